"""The data sets by name: where their videos lie, which class each has, which are held out, which are damaged."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.demo import DemoVideos
from data.files import write_atomic
from data.scan import ScanRecord, build_index
from data.video import list_videos, read_frames

logger = logging.getLogger(__name__)

SOURCES = ("ucf101", "sky_timelapse", "folder", "demo")


@dataclass(frozen=True)
class Video:
    """One usable video: name (path below the root), scan record, label (-1 when unconditional)."""

    name: str
    record: ScanRecord
    label: int = -1


@dataclass
class Source:
    """The videos of one data set after the scan. class_names is [] when unconditional."""

    name: str
    root: str
    videos: list[Video]
    class_names: list[str] = field(default_factory=list)
    damaged: list[ScanRecord] = field(default_factory=list)
    demo: DemoVideos | None = None

    def read(self, video: Video, indices: Sequence[int], size: int) -> np.ndarray:
        """Frames of a video: uint8 (len(indices), H, W, 3). The demo draws them at `size`, files keep their own."""
        if self.demo is not None:
            return self.demo.frames(int(video.name), indices, size)
        return read_frames(video.record.path, indices)


@dataclass(frozen=True)
class _Found:
    """A video before the scan. Videos of one group stay on one side of a held-out split."""

    path: Path
    name: str
    group: str
    label: int = -1


def open_source(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    list_file: str | Path | None = None,
    labels: str = "none",
    index_dir: str | Path | None = None,
    workers: int = 2,
    val_fraction: float = 0.0,
    held_out: bool = False,
    seed: int = 0,
    num_videos: int = 256,
    num_classes: int = 4,
    size: int = 64,
    num_frames: int = 64,
) -> Source:
    """Open a data set: find its videos, scan those not scanned before, leave the damaged out.

    name: "ucf101", "sky_timelapse", "folder" (any tree of videos) or "demo" (no files at all).
    split: "train" or "test", the folder of sky_timelapse. list_file: for ucf101, lines `Class/v_x.avi [label]`.
    labels: for folder, "none" or "folder" (class = first folder below the root).
    index_dir: where scans are kept and `<name>-quarantine.tsv` is written; not below root. None: no file is written.
    val_fraction, held_out: which share of the videos (ucf101: groups gNN of a class) is held out, and whether to
    open that part or the rest. The choice depends on names only. Held out of sky_timelapse is sky_test; of demo,
    another seed. seed, num_videos, num_classes, size, num_frames: the demo's.
    Raises ValueError if the name or a folder is unknown, or no video is left.
    """
    if name not in SOURCES:
        raise ValueError(f"source {name!r}: choose one of {', '.join(SOURCES)}")
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: choose train or test")
    if name == "demo":
        return _demo(num_videos, num_classes, size, num_frames, 2 * seed + held_out)
    if not root or not Path(root).is_dir():
        raise ValueError(
            f"{name}: root={str(root or '')!r} is no folder; see docs/datasets.md for the layout"
        )
    root = Path(root).absolute()
    if index_dir is not None and Path(index_dir).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"index_dir={index_dir}: lies inside the data; choose a folder outside {root}")
    if list_file and name != "ucf101":
        raise ValueError(f"list_file={list_file}: only ucf101 has list files; leave it empty for {name}")
    if name == "ucf101":
        found, class_names = _find_ucf101(root, list_file)
    elif name == "sky_timelapse":
        found, class_names = _find_sky(root, "test" if held_out else split), []
    else:
        found, class_names = _find_folder(root, labels)
    if not found:
        raise ValueError(f"{name}: no videos in {root}; see docs/datasets.md for the layout")
    if name != "sky_timelapse":
        found = _hold_out(found, val_fraction, held_out)
    return _scanned(name, root, found, class_names, index_dir, workers)


def _demo(num_videos: int, num_classes: int, size: int, num_frames: int, seed: int) -> Source:
    demo = DemoVideos(num_videos, num_classes, size, num_frames, seed)
    videos = [
        Video(str(n), ScanRecord(f"demo:{seed}:{n}", num_frames, size, size, 8.0), demo.label(n))
        for n in range(num_videos)
    ]
    return Source("demo", "", videos, demo.class_names, demo=demo)


def _find_ucf101(root: Path, list_file: str | Path | None) -> tuple[list[_Found], list[str]]:
    """Class = directory, ids in ASCII order of the directories, as in Latte's released UCF101 model.

    Not the order of classInd.txt (Hammering/HammerThrow and JumpingJack/JumpRope change places), and not the file
    name (v_HandStandPushups_* lies in HandstandPushups/).
    """
    base = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    files = {
        folder.name: sorted(path for path in folder.iterdir() if path.suffix.lower() == ".avi")
        for folder in base.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
    }
    # A class may be empty, ucfTrainTestlist/ is none.
    class_names = sorted(name for name, videos in files.items() if videos or not any((base / name).iterdir()))
    if class_names and len(class_names) != 101:
        logger.warning(
            "%s: %d classes, UCF101 has 101; class ids follow these folders", base, len(class_names)
        )
    found = []
    for label, class_name in enumerate(class_names):
        for path in files[class_name]:
            group = re.search(r"_(g[0-9]+)_", path.name)
            name = f"{class_name}/{path.name}"
            found.append(_Found(path, name, f"{class_name}/{group.group(1) if group else path.name}", label))
    if list_file:
        found = _listed(found, Path(list_file))
    return found, class_names


def _listed(found: list[_Found], list_file: Path) -> list[_Found]:
    """The videos a ucfTrainTestlist file names. Labels in it are not used; letters' case in a name is no matter."""
    if not list_file.is_file():
        raise ValueError(f"list_file={list_file}: no such file")
    by_name = {video.name.lower(): video for video in found}
    lines = [line.split()[0] for line in list_file.read_text().splitlines() if line.strip()]
    missing = [line for line in lines if line.lower() not in by_name]
    if missing:
        raise ValueError(
            f"{list_file}: {len(missing)} of {len(lines)} videos are not on disk, e.g. {missing[0]}; "
            "is root the folder that holds the class folders?"
        )
    return list({line.lower(): by_name[line.lower()] for line in lines}.values())


def _find_sky(root: Path, split: str) -> list[_Found]:
    for folder in (root / f"sky_{split}", root / "sky_timelapse" / f"sky_{split}"):
        if folder.is_dir():
            names = [(path, path.relative_to(folder).as_posix()) for path in list_videos(folder)]
            return [_Found(path, name, name) for path, name in names]
    raise ValueError(f"sky_timelapse: no sky_{split}/ in {root}; see docs/datasets.md for the layout")


def _find_folder(root: Path, labels: str) -> tuple[list[_Found], list[str]]:
    if labels not in ("none", "folder"):
        raise ValueError(f"labels={labels!r}: choose none or folder")
    names = [(path, path.relative_to(root).as_posix()) for path in list_videos(root)]
    if labels == "none":
        return [_Found(path, name, name) for path, name in names], []
    bare = [name for _, name in names if "/" not in name]
    if bare:
        raise ValueError(
            f"labels=folder: {bare[0]} lies in no class folder of {root}; use labels=none or move it"
        )
    class_names = sorted({name.split("/")[0] for _, name in names})
    label = {class_name: n for n, class_name in enumerate(class_names)}
    return [_Found(path, name, name, label[name.split("/")[0]]) for path, name in names], class_names


def _hold_out(found: list[_Found], val_fraction: float, held_out: bool) -> list[_Found]:
    """The held-out part or the rest: whole groups, at least one on each side, chosen by a hash of their names."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: must lie in [0, 1)")
    if val_fraction == 0:
        if held_out:
            raise ValueError("val_fraction=0: no videos are held out; use e.g. val_fraction=0.05")
        return found
    groups = sorted(
        {video.group for video in found}, key=lambda group: hashlib.sha256(group.encode()).digest()
    )
    if len(groups) < 2:
        raise ValueError(
            f"val_fraction={val_fraction}: {len(groups)} group of videos cannot be split; use val_fraction=0"
        )
    count = min(max(1, round(val_fraction * len(groups))), len(groups) - 1)
    chosen = set(groups[:count])
    return [video for video in found if (video.group in chosen) == held_out]


def _scanned(name, root: Path, found: list[_Found], class_names, index_dir, workers: int) -> Source:
    cache_file = Path(index_dir, f"{name}-index.json") if index_dir is not None else None
    index = build_index([video.path for video in found], cache_file, workers)
    quarantine = Path(index_dir, f"{name}-quarantine.tsv") if index_dir is not None else None
    for record in index.damaged:
        logger.warning("damaged, left out: %s: %s", record.path, record.damaged)
    if quarantine:
        _write_quarantine(quarantine, {str(video.path) for video in found}, index.damaged)
    if not index.good:
        raise ValueError(
            f"{name}: all videos of {root} are damaged ({len(found)} found, {len(index.damaged)} damaged); "
            f"the first: {Path(index.damaged[0].path).name}: {index.damaged[0].damaged}"
        )
    logger.info("%s: %d videos found, %d damaged", name, len(found), len(index.damaged))
    good = {record.path: record for record in index.good}
    videos = [
        Video(video.name, good[str(video.path)], video.label) for video in found if str(video.path) in good
    ]
    return Source(name, str(root), videos, class_names, index.damaged)


def _write_quarantine(path: Path, scanned: set[str], damaged: list[ScanRecord]) -> None:
    """path, tab, reason; rows of videos that this scan did not look at (another split) stay."""
    rows = dict(line.split("\t", 1) for line in path.read_text().splitlines()[1:]) if path.exists() else {}
    rows = {name: reason for name, reason in rows.items() if name not in scanned}
    rows.update({record.path: " ".join(record.damaged.split()) for record in damaged})
    write_atomic(
        path, "\n".join(["path\treason", *(f"{name}\t{rows[name]}" for name in sorted(rows))]) + "\n"
    )
