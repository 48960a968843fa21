"""The data sets by name: their usable videos after the scan, which are held out, which are damaged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data import layouts, lists, user_list
from data.core.files import escaped, printable, unescaped, write_atomic
from data.core.registry import sources
from data.cut import TO_THE_END, cut_frames
from data.demo import EDGE, DemoVideos
from data.finding import VIDEO_SUFFIXES
from data.index import Scans, decord_agrees, scan_paths
from data.layouts import Found
from data.scan import ScanRecord
from data.table import WHOLE, Video, VideoTable
from data.timeline import cut_between
from data.video import Frames

logger = logging.getLogger(__name__)

SOURCES = ("ucf101", "sky_timelapse", "kinetics400", "webvid", "panda70m", "folder", "csv", "demo")
_SPLITS = {"kinetics400": ("train", "val", "test"), "csv": ("train", "val", "test", "all")}
_LISTS = ("ucf101", "kinetics400", "webvid", "panda70m", "csv")


@dataclass
class Source:
    """The videos of one data set after the scan. class_names is [] when unconditional."""

    name: str
    root: str
    videos: Sequence[Video]
    class_names: list[str] = field(default_factory=list)
    damaged: list[ScanRecord] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of a list, as it names them
    demo: DemoVideos | None = None


def video_frames(
    video: Video, indices: Sequence[int], size: int, demo: DemoVideos | None = None
) -> Frames | np.ndarray:
    """Return frames of a video, decoded when they are wanted, (len(indices), H, W, 3); the demo's are drawn at `size` instead."""
    if demo is not None:
        return demo.frames(int(video.name), indices, size)
    record = video.record
    if video.tick is not None:
        return cut_frames(record.path, video.first, video.tick, indices, record.times, record.decord)
    return Frames(record.path, indices, record.times or None, record.decord)


def open_source(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    list_file: str | Path | None = None,
    labels: str = "none",
    index_dir: str | Path | None = None,
    workers: int = 2,
    reader: str = "pyav",
    val_fraction: float = 0.0,
    held_out: bool = False,
    seed: int = 0,
    num_videos: int = 256,
    num_classes: int = 4,
    size: int = 64,
    num_frames: int = 64,
    edge: float = EDGE,
) -> Source:
    """Open a data set: find its videos, scan those not scanned before, leave the damaged out.

    name: one of SOURCES, or one added to data.core.registry.sources; "folder" is any tree of videos, "csv" a list of one's
    own, "demo" needs no files.
    split: "train" or "test" (kinetics400, csv: also "val"; csv: "all"), a folder of sky_timelapse and kinetics400.
    list_file: the list as published: webvid needs its csv, panda70m cuts clips by its csv, kinetics400 takes labels
    from its csv, ucf101 has lines `Class/v_x.avi [label]`, csv is data/user_list.py's. Entries without a file are skipped
    and reported.
    labels: for folder, "none" or "folder" (class = first folder below the root).
    index_dir: where scans, `<name>-quarantine.tsv` and `<name>-missing.txt` are kept; not below root. None: no file
    is written.
    reader: "pyav", or "decord" for files on which the scan finds that it shows the same frames, PyAV for the others.
    val_fraction, held_out: which share of the videos (ucf101: groups gNN of a class; panda70m: source videos) is held
    out, and whether to open that part or the rest. The choice depends on names only, but for a part without an undamaged
    video. Held out of sky_timelapse is sky_test; of a csv with rows of split val, these; of demo, another seed.
    seed, num_videos, num_classes, size, num_frames, edge: the demo's.
    Names in the lists are escaped (`data.core.files.escaped`). Raises ValueError if the name or a folder is unknown, or no
    video is left.
    """
    # Wrong words are refused before anything is looked for.
    if name not in SOURCES and sources.find(name) is None:
        raise ValueError(f"source {name!r}: choose one of {', '.join([*SOURCES, *sources])}")
    if reader not in ("pyav", "decord"):
        raise ValueError(f"reader={reader!r}: choose pyav or decord")
    splits = _SPLITS.get(name, ("train", "test"))
    if split not in splits:
        raise ValueError(f"split={split!r}: choose {', '.join(splits[:-1])} or {splits[-1]}")
    # The demo has no files; of the others the folder, the list and the place of the index must fit together.
    if name == "demo":
        return _demo(DemoVideos(num_videos, num_classes, size, num_frames, 2 * seed + held_out, edge))
    root = _folder_of(name, root, index_dir)
    if list_file and name not in _LISTS:
        raise ValueError(
            f"list_file={list_file}: {', '.join(_LISTS)} have list files; leave it empty for {name}"
        )
    # Find the videos, each data set in its own layout; a list names what is missing on disk.
    found = _find(name, root, split, Path(list_file) if list_file else None, labels, held_out)
    _tell_missing(name, found, index_dir)
    if not found:
        suffixes = " ".join(VIDEO_SUFFIXES)
        raise ValueError(
            f"{name}: no videos in {root or list_file} (files {suffixes}, or folders of frames); see docs/datasets.md for the layout"
        )
    # Scan them, and hold out a share unless the data set says itself what is held out.
    share = None if found.parted else (val_fraction, held_out)
    return _scanned(name, root or Path(found.base), found, share, index_dir, workers, reader)


def _folder_of(name: str, root: str | Path | None, index_dir: str | Path | None) -> Path | None:
    """Check the folder of the videos, which a list of one's own may do without; no file of ours may be kept in it."""
    if not root:
        if name == "csv":
            return None
        raise ValueError(
            f"{name}: root='' is not a folder; give that of the videos: --data DIR or source.root=DIR"
        )
    root = Path(root)
    if not root.is_dir():
        is_list = str(root).endswith(user_list.SUFFIXES)
        hint = f"; for a list say source.name=csv source.list_file={root}" if is_list else ""
        raise ValueError(
            f"{name}: root={str(root)!r} is not a folder; see docs/datasets.md for the layout{hint}"
        )
    root = root.absolute()
    if index_dir is not None and Path(index_dir).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"index_dir={index_dir}: lies inside the data; choose a folder outside {root}")
    return root


def _demo(demo: DemoVideos) -> Source:
    """Make the demo's source: videos without files, all of one size, length and rate."""
    same = {"width": demo.size, "height": demo.size, "num_frames": demo.num_frames, "fps": 8.0}
    columns = {key: np.full(len(demo), value) for key, value in same.items()}
    columns["label"] = np.array(list(map(demo.label, range(len(demo)))))
    videos = VideoTable(f"demo:{demo.seed}", list(map(str, range(len(demo)))), columns)
    return Source("demo", "", videos, demo.class_names, demo=demo)


def _find(
    name: str, root: Path | None, split: str, list_file: Path | None, labels: str, held_out: bool
) -> Found:
    """Find the videos of a data set before the scan, in its own layout or by its list."""
    if name == "csv":
        return user_list.find_csv(root, list_file, split, held_out)
    if name == "sky_timelapse":
        return layouts.find_sky(root, "test" if held_out else split)
    if name == "ucf101":
        found = layouts.find_ucf101(root, split)
        return lists.listed_ucf101(found, list_file) if list_file else found
    if name == "kinetics400":
        if list_file:
            return lists.find_kinetics400_list(root, split, list_file)
        return layouts.find_kinetics400(root, split)
    if name == "panda70m":
        return lists.find_panda70m_list(root, list_file) if list_file else layouts.find_panda70m(root)
    if name == "webvid":
        if list_file is None:
            raise ValueError(
                "webvid: give its csv, list_file=.../results_10M_val.csv; without one use source folder"
            )
        return lists.find_webvid(root, list_file)
    if name in sources:  # of a plugin
        return sources[name](root, split)
    return layouts.find_folder(root, labels)


def _tell_missing(name: str, found: Found, index_dir: str | Path | None) -> None:
    """Report the videos of a list that are not on disk, and write all of them to `<name>-missing.txt`."""
    if index_dir is not None and name in _LISTS:
        lines = "".join(f"{escaped(missing)}\n" for missing in found.missing)
        write_atomic(Path(index_dir, f"{name}-missing.txt"), lines)
    if found.missing:
        where = f"; all: {Path(index_dir, f'{name}-missing.txt')}" if index_dir is not None else ""
        first = ", ".join(found.missing[:3])
        logger.warning(
            "%s: %d videos of the list are not on disk, e.g. %s%s", name, len(found.missing), first, where
        )


def _hold_out(found: Found, val_fraction: float, held_out: bool, damaged: set[str]) -> Found:
    """Choose the held-out part or the rest: whole groups, at least one on each side, chosen by a hash of their names.

    As many groups more as it takes to hold out one video that is not damaged.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must lie in [0, 1)")
    if val_fraction == 0:
        if held_out:
            raise ValueError("val_fraction=0: no videos are held out; use e.g. val_fraction=0.05")
        return found
    # Groups in the order of their hashes: adding videos does not move the others.
    of_video = found.groups or found.names
    groups = sorted(set(of_video), key=lambda g: hashlib.sha256(g.encode(errors="surrogateescape")).digest())
    if len(groups) < 2:
        raise ValueError(
            f"val_fraction={val_fraction}: {len(groups)} group of videos cannot be split; use val_fraction=0"
        )
    # The first of them are held out, until one has a video that is not damaged.
    count = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    good = {group for name, group in zip(found.names, of_video, strict=True) if name not in damaged}
    while not good & set(groups[:count]) and count < len(groups) - 1:
        count += 1
    chosen = set(groups[:count])
    return found.choose(n for n, group in enumerate(of_video) if (group in chosen) == held_out)


def _scanned(
    name: str,
    root: Path,
    found: Found,
    share: tuple[float, bool] | None,
    index_dir: str | Path | None,
    workers: int,
    reader: str,
) -> Source:
    """Scan the videos found, choose the part that is wanted, and leave the damaged out.

    share: (val_fraction, held_out), unless the data set says itself what is held out.
    """
    # Scan each file once, also one of which a list cuts several clips; note the damaged ones.
    files = {file: n for n, file in enumerate(dict.fromkeys(found.names))}
    paths = [f"{found.base}/{file}" for file in files]
    cache_file = Path(index_dir, f"{name}-index.sqlite") if index_dir is not None else None
    scans = scan_paths(paths, cache_file, workers)
    bad = {n: ScanRecord(paths[n], damaged=reason) for n, reason in scans.damaged.items()}
    if index_dir is not None:
        _write_quarantine(Path(index_dir, f"{name}-quarantine.tsv"), set(paths), list(bad.values()))
    # Choose the part, training or held out, by names; what is damaged counts as absent.
    if share is not None:
        found = _hold_out(found, *share, {file for file, n in files.items() if n in bad})
    # Which file each video of the part is; report the damaged ones of these.
    file_of = np.fromiter(map(files.get, found.names), np.int64, len(found))
    opened = set(file_of.tolist())
    damaged = [record for n, record in bad.items() if n in opened]
    for record in damaged:
        logger.warning("damaged, left out: %s: %s", printable(str(record.path)), record.damaged)
    if len(damaged) == len(opened):
        raise ValueError(
            f"{name}: all videos of {root} are damaged ({len(opened)} found, {len(damaged)} damaged); "
            f"the first: {Path(damaged[0].path).name}: {damaged[0].damaged}"
        )
    logger.info("%s: %d videos found, %d damaged", name, len(opened), len(damaged))
    # One row a video: numbers of its file, its reader, class and cut.
    columns = {key: getattr(scans, key)[file_of] for key in ("num_frames", "width", "height", "fps")}
    columns["file"] = file_of.astype(np.int32)
    if reader == "decord":
        columns["decord"] = decord_agrees(paths, scans, cache_file, workers)[file_of]
    good = ~np.isin(file_of, list(scans.damaged))
    if found.labels:
        columns["label"] = np.array(found.labels, np.int32)
    if found.cuts:
        good &= _cut(name, found, scans, file_of, columns)
    videos = VideoTable(found.base, found.names, columns, scans.times)
    return Source(name, str(root), videos.select(good), found.class_names, damaged, found.missing)


def _cut(
    name: str, found: Found, scans: Scans, file_of: np.ndarray, columns: dict[str, np.ndarray]
) -> np.ndarray:
    """Put first frame, number of frames and rate of each clip into the columns; return which clips have any."""
    # (first, stop, tick, rate) of each clip in its video, by the scan's time stamps.
    spans = []
    for n, cut in zip(file_of, found.cuts, strict=True):
        times, rate = scans.times[n], float(scans.fps[n])
        if cut == (0, TO_THE_END):
            spans.append((0, scans.num_frames[n], WHOLE, rate))
        else:
            spans.append(cut_between(times, *cut, rate) if times else (0, 0, 0, rate))
    *frames, rates = zip(*spans, strict=True)
    first, stop, tick = np.array(frames, np.int64)
    columns |= {"first": first, "tick": tick, "num_frames": stop - first, "cut": np.array(found.cuts)}
    columns["fps"] = np.array(rates)
    # Report what cannot be cut, and clips that lie beyond the end of their video.
    timeless = sum(not scans.times[n] and n not in scans.damaged for n in set(file_of.tolist()))
    if timeless:
        logger.warning("%s: %d videos have no rising time stamps and cannot be cut by time", name, timeless)
    empty = int(((stop == first) & ~np.isin(file_of, list(scans.damaged))).sum())
    if empty:
        logger.warning("%s: %d clips of the list hold no frame of their video and are left out", name, empty)
    return stop > first


def _write_quarantine(path: Path, scanned: set[str], damaged: list[ScanRecord]) -> None:
    """Write escaped path, tab, reason; rows of videos that this scan did not look at (another split) stay."""
    rows: dict[str, str] = {}
    if path.is_file():
        for line in path.read_bytes().decode(errors="surrogateescape").split("\n")[1:]:
            name, tab, reason = line.rpartition("\t")
            if tab and unescaped(name) not in scanned:
                rows[unescaped(name)] = reason
    for record in damaged:
        rows[record.path] = " ".join(record.damaged.split())
    lines = [f"{escaped(name)}\t{rows[name]}" for name in sorted(rows)]
    write_atomic(path, "\n".join(["path\treason", *lines]) + "\n")
