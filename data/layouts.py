"""Where the videos of each data set lie below its folder, which class each has, and which belong together."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.finding import VIDEO_SUFFIXES, folder_entries, video_names, walk

logger = logging.getLogger(__name__)


@dataclass
class Found:
    """Videos before the scan, as parallel lists: a million must stay light.

    base: folder. names: paths below it. groups: videos of one group stay on one side of a held-out split; [] when each
    is its own. labels: [] when unconditional. cuts: begin and end in ms, for lists that cut clips out of longer videos.
    missing: videos of a list that are not on disk, as the list writes them. parted: the data set itself says which videos
    are held out, and these are those asked for.
    """

    base: str
    names: list[str]
    groups: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    cuts: list[tuple[int, int]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    parted: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def choose(self, numbers: Iterable[int]) -> Found:
        """Choose the videos with these numbers; classes and missing ones stay."""
        numbers, part = list(numbers), copy.copy(self)
        for name in ("names", "groups", "labels", "cuts"):
            column = getattr(self, name)
            setattr(part, name, [column[n] for n in numbers] if column else [])
        return part


def files_below(root: Path) -> list[str]:
    """List video files below a folder at any depth, as paths below it, in ASCII order. Folders of frames do not count."""
    found = []
    for below, files in walk(root):
        found += [below + name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]
    return sorted(found)


def find_ucf101(root: Path, split: str = "train") -> Found:
    """Find videos in class folders, of UCF-101/ or of train/ and test/ (as some sites publish it) or of the root itself.

    Class = directory, ids in ASCII order of the directories, as in Latte's released UCF101 model.

    Not the order of classInd.txt (Hammering/HammerThrow and JumpingJack/JumpRope change places), and not the file
    name (v_HandStandPushups_* lies in HandstandPushups/). Raises ValueError for split test where all videos are together.
    """
    names = ("UCF-101", split) if split == "train" else (split, "UCF-101")
    base = next((root / name for name in names if (root / name).is_dir()), root)
    if split != "train" and not re.search(rf"(?<![a-z]){split}(?![a-z])", base.name.lower()):
        raise ValueError(
            f"split={split}: {base} holds all of UCF101, its official split is a list: "
            f"source.list_file=ucfTrainTestlist/{split}list01.txt, without source.split"
        )
    # A folder of videos is a class, and so is an empty one; ucfTrainTestlist/ is not.
    files = {}
    for folder in sorted(folder_entries(base)[0]) if base.is_dir() else ():
        below, names = folder_entries(base / folder)
        videos = [name for name in sorted(names) if name.lower().endswith(VIDEO_SUFFIXES)]
        if videos or not (below or names):
            files[folder] = videos
    class_names = list(files)
    if class_names and len(class_names) != 101:
        logger.warning(
            "%s: %d classes, UCF101 has 101; class ids follow these folders", base, len(class_names)
        )
    # Clips of one group, v_X_g01_c01.avi to v_X_g01_c07.avi, look alike: a held-out share takes all or none of them.
    found = Found(str(base), [], class_names=class_names)
    for label, class_name in enumerate(class_names):
        for name in files[class_name]:
            group = re.search(r"_(g[0-9]+)_", name)
            found.names.append(f"{class_name}/{name}")
            found.groups.append(f"{class_name}/{group.group(1) if group else name}")
            found.labels.append(label)
    return found


def find_sky(root: Path, split: str) -> Found:
    """Find the folders of frames below sky_train or sky_test."""
    for folder in (root / f"sky_{split}", root / "sky_timelapse" / f"sky_{split}"):
        if folder.is_dir():
            return Found(str(folder), video_names(folder), parted=True)
    raise ValueError(f"sky_timelapse: no sky_{split}/ in {root}; see docs/datasets.md for the layout")


def find_folder(root: Path, labels: str) -> Found:
    """Find all videos of a tree. labels: "none", or "folder" (class = first folder below the root)."""
    if labels not in ("none", "folder"):
        raise ValueError(f"labels={labels!r}: choose none or folder")
    names = video_names(root)
    if labels == "none":
        return Found(str(root), names)
    bare = [name for name in names if "/" not in name]
    if bare:
        raise ValueError(
            f"labels=folder: {bare[0]} lies in no class folder of {root}; use labels=none or move it"
        )
    return _labelled(str(root), names, [name.split("/")[0] for name in names])


def find_kinetics400(root: Path, split: str) -> Found:
    """Find `<split>/<class>/<id>_000012_000022.mp4`, or the class folders themselves; class ids in ASCII order.

    A file of the same name below `replacement*/` is read in place of the one in the class folder, which the publisher
    found damaged.
    """
    base = root / split if (root / split).is_dir() else root
    names = [name for name in files_below(base) if not name.startswith("replacement")]
    bare = [name for name in names if "/" not in name]
    if bare:
        raise ValueError(
            f"kinetics400: {bare[0]} lies in no class folder of {base}; give the annotations as "
            "list_file=.../train.csv (label,youtube_id,time_start,time_end,split)"
        )
    classes = [name.split("/")[-2] for name in names]
    found = _labelled(str(base), names, classes)
    if len(found.class_names) not in (0, 400):
        logger.warning("%s: %d classes, Kinetics-400 has 400", base, len(found.class_names))
    return replaced(found, root)


def replaced(found: Found, root: Path) -> Found:
    """Take videos from `replacement*/` of the root, or of the folder itself, where it has one of the same name."""
    folders = {*root.glob("replacement*"), *Path(found.base).glob("replacement*")}
    better = {}
    for folder in sorted(filter(Path.is_dir, folders)):
        for name in files_below(folder):
            better[Path(name).name] = os.path.relpath(folder / name, found.base)
    if better:
        found.groups = found.groups or list(found.names)  # the split does not depend on the replacement
        found.names = [better.get(Path(name).name, name) for name in found.names]
    return found


def find_panda70m(root: Path) -> Found:
    """Find the shards that Panda-70M's downloader writes: `00000/0000000_00000.mp4`, video and clip of it.

    Clips of one video are one group.
    """
    names = files_below(root)
    return Found(str(root), names, [re.sub(r"_[0-9]+\.[^.]+$", "", name) for name in names])


def _labelled(base: str, names: list[str], classes: list[str]) -> Found:
    class_names = sorted(set(classes))
    ids = {name: n for n, name in enumerate(class_names)}
    return Found(base, names, labels=[ids[name] for name in classes], class_names=class_names)
