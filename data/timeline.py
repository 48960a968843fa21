"""When each frame of a video is shown, and at which frames decoding may begin: what the scan keeps of a file.

Packed in some 60 bytes for a steady rate, so that a million videos stay light.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

SAME_RATE = 0.999  # of the rate asked for: 29.97 passes for 30
_HEADER = struct.Struct("<qqq")
_ROW = 9  # bytes a frame before compression: the step as int64, then whether it is an entry


@dataclass(frozen=True)
class Timeline:
    """ticks: int64 (n,), rising presentation times of the n frames in display order. entries: int64, rising frame numbers.

    A decoder that seeks to the tick of an entry shows that frame and all after it as it would coming from frame 0.
    """

    ticks: np.ndarray
    entries: np.ndarray

    def entry(self, frame: int) -> int:
        """Find the last entry at or before a frame; 0 if there is none."""
        place = int(np.searchsorted(self.entries, frame, side="right"))
        return int(self.entries[place - 1]) if place else 0


def rising(ticks: Sequence[int | None]) -> bool:
    """Tell whether every frame has a time and is shown after the one before."""
    known = isinstance(ticks, np.ndarray) or None not in ticks
    return len(ticks) > 0 and known and bool((np.diff(np.asarray(ticks, np.int64)) > 0).all())


def pack_times(
    ticks: Sequence[int | None], numerator: int, denominator: int, entries: Iterable[int] = ()
) -> bytes:
    """Pack a timeline; one tick lasts numerator / denominator seconds.

    b"" when a frame has no time or times do not rise: such a video is read from its beginning and not cut by time.
    """
    if denominator < 1 or not rising(ticks):
        return b""
    # All steps, then all flags: equal values in a row, which compression makes small.
    steps = np.diff(np.asarray(ticks, np.int64), prepend=ticks[0])
    flags = np.zeros(len(steps), np.uint8)
    flags[list(entries)] = 1
    body = zlib.compress(steps.astype("<i8").tobytes() + flags.tobytes())
    return _HEADER.pack(numerator, denominator, ticks[0]) + body


def unpack_times(packed: bytes) -> Timeline:
    """Unpack the timeline of `pack_times`; not of b""."""
    start, body = _HEADER.unpack_from(packed)[2], zlib.decompress(packed[_HEADER.size :])
    count = len(body) // _ROW
    ticks = start + np.cumsum(np.frombuffer(body, "<i8", count))
    return Timeline(ticks, np.flatnonzero(np.frombuffer(body, np.uint8, count, 8 * count)))


def frames_at_rate(packed: bytes, fps: float, source_fps: float, first: int, count: int) -> np.ndarray:
    """Choose which of `count` frames from `first` on is shown at 0, 1/fps, 2/fps ... seconds after the first: int64 (n,).

    The last one whose time has come, so none is shown before its time but for what the file's clock rounds: Matroska counts
    whole milliseconds. A source just below the rate (29.97 for 30) gives each frame once. packed: of pack_times; b"": frames
    source_fps apart.
    """
    # When each frame is shown, in seconds after the first.
    fps, rounding = rate_taken(fps, source_fps), 1e-6
    if packed:
        numerator, denominator, _ = _HEADER.unpack_from(packed)
        ticks = unpack_times(packed).ticks[first : first + count]
        seconds = (ticks - ticks[0]) * (numerator / denominator)
        rounding += min(0.5 * numerator / denominator, 0.0005)
    else:
        seconds = np.arange(count) / source_fps
    # The frame on the screen at each of the times wanted.
    wanted = np.arange(int((seconds[-1] + rounding) * fps) + 1) / fps
    return np.searchsorted(seconds, wanted + rounding, side="right") - 1


def rate_taken(fps: float, source_fps: float) -> float:
    """Return the rate asked for, or that of a source which is at most 0.1 % slower."""
    return source_fps if SAME_RATE * fps <= source_fps < fps else fps


def mean_rate(ticks: Sequence[int | None], tick_s: float, stated: float) -> float:
    """Return frames per second: the rate that the file states, or, where that is more than a frame off, the mean by time stamps.

    A file of a variable rate often states one that its frames do not have. tick_s: seconds of a tick.
    """
    if len(ticks) < 2 or not rising(ticks):
        return stated
    return _rate(len(ticks) - 1, (ticks[-1] - ticks[0]) * tick_s, stated)


def _rate(steps: int, seconds: float, stated: float) -> float:
    return stated if stated and abs(seconds * stated - steps) <= 1 else float(steps / seconds)


def packed_rate(packed: bytes, stated: float) -> float:
    """Compute `mean_rate` of a whole video, quickly. packed: of pack_times; b"": the rate that the file states."""
    if not packed:
        return stated
    numerator, denominator, _ = _HEADER.unpack_from(packed)
    body = zlib.decompress(packed[_HEADER.size :])
    steps = np.frombuffer(body, "<i8", len(body) // _ROW)  # the first of them is 0
    passed = int(steps.sum()) * (numerator / denominator)
    return _rate(len(steps) - 1, passed, stated) if len(steps) > 1 else stated


def own_ticks(ticks: Sequence[int | None], tick_s: float, fps: float) -> tuple[int, ...] | None:
    """Return the time stamps from the first frame on, of frames that do not come evenly; None: each comes 1 / fps after the last.

    What a clock of milliseconds rounds is even. Without rising times, or a rate, there is nothing to keep.
    """
    if not fps or not rising(ticks):
        return None
    passed = np.asarray(ticks, np.int64) - ticks[0]
    uneven = np.abs(passed * tick_s - np.arange(len(passed)) / fps) > max(tick_s, 0.001) + 1e-6
    return tuple(passed.tolist()) if uneven.any() else None


def cut_between(packed: bytes, begin_ms: int, end_ms: int, fps: float) -> tuple[int, int, int, float]:
    """Find (first, stop, tick, rate): frames first <= n < stop have begin <= time < end, times counted from frame 0.

    tick: the presentation time that the file gives the first of them; 0 if there is none. rate: theirs, as `mean_rate`
    has it where the file states `fps`.

    packed: of pack_times; not b"". end_ms: below 0 means to the end. Whole numbers throughout: no rounding puts a frame on
    the wrong side.
    """
    numerator, denominator, _ = _HEADER.unpack_from(packed)
    ticks = unpack_times(packed).ticks
    # The first tick at or after each limit, rounded up.
    limits = [-(-ms * denominator // (numerator * 1000)) for ms in (begin_ms, end_ms)]
    first, stop = np.searchsorted(ticks - ticks[0], limits)
    stop = stop if end_ms >= 0 else len(ticks)
    tick = int(ticks[first]) if first < stop else 0
    rate = mean_rate(ticks[first:stop], numerator / denominator, fps)
    return int(first), int(stop), tick, rate
