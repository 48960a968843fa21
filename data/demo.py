"""Procedural videos: two soft shapes over a gradient, the class is the motion. No file is read or written."""

from __future__ import annotations

import colorsys

import numpy as np

MOTIONS = ("right", "left", "up", "down", "clockwise", "counterclockwise", "outward", "inward")
_DIRECTION = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
_STEP = 1 / 32  # of the picture's side per frame: 17 frames cross half of it
_TURN = 2 * np.pi / 48  # radians per frame
EDGE = 0.08  # of the picture's side: the default width of a shape's soft edge
_ZOOM = 1 / 40  # of the way from the centre to outside the picture, per frame


class DemoVideos:
    """Moving scenes as a pure function of (seed, index); video n has class n % num_classes, named after its motion.

    num_frames: frames each video offers. size: default side of the square picture, pixels. edge: width of the shapes' soft
    edges, of the side; a small VAE draws wide ones better.
    Every motion is steady, so any window of any video shows its class.
    """

    def __init__(
        self,
        num_videos: int,
        num_classes: int = 4,
        size: int = 64,
        num_frames: int = 64,
        seed: int = 0,
        edge: float = EDGE,
    ):
        if not 1 <= num_classes <= len(MOTIONS):
            raise ValueError(f"num_classes={num_classes}: the demo knows 1 to {len(MOTIONS)} motions")
        for name, value in (("num_videos", num_videos), ("size", size), ("num_frames", num_frames)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.num_videos, self.num_classes = num_videos, num_classes
        if not 0 < edge <= 1:
            raise ValueError(f"edge={edge}: above 0, at most 1 of the picture's side")
        self.size, self.num_frames, self.seed, self.edge = size, num_frames, seed, edge
        self.class_names = list(MOTIONS[:num_classes])

    def __len__(self) -> int:
        return self.num_videos

    def label(self, index: int) -> int:
        """Return the class of a video."""
        return index % self.num_classes

    def frames(self, index: int, indices, size: int | None = None) -> np.ndarray:
        """Draw the frames `indices` of video `index`: uint8 (len(indices), size, size, 3)."""
        indices = np.asarray(indices, dtype=np.int64)
        if not 0 <= index < self.num_videos:
            raise ValueError(f"index={index}: the demo has videos 0..{self.num_videos - 1}")
        if indices.size == 0 or indices.min() < 0 or indices.max() >= self.num_frames:
            raise ValueError(
                f"frames {indices.tolist()}: each demo video has frames 0..{self.num_frames - 1}"
            )
        # Time in frames, and the coordinates of the pixels' centres in [0, 1].
        size = size or self.size
        rng = np.random.default_rng((self.seed, index))
        motion = MOTIONS[self.label(index)]
        time = indices[:, None, None].astype(np.float32)  # (T, 1, 1)
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        y, x = axis[None, :, None], axis[None, None, :]  # (1, size, 1), (1, 1, size)
        # The same background in all frames, and two or three shapes that move over it.
        picture = _background(rng, x, y)
        picture = np.broadcast_to(picture, (len(indices), size, size, 3)).copy()
        num_shapes = 2 if index % self.num_classes < 6 else 3
        hue, phase = rng.random(), rng.random()
        for n in range(num_shapes):
            colour = np.array(
                colorsys.hsv_to_rgb((hue + n / num_shapes) % 1, rng.uniform(0.7, 1), rng.uniform(0.8, 1))
            )
            shape = {
                "square": bool(rng.integers(2)),
                "radius": rng.uniform(0.22, 0.3),
                "slot": (phase + n / num_shapes) % 1,
                "cross": (n + rng.uniform(0.35, 0.65)) / num_shapes,
            }
            _draw(picture, x, y, colour, *_place(motion, time, shape), shape["square"], self.edge)
        return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Blend two dark colours along a random direction: (1, size, size, 3) in [0, 1]."""
    ends = rng.uniform(0.05, 0.45, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    blend = 0.5 + 0.7 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    blend = np.clip(blend, 0, 1)[..., None]
    return (ends[0] * (1 - blend) + ends[1] * blend).astype(np.float32)


def _place(motion: str, time: np.ndarray, shape: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Return centre x, y, radius (each (T, 1, 1), in picture sides) of a shape, and whether the picture wraps around."""
    slot, cross, radius = shape["slot"], shape["cross"], np.full_like(time, shape["radius"])
    # Along one axis, at a fixed place on the other.
    if motion in _DIRECTION:
        step_x, step_y = _DIRECTION[motion]
        along = slot + _STEP * time * (step_x + step_y)
        fixed = np.full_like(time, cross)
        return (along, fixed, radius, True) if step_x else (fixed, along, radius, True)
    if motion in ("clockwise", "counterclockwise"):
        sign = 1 if motion == "clockwise" else -1  # y points down
        angle = 2 * np.pi * slot + sign * _TURN * time
        return 0.5 + 0.27 * np.cos(angle), 0.5 + 0.27 * np.sin(angle), radius, False
    # A shape is born at the centre with no size and leaves the picture at way = 1 (or the reverse).
    way = (slot + (_ZOOM if motion == "outward" else -_ZOOM) * time) % 1
    angle = 2 * np.pi * cross
    return 0.5 + way * np.cos(angle), 0.5 + way * np.sin(angle), 1.5 * radius * np.sqrt(way), False


def _draw(picture, x, y, colour, centre_x, centre_y, radius, wraps: bool, square: bool, edge: float) -> None:
    """Blend one shape into picture (T, size, size, 3), in place; its edge is at least one pixel wide."""
    dx, dy = x - centre_x, y - centre_y
    if wraps:
        dx, dy = (dx + 0.5) % 1 - 0.5, (dy + 0.5) % 1 - 0.5
    # Distance from the shape's border, below 0 inside: (T, size, size)
    if square:
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * radius
    else:
        distance = np.hypot(dx, dy) - radius
    cover = np.clip(0.5 - distance / max(edge, 1 / picture.shape[1]), 0, 1)[..., None]
    wave = 0.85 + 0.15 * np.cos(2.2 * (dx + dy) / np.maximum(radius, 1e-3))
    picture += cover * (wave[..., None] * colour - picture)
