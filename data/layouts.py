"""Where the videos of each data set lie below its folder, which class each has, and which belong together."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.video import VIDEO_SUFFIXES, folder_entries, video_names

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
        """The videos with these numbers; classes and missing ones stay."""
        numbers = list(numbers)
        parts = [[column[n] for n in numbers] if column else [] for column in (self.groups, self.labels)]
        cuts = [self.cuts[n] for n in numbers] if self.cuts else []
        names = [self.names[n] for n in numbers]
        return Found(self.base, names, *parts, self.class_names, cuts, self.missing, self.parted)


def files_below(root: Path) -> list[str]:
    """Video files below a folder at any depth, as paths below it, in ASCII order. Folders of frames do not count."""
    found, waiting, seen = [], [""], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(root / folder)
        if real in seen:  # a link back up the tree
            continue
        seen.add(real)
        folders, files = folder_entries(real)
        waiting += [f"{folder}{name}/" for name in folders]
        found += [folder + name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]
    return sorted(found)


def find_ucf101(root: Path, split: str = "train") -> Found:
    """Videos in class folders, of UCF-101/ or of train/ and test/ (as some sites publish it) or of the root itself.

    Class = directory, ids in ASCII order of the directories, as in Latte's released UCF101 model.

    Not the order of classInd.txt (Hammering/HammerThrow and JumpingJack/JumpRope change places), and not the file
    name (v_HandStandPushups_* lies in HandstandPushups/).
    """
    base = next((root / name for name in ("UCF-101", split) if (root / name).is_dir()), root)
    folders = folder_entries(base)[0] if base.is_dir() else []
    files = {
        name: sorted(f for f in folder_entries(base / name)[1] if f.lower().endswith(VIDEO_SUFFIXES))
        for name in folders
    }
    # A class may be empty, ucfTrainTestlist/ is none.
    class_names = sorted(
        name for name, videos in files.items() if videos or not any(map(len, folder_entries(base / name)))
    )
    if class_names and len(class_names) != 101:
        logger.warning(
            "%s: %d classes, UCF101 has 101; class ids follow these folders", base, len(class_names)
        )
    found = Found(str(base), [], class_names=class_names)
    for label, class_name in enumerate(class_names):
        for name in files[class_name]:
            group = re.search(r"_(g[0-9]+)_", name)
            found.names.append(f"{class_name}/{name}")
            found.groups.append(f"{class_name}/{group.group(1) if group else name}")
            found.labels.append(label)
    return found


def find_sky(root: Path, split: str) -> Found:
    """Folders of frames below sky_train or sky_test."""
    for folder in (root / f"sky_{split}", root / "sky_timelapse" / f"sky_{split}"):
        if folder.is_dir():
            return Found(str(folder), video_names(folder), parted=True)
    raise ValueError(f"sky_timelapse: no sky_{split}/ in {root}; see docs/datasets.md for the layout")


def find_folder(root: Path, labels: str) -> Found:
    """All videos of a tree. labels: "none", or "folder" (class = first folder below the root)."""
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
    """`<split>/<class>/<id>_000012_000022.mp4`, or the class folders themselves; class ids in ASCII order.

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
    """The same videos, read from `replacement*/` of the root or the folder itself where it has one of that name."""
    folders = {path for top in {root, Path(found.base)} for path in top.glob("replacement*") if path.is_dir()}
    better = {
        Path(name).name: os.path.relpath(folder / name, found.base)
        for folder in sorted(folders)
        for name in files_below(folder)
    }
    if better:
        found.groups = found.groups or list(found.names)  # the split does not depend on the replacement
        found.names = [better.get(Path(name).name, name) for name in found.names]
    return found


def find_panda70m(root: Path) -> Found:
    """The shards that Panda-70M's downloader writes: `00000/0000000_00000.mp4`, video and clip of it.

    Clips of one video are one group.
    """
    names = files_below(root)
    return Found(str(root), names, [re.sub(r"_[0-9]+\.[^.]+$", "", name) for name in names])


def _labelled(base: str, names: list[str], classes: list[str]) -> Found:
    class_names = sorted(set(classes))
    ids = {name: n for n, name in enumerate(class_names)}
    return Found(base, names, labels=[ids[name] for name in classes], class_names=class_names)
