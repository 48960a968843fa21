"""Where numbers and pictures of a run go: metrics.jsonl (exact), TensorBoard (to look at), one console line.

Logging never stops a training: a failing writer is reported once and left out.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.encode import encode_webp
from data.files import write_atomic

log = logging.getLogger(__name__)


def console() -> None:
    """One line per event on stderr, for programs."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("PIL", "matplotlib", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class MetricLog:
    """Append-only metrics of the main process. Opening it at `step` drops what a later, lost step had written.

    So the file after a resume equals that of a run which was never interrupted.
    """

    def __init__(self, run_dir: Path, step: int, enabled: bool = True):
        self.enabled, self.broken = enabled, False
        self.file, self.speed_file = run_dir / "metrics.jsonl", run_dir / "speed.jsonl"
        self.writer = None
        if not enabled:
            return
        for file in (self.file, self.speed_file):
            if file.is_file():
                kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
                write_atomic(file, "".join(line + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tb"), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, float | None], timing: bool = False) -> None:
        """Values at a step; None is written as null and left out of TensorBoard.

        timing: speeds and memory, which no two runs share, go to speed.jsonl; metrics.jsonl is reproducible.
        """
        if not self.enabled or self.broken:
            return
        record = {
            "step": step,
            **{k: float(v) if v is not None and math.isfinite(v) else None for k, v in values.items()},
        }
        with self._guard():
            with open(self.speed_file if timing else self.file, "a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 8) -> None:
        """frames (T, H, W, 3) uint8, shown by TensorBoard as an animated WebP among the images."""
        if not self.enabled or self.broken:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        with self._guard():
            image = Summary.Image(
                height=frames.shape[1],
                width=frames.shape[2],
                colorspace=3,
                encoded_image_string=encode_webp(frames, fps),
            )
            summary = Summary(value=[Summary.Value(tag=name, image=image)])
            self.writer._get_file_writer().add_summary(summary, step)

    def close(self) -> None:
        if self.writer is not None:
            with self._guard():
                self.writer.close()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """An OSError inside (a full disk) turns the log off with one line instead of ending the training."""
        try:
            yield
        except OSError as error:
            self.broken = True
            log.warning("logging to %s stopped (%s); training goes on", self.file.parent, error)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the half-written last line of a killed run
        return float("inf")


def read_metrics(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """All complete records of a run's metrics.jsonl or speed.jsonl; [] when there are none."""
    file = run_dir / name
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]
