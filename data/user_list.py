"""A list of one's own: csv, tsv or jsonl with a row a video, and the metadata.csv of Hugging Face's videofolder.

Columns: path (or file_name); if there are any: label, start_s, end_s, split. Others are not read. Unlike a published list
it may name any file of this machine: an absolute path, or one below the folder of the list (or below `root`).
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.core.files import printable
from data.cut import TO_THE_END
from data.layouts import Found

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl")
_PATH, _OPTIONAL = ("path", "file_name"), ("label", "start_s", "end_s", "split")
_SPLITS = {"": "train", "valid": "val", "validation": "val", "dev": "val"}
_SPLITS |= {"train": "train", "val": "val", "test": "test"}


def find_lists(root: Path | None, list_file: Path | None) -> list[tuple[Path, str]]:
    """Find [(list, split that its folder names or "")]: the list, or metadata.* of the root and of train/, validation/, test/."""
    if list_file is not None:
        if not list_file.is_file():
            raise ValueError(f"list_file={list_file}: no such file")
        return [(list_file, "")]
    found = []
    for name in _SPLITS if root else ():
        for suffix in SUFFIXES:
            file = root / name / f"metadata{suffix}"
            if file.is_file():
                found.append((file, _SPLITS[name] if name else ""))
    if not found:
        raise ValueError(
            "csv: give the list, source.list_file=FILE.csv (.tsv, .jsonl; columns path and, if you have them, label, start_s, "
            f"end_s, split), or a source.root with metadata.csv in it; root={str(root or '')!r} has none"
        )
    return found


def find_csv(root: Path | None, list_file: Path | None, split: str, held_out: bool) -> Found:
    """Find the videos of one split, or those held out: the rows of split val if the list has any (`parted` then says so).

    split: train, val, test; all: every row, and nothing is parted.
    Class ids are those of the whole list: labels in ASCII order, or by value if all are whole numbers. Missing files
    are in `missing`, repeated rows are named and read once. Raises ValueError, with the line, for a row that cannot be read.
    """
    # (path, begin, end) -> (label, split, where it stands); written: the paths as the list has them.
    rows: dict[tuple[str, int, int], tuple[str, str, str]] = {}
    repeated, missing, written = [], [], {}
    files = find_lists(root, list_file)
    for file, of_folder in files:
        base = root if root and list_file else file.parent
        for line, row in _rows(file):
            where = f"{file}, line {line}"
            name = row["path"]
            key = (_absolute(base, name, where), *_cut(row, where))
            value = (row["label"], of_folder or _split(row["split"], where))
            written.setdefault(key[0], f"{of_folder}/{name}")
            # A clip that is there twice must say the same twice.
            if key not in rows:
                rows[key] = (*value, where)
                if not os.path.exists(key[0]):
                    missing.append(name)
            elif rows[key][:2] == value:
                repeated.append(printable(name))
            else:
                raise ValueError(
                    f"{where}: {name} is also {rows[key][2]}, with another label or split; keep one of them"
                )
    if repeated:
        first = ", ".join(list(dict.fromkeys(repeated))[:3])
        logger.warning(
            "csv: %d rows of the list are there twice and count once, e.g. %s", len(repeated), first
        )
    return _of_split(
        rows, str(os.path.realpath(root or files[0][0].parent)), missing, split, held_out, written
    )


def _of_split(
    rows: dict, base: str, missing: list[str], split: str, held_out: bool, written: dict[str, str]
) -> Found:
    """Choose the rows of the split that is wanted and whose files are on disk; classes are those of all rows."""
    class_names = _class_names(rows)
    ids = {name: n for n, name in enumerate(class_names)}
    # Which split is wanted.
    counts = Counter(s for _, s, _ in rows.values())
    parted = "val" in counts and split != "all"
    wanted = "val" if held_out and parted else split
    if rows and wanted != "all" and not counts[wanted]:
        raise ValueError(f"source.split={wanted}: the list has {dict(counts)}; choose one of these, or all")
    # Its rows, and those of them that are there.
    chosen = [key for key, row in rows.items() if wanted in (row[1], "all")]
    there = [key for key in chosen if os.path.exists(key[0])]
    if chosen and not there:
        raise ValueError(
            f"csv: none of the {len(chosen)} videos of the list is on disk, the first is {printable(chosen[0][0])}; paths are "
            "absolute, or below the list's own folder, or below source.root=DIR"
        )
    # The folder that holds all files of the list, of whatever split: names below it do not depend on the choice.
    if not all(path.startswith(base + "/") for path, *_ in rows):
        base = os.path.commonpath([base, *(os.path.dirname(path) for path, *_ in rows)])
    found = Found(base, [], class_names=class_names, missing=missing, parted=parted)
    for path, begin, end in there:
        found.names.append(os.path.relpath(path, base))
        found.groups.append(written[path])  # as the list has it: rows of other folders change no name
        found.cuts.append((begin, end))
        if class_names:
            found.labels.append(ids[rows[path, begin, end][0]])
    if set(found.cuts) <= {(0, TO_THE_END)}:
        found.cuts = []
    return found


def _class_names(rows: dict) -> list[str]:
    """Order the labels of all rows: by value if all are whole numbers, else in ASCII order; [] if no row has one."""
    names = {label for label, *_ in rows.values()}
    if names <= {""}:
        return []
    for label, _, where in rows.values():
        if not label:
            raise ValueError(f"{where}: no label, but other rows have one; label all rows or none")
    if all(map(str.isdecimal, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, {path, label, start_s, end_s, split}) with "" for what a row has not."""
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        try:
            rows = _json_rows(lines, file) if file.suffix == ".jsonl" else _csv_rows(lines, file)
            named = ""
            for line, row in rows:
                # Which column holds the path: the first row decides.
                named = named or next((name for name in _PATH if name in row), "")
                if not named:
                    raise ValueError(
                        f"{file}: no column path or file_name (it has {', '.join(map(str, row))}); the first line names the columns"
                    )
                yield line, {name: row.get(name) or "" for name in _OPTIONAL} | {"path": row.get(named) or ""}
        except csv.Error as error:
            raise ValueError(f"{file}: not a csv ({error})") from error


def _csv_rows(lines: Iterator[str], file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # The mark between columns: the one that the head has most of.
    head = next(lines, "")
    mark = "\t" if file.suffix == ".tsv" else max(",;\t", key=head.count)
    names = next(csv.reader([head], delimiter=mark), [])
    reader = csv.DictReader(lines, [name.strip() for name in names], delimiter=mark)
    for row in reader:
        yield reader.line_num + 1, {key: text.strip() for key, text in row.items() if isinstance(text, str)}


def _json_rows(lines: Iterator[str], file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'{file}, line {number}: need one JSON object a line, {{"path": "a.mp4"}} ({error})'
            ) from error
        yield number, {key: str(value) for key, value in row.items() if isinstance(value, str | int | float)}


def _absolute(base: Path, name: str, where: str) -> str:
    """Make a row's path absolute, without following a link in its last part."""
    try:
        path = os.path.abspath(os.path.join(os.path.realpath(base), os.path.expanduser(name)))
        os.fsencode(path)
        if not name or "\0" in name:
            raise ValueError("empty" if not name else "a zero byte in it")
    except ValueError as error:
        raise ValueError(f"{where}: path {name!r} is not a file's name ({error})") from error
    return path


def _cut(row: dict[str, str], where: str) -> tuple[int, int]:
    """Read begin and end of a row's clip in ms."""
    times = []
    for name, empty in (("start_s", 0), ("end_s", TO_THE_END)):
        try:
            seconds = float(row[name]) if row[name] else None
        except ValueError:
            seconds = math.nan
        if seconds is not None and not 0 <= seconds < 1e9:
            raise ValueError(f"{where}: {name}={row[name]!r}: write seconds from the first frame, e.g. 12.5")
        times.append(empty if seconds is None else round(seconds * 1000))
    if times[1] != TO_THE_END and times[0] >= times[1]:
        raise ValueError(
            f"{where}: start_s={row['start_s']!r}, end_s={row['end_s']!r}: a clip must end after it begins"
        )
    return times[0], times[1]


def _split(name: str, where: str) -> str:
    if name.lower() not in _SPLITS:
        raise ValueError(f"{where}: split {name!r}: write train, val or test")
    return _SPLITS[name.lower()]
