"""Open one file: its video stream, its pictures as players show them, and what is wrong with it in a few words."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data.core.lazy import lazy

av = lazy("av")
reformatter = lazy("av.video.reformatter")
BT709 = 1  # as H.273 numbers it


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
    """Turn errors about this file into BadVideo with a reason in a few words; those of the machine pass as OSError."""
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
    """Choose the video stream that players choose, set to decode on one thread. Raises BadVideo if there is none."""
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
        """Return `_turn` of a frame; the matrix is read only when the angle changes, for reading keeps frames from being freed."""
        if frame.rotation != self.rotation:
            self.rotation, self.turn = frame.rotation, _turn(frame)
        return self.turn

    def size(self, frame) -> tuple[int, int]:
        """Return (width, height) of the picture."""
        width, height = round(frame.width * self.stretch[0]), round(frame.height * self.stretch[1])
        return (height, width) if self.turned(frame)[0] else (width, height)

    def picture(self, frame) -> np.ndarray:
        """Convert a frame to RGB uint8 (H, W, 3)."""
        # PyAV 15 and 16 look at the tag only where another matrix is asked for; RGB has none, so the answer is the same.
        matrices = (
            {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"} if frame.colorspace == BT709 else {}
        )
        picture = self.reformatter.reformat(frame, format="rgb24", **matrices).to_ndarray()
        # Square pixels first, then the turn: the aspect ratio is that of the stored frame.
        if max(self.stretch) > 1:
            height, width, _ = picture.shape
            size = round(width * self.stretch[0]), round(height * self.stretch[1])
            picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        transposed, rows, columns = self.turned(frame)
        return (picture.swapaxes(0, 1) if transposed else picture)[::rows, ::columns]


def _turn(frame) -> tuple[bool, int, int]:
    """Read (transposed, step of the rows, step of the columns) that the frame's display matrix asks for, in quarter turns."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, 1, 1
    # x' = a x + c y, y' = b x + d y (ISO 14496-12, 8.3.2), whole numbers of 1 / 65536
    a, b, _, c, d = struct.unpack_from("<5i", bytes(data))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, -1 if d < 0 else 1, -1 if a < 0 else 1
    return True, -1 if b < 0 else 1, -1 if c < 0 else 1


def read_image(path: Path) -> np.ndarray:
    """Read an image file as RGB uint8 (H, W, 3). Raises ValueError if it cannot be read."""
    try:
        with reading(path), Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (BadVideo, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadVideo(f"{path}: not a readable image ({error})", getattr(error, "final", True)) from error
