"""Read frames by index, look at a file, find videos in a folder; the writers of data/encode.py by the way.

One reader for the scan, training and judges: PyAV (and decord where asked for, data/by_decord.py). Frame n is the n-th
that a player shows. Decoding begins at an entry that the scan compared with decoding from frame 0 (data/timeline.py),
and every frame must have the time expected of it.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from data.core.lazy import lazy
from data.encode import Clock, encode_webp, write_ffv1, write_mp4
from data.timeline import Timeline, mean_rate, own_ticks, pack_times, unpack_times

av = lazy("av")
reformatter = lazy("av.video.reformatter")

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "BadVideo",
    "Frames",
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
_AT_ONCE = 256 << 20  # bytes of decoded frames that read_frames holds
_NEAR = 64  # frames: not worth a look at the packets of a file


@dataclass(frozen=True)
class VideoInfo:
    """num_frames; fps (0.0 when unknown, as for a folder of frames); width and height in pixels, as displayed.

    clock: when each frame is shown, where that is not fps apart.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    clock: Clock | None = field(default=None, compare=False, repr=False)


def natural_key(text: str) -> tuple:
    """Sort key with numbers by value: clip_2 before clip_10."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if n % 2 else part.lower() for n, part in enumerate(parts)], text


def list_frames(folder: str | Path) -> list[Path]:
    """The image files of a folder of frames in natural order; other files (Thumbs.db) do not count."""
    names = [name for name in folder_entries(folder)[1] if name.lower().endswith(IMAGE_SUFFIXES)]
    return [Path(folder, name) for name in sorted(names, key=natural_key)]


def list_videos(root: str | Path) -> list[Path]:
    """`video_names` as paths."""
    return [Path(root, name) for name in video_names(root)]


def video_names(root: str | Path) -> list[str]:
    """All videos below a folder at any depth, as paths below it, in natural order.

    A video is a file with a video suffix, or a folder of images with no video in or below it. Hidden files and
    folders, pipes, sockets and devices are left out. Raises ValueError if the folder does not exist.
    """
    root = str(root)
    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder")
    found, image_folders, above, seen, waiting = [], [], set(), set(), [""]
    while waiting:
        below = waiting.pop()
        real = os.path.realpath(os.path.join(root, below))
        if real in seen:  # a link back up the tree
            continue
        seen.add(real)
        folders, names = folder_entries(real)
        waiting += [f"{below}{name}/" for name in folders]
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


def folder_entries(folder: str | Path) -> tuple[list[str], list[str]]:
    """(folders, files) in a folder, links followed; hidden ones (._x of a Mac, .DS_Store) and pipes, sockets, devices are none.

    A link that leads nowhere counts as a file, so that the scan can say so. Raises ValueError if it cannot be listed.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    kind = (
                        folders if entry.is_dir() else files if entry.is_file() or not entry.stat() else None
                    )
                except OSError:
                    kind = files
                if kind is not None:
                    kind.append(entry.name)
                else:
                    logger.warning("%s: neither a file nor a folder, passed over", entry.path)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror}); mend it or move it out") from error
    return folders, files


def _with_parents(folder: str) -> Iterator[str]:
    """ "a/b/", then "a/", then ""."""
    while folder:
        yield folder
        folder = folder[: folder.rstrip("/").rfind("/") + 1]
    yield ""


class BadVideo(ValueError):
    """What the decoder, or the file system, says about one file. Any other error is a fault of the machine or of us.

    final: it lies in the file's content; False: it may be well the next time (vanished, no permission, time limit).
    """

    def __init__(self, text: str, final: bool = True):
        super().__init__(text)
        self.final = final

    def __reduce__(self):
        return BadVideo, (str(self), self.final)


# What a process lacks, whatever file it opens.
_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.ENOSPC}
_FOR_NOW = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENXIO}


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Errors about this file become BadVideo with a reason in a few words; those of the machine pass as OSError."""
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeDecodeError, EOFError, MemoryError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or number in _MACHINE:
            text = f"{path}: {type(error).__name__}: {error}; this is not a fault of the file: more memory, or fewer processes"
            raise OSError(number or errno.ENOMEM, text) from error
        text = " ".join(str(getattr(error, "strerror", None) or error).split()).replace(f"{path}: ", "")
        raise BadVideo(text[:100] or type(error).__name__, number not in _FOR_NOW) from error


def best_stream(container):
    """The video stream that players choose, set to decode on one thread. Raises BadVideo if there is none."""
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise BadVideo("no video stream in this file" if stream is None else "no decoder for its video")
    stream.codec_context.thread_count = 1  # parallel work belongs to the loader's processes
    return stream


class Screen:
    """Decoded frames as players show them: RGB, turned or mirrored as the file says, with square pixels.

    Pixels that are not square are made so by enlarging one side (bilinear), as browsers do.
    """

    def __init__(self, stream):
        self.reformatter = reformatter.VideoReformatter()  # one for all frames: it keeps its tables
        ratio = float(stream.sample_aspect_ratio or 1)
        self.stretch = (max(ratio, 1.0), max(1 / ratio, 1.0)) if 1 / 8 <= ratio <= 8 else (1.0, 1.0)
        self.rotation, self.turn = None, (False, 1, 1)

    def turned(self, frame) -> tuple[bool, int, int]:
        """`_turn` of a frame; its matrix is looked at when the angle changes, for the look keeps frames from being freed."""
        if frame.rotation != self.rotation:
            self.rotation, self.turn = frame.rotation, _turn(frame)
        return self.turn

    def size(self, frame) -> tuple[int, int]:
        """(width, height) of the picture."""
        width, height = (
            round(side * by) for side, by in zip((frame.width, frame.height), self.stretch, strict=True)
        )
        return (height, width) if self.turned(frame)[0] else (width, height)

    def picture(self, frame) -> np.ndarray:
        """RGB uint8 (H, W, 3)."""
        picture = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
        if max(self.stretch) > 1:
            height, width, _ = picture.shape
            size = round(width * self.stretch[0]), round(height * self.stretch[1])
            picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        transposed, rows, columns = self.turned(frame)
        return (picture.swapaxes(0, 1) if transposed else picture)[::rows, ::columns]


def _turn(frame) -> tuple[bool, int, int]:
    """(transposed, step of the rows, step of the columns) that the frame's display matrix asks for, in quarter turns."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, 1, 1
    # x' = a x + c y, y' = b x + d y (ISO 14496-12, 8.3.2), whole numbers of 1 / 65536
    a, b, _, c, d = struct.unpack_from("<5i", bytes(data))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, -1 if d < 0 else 1, -1 if a < 0 else 1
    return True, -1 if b < 0 else 1, -1 if c < 0 else 1


class Frames:
    """Frames of a video file or folder of frames that are decoded when they are wanted, one in memory at a time.

    `np.asarray` gives uint8 (N, H, W, 3), RGB, as players show them. indices: any order, repeats allowed.
    times: the scan's timeline of the file: decoding begins near the first frame asked for. b"": what the file's packets
    say is used where that is safe; None: decoding begins at frame 0. decord: whether it agreed on this file.
    Looking at the frames raises BadVideo for one outside the video and for a file that cannot be read.
    """

    def __init__(
        self, path: str | Path, indices: Sequence[int], times: bytes | None = b"", decord: bool = False
    ):
        self.path, self.times, self.decord = Path(path), times, decord
        self.indices = [int(n) for n in indices]
        if not self.indices or min(self.indices) < 0:
            raise ValueError(f"{path}: frames {self.indices}: need at least one index, none below 0")

    def __len__(self) -> int:
        return len(self.indices)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.map(lambda picture: picture).astype(dtype or np.uint8, copy=False)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What `function` makes of each picture, uint8 (H, W, 3), called once for each in the order of the video."""
        return self.gather(self.pictures(), function)

    def gather(
        self, pictures: Iterable[tuple[int, np.ndarray]], function: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """The pictures in the order of the indices, after `function`."""
        kept = {n: function(picture) for n, picture in pictures}
        sizes = {picture.shape[:2] for picture in kept.values()}
        if len(sizes) > 1:
            raise BadVideo(f"{self.path}: the frames differ in size: {sorted(sizes)}")
        return np.stack([kept[n] for n in self.indices])

    def pictures(self) -> Iterator[tuple[int, np.ndarray]]:
        """(n, picture uint8 (H, W, 3)) of each frame asked for, once, in the order of the video."""
        wanted = sorted(set(self.indices))
        try:
            if self.path.is_dir():
                yield from self._images(wanted)
            elif not self.path.is_file():
                raise BadVideo("no such file", final=False)
            else:
                yield from self._decoded(wanted)
        except BadVideo as error:
            if str(error).startswith(f"{self.path}: "):
                raise
            raise BadVideo(f"{self.path}: cannot be read ({error})", error.final) from error

    def _images(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        files = list_frames(self.path)
        if wanted[-1] >= len(files):
            raise BadVideo(
                f"{self.path}: frame {wanted[-1]} asked, the folder has frames 0..{len(files) - 1}"
            )
        for n in wanted:
            yield n, read_image(files[n])

    def _decoded(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        times = self.times
        if times == b"" and wanted[0] >= _NEAR:
            times = packet_times(self.path)
        line = unpack_times(times) if times else None
        if line and self.decord:
            from data import by_decord

            for n, picture in by_decord.pictures(self.path, wanted, len(line.ticks)):
                wanted = wanted[1:]
                yield n, picture
        if line and wanted:
            for n, picture in _enter(self.path, wanted, line):
                wanted = wanted[1:]
                yield n, picture
        if wanted:  # no timeline, or not the one of this file
            yield from _from_the_beginning(self.path, wanted)


def _enter(path: Path, wanted: list[int], line: Timeline) -> Iterator[tuple[int, np.ndarray]]:
    """The frames wanted, decoded from the entry before each; ends early where a frame is not the one expected."""
    if wanted[-1] >= len(line.ticks):
        return
    with reading(path), av.open(str(path)) as container:
        stream = best_stream(container)
        screen, decoded, at, entering = Screen(stream), container.decode(stream), 0, False
        for n in wanted:
            entry = line.entry(n)
            if entry > at:
                container.seek(int(line.ticks[entry]), stream=stream)
                decoded, at, entering = container.decode(stream), entry, True
            while at <= n:
                frame = next(decoded, None)
                if entering and frame is not None and frame.pts is not None and frame.pts < line.ticks[entry]:
                    continue
                if frame is None or frame.pts != line.ticks[at] or frame.is_corrupt:
                    return
                at, entering = at + 1, False
            yield n, screen.picture(frame)


def _from_the_beginning(path: Path, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    left, count = set(wanted), 0
    with reading(path), av.open(str(path)) as container:
        stream = best_stream(container)
        screen = Screen(stream)
        for count, frame in enumerate(container.decode(stream), 1):
            if count - 1 in left:
                left.discard(count - 1)
                yield count - 1, screen.picture(frame)
            if not left:
                return
    raise BadVideo(f"{path}: frame {wanted[-1]} asked, the video has frames 0..{count - 1}")


def packet_times(path: str | Path) -> bytes:
    """A timeline from the packets of a file that was not scanned, without decoding; b"" where they do not suffice."""
    status = os.stat(path)
    return _packet_times(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _packet_times(path: str, _size: int, _changed: int) -> bytes:
    """Only for containers and codecs with one packet a shown frame; each frame read is compared with its time."""
    ticks, keys, first = [], set(), None
    with reading(path), av.open(path) as container:
        stream = best_stream(container)
        whole = container.format.name.split(",")[0] in ("mov", "matroska")
        if not whole or stream.codec_context.name not in ("h264", "hevc", "vp9", "libdav1d", "av1"):
            return b""
        # Times and key frames of all packets that show a frame.
        for packet in container.demux(stream):
            if packet.dts is None and not packet.size:
                continue  # the end
            first = first or packet
            if packet.pts is None or not first.is_keyframe or packet.pts < first.pts:
                return b""  # it begins in the middle of a group: some packets show nothing
            if not packet.is_discard:
                ticks.append(packet.pts)
                if packet.is_keyframe:
                    keys.add(packet.pts)
        base = stream.time_base
    # Packets come in the order of decoding, frames in that of their times.
    ticks.sort()
    entries = [n for n, tick in enumerate(ticks) if tick in keys]
    return pack_times(ticks, *base.as_integer_ratio(), entries) if base else b""


def read_frames(path: str | Path, indices: Sequence[int], times: bytes | None = b"") -> np.ndarray | Frames:
    """Frames `indices` (any order, repeats allowed) of a video file or folder of frames.

    Returns uint8 (len(indices), H, W, 3), RGB, as players show them. More than 256 MiB of them come as `Frames`, which
    `crop_resize_uint8` takes one by one; `np.asarray` holds them all. times: see `Frames`. Raises ValueError for an
    index outside the video and for a file that cannot be read.
    """
    frames = Frames(path, indices, times)
    pictures = frames.pictures()
    n, picture = next(pictures)
    if picture.nbytes * len(set(frames.indices)) > _AT_ONCE:
        pictures.close()
        return frames
    return frames.gather(chain([(n, picture)], pictures), lambda picture: picture)


def probe(path: str | Path) -> VideoInfo:
    """Frames, rate and displayed size of a video file or a folder of frames. Raises ValueError if unreadable.

    A file is decoded whole: what its header says of the number of frames is often wrong.
    """
    path = Path(path)
    if path.is_dir():
        frames = list_frames(path)
        if not frames:
            raise ValueError(f"{path}: no .jpg or .png frames in this folder")
        height, width, _ = read_image(frames[0]).shape
        return VideoInfo(len(frames), 0.0, width, height)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with reading(path), av.open(str(path)) as container:
            stream = best_stream(container)
            ticks, size, tick = [], None, stream.time_base
            for frame in container.decode(stream):
                ticks.append(frame.pts)
                size = size or Screen(stream).size(frame)
            fps = mean_rate(ticks, float(tick or 0), float(stream.average_rate or 0))
            own = own_ticks(ticks, float(tick or 0), fps)
            if size is None:
                raise BadVideo("no frame could be decoded")
    except BadVideo as error:
        raise BadVideo(
            f"{path}: not a readable video ({error}); run the scan of docs/datasets.md", error.final
        ) from error
    return VideoInfo(len(ticks), fps, *size, Clock(tick, own) if own else None)


def iterate_frames(path: str | Path) -> Iterator[np.ndarray]:
    """All frames of a video file or folder of frames in order, each uint8 (H, W, 3); one is in memory at a time.

    Raises ValueError where the video cannot be decoded any further.
    """
    path = Path(path)
    if path.is_dir():
        yield from (read_image(frame) for frame in list_frames(path))
        return
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with reading(path), av.open(str(path)) as container:
            stream = best_stream(container)
            screen = Screen(stream)
            for frame in container.decode(stream):
                yield screen.picture(frame)
    except BadVideo as error:
        raise BadVideo(
            f"{path}: cannot be decoded ({error}); run the scan of docs/datasets.md", error.final
        ) from error


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB uint8 (H, W, 3). Raises ValueError if it cannot be read."""
    try:
        with reading(path), Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (BadVideo, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadVideo(f"{path}: not a readable image ({error})", getattr(error, "final", True)) from error
