"""Find damaged videos before training does: decoders hand out grey or repeated frames of many of them without a word.

A file is damaged when decoding raises, a frame is marked corrupt, FFmpeg reports an error, or frames are missing.
Each file is decoded once in a process of its own kind (data/processes.py), by the reader of training. Places where the
reader may begin are tried, and kept if the frames after them are those of decoding from frame 0. A fault of the machine
(no memory, no handles, a broken package) is not a verdict: it stops the scan.
"""

from __future__ import annotations

import itertools
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.core.lazy import lazy
from data.decoder import BadVideo, Screen, best_stream, reading
from data.finding import list_frames
from data.processes import Pool
from data.timeline import mean_rate, pack_times, rising

av = lazy("av")

_MISSING_ALLOWED = 2  # frames: headers of intact AVI files with dropped frames are off by one or two
MEMORY_BYTES = 4 << 30  # what one process may allocate
_ENTRIES_APART = 12  # frames, at least: what lies nearer is decoded quickly
_TRIED = 8  # entries of a file: all of a clip, some of a film
_COMPARED = 48  # frames after an entry
_ALIKE = 20  # files of one and the same reason, with no good one before them: not the files' fault


@dataclass(frozen=True)
class ScanRecord:
    """What the scan saw of one file or folder of frames; damaged is "" or the reason in a few words.

    times: when its frames are shown and where to enter, as data/timeline.py packs them; b"" when unknown.
    decord: read it with decord, which was compared on it (data/by_decord.py).
    final: False when the reason may be gone the next time: it is not kept.
    """

    path: str
    num_frames: int = 0
    width: int = 0
    height: int = 0
    fps: float = 0.0
    damaged: str = ""
    times: bytes = field(default=b"", repr=False, compare=False)
    final: bool = field(default=True, repr=False, compare=False)
    decord: bool = field(default=False, repr=False, compare=False)


@lru_cache(maxsize=1)
def reader_name() -> str:
    """Return name and versions of what reads videos here: a verdict is theirs."""
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"av {av.__version__}, libavcodec {codec}"


def scan_file(path: str | Path) -> ScanRecord:
    """Decode a whole video file or folder of frames; the record says what is wrong with it.

    Raises OSError for a fault of the machine, and whatever a fault of the program raises.
    """
    path = Path(path)
    try:
        with reading(path):
            status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return _scan_folder(path)
        if not stat.S_ISREG(status.st_mode):
            return ScanRecord(str(path), damaged="neither a file nor a folder")
        return _scan_video(path) if status.st_size else ScanRecord(str(path), damaged="empty file")
    except BadVideo as error:
        return ScanRecord(str(path), damaged=f"cannot be decoded: {error}", final=error.final)


def _scan_video(path: Path) -> ScanRecord:
    """Decode a video file and say what is wrong with it, when its frames are shown, and where decoding may begin."""
    # Decode the whole file once: times, sizes, digests and key frames, and all that the decoder complains of.
    sizes, ticks, digests, keys = set(), [], [], []
    corrupt = dropped = packets = 0
    with _all_errors():
        with av.logging.Capture() as messages, reading(path), av.open(str(path)) as container:
            stream = best_stream(container)
            if container.format.name.endswith("_pipe"):
                return ScanRecord(str(path), damaged=f"a picture ({container.format.name}), not a video")
            fps, expected, tick = float(stream.average_rate or 0), stream.frames, stream.time_base
            screen, is_mov = Screen(stream), "mov" in container.format.name
            for packet in container.demux(stream):
                dropped += packet.is_discard  # cut away by the file's own edit list
                packets += packet.size > 0
                for frame in packet.decode():
                    if frame.key_frame:
                        keys.append(len(ticks))
                    ticks.append(frame.pts)
                    digests.append(_digest(frame))
                    corrupt += frame.is_corrupt
                    sizes.add(screen.size(frame))
        # Frames that the header promises and that neither an edit list cuts nor a packet lacks are missing.
        messages = list(messages)
        count = len(ticks)
        missing = expected - dropped - count
        if missing > _MISSING_ALLOWED and is_mov:
            missing -= _packets(path) - packets  # whole groups of pictures before the cut are not even read
        # The first of these that holds is why the file is left out.
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
        # Where reading may begin: key frames from which a seek gives the frames that decoding from 0 gave.
        entries = _entries(path, ticks, digests, keys) if not reason and rising(ticks) else []
    width, height = min(sizes, default=(0, 0))
    times = pack_times(ticks, tick.numerator, tick.denominator, entries) if tick else b""
    fps = mean_rate(ticks, float(tick), fps) if tick else fps
    return ScanRecord(str(path), count, width, height, fps, reason, times)


@contextmanager
def _all_errors() -> Iterator[None]:
    """Let FFmpeg tell every error, and nothing less; also one that it told of a file before."""
    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        yield
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip_repeated)


def _digest(frame) -> int:
    """Digest the decoded samples of a frame, before any conversion."""
    kind, value = frame.format, 0
    packed = len(frame.planes) == 1
    sample = kind.padded_bits_per_pixel // 8 if packed else 1 + any(c.bits > 8 for c in kind.components)
    for plane in frame.planes:  # what lies beyond the width is the decoder's own
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        value = zlib.crc32(np.ascontiguousarray(rows[:, : plane.width * sample]), value)
    return value


def _packets(path: Path) -> int:
    """Count the packets of a file's video, those that its edit list hides too."""
    with reading(path), av.open(str(path), options={"ignore_editlist": "1"}) as container:
        return sum(packet.size > 0 for packet in container.demux(best_stream(container)))


def _entries(path: Path, ticks: list[int], digests: list[int], keys: list[int]) -> list[int]:
    """Find where decoding may begin: key frames after which the decoder shows what it shows coming from frame 0."""
    # Key frames that are not too near one another.
    candidates = [0]
    for key in keys:
        if key - candidates[-1] >= _ENTRIES_APART:
            candidates.append(key)
    candidates = candidates[1:]
    # Some of them are tried; when all of these are good, so are the others.
    tried = candidates
    if len(candidates) > _TRIED:
        tried = [candidates[n] for n in np.linspace(0, len(candidates) - 1, _TRIED).astype(int)]
    good = []
    if tried:
        with reading(path), av.open(str(path)) as container:
            stream = best_stream(container)
            good = [entry for entry in tried if _same(container, stream, ticks, digests, entry)]
    return candidates if good == tried else good


def _same(container, stream, ticks: list[int], digests: list[int], entry: int) -> bool:
    """Seek to an entry and compare the frames after it with those of decoding from frame 0."""
    at, end = entry, min(entry + _COMPARED, len(ticks))
    try:
        container.seek(ticks[entry], stream=stream)
        for frame in container.decode(stream):
            if at == entry and frame.pts is not None and frame.pts < ticks[entry]:
                continue
            if frame.pts != ticks[at] or frame.is_corrupt or _digest(frame) != digests[at]:
                return False
            at += 1
            if at == end:
                return True
    except (av.FFmpegError, OSError):
        return False
    return False


def _scan_folder(path: Path) -> ScanRecord:
    """Decode all pictures of a folder of frames; they must have one size, and numbers without a gap."""
    with reading(path):
        frames, sizes = list_frames(path), set()
    if not frames:
        return ScanRecord(str(path), damaged="no frames in this folder")
    # Every picture can be decoded.
    for frame in frames:
        try:
            with reading(frame), Image.open(frame) as picture:
                sizes.add(picture.size)
                # An eighth of the size for JPEG: all bytes are still read, most of the work is not done.
                picture.draft("RGB", (max(1, picture.width // 8), max(1, picture.height // 8)))
                picture.load()
        except (BadVideo, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason, final = f"{frame.name}: {str(error)[:80]}", getattr(error, "final", True)
            return ScanRecord(str(path), len(frames), damaged=reason, final=final)
    # They have one size, and the numbers at the end of their names, if all have one, one step.
    numbers = [re.search(r"([0-9]+)$", frame.stem) for frame in frames]
    reason = ""
    if len(sizes) > 1:
        reason = f"frames differ in size: {sorted(sizes)[:3]}"
    elif all(numbers):
        values = [int(number.group()) for number in numbers]
        steps = [after - before for before, after in itertools.pairwise(values)]
        usual = min(steps, key=abs, default=0)
        for at, step in enumerate(steps):
            if step != usual and not reason:
                reason = f"frames missing between {frames[at].name} and {frames[at + 1].name}"
    width, height = min(sizes)
    return ScanRecord(str(path), len(frames), width, height, 0.0, reason)


def scan_all(names: Sequence[str], workers: int, timeout_s: float) -> Iterator[ScanRecord]:
    """Yield records in the order they are done. A process that dies or takes too long is replaced, its file tried once more."""
    with Pool(workers, timeout_s, MEMORY_BYTES) as pool:
        waiting, asked = iter(names), {}
        while True:
            # Two files per process are on their way.
            for name in itertools.islice(waiting, 2 * workers - len(asked)):
                asked[pool.submit(scan_file, name)] = name
            if not asked:
                return
            ticket, record = pool.wait()
            name = asked.pop(ticket)
            if isinstance(record, BadVideo):
                record = ScanRecord(name, damaged=str(record), final=record.final)
            yield record


def plausible(records: Iterable[ScanRecord]) -> Iterator[ScanRecord]:
    """Pass the records on, held back until one of the files is good or two differ in their faults.

    Raises OSError when the first 20 all fail for one reason: that is this machine's or the program's fault.
    """
    held: list[ScanRecord] | None = []
    for record in records:
        if held is None:
            yield record
            continue
        held.append(record)
        told = [one.damaged for one in held if one.damaged != "empty file"]
        if "" in told or len(set(told)) > 1:
            yield from held
            held = None
        elif len(told) >= _ALIKE:
            raise OSError(
                f"the first {len(told)} files all fail for one reason, e.g. {record.path}: {told[0]}; is it this "
                f"machine's software ({reader_name()})? Nothing was noted against the files"
            )
    yield from held or []
