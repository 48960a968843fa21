"""Read a run's folder, finished or in progress: settings, versions, newest checkpoint, curves. Nothing is changed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.results.page import is_number
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.config import read_yaml
from pipelines.training.folder import flatten_yaml
from pipelines.training.log import read_metrics


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself; what is not there yet is empty.

    settings: flat, "clip.size" -> 256. checkpoint: the newest one's manifest. metrics, speed: records of each log.
    real_clips: names of the videos in media/real.mp4, tile by tile.
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
    real_clips: list[str]

    @property
    def step(self) -> int:
        """The last step that a log or a checkpoint knows of."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        return int(max(last, self.checkpoint.get("step", 0)))

    @property
    def steps(self) -> int:
        """The step at which the run ends."""
        return int(self.settings.get("steps", 0))

    @property
    def finished(self) -> bool:
        """Whether the last step has its checkpoint."""
        return bool(self.steps) and self.checkpoint.get("step", 0) >= self.steps

    def last(self, name: str) -> tuple[int, float] | None:
        """(step, value) of the newest finite value of a metric, of either log."""
        for record in reversed([*self.speed, *self.metrics]):
            if is_number(record.get(name)):
                return int(record["step"]), record[name]
        return None

    def speed_text(self, unit: str) -> str | None:
        """TSpeed at the run's end in words; None when it is not known."""
        speed = self.efficiency.get("tspeed")
        return f"{speed:.3f} {unit}" if is_number(speed) and speed else None

    def memory_text(self) -> str:
        """TMem at the run's end in words."""
        memory = self.efficiency.get("tmem", {}).get("device_mib")
        return f"{memory:,.0f} MiB" if is_number(memory) else "not measured"


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training."""
    return (folder / "config.yaml").is_file() and (folder / "env.json").is_file()


def read_run(folder: str | Path) -> Run:
    """Read the run in `folder`. Raises ValueError when there is none."""
    folder = Path(folder)
    if not is_run(folder):
        raise ValueError(
            f"{folder}: no run there (config.yaml and env.json); give the run_dir of a training program"
        )
    # What the programs write at the start, then what grows: logs and checkpoints.
    env, steps = _json(folder / "env.json"), Checkpoints(folder).steps()
    names = _json(folder / "media" / "real.json").get("names")
    versions, starts = env.get("versions"), env.get("starts")
    return Run(
        folder=folder,
        program=env.get("program", "unknown"),
        settings=flatten_yaml(read_yaml(folder / "config.yaml")),
        versions=versions if isinstance(versions, dict) else {},
        starts=starts if isinstance(starts, list) else [],
        efficiency=_json(folder / "efficiency.json"),
        checkpoint=_json(Checkpoints(folder).path(steps[-1]) / "manifest.json") if steps else {},
        metrics=_log(folder, "metrics.jsonl"),
        speed=_log(folder, "speed.jsonl"),
        real_clips=list(map(str, names)) if isinstance(names, list) else [],
    )


def _log(folder: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder, name) if is_number(record["step"])]


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, {} when it is missing (a checkpoint may be replaced while we read) or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_manifest(folder: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    """File names, class names ([]: none; video i is of class i modulo their number) and settings of a sample folder.

    Raises ValueError when the folder has no readable manifest.json.
    """
    file = folder / "manifest.json"
    try:
        content = json.loads(file.read_text())
        settings = dict(content["settings"]) | {"fps": float(content["settings"]["fps"])}
        classes = list(map(str, settings["labels"] or settings["class_names"]))
        return list(content["files"]), classes, settings
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: no manifest of samples ({error}); give a folder of pipelines.sample"
        ) from error
