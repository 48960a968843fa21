"""Pictures for people: comparison strips, grids of videos, previews. All uint8 (T, H, W, 3)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.core.files import write_json
from data.encode import write_mp4

log = logging.getLogger(__name__)


def comparison(original: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """original | reconstruction | absolute error x 4, side by side: (T, H, 3W, 3)."""
    error = np.abs(original.astype(np.int16) - decoded.astype(np.int16)) * 4
    return np.concatenate([original, decoded, error.clip(0, 255).astype(np.uint8)], axis=2)


def grid(videos: Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Videos of one shape as tiles, row by row, on white: (T, rows, columns, 3)."""
    columns = columns or int(np.ceil(np.sqrt(len(videos))))
    T, H, W, _ = videos[0].shape
    # A white sheet, then each video in its place.
    rows = -(-len(videos) // columns)
    sheet = np.full((T, rows * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, np.uint8)
    for n, video in enumerate(videos):
        top, left = n // columns * (H + gap), n % columns * (W + gap)
        sheet[:, top : top + H, left : left + W] = video
    return sheet


def write_preview(path: Path, video: np.ndarray, names: Sequence[str] = (), fps: float = 8) -> None:
    """An mp4 to look at; a full disk costs the preview, not the training. names: of its tiles, beside it as .json."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, video, fps)
        if names:
            write_json(path.with_suffix(".json"), {"names": list(names)})
    except OSError as error:
        log.warning("preview %s not written: %s", path, error)
