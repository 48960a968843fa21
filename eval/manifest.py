"""The manifest of a folder of generated videos: which files belong to it, so that none is missing or stale."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from data.video import IMAGE_SUFFIXES
from eval.videos import Video, find_videos

logger = logging.getLogger(__name__)
FILE = "manifest.json"


@dataclass(frozen=True)
class Listing:
    """The videos of a folder.

    stale: in the folder and not in its manifest, left out. manifest: for the record. ignored: number of files that
    are not part of a video (another suffix, a picture beside videos).
    """

    videos: list[Video]
    stale: list[str]
    manifest: dict | None
    ignored: int


def _count_ignored(root: Path, videos: list[Video]) -> int:
    """Files below root that no video is made of; hidden ones and the manifest do not count."""
    paths = {str(video.path) for video in videos}
    ignored = 0
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [
            name for name in files if not name.startswith(".") and os.path.join(folder, name) not in paths
        ]
        if folder in paths:
            visible = [name for name in visible if not name.lower().endswith(IMAGE_SUFFIXES)]
        ignored += len(visible) - (Path(folder) == root and FILE in visible)
    return ignored


def _names(path: Path, content: object) -> set[str]:
    """The files of a manifest. Raises ValueError if it is none, or says that it is not complete."""
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{path}: no list `files` in it; generate the samples again or delete it")
    if content.get("num_videos", len(files)) != len(files) or len(set(files)) != len(files):
        raise ValueError(
            f"{path}: num_videos={content.get('num_videos')} but {len(set(files))} different files"
        )
    if content.get("complete", True) is not True:
        raise ValueError(f"{path}: the samples are not complete; run pipelines.sample again to finish them")
    return set(files)


def list_folder(root: str | Path) -> Listing:
    """All videos of a folder; where it has a manifest.json, exactly those listed there.

    Raises ValueError if there is no video, if a listed file is missing, or if the samples are not complete.
    """
    root, videos = Path(root), find_videos(root)
    path = root / FILE
    if not path.is_file():
        return Listing(videos, [], None, _count_ignored(root, videos))
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    names = _names(path, content)
    listed = [v for v in videos if v.path.relative_to(root).as_posix() in names]
    missing = names - {v.path.relative_to(root).as_posix() for v in listed}
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(names)} files are missing, e.g. {min(missing)}; "
            "run pipelines.sample again to make them"
        )
    kept = {video.name for video in listed}
    stale = [video.name for video in videos if video.name not in kept]
    if stale:
        logger.warning(
            "%s: %d videos are not in the manifest and left out, e.g. %s", root, len(stale), stale[0]
        )
    digest = hashlib.sha256(raw).hexdigest()
    manifest = {"sha256": digest, "settings": content.get("settings")}
    return Listing(listed, stale, manifest, _count_ignored(root, videos))
