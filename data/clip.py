"""From decoded frames to the clip a model sees: which frames, how they are resized and cropped, the pixel scale.

Trainers and judges share the one path of this file, so that a metric never measures a difference in resizing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from PIL import Image

from data.core.option import check_choices, option
from data.core.tensors import to_float, to_uint8  # noqa: F401 - the pixel scale of this file's clips
from data.video import Frames


class Resize(StrEnum):
    short = "short"
    none = "none"


class Crop(StrEnum):
    center = "center"
    random = "random"


class Short(StrEnum):
    skip = "skip"
    stretch = "stretch"
    reflect = "reflect"
    loop = "loop"


class Position(StrEnum):
    random = "random"
    center = "center"
    start = "start"


@dataclass
class ClipSpec:
    """How a clip is cut out of a video. Defaults: stage one of the paper (25 frames of 256 x 256 pixels)."""

    num_frames: int = option(25, "frames of a clip")
    interval: int = option(1, "distance of two frames of the clip in the video, in frames")
    size: int = option(256, "side of the square clip in pixels")
    resize: Resize = option(
        Resize.short,
        "short: scale the short side to size (antialiased bilinear); none: crop the video's own pixels",
    )
    crop: Crop = option(Crop.center, "where the square lies in a frame")
    flip: bool = option(False, "mirror half of the clips")
    short: Short = option(
        Short.skip,
        "videos with too few frames: skip them, stretch (all frames, uneven steps), reflect (back and forth) or loop",
    )
    position: Position = option(Position.random, "where a clip starts in a long video")
    fps: float = option(
        0.0, "frames a second, by the time stamps: for videos of several rates; 0: every interval-th frame"
    )
    repeat: bool = option(False, "with fps: take videos of a lower rate too and repeat their frames")

    def __post_init__(self):
        for name in ("num_frames", "interval", "size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a clip needs a whole number of at least 1")
        if not 0 <= self.fps < float("inf") or (self.fps and self.interval > 1):
            raise ValueError(f"fps={self.fps}, interval={self.interval}: fps is above 0, and interval then 1")
        check_choices(self)

    def settings(self) -> dict[str, Any]:
        """Return the fields for a fingerprint; those of fps only where it is used, so that older ones stay valid."""
        kept = asdict(self)
        return kept if self.fps else {k: v for k, v in kept.items() if k not in ("fps", "repeat")}


def span(spec: ClipSpec) -> int:
    """Count the frames of video that a clip covers, first and last included."""
    return (spec.num_frames - 1) * spec.interval + 1


def frame_indices(total: int, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Choose the indices (num_frames,) of a clip in a video of `total` frames, exactly `interval` apart.

    A video shorter than `span(spec)` follows `spec.short`; under "skip" it is a ValueError.
    """
    if total < 1:
        raise ValueError(f"total={total}: a video needs at least one frame")
    length, steps = span(spec), np.arange(spec.num_frames) * spec.interval
    # Long enough: a window, whose place is drawn or fixed.
    if total >= length:
        last = total - length
        begin = {"start": 0, "center": last // 2}.get(spec.position)
        return steps + (int(rng.integers(0, last + 1)) if begin is None else begin)
    if spec.short == "skip":
        raise ValueError(
            f"{total} frames: {spec.num_frames} frames {spec.interval} apart need {length}; "
            "use fewer frames, a smaller interval, or short=stretch|reflect|loop"
        )
    # Too short: all frames with uneven steps, from the beginning again, or back and forth.
    if spec.short == "stretch":
        return upstream_linspace(total, 0, spec.num_frames, spec.interval)
    if spec.short == "loop":
        return steps % total
    period = max(2 * (total - 1), 1)
    folded = steps % period
    return np.minimum(folded, period - folded) if total > 1 else folded * 0


def upstream_linspace(total: int, begin: int, num_frames: int, interval: int) -> np.ndarray:
    """Choose frames by Latte's rule for UCF101: num_frames points from begin to begin + num_frames * interval, cut at the end.

    Rounded down, so steps are uneven: interval 3 gives 0, 3, ..., 21, 25, 28 (Latte, ucf101_datasets.py).
    """
    end = min(begin + num_frames * interval, total)
    if not 0 <= begin < end:
        raise ValueError(f"begin={begin}: must lie in a video of {total} frames, 0..{total - 1}")
    return np.linspace(begin, end - 1, num_frames).astype(np.int64)


def _crop_box(height: int, width: int, spec: ClipSpec, rng: np.random.Generator) -> tuple[float, ...]:
    """Choose the square to keep, (left, top, right, bottom) in the video's pixels.

    The window sits at whole pixels of the resized picture, rounded like torchvision's CenterCrop.
    """
    size, side = spec.size, min(height, width)
    if spec.resize == "none":
        if side < size:
            raise ValueError(
                f"{width}x{height}: smaller than size={size}; use resize=short or a smaller size"
            )
        side = size
    # The window's corner, in whole pixels of the picture whose short side is `size`.
    room_y, room_x = height * size // side - size, width * size // side - size
    if spec.crop == "random":
        top, left = int(rng.integers(0, room_y + 1)), int(rng.integers(0, room_x + 1))
    else:
        top, left = round(room_y / 2), round(room_x / 2)
    # The same window in the video's own pixels.
    scale = side / size
    return left * scale, top * scale, left * scale + side, top * scale + side


def crop_resize_uint8(frames: np.ndarray | Frames, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Resize, crop and maybe mirror decoded frames; the same window for all of them.

    frames: uint8 (T, H, W, 3), or Frames, of which one at a time is in memory. Returns uint8 (T, size, size, 3).
    Pillow's integer arithmetic: equal on every machine, within one level of exact antialiased bilinear.
    """
    box: list[float] = []

    def fit(frame: np.ndarray) -> np.ndarray:
        # The first frame tells the size, and with it the window of all.
        if not box:
            box.extend(_crop_box(*frame.shape[:2], spec, rng))
        left, top, right, bottom = box
        if right - left == spec.size:
            return frame[int(top) : int(bottom), int(left) : int(right)].copy()
        picture = Image.fromarray(np.ascontiguousarray(frame))
        shape = (spec.size, spec.size)
        return np.asarray(picture.resize(shape, Image.Resampling.BILINEAR, box=tuple(box)))

    if isinstance(frames, Frames):
        clip = frames.map(fit)
    elif frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames {frames.dtype} {frames.shape}: need uint8 (T, H, W, 3)")
    else:
        clip = np.stack(list(map(fit, frames)))
    if spec.flip and rng.random() < 0.5:
        clip = clip[:, :, ::-1]
    return np.ascontiguousarray(clip)
