"""A run's folder read back, finished or in progress: settings, versions, newest checkpoint, curves. Nothing is changed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.training.checkpoints import Checkpoints
from pipelines.training.folder import flatten_yaml
from pipelines.training.log import read_metrics

TRAINERS = ("train_vae", "train_latte")


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself; what is not there yet is empty.

    settings: flat, "clip.size" -> 256. checkpoint: the newest one's manifest. metrics, speed: records of each log.
    """

    folder: Path
    program: str
    settings: dict[str, Any]
    versions: dict[str, str]
    starts: list[dict[str, Any]]
    efficiency: dict[str, Any]
    checkpoint: dict[str, Any]
    metrics: list[dict[str, Any]]
    speed: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """The last step that a log or a checkpoint knows of."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        return int(max(last, self.checkpoint.get("step", 0)))

    @property
    def steps(self) -> int:
        return int(self.settings.get("steps", 0))

    @property
    def finished(self) -> bool:
        return bool(self.steps) and self.checkpoint.get("step", 0) >= self.steps

    def last(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the newest finite value of a metric."""
        for record in reversed(self.metrics):
            if is_number(record.get(name)):
                return int(record["step"]), record[name]
        return None


def is_number(value: Any) -> bool:
    """A finite int or float. JSON's NaN and null are none."""
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "env.json").is_file()


def read_run(folder: str | Path) -> Run:
    """The run in `folder`. Raises ValueError when it is none."""
    from pipelines.training.config import read_yaml

    folder = Path(folder)
    if not is_run(folder):
        raise ValueError(
            f"{folder}: no run there (config.yaml and env.json); give the run_dir of a training program"
        )
    settings = flatten_yaml(read_yaml(folder / "config.yaml"))
    env = _json(folder / "env.json")
    steps = Checkpoints(folder).steps()
    return Run(
        folder=folder,
        program=env.get("program", "unknown"),
        settings=settings,
        versions=env.get("versions", {}) if isinstance(env.get("versions"), dict) else {},
        starts=env.get("starts", []) if isinstance(env.get("starts"), list) else [],
        efficiency=_json(folder / "efficiency.json"),
        checkpoint=_json(Checkpoints(folder).path(steps[-1]) / "manifest.json") if steps else {},
        metrics=_records(folder, "metrics.jsonl"),
        speed=_records(folder, "speed.jsonl"),
    )


def _records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder, name) if is_number(record["step"])]


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, {} when it is missing (a checkpoint may be replaced while we read) or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
