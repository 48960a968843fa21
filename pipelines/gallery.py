"""Generated videos for a page, by class: a small animated picture of each."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.video import read_frames
from pipelines.report import Figure, Section, clip_figure

VIDEOS = 64  # read at most, or one for each class
FRAMES = 17  # of a video, from its beginning
PIXELS = 128  # of the longer side; larger videos are made smaller


def gallery(folder: Path, room: Any) -> Section:
    """A section with videos of `folder`, which pipelines.sample has made; `room.take` says what still fits.

    Raises ValueError when the folder has no readable manifest.json.
    """
    names, classes, settings = read_manifest(folder)
    figures: list[Figure] = []
    notes = []
    for index in chosen(len(names), len(classes)):
        label = classes[index % len(classes)] if classes else f"video {index}"
        path = folder / Path(names[index]).name  # a manifest does not lead out of its folder
        try:
            figure = example(path, f"{label}, {path.name}" if classes else path.name, settings["fps"])
        except ValueError as error:
            notes.append(f"{path.name} cannot be read ({error}).")
            continue
        if room.take(figure, path.name):
            figures.append(figure)
    kind = f"{len(classes)} classes" if classes else "no classes"
    how = f"{settings.get('sampler')}, {settings.get('num_steps')} steps, guidance {settings.get('guidance_scale')}"
    text = f"{len(figures)} of {len(names)} generated videos, {kind}; {how}. Their first {FRAMES} frames."
    return Section("Samples", " ".join([text, *notes[:3]]), figures=figures)


def read_manifest(folder: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    """File names, class names ([]: none; video i is of class i modulo their number) and settings of a sample folder."""
    file = folder / "manifest.json"
    try:
        content = json.loads(file.read_text())
        settings = dict(content["settings"]) | {"fps": float(content["settings"]["fps"])}
        classes = [str(c) for c in settings["labels"] or settings["class_names"]]
        return list(content["files"]), classes, settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: no manifest of samples ({error}); give a folder of pipelines.sample"
        ) from error


def chosen(videos: int, classes: int) -> list[int]:
    """Numbers of the videos to show, class by class."""
    if not classes:
        return list(range(min(videos, VIDEOS // 4)))
    each = max(1, min(4, VIDEOS // classes))
    return [i for c in range(classes) for i in range(c, videos, classes)[:each]]


def example(path: Path, caption: str, fps: float) -> Figure:
    """One video as a tile. Raises ValueError when it cannot be read."""
    from data.video import probe

    count = min(FRAMES, probe(path).num_frames)
    frames = read_frames(path, range(count))
    return clip_figure(thinned(frames), caption, fps, PIXELS, "example")


def thinned(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, 3) made smaller by a whole factor, the mean of each block, until no side is above PIXELS."""
    T, H, W, _ = frames.shape
    n = -(-max(H, W) // PIXELS)
    n = min(n, H, W)
    blocks = frames[:, : H // n * n, : W // n * n].reshape(T, H // n, n, W // n, n, 3)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)
