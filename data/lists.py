"""The lists that data sets are published with: WebVid-10M, Panda-70M and Kinetics-400 csv files, UCF101 text files.

A list is data: its names are looked up among the files below the root, its times are matched against a pattern.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

from data.cut import parse_time
from data.layouts import Found, files_below, replaced

_TIME_TEXT = r"\s*['\"]([0-9:.]+)['\"]\s*"
_PAIR = re.compile(rf"\[{_TIME_TEXT},{_TIME_TEXT}\]")
_PAIRS = re.compile(rf"\s*\[\s*{_PAIR.pattern}(?:\s*,\s*{_PAIR.pattern})*\s*\]\s*")
_LONGEST_FIELD = 16 << 20  # characters: the captions of an hour of clips are in one field


def _rows(path: Path, *needed: str) -> Iterator[tuple]:
    """Yield (line, values of the needed columns) of a csv with a header.

    Raises ValueError for what is missing or broken.
    """
    if not path.is_file():
        raise ValueError(f"list_file={path}: no such file")
    before = csv.field_size_limit(_LONGEST_FIELD)  # of the whole process
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file)
        try:
            # The first line names the columns.
            head = next(reader, [])
            absent = [name for name in needed if name not in head]
            if absent:
                raise ValueError(
                    f"{path}: no column {', '.join(absent)} (it has {', '.join(head)}); use the csv as published"
                )
            places = list(map(head.index, needed))
            for row in reader:
                if not row:
                    continue
                if len(row) <= max(places):
                    raise ValueError(f"{path}, line {reader.line_num}: too few columns")
                yield reader.line_num, *map(row.__getitem__, places)
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not a csv row ({error})") from error
        finally:
            csv.field_size_limit(before)


def _inside(path: Path, line: int, name: str) -> str:
    """Check a name that a list has and the disk has not. Raises ValueError if it leads out of the root."""
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or name.startswith("/") or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"{path}, line {line}: {name!r} is not a name below the root; do not use lists of unknown origin"
        )
    return name


def find_webvid(root: Path, list_file: Path) -> Found:
    """Find what rows (videoid, page_dir) name: `<page_dir>/<videoid>.mp4` or `<videoid>.mp4`, below `videos/` or not."""
    base = root / "videos" if (root / "videos").is_dir() else root
    there = set(files_below(base))
    wanted: dict[str, str] = {}
    missing = []
    for line, video, page in _rows(list_file, "videoid", "page_dir"):
        flat = f"{video}.mp4"
        nested = f"{page}/{flat}" if page else flat
        if nested in there:
            wanted[nested] = ""
        elif flat in there:
            wanted[flat] = ""
        else:
            _inside(list_file, line, video)
            missing.append(_inside(list_file, line, nested))
    return Found(str(base), list(wanted), missing=missing)


def parse_pairs(text: str) -> list[tuple[int, int]]:
    """Parse "[['0:00:10.060', '0:00:13.560'], ...]" into begins and ends in ms. Raises ValueError for anything else."""
    if not _PAIRS.fullmatch(text):
        raise ValueError(f"timestamp {text[:60]!r}: need [['H:MM:SS.mmm', 'H:MM:SS.mmm'], ...]")
    pairs = [(parse_time(begin), parse_time(end)) for begin, end in _PAIR.findall(text)]
    for begin, end in pairs:
        if begin >= end:
            raise ValueError(f"timestamp {text[:60]!r}: a clip must end after it begins")
    return pairs


def find_panda70m_list(root: Path, list_file: Path) -> Found:
    """Find what rows (videoID, timestamp) name: one clip for each pair of times, cut out of `<videoID>.mp4` at any depth."""
    # Where two files have one name, the first in ASCII order counts.
    by_id = {Path(name).stem: name for name in reversed(files_below(root))}
    found = Found(str(root), [])
    for line, video, times in _rows(list_file, "videoID", "timestamp"):
        try:
            pairs = parse_pairs(times)
        except ValueError as error:
            raise ValueError(f"{list_file}, line {line}: {error}") from error
        if video not in by_id:
            found.missing.append(_inside(list_file, line, video))
            continue
        found.names += [by_id[video]] * len(pairs)
        found.groups += [video] * len(pairs)
        found.cuts += pairs
    return found


def find_kinetics400_list(root: Path, split: str, list_file: Path) -> Found:
    """Find what rows (label, youtube_id, time_start, time_end) name: `<id>_000012_000022.mp4` in any folder of the split."""
    # The files by name, without those that replace others.
    base = root / split if (root / split).is_dir() else root
    names = [name for name in files_below(base) if not name.startswith("replacement")]
    by_stem = {Path(name).stem: name for name in reversed(names)}
    # The rows; classes count even where none of their videos is on disk, so that ids do not depend on it.
    wanted: dict[str, str] = {}
    missing, class_names = [], set()
    for line, label, video, begin, end in _rows(list_file, "label", "youtube_id", "time_start", "time_end"):
        try:
            stem = f"{video}_{int(begin):06d}_{int(end):06d}"
        except ValueError as error:
            raise ValueError(f"{list_file}, line {line}: times are whole seconds ({error})") from error
        class_names.add(label)
        if stem in by_stem:
            wanted[by_stem[stem]] = label
        else:
            _inside(list_file, line, video)
            missing.append(stem)
    ordered = sorted(class_names)
    ids = {name: n for n, name in enumerate(ordered)}
    labels = [ids[label] for label in wanted.values()]
    found = Found(str(base), list(wanted), labels=labels, class_names=ordered, missing=missing)
    return replaced(found, root)


def listed_ucf101(found: Found, list_file: Path) -> Found:
    """Choose the videos that a ucfTrainTestlist file names; names match whatever their case and suffix.

    Labels in it are not used. Entries without a file go to `missing`; ValueError when that is all.
    """
    if not list_file.is_file():
        raise ValueError(f"list_file={list_file}: no such file")
    numbers = {_without_suffix(name): n for n, name in enumerate(found.names)}
    text = list_file.read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = [line.split()[0] for line in re.split(r"\r\n?|\n", text) if line.strip()]
    # Each line is a video on the disk, which counts once, or missing.
    wanted, missing = {}, []
    for line in lines:
        number = numbers.get(_without_suffix(line))
        if number is None:
            missing.append(line)
        else:
            wanted[number] = None
    if len(missing) == len(lines):
        raise ValueError(
            f"{list_file}: {len(missing)} of {len(lines)} videos are not on disk, e.g. {(missing or ['none'])[0]}; "
            "is root the folder that holds the class folders?"
        )
    chosen = found.choose(wanted)
    chosen.missing = missing
    return chosen


def _without_suffix(name: str) -> str:
    return os.path.splitext(name.lower())[0]
