"""decord as another reader, for files on which the scan saw it show what PyAV shows, bit for bit.

It indexes a file again for each clip, and is wrong on some without a word (cut by an edit list, pixels that are not
square, B-frames in AVI); on others it ends the process. It decodes ahead of its reader without a limit. So PyAV is the
reader unless the other is asked for.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.decoder import BadVideo
from data.video import iterate_frames

logger = logging.getLogger(__name__)

_MOST = 384 << 20  # bytes of all frames of a file: as much may wait to be read


def version() -> str:
    """Return decord's name and version; "" and a warning where it cannot be imported."""
    try:
        import decord
    except (ImportError, OSError) as error:
        logger.warning("decord cannot be imported (%s): all videos are read with PyAV", error)
        return ""
    return f"decord {decord.__version__}"


def pictures(path: str | Path, wanted: Sequence[int], count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (n, uint8 (H, W, 3)) of rising frame numbers; ends early where decord fails or does not count `count` frames."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        for n in wanted if len(reader) == count else ():
            yield n, reader[n].asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        logger.warning("%s: decord failed (%s); read with PyAV", path, " ".join(str(error).split())[:120])


def agrees(path: str) -> bool:
    """Compare decord with PyAV: in order, and after a seek to each of its key frames, with skips too. True where all agree.

    False for files with more than 384 MiB of frames, which decord does not read here.
    """
    import decord

    # A digest of each frame as PyAV shows it.
    expected: list[int] = []
    try:
        for picture in iterate_frames(path):
            expected.append(_digest(picture))
            if len(expected) * picture.nbytes > _MOST:
                return False
        decord.logging.set_level(decord.logging.QUIET)
        keys = decord.VideoReader(path, num_threads=1).get_key_indices()
    except (decord.DECORDError, RuntimeError, BadVideo):
        return False
    # Orders of reading: as it comes, and the groups of pictures from the last to the first, whole and every third frame.
    count, backward, skipping = len(expected), [], []
    for begin, end in reversed(list(pairwise(sorted({0, *keys, count})))):
        backward += range(begin, end)
        skipping += range(begin + 2, end, 3)
    # decord must show every frame asked for, and each as PyAV does.
    for wanted in (list(range(count)), backward, skipping):
        same = [n for n, picture in pictures(path, wanted, count) if _digest(picture) == expected[n]]
        if same != wanted:
            return False
    return True


def _digest(picture: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(picture), len(picture))
