"""Clips by time stamp: which frames of a video lie between two times, exactly, whatever its frame rate does."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.video import av_errors, best_stream, read_frames, upright

_TIME = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d)(?:\.(\d{1,6}))?")
_HEADER = struct.Struct("<qqq")


def parse_time(text: str) -> int:
    """ "H:MM:SS.mmm" to whole ms; more than three decimals must be zero. Raises ValueError for anything else."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"time {text!r}: write H:MM:SS.mmm, e.g. 0:00:12.500")
    hours, minutes, seconds, fraction = match.groups()
    fraction = (fraction or "").ljust(6, "0")
    if fraction[3:] != "000":
        raise ValueError(f"time {text!r}: finer than a millisecond; round it")
    return ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int(fraction[:3])


def show_time(ms: int) -> str:
    """Whole ms as "H:MM:SS.mmm"."""
    seconds, ms = divmod(ms, 1000)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{ms:03d}"


def pack_times(ticks: Sequence[int | None], numerator: int, denominator: int) -> bytes:
    """Presentation times of a video's frames in display order, packed; one tick lasts numerator / denominator seconds.

    b"" when a frame has none or they do not rise: such a video cannot be cut by time. A steady rate takes 40 bytes.
    """
    if not ticks or None in ticks or denominator < 1:
        return b""
    steps = np.diff(np.asarray(ticks, np.int64), prepend=ticks[0])
    if (steps[1:] <= 0).any():
        return b""
    return _HEADER.pack(numerator, denominator, ticks[0]) + zlib.compress(steps.astype("<i8").tobytes())


def frames_between(packed: bytes, begin_ms: int, end_ms: int) -> tuple[int, int, int]:
    """(first, stop, tick): frames first <= n < stop have begin <= time < end, times counted from frame 0.

    tick: the presentation time that the file gives the first of them; 0 if there is none.

    packed: of pack_times; not b"". Whole numbers throughout: no rounding puts a frame on the wrong side.
    """
    numerator, denominator, start = _HEADER.unpack_from(packed)
    steps = np.frombuffer(zlib.decompress(packed[_HEADER.size :]), "<i8")
    ticks = np.cumsum(steps)  # from 0
    limits = [-(-ms * denominator // (numerator * 1000)) for ms in (begin_ms, end_ms)]
    first, stop = np.searchsorted(ticks, limits)
    tick = start + int(ticks[first]) if first < stop else 0
    return int(first), int(stop), tick


def read_cut(path: str | Path, first: int, tick: int, indices: Sequence[int]) -> np.ndarray:
    """Frames first + indices of a video file, found by seeking to `tick`, the presentation time of frame `first`.

    Returns uint8 (len(indices), H, W, 3), the frames that read_frames gives, which is asked when the file cannot be
    entered before them. Decodes from the key frame before, not from the beginning of an hour of video.
    """
    import av

    indices, kept, count = [int(n) for n in indices], {}, None
    try:
        with av.open(str(path)) as container:
            stream = best_stream(container, Path(path))
            container.seek(tick, stream=stream)
            for frame in container.decode(stream):
                if count is None and (frame.pts is None or frame.pts > tick):
                    break
                if count is None and frame.pts < tick:
                    continue
                count = 0 if count is None else count + 1
                if count in indices:
                    kept[count] = upright(frame)
                if count == max(indices):
                    return np.stack([kept[n] for n in indices])
    except av_errors():
        kept.clear()  # read_frames says what is wrong
    return read_frames(path, [first + n for n in indices])
