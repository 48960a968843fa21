"""Clips by time stamp: which frames of a video lie between two times, exactly, whatever its frame rate does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.timeline import unpack_times
from data.video import Frames, packet_times

TO_THE_END = -1  # as an end in ms
_TIME = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d)(?:\.(\d{1,6}))?")


def parse_time(text: str) -> int:
    """Parse "H:MM:SS.mmm" to whole ms; more than three decimals must be zero. Raises ValueError for anything else."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"time {text!r}: write H:MM:SS.mmm, e.g. 0:00:12.500")
    hours, minutes, seconds, fraction = match.groups()
    fraction = (fraction or "").ljust(6, "0")
    if fraction[3:] != "000":
        raise ValueError(f"time {text!r}: finer than a millisecond; round it")
    return ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int(fraction[:3])


def show_time(ms: int) -> str:
    """Write whole ms as "H:MM:SS.mmm"."""
    seconds, ms = divmod(ms, 1000)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{ms:03d}"


def cut_frames(
    path: str | Path,
    first: int,
    tick: int,
    indices: Sequence[int],
    times: bytes = b"",
    decord: bool = False,
) -> Frames:
    """Return frames first + indices of a video, decoded when wanted; `tick` is the presentation time of frame `first`.

    times: of the scan (data/timeline.py). When it, or what the packets say without it, gives frame `first` another
    time, the file is not the one that was cut, and is read from its beginning.
    """
    times = times or packet_times(path)
    line = unpack_times(times) if times else None
    known = line is not None and first < len(line.ticks) and line.ticks[first] == tick
    return Frames(path, [first + int(n) for n in indices], times if known else None, decord)


def read_cut(
    path: str | Path, first: int, tick: int, indices: Sequence[int], times: bytes = b""
) -> np.ndarray:
    """Read `cut_frames` into an array: uint8 (len(indices), H, W, 3)."""
    return np.asarray(cut_frames(path, first, tick, indices, times))
