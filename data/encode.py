"""Write videos: H.264 for people, FFV1 without loss for metrics, animated WebP for logs. uint8 (T, H, W, 3) in."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from data.core.files import fsync, temporary_name
from data.core.lazy import lazy
from data.decoder import BT709

av = lazy("av")


@dataclass(frozen=True)
class Clock:
    """When the frames of a video are shown: rising ticks, of `base` seconds each, from 0 on."""

    base: Fraction
    ticks: tuple[int, ...]


# Seconds of the finest tick. A .mkv has no other; a .mp4 has 31 bits for the ticks of a frame, too few for nanoseconds.
_FINEST = {".mp4": Fraction(1, 90000), ".mkv": Fraction(1, 1000)}
# In ticks: frames nearer than a tick are moved apart, but a whole video of them is not stretched.
_MOST_LATE = 10
_LIMITED = 1  # as FFmpeg numbers ranges
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}  # not to be mistaken for a fault of the video


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name in the same folder (made if missing); it becomes `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path, path.suffix)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_frames(frames: np.ndarray, fps: float) -> None:
    """Raise ValueError unless frames are uint8 (T, H, W, 3), T >= 1, and the rate is above 0."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames {frames.dtype} {frames.shape}: need uint8 (T, H, W, 3), T >= 1")
    if not fps > 0:
        raise ValueError(f"fps={fps}: must be above 0")


@contextmanager
def _writing(
    path: Path,
    height: int,
    width: int,
    fps: float,
    codec: str,
    pixel_format: str,
    options: dict,
    audio: Path | None = None,
    clock: Clock | None = None,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that adds frames uint8 (n, H, W, 3) to a new file, which is there when the block ends well."""
    with ExitStack() as stack:
        # The picture's stream, at a steady rate or with the times of a clock.
        temporary = stack.enter_context(atomic_path(path))
        container = stack.enter_context(av.open(str(temporary), "w"))
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        # Players take a large picture for BT.709 and others for BT.601, so it is written that way, and says so.
        hd = pixel_format.startswith("yuv") and (width >= 1280 or height > 576)
        if hd:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = _LIMITED
        shown = iter(clock.ticks if clock else ())
        if clock:
            stream.codec_context.time_base = clock.base
        # The sound's, if the file has any and the container takes it.
        source = stack.enter_context(av.open(str(audio))) if audio else None
        sound = source.streams.best("audio") if source else None
        if sound:
            with _about_sound(path):
                copy = container.add_stream_from_template(sound)
                # some kinds are refused by the header alone
                with av.open(io.BytesIO(), "w", format=container.format.name) as trial:
                    trial.add_stream_from_template(sound)
                    trial.start_encoding()

        def add(frames: np.ndarray) -> None:
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame = frame.reformat(format=pixel_format, dst_colorspace="ITU709" if hd else None)
                if clock:
                    frame.pts, frame.time_base = next(shown), clock.base
                container.mux(stream.encode(frame))

        yield add
        # The frames that the encoder still holds, then the sound.
        container.mux(stream.encode())
        if sound:
            begin = round(_begin(audio) / sound.time_base)
            with _about_sound(path):
                for packet in source.demux(sound):
                    # the picture begins at 0: so must what is heard with it, and what ends before it cannot be kept
                    if packet.dts is None or (begin and packet.dts + (packet.duration or 0) < begin):
                        continue
                    packet.pts = packet.dts = packet.dts - begin  # sound is heard in the order of decoding
                    packet.stream = copy
                    container.mux(packet)


@contextmanager
def _about_sound(path: Path) -> Iterator[None]:
    """Give errors, other than the disk's, the way out for sound that cannot be copied."""
    try:
        yield
    except (av.FFmpegError, ValueError) as error:
        if getattr(error, "errno", None) in _DISK:
            raise
        way_out = "a .mkv takes more kinds of sound, --no-audio leaves it out"
        raise ValueError(f"{path}: the sound cannot be copied ({error}); {way_out}") from error


def _begin(path: Path) -> Fraction:
    """Find when the first picture of a file is shown, in seconds; 0 where the file does not say."""
    with av.open(str(path)) as container:
        video = container.streams.best("video")
        first = next(container.decode(video), None) if video else None
        return Fraction(0) if first is None or first.pts is None else first.pts * first.time_base


def _encode(path: Path, frames: np.ndarray, fps: float, codec: str, pixel_format: str, options: dict) -> None:
    _check_frames(frames, fps)
    try:
        with _writing(path, *frames.shape[1:3], fps, codec, pixel_format, options) as add:
            add(frames)
    except OSError as error:
        most = f"at most {frames.nbytes:,} bytes"
        raise OSError(error.errno, f"cannot write {path} ({most}): {error.strerror}") from error


@contextmanager
def writing_video(
    path: Path, height: int, width: int, fps: float, audio: Path | None = None, clock: Clock | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that adds frames uint8 (n, H, W, 3) to a new .mp4 (H.264, crf 18) or .mkv (FFV1, without loss).

    The size stays, also an odd one (4:4:4 then, which some players lack). audio: a file whose sound is copied as it is.
    clock: when each frame is shown, in place of fps apart. A .mp4 rounds it to 1/90000 s, a .mkv to milliseconds; a frame
    that would have the time of the one before is shown one such step after it.
    Raises ValueError for another suffix, for sound that the container does not take, and for frames so fast that one would
    be over ten such steps late; OSError where the disk fails.
    """
    codec, pixel_format, options = _codec_of(path, height, width)
    clock = _countable(clock, path) if clock else None
    try:
        with _writing(path, height, width, fps, codec, pixel_format, options, audio, clock) as add:
            yield add
    except av.FFmpegError as error:
        if error.errno in _DISK:
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
        raise ValueError(f"{path}: {error}") from error


def _countable(clock: Clock, path: Path) -> Clock:
    """Return the clock, or one as fine as the container of `path` counts, with ticks that rise all the same."""
    finest = _FINEST[path.suffix]
    if clock.base >= finest:
        return clock
    # Each tick at the nearest of the container's, in whole numbers, and later than the one before.
    up, down = (clock.base / finest).as_integer_ratio()
    ticks: list[int] = []
    for tick in clock.ticks:
        nearest = (2 * tick * up + down) // (2 * down)
        ticks.append(max(nearest, ticks[-1] + 1) if ticks else nearest)
        if ticks[-1] - nearest > _MOST_LATE:
            raise ValueError(
                f"{path}: its frames come faster than it counts time, {1 / finest} a second; "
                f"a .mp4 counts finest, {1 / _FINEST['.mp4']}"
            )
    return Clock(finest, tuple(ticks))


def _codec_of(path: Path, height: int, width: int) -> tuple[str, str, dict]:
    if path.suffix == ".mp4":
        return "libx264", "yuv444p" if height % 2 or width % 2 else "yuv420p", {"crf": "18"}
    if path.suffix == ".mkv":
        return "ffv1", "bgr0", {}
    raise ValueError(f"{path}: .mp4 (H.264) or .mkv (FFV1, without loss)")


def write_mp4(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (T, H, W, 3) as H.264 (crf 18, 4:2:0) for people to look at; not for metrics: see write_ffv1.

    An odd width or height is padded by repeating the last column or row.
    """
    _check_frames(frames, fps)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    _encode(Path(path), frames, fps, "libx264", "yuv420p", {"crf": "18"})


def write_ffv1(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (T, H, W, 3) without loss (FFV1, .mkv): read_frames gives the same numbers back."""
    if Path(path).suffix != ".mkv":
        raise ValueError(f"{path}: FFV1 goes into a .mkv file")
    _encode(Path(path), frames, fps, "ffv1", "bgr0", {})


def encode_webp(frames: np.ndarray, fps: float) -> bytes:
    """Encode uint8 (T, H, W, 3) as the bytes of an animated WebP that loops forever."""
    _check_frames(frames, fps)
    first, *others = map(Image.fromarray, np.ascontiguousarray(frames))
    buffer = io.BytesIO()
    duration_ms = max(1, round(1000 / fps))
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=duration_ms, loop=0, quality=85)
    return buffer.getvalue()
