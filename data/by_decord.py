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

from data.video import BadVideo, iterate_frames

logger = logging.getLogger(__name__)

_MOST = 384 << 20  # bytes of all frames of a file: as much may wait to be read


def version() -> str:
    """Its name and version; "" and a warning where it cannot be imported."""
    try:
        import decord
    except (ImportError, OSError) as error:
        logger.warning("decord cannot be imported (%s): all videos are read with PyAV", error)
        return ""
    return f"decord {decord.__version__}"


def pictures(path: str | Path, wanted: Sequence[int], count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(n, uint8 (H, W, 3)) of rising frame numbers; ends early where decord fails or does not count `count` frames."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        for n in wanted if len(reader) == count else ():
            yield n, reader[n].asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        logger.warning("%s: decord failed (%s); read with PyAV", path, " ".join(str(error).split())[:120])


def agrees(path: str) -> bool:
    """Whether decord shows the frames of PyAV: in order, and after a seek to each of its key frames, with skips too.

    Not asked of files with more than 384 MiB of frames.
    """
    import decord

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
    count = len(expected)
    groups = [range(*ends) for ends in pairwise(sorted({0, *keys, count}))]
    backward = [n for group in reversed(groups) for n in group]
    skipping = [n for group in reversed(groups) for n in group[2::3]]
    return all(
        [n for n, picture in pictures(path, wanted, count) if _digest(picture) == expected[n]] == wanted
        for wanted in (list(range(count)), backward, skipping)
    )


def _digest(picture: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(picture), len(picture))
