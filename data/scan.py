"""Find damaged videos before training does: decoders hand out grey or repeated frames of many of them without a word.

A file is damaged when decoding raises, a frame is marked corrupt, FFmpeg reports an error, or frames are missing.
Each file is decoded once, in a process of its own kind: a crash or a hang of the decoder is one damaged record.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from PIL import Image

from data.cut import pack_times
from data.video import av_errors, best_stream, list_frames

logger = logging.getLogger(__name__)

_MISSING_ALLOWED = 2  # frames: headers of intact AVI files with dropped frames are off by one or two
_MEMORY_BYTES = 4 << 30  # what one worker may allocate
_START_S = 300.0  # for a process to import what it needs


@dataclass(frozen=True)
class ScanRecord:
    """What the scan saw of one file or folder of frames; damaged is "" or the reason in a few words.

    times: presentation times of the frames as data/cut.py packs them, b"" when unknown.
    """

    path: str
    num_frames: int = 0
    width: int = 0
    height: int = 0
    fps: float = 0.0
    damaged: str = ""
    times: bytes = field(default=b"", repr=False, compare=False)


def scan_file(path: str | Path) -> ScanRecord:
    """Decode a whole video file or folder of frames; the record says what is wrong, nothing is raised for damage."""
    path = Path(path)
    if path.is_dir():
        return _scan_folder(path)
    try:
        if path.stat().st_size == 0:
            return ScanRecord(str(path), damaged="empty file")
        return _scan_video(path)
    except MemoryError:
        return ScanRecord(str(path), damaged="decoding needs too much memory")
    except av_errors() as error:
        text = " ".join(str(getattr(error, "strerror", None) or error).split()).replace(f"{path}: ", "")
        return ScanRecord(str(path), damaged=f"cannot be decoded: {text[:100] or type(error).__name__}")


def _scan_video(path: Path) -> ScanRecord:
    import av

    sizes, ticks, corrupt, dropped = set(), [], 0, 0
    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else a file is not told what a file before it was
    try:
        with av.logging.Capture() as messages, av.open(str(path)) as container:
            stream = best_stream(container, path)
            if container.format.name.endswith("_pipe"):
                return ScanRecord(str(path), damaged=f"a picture ({container.format.name}), not a video")
            fps, expected, tick = float(stream.average_rate or 0), stream.frames, stream.time_base
            for packet in container.demux(stream):
                dropped += packet.is_discard  # cut away by the file's own edit list
                for frame in packet.decode():
                    ticks.append(frame.pts)
                    corrupt += frame.is_corrupt
                    turned = frame.rotation % 180 != 0
                    sizes.add((frame.height, frame.width) if turned else (frame.width, frame.height))
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip_repeated)
    count = len(ticks)
    missing = expected - dropped - count
    reason = ""
    if not count:
        reason = "no frame could be decoded"
    elif missing > _MISSING_ALLOWED:
        reason = f"cut short: {count} of {expected} frames"
    elif corrupt:
        reason = f"{corrupt} of {count} frames corrupt"
    elif len(sizes) > 1:
        reason = f"the frame size changes: {sorted(sizes)}"
    elif messages:
        reason = f"decoder error: {' '.join(messages[0][2].split())[:100]}"
    width, height = min(sizes, default=(0, 0))
    times = pack_times(ticks, *tick.as_integer_ratio()) if tick else b""
    return ScanRecord(str(path), count, width, height, fps, reason, times)


def _scan_folder(path: Path) -> ScanRecord:
    frames, sizes = list_frames(path), set()
    if not frames:
        return ScanRecord(str(path), damaged="no frames in this folder")
    for frame in frames:
        try:
            with Image.open(frame) as picture:
                sizes.add(picture.size)
                # An eighth of the size for JPEG: all bytes are still read, most of the work is not done.
                picture.draft("RGB", (max(1, picture.width // 8), max(1, picture.height // 8)))
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return ScanRecord(str(path), len(frames), damaged=f"{frame.name}: {str(error)[:80]}")
    numbers = [re.search(r"([0-9]+)$", frame.stem) for frame in frames]
    reason = ""
    if len(sizes) > 1:
        reason = f"frames differ in size: {sorted(sizes)[:3]}"
    elif all(numbers):
        values = [int(number.group()) for number in numbers]
        steps = [after - before for before, after in itertools.pairwise(values)]
        if len(set(steps)) > 1:
            at = next(n for n, step in enumerate(steps) if step != min(steps, key=abs))
            reason = f"frames missing between {frames[at].name} and {frames[at + 1].name}"
    width, height = min(sizes)
    return ScanRecord(str(path), len(frames), width, height, 0.0, reason)


def _worker(connection) -> None:
    """Scan what the parent names until it hangs up."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    except (ImportError, ValueError, OSError) as error:
        logger.debug("no memory limit for the scan on this system: %s", error)
    connection.send(None)  # ready
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        connection.send(scan_file(name))


class _Process:
    """One scanning process and the file it is at ("" until it is ready)."""

    def __init__(self, context):
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_worker, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.name, self.deadline = "", time.monotonic() + _START_S

    def give(self, name: str, timeout_s: float) -> None:
        """Hand over a file; its time starts now."""
        self.name, self.deadline = name, time.monotonic() + timeout_s
        try:
            self.connection.send(name)
        except OSError:
            logger.debug("scan process ended before %s", name)  # seen again, and recorded, by answer()

    def answer(self, readable: bool, timeout_s: float) -> tuple[bool, ScanRecord | None]:
        """(alive, record): the record of the file at hand; (True, None) if just ready."""
        if readable:
            try:
                return True, self.connection.recv()
            except (EOFError, OSError):
                if self.name:
                    return False, ScanRecord(self.name, damaged="the decoder crashed on this file")
        elif self.name:
            return False, ScanRecord(self.name, damaged=f"not decoded within {timeout_s:g} s")
        raise OSError("a scan process did not start; is the program's main part behind `if __name__ == ...`?")

    def stop(self) -> None:
        """End the process, busy or not."""
        self.connection.close()
        self.process.terminate()
        self.process.join()


def scan_all(names: Sequence[str], workers: int, timeout_s: float) -> Iterator[ScanRecord]:
    """Records in the order they are done; a process that dies or takes too long is replaced."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the parent's threads
    waiting = list(reversed(names))
    pool = [_Process(context) for _ in range(workers)]
    try:
        while pool:
            ready = wait([process.connection for process in pool], timeout=0.5)
            for process in list(pool):
                readable = process.connection in ready
                if not readable and time.monotonic() <= process.deadline:
                    continue
                alive, record = process.answer(readable, timeout_s)
                if record is not None:
                    yield record
                if alive and waiting:
                    process.give(waiting.pop(), timeout_s)
                    continue
                process.stop()
                pool.remove(process)
                if waiting:
                    pool.append(_Process(context))
    finally:
        for process in pool:
            process.stop()
