"""Where numbers and pictures of a run go: metrics.jsonl (exact), TensorBoard (to look at), one console line.

Logging never stops a training: what cannot be written is reported once, counted and left out.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.core.files import append_line, fsync
from data.encode import encode_webp

log = logging.getLogger(__name__)


def console() -> None:
    """One line per event on stderr, for programs."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("PIL", "matplotlib", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # diffusers 0.42 says this of every model that is cast, although its list of modules is empty
    casts = logging.getLogger("diffusers.models.modeling_utils")
    casts.addFilter(lambda record: "kept in float32: []" not in record.getMessage())


class MetricLog:
    """Append-only metrics of the main process. Opening it at `step` drops what a later, lost step had written.

    So the file after a resume equals that of a run which was never interrupted. A record that cannot be written is
    counted; the first one of each file is reported at once, the counts at the end.
    """

    def __init__(self, run_dir: Path, step: int, enabled: bool = True):
        """step: the last one whose records stay; -1: none do."""
        self.enabled = enabled
        self.lost: dict[str, int] = {}  # records, by file
        self.file, self.speed_file = run_dir / "metrics.jsonl", run_dir / "speed.jsonl"
        self.writer: Any = None
        if not enabled:
            return
        for file in (self.file, self.speed_file):
            _cut(file, step)
        from torch.utils.tensorboard import SummaryWriter

        with self._guard("tb"):
            self.writer = SummaryWriter(str(run_dir / "tb"), purge_step=step + 1 if step > 0 else None)

    def scalars(self, step: int, values: dict[str, float | None], timing: bool = False) -> None:
        """Values at a step; None is written as null and left out of TensorBoard.

        timing: speeds and memory, which no two runs share, go to speed.jsonl; metrics.jsonl is reproducible.
        """
        if not self.enabled:
            return
        record = {
            "step": step,
            **{k: float(v) if v is not None and math.isfinite(v) else None for k, v in values.items()},
        }
        file = self.speed_file if timing else self.file
        with self._guard(file.name):
            append_line(file, json.dumps(record))
        shown = {name: value for name, value in values.items() if value is not None}
        self._tensorboard(lambda writer: [writer.add_scalar(n, v, step) for n, v in shown.items()])

    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 8) -> None:
        """frames (T, H, W, 3) uint8, shown by TensorBoard as an animated WebP among the images."""
        if not self.enabled:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(
            height=frames.shape[1],
            width=frames.shape[2],
            colorspace=3,
            encoded_image_string=encode_webp(frames, fps),
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._tensorboard(lambda writer: writer._get_file_writer().add_summary(summary, step))

    def sync(self) -> None:
        """Bring the records to the disk, before a checkpoint that counts on them."""
        for file in (self.file, self.speed_file):
            if self.enabled and file.is_file():
                with self._guard(file.name):
                    fsync(file)

    def close(self) -> None:
        """Says what was lost, if anything was."""
        if self.writer is not None:
            self._tensorboard(lambda writer: writer.close())
        if self.lost:
            counts = ", ".join(f"{count} of {name}" for name, count in sorted(self.lost.items()))
            log.warning("records lost because they could not be written: %s", counts)

    def _tensorboard(self, write: Callable[[Any], None]) -> None:
        """Call write(writer). The writer's thread does not survive an error: from then on records are counted only."""
        if self.writer is None:
            self.lost["tb"] = self.lost.get("tb", 0) + 1
            return
        before = self.lost.get("tb", 0)
        with self._guard("tb"):
            write(self.writer)
        if self.lost.get("tb", 0) > before:
            self.writer = None

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """An OSError inside (a full disk) is reported once a file and counted; it does not end the training."""
        try:
            yield
        except OSError as error:
            if name not in self.lost:
                place = self.file.with_name(name)
                log.warning("cannot write to %s (%s); training continues without it", place, error)
            self.lost[name] = self.lost.get(name, 0) + 1


def _cut(file: Path, step: int) -> None:
    """Shorten a file to its records up to `step`. Needs no space: records stand in the order of their steps."""
    if not file.is_file():
        return
    kept = end = 0
    with open(file, "rb") as lines:
        for line in lines:
            end += len(line)
            if line.endswith(b"\n") and _step_of(line) <= step:
                kept = end  # a line before it that is no record stays; readers pass over it
    os.truncate(file, kept)


def _step_of(line: str | bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # e.g. the half-written last line of a killed run
        return float("inf")


def read_metrics(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """All complete records of a run's metrics.jsonl or speed.jsonl; [] when there are none."""
    file = run_dir / name
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]
