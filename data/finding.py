"""Find videos and frames: what is a video below a folder, in which order, under which name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def natural_key(text: str) -> tuple:
    """Sort key with numbers by value: clip_2 before clip_10."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if n % 2 else part.lower() for n, part in enumerate(parts)], text


def list_frames(folder: str | Path) -> list[Path]:
    """List the image files of a folder of frames in natural order; other files (Thumbs.db) do not count."""
    names = [name for name in folder_entries(folder)[1] if name.lower().endswith(IMAGE_SUFFIXES)]
    return [Path(folder, name) for name in sorted(names, key=natural_key)]


def list_videos(root: str | Path) -> list[Path]:
    """List `video_names` as paths."""
    return [Path(root, name) for name in video_names(root)]


def video_names(root: str | Path) -> list[str]:
    """List all videos below a folder at any depth, as paths below it, in natural order.

    A video is a file with a video suffix, or a folder of images with no video in or below it. Hidden files and
    folders, pipes, sockets and devices are left out. Raises ValueError if the folder does not exist.
    """
    root = str(root)
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder")
    # Video files; `above` has their folders and all folders above those.
    found, image_folders, above = [], [], set()
    for below, names in walk(root):
        videos = [below + name for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
        found += videos
        if videos:
            above.update(_with_parents(below))
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            image_folders.append(below)
    # Folders of frames, the deepest first: one that has a video below it is not a video itself.
    for folder in sorted(image_folders, key=lambda path: path.count("/"), reverse=True):
        if folder not in above:
            found.append(folder.rstrip("/") or ".")
            above.update(_with_parents(folder))
    return sorted(found, key=natural_key)


def walk(root: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield ("a/b/", its files) of a folder and of each one below it, links followed, each folder once."""
    seen, waiting = set(), [""]
    while waiting:
        below = waiting.pop()
        real = os.path.realpath(os.path.join(root, below))
        if real in seen:  # a link back up the tree
            continue
        seen.add(real)
        folders, names = folder_entries(real)
        waiting += [f"{below}{name}/" for name in folders]
        yield below, names


def folder_entries(folder: str | Path) -> tuple[list[str], list[str]]:
    """List (folders, files) in a folder, links followed.

    Hidden ones (._x of a Mac, .DS_Store) and pipes, sockets and devices are neither. A link that leads nowhere counts as
    a file, so that the scan can say so. Raises ValueError if the folder cannot be listed.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files.append(entry.name)
                    else:
                        entry.stat()
                        logger.warning("%s: neither a file nor a folder, passed over", entry.path)
                except OSError:  # a link that leads nowhere
                    files.append(entry.name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror}); mend it or move it out") from error
    return folders, files


def _with_parents(folder: str) -> Iterator[str]:
    """Yield "a/b/", then "a/", then ""."""
    while folder:
        yield folder
        folder = folder[: folder.rstrip("/").rfind("/") + 1]
    yield ""
