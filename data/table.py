"""A million videos in columns: about 100 bytes each, and processes that fork share them instead of copying them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.cut import TO_THE_END, show_time
from data.scan import ScanRecord

WHOLE = -(1 << 62)  # as a tick: the whole file, not a cut of it


@dataclass(frozen=True)
class Video:
    """One usable video: name (path below the root), scan record, label (-1 when unconditional).

    first, tick: where it begins in its file, in frames and as a presentation time; record.num_frames counts from
    there. tick is None unless a list cuts clips out of longer videos.
    """

    name: str
    record: ScanRecord
    label: int = -1
    first: int = 0
    tick: int | None = None


class Texts(Sequence):
    """Strings in one buffer; any file name is kept as it is."""

    def __init__(self, texts: Sequence[str]):
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"{index}: there are {len(self)}")
        piece = self.bytes[self.ends[index] : self.ends[index + 1]]
        return piece.tobytes().decode("utf-8", "surrogateescape")


class Blobs:
    """n byte strings in one buffer, b"" until they are put in, in any order."""

    def __init__(self, count: int):
        self.places, self.buffer = np.zeros((count, 2), np.int64), bytearray()

    def put(self, index: int, content: bytes) -> None:
        self.places[index] = len(self.buffer), len(self.buffer) + len(content)
        self.buffer += content

    def __getitem__(self, index: int) -> bytes:
        start, end = self.places[index]
        return bytes(self.buffer[start:end])


class VideoTable(Sequence):
    """A sequence of Video, made when asked for; `select` and slices share the columns."""

    def __init__(
        self, base: str, files: Sequence[str], columns: dict[str, np.ndarray], times: Blobs | None = None
    ):
        """Make a table. base: folder of the files. files: paths below it, one per video. times: the scan's timelines, if any.

        columns, each (len(files), ...): num_frames, width, height, fps; if there are any: label; first, tick, and
        cut int64 (n, 2), begin and end of the clip in ms; file, the number of the file in `times`; decord, its reader.
        """
        self.base, self.columns, self.times = base, columns, times
        self.files = files if isinstance(files, Texts) else Texts(files)
        self.rows = np.arange(len(files), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """Return one number of each video, e.g. column("num_frames"): (len(self),)."""
        return self.columns[name][self.rows]

    def select(self, chosen: np.ndarray) -> VideoTable:
        """Select the videos where `chosen`, bool (len(self),), is true, or those with the numbers `chosen`."""
        part = copy.copy(self)
        part.rows = self.rows[chosen]
        return part

    def name(self, index: int) -> str:
        """Return the path below the root; with begin and end where a list cuts clips out of the file."""
        row = self._row(index)
        if "cut" not in self.columns:
            return self.files[row]
        begin, end = map(int, self.columns["cut"][row])
        if (begin, end) == (0, TO_THE_END):
            return self.files[row]
        return f"{self.files[row]}[{show_time(begin)}-{'' if end == TO_THE_END else show_time(end)}]"

    def label(self, index: int) -> int:
        """Return the class, -1 when unconditional."""
        row = self._row(index)
        return int(self.columns["label"][row]) if "label" in self.columns else -1

    def __getitem__(self, index: int | slice) -> Video | VideoTable:
        """Make the video of a row; of a slice a table that shares the columns."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row, columns = self._row(index), self.columns
        # The scan's record of the file; num_frames is that of the clip where a list cuts one out.
        path = f"{self.base}/{self.files[row]}"
        times = self.times[columns["file"][row]] if self.times is not None else b""
        numbers = {key: int(columns[key][row]) for key in ("num_frames", "width", "height")}
        decord = bool(columns["decord"][row]) if "decord" in columns else False
        record = ScanRecord(path, fps=float(columns["fps"][row]), times=times, decord=decord, **numbers)
        # Where the clip begins in its file.
        video = Video(self.name(index), record, self.label(index))
        if "tick" in columns and columns["tick"][row] != WHOLE:
            first, tick = int(columns["first"][row]), int(columns["tick"][row])
            return dataclasses.replace(video, first=first, tick=tick)
        return video

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"video {index}: there are {len(self)}")
        return int(self.rows[index])
