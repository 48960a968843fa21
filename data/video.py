"""Read frames by index, and look at a file: how many frames, when they are shown, how large.

One reader for the scan, training and judges: PyAV (and decord where asked for, data/by_decord.py). Frame n is the n-th
that a player shows. Decoding begins at an entry that the scan compared with decoding from frame 0 (data/timeline.py),
and every frame must have the time expected of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from data.core.lazy import lazy
from data.decoder import BadVideo, Screen, best_stream, read_image, reading
from data.encode import Clock
from data.finding import list_frames
from data.timeline import Timeline, mean_rate, own_ticks, pack_times, unpack_times

av = lazy("av")

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
        """Stack what `function` makes of each picture, uint8 (H, W, 3), called once for each in the order of the video."""
        return self.gather(self.pictures(), function)

    def gather(
        self, pictures: Iterable[tuple[int, np.ndarray]], function: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Stack the pictures in the order of the indices, after `function`."""
        kept = {n: function(picture) for n, picture in pictures}
        sizes = {picture.shape[:2] for picture in kept.values()}
        if len(sizes) > 1:
            raise BadVideo(f"{self.path}: the frames differ in size: {sorted(sizes)}")
        return np.stack([kept[n] for n in self.indices])

    def pictures(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (n, picture uint8 (H, W, 3)) of each frame asked for, once, in the order of the video."""
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
        """Yield the frames wanted of a file, by the quickest way that is known to show the right ones."""
        # The scan's timeline, or, where the first frame lies far behind the beginning, that of the packets.
        times = self.times
        if times == b"" and wanted[0] >= _NEAR:
            times = packet_times(self.path)
        line = unpack_times(times) if times else None
        # Each reader takes over where the one before it ended: decord, PyAV with seeks, PyAV from frame 0.
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
    """Yield the frames wanted, decoded from the entry before each; ends early where a frame is not the one expected."""
    if wanted[-1] >= len(line.ticks):
        return
    with reading(path), av.open(str(path)) as container:
        stream = best_stream(container)
        screen, decoded, at, entering = Screen(stream), container.decode(stream), 0, False
        for n in wanted:
            # Seek where an entry lies between the frame that comes next and the one wanted.
            entry = line.entry(n)
            if entry > at:
                container.seek(int(line.ticks[entry]), stream=stream)
                decoded, at, entering = container.decode(stream), entry, True
            # Decode up to it: after a seek some frames before the entry may come first, then each as the timeline says.
            while at <= n:
                frame = next(decoded, None)
                if entering and frame is not None and frame.pts is not None and frame.pts < line.ticks[entry]:
                    continue
                if frame is None or frame.pts != line.ticks[at] or frame.is_corrupt:
                    return
                at, entering = at + 1, False
            yield n, screen.picture(frame)


def _from_the_beginning(path: Path, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames wanted, counted from frame 0. Raises BadVideo if the video has not all of them."""
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
    """Read a timeline from the packets of a file that was not scanned, without decoding; b"" where they do not suffice."""
    status = os.stat(path)
    return _packet_times(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _packet_times(path: str, _size: int, _changed: int) -> bytes:
    """Do the work of `packet_times`, for containers and codecs with one packet per shown frame; stamps are the cache's key."""
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
    return pack_times(ticks, base.numerator, base.denominator, entries) if base else b""


def read_frames(path: str | Path, indices: Sequence[int], times: bytes | None = b"") -> np.ndarray | Frames:
    """Read the frames `indices` (any order, repeats allowed) of a video file or folder of frames.

    Returns uint8 (len(indices), H, W, 3), RGB, as players show them. More than 256 MiB of them come as `Frames`, which
    `crop_resize_uint8` takes one by one; `np.asarray` holds them all. times: see `Frames`. Raises ValueError for an
    index outside the video and for a file that cannot be read.
    """
    frames = Frames(path, indices, times)
    # The first picture tells how much all of them take.
    pictures = frames.pictures()
    n, picture = next(pictures)
    if picture.nbytes * len(set(frames.indices)) > _AT_ONCE:
        pictures.close()
        return frames
    return frames.gather(chain([(n, picture)], pictures), lambda picture: picture)


def probe(path: str | Path) -> VideoInfo:
    """Find out frames, rate and displayed size of a video file or a folder of frames. Raises ValueError if unreadable.

    A file is decoded whole: what its header says of the number of frames is often wrong.
    """
    path = Path(path)
    # A folder of frames: no rate, and the first frame's size.
    if path.is_dir():
        frames = list_frames(path)
        if not frames:
            raise ValueError(f"{path}: no .jpg or .png frames in this folder")
        height, width, _ = read_image(frames[0]).shape
        return VideoInfo(len(frames), 0.0, width, height)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    # A file: every frame is decoded, and its time noted.
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
    return VideoInfo(
        len(ticks), fps, *size, Clock(Fraction(tick.numerator, tick.denominator), own) if own else None
    )


def iterate_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Yield all frames of a video file or folder of frames in order, each uint8 (H, W, 3); one is in memory at a time.

    Raises ValueError where the video cannot be decoded any further.
    """
    path = Path(path)
    if path.is_dir():
        yield from map(read_image, list_frames(path))
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
