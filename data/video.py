"""Read frames by index, look at a file, find videos in a folder; the writers of data/encode.py by the way.

Reader: decord (light, quick to seek) for videos without B-frames; PyAV, decoding from the first frame, for the rest.
decord 0.6 returns neighbours of the frames asked for when a group of pictures is open or an AVI, MPEG or HEVC stream
has B-frames; so does PyAV when it seeks to a time stamp. Some UCF101 files are of that kind.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.encode import encode_webp, write_ffv1, write_mp4

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "VideoInfo",
    "encode_webp",
    "list_frames",
    "list_videos",
    "natural_key",
    "probe",
    "read_frames",
    "write_ffv1",
    "write_mp4",
]

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class VideoInfo:
    """num_frames; fps (0.0 when unknown, as for a folder of frames); width and height in pixels, as displayed."""

    num_frames: int
    fps: float
    width: int
    height: int


def natural_key(text: str) -> tuple:
    """Sort key with numbers by value: clip_2 before clip_10."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if n % 2 else part.lower() for n, part in enumerate(parts)], text


def list_frames(folder: str | Path) -> list[Path]:
    """The image files of a folder of frames in natural order; other files (Thumbs.db) do not count."""
    names = [
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
    ]
    return [Path(folder, name) for name in sorted(names, key=natural_key)]


def list_videos(root: str | Path) -> list[Path]:
    """`video_names` as paths."""
    return [Path(root, name) for name in video_names(root)]


def video_names(root: str | Path) -> list[str]:
    """All videos below a folder at any depth, as paths below it, in natural order.

    A video is a file with a video suffix, or a folder of images with no video in or below it. Hidden files and
    folders are left out. Raises ValueError if the folder does not exist.
    """
    root = str(root)
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder")
    found, image_folders, above, seen = [], [], set(), set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = "" if folder == root else f"{os.path.relpath(folder, root)}/"
        names = [name for name in files if not name.startswith(".")]
        videos = [below + name for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
        found += videos
        if videos:
            above.update(_with_parents(below))
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            image_folders.append(below)
    for folder in sorted(image_folders, key=lambda path: path.count("/"), reverse=True):
        if folder not in above:
            found.append(folder.rstrip("/") or ".")
            above.update(_with_parents(folder))
    return sorted(found, key=natural_key)


def _with_parents(folder: str) -> Iterator[str]:
    """ "a/b/", then "a/", then ""."""
    while folder:
        yield folder
        folder = folder[: folder.rstrip("/").rfind("/") + 1]
    yield ""


def av_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on a bad file; mangled metadata alone gives UnicodeDecodeError, a ValueError."""
    import av

    return av.FFmpegError, ValueError, IndexError, AttributeError, OSError


def best_stream(container, path: Path):
    """The video stream decord would take too, set to decode on one thread. Raises ValueError if there is none."""
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError(f"{path}: no video stream in this file")
    stream.codec_context.thread_count = 1  # parallel work belongs to the loader's processes
    return stream


def upright(frame) -> np.ndarray:
    """RGB uint8 (H, W, 3) of a PyAV frame, turned as the file says (decord does that by itself)."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


@lru_cache(maxsize=65536)
def _decord_reads(path: str) -> bool:
    """Whether decord is the reader of this file. Logged once a file (and process) when it is not."""
    import av

    try:
        import decord
    except ImportError:
        logger.warning("decord is not installed: %s is read with PyAV", path)
        return False
    decord.logging.set_level(decord.logging.QUIET)
    reason = ""
    try:
        with av.open(path) as container:
            codec = best_stream(container, Path(path)).codec_context
            if codec.has_b_frames:
                reason = "it has B-frames"
            elif codec.format is not None and any(part.bits > 8 for part in codec.format.components):
                reason = "more than 8 bits a colour"  # decord 0.6 is then wrong by up to 147 levels
        if not reason:
            decord.VideoReader(path, num_threads=1).get_batch([0])
    except (*av_errors(), decord.DECORDError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
    if reason:
        logger.info("%s: read with PyAV, not decord: %s", path, reason)
    return not reason


def probe(path: str | Path) -> VideoInfo:
    """Frames, rate and displayed size of a video file or a folder of frames. Raises ValueError if unreadable."""
    import av

    path = Path(path)
    if path.is_dir():
        frames = list_frames(path)
        if not frames:
            raise ValueError(f"{path}: no .jpg or .png frames in this folder")
        height, width, _ = read_image(frames[0]).shape
        return VideoInfo(len(frames), 0.0, width, height)
    _check_file(path)
    try:
        with av.open(str(path)) as container:
            stream = best_stream(container, path)
            fps = float(stream.average_rate or 0)
            count, first = 0, None
            for frame in container.decode(stream):
                first, count = first or frame, count + 1
                if _decord_reads(str(path)):
                    break
            if first is None:
                raise ValueError("no frame could be decoded")
            width, height = first.width, first.height
            if first.rotation % 180:
                width, height = height, width
    except av_errors() as error:
        raise ValueError(
            f"{path}: not a readable video ({error}); run the scan of docs/datasets.md"
        ) from error
    if _decord_reads(str(path)):
        import decord

        count = len(decord.VideoReader(str(path), num_threads=1))
    return VideoInfo(count, fps, width, height)


def read_frames(path: str | Path, indices: Sequence[int]) -> np.ndarray:
    """Frames `indices` (any order, repeats allowed) of a video file or folder of frames.

    Returns uint8 (len(indices), H, W, 3), RGB, upright. Raises ValueError for an index outside the video and for
    a file that cannot be decoded.
    """
    path = Path(path)
    indices = [int(n) for n in indices]
    if not indices or min(indices) < 0:
        raise ValueError(f"{path}: frames {indices}: need at least one index, none below 0")
    if path.is_dir():
        return _read_folder(path, indices)
    _check_file(path)
    if _decord_reads(str(path)):
        frames = _read_decord(path, indices)
        if frames is not None:
            return frames
    return _read_av(path, indices)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")


def _read_decord(path: Path, indices: list[int]) -> np.ndarray | None:
    """None when PyAV has to try (and to say what is wrong). The reader lives for one call: an idle one leaks and blocks forks."""
    import decord

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch(indices).asnumpy() if max(indices) < len(reader) else None
    except (decord.DECORDError, RuntimeError) as error:
        logger.warning("%s: decord failed (%s); read with PyAV", path, " ".join(str(error).split())[:120])
        return None


def _read_av(path: Path, indices: list[int]) -> np.ndarray:
    import av

    wanted, kept, count = set(indices), {}, 0
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(best_stream(container, path)):
                if count in wanted:
                    kept[count] = upright(frame)
                count += 1
                if len(kept) == len(wanted):
                    break
    except av_errors() as error:
        raise ValueError(f"{path}: cannot decode ({error}); run the scan of docs/datasets.md") from error
    if len(kept) < len(wanted):
        raise ValueError(f"{path}: frame {max(indices)} asked, the video has frames 0..{count - 1}")
    return _stack(path, [kept[n] for n in indices])


def iterate_frames(path: str | Path) -> Iterator[np.ndarray]:
    """All frames of a video file or folder of frames in order, each uint8 (H, W, 3); one is in memory at a time.

    Raises ValueError where the video cannot be decoded any further.
    """
    import av

    path = Path(path)
    if path.is_dir():
        yield from (read_image(frame) for frame in list_frames(path))
        return
    _check_file(path)
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(best_stream(container, path)):
                yield upright(frame)
    except av_errors() as error:
        raise ValueError(f"{path}: cannot decode ({error}); run the scan of docs/datasets.md") from error


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB uint8 (H, W, 3). Raises ValueError if it cannot be read."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def _read_folder(path: Path, indices: list[int]) -> np.ndarray:
    frames = list_frames(path)
    if max(indices) >= len(frames):
        raise ValueError(f"{path}: frame {max(indices)} asked, the folder has frames 0..{len(frames) - 1}")
    pictures = {n: read_image(frames[n]) for n in set(indices)}
    return _stack(path, [pictures[n] for n in indices])


def _stack(path: Path, frames: list[np.ndarray]) -> np.ndarray:
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(
            f"{path}: the frames differ in size: {sorted({frame.shape[:2] for frame in frames})}"
        )
    return np.stack(frames)
