"""A run's folder: settings, versions, and a clean stop on signals.

runs/<name>/
    config.yaml  env.json  metrics.jsonl  speed.jsonl  tb/  media/  quarantine.tsv
    checkpoints/step_00000500/   see checkpoints.py
"""

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from data.files import write_atomic, write_json
from eval.records import git_commit
from pipelines.config import dump, flatten, free_keys

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch",
    "diffusers",
    "accelerate",
    "deepspeed",
    "timm",
    "av",
    "scipy",
    "numpy",
    "lpips",
)


def versions() -> dict[str, str]:
    """Versions of what decides numbers: Python, the packages, git."""
    found = {"python": platform.python_version(), "git": git_commit() or "unknown"}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(dump(config)))


def open_run(run_dir: str | Path, config: Any, program: str) -> Path:
    """Create the folder, or re-enter it: a run goes on only with the settings it began with.

    Settings marked `free` (steps, logging, workers) may differ. Raises ValueError with the differing keys otherwise.
    """
    from omegaconf import OmegaConf

    folder = Path(run_dir)
    saved = folder / "config.yaml"
    if saved.is_file():
        old = flatten_yaml(OmegaConf.to_container(OmegaConf.load(saved)))
        new = flatten_yaml(_plain(config))
        free = free_keys(config)
        # a key that the old run did not know has its default there
        old = {**{k: v for k, v in flatten_yaml(_plain(type(config)())).items() if k in new}, **old}
        differing = sorted(k for k in old.keys() & new.keys() if old[k] != new[k] and k not in free)
        if differing:
            text = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in differing[:5])
            raise ValueError(
                f"run_dir={folder} holds a run with other settings ({text}); choose another run_dir"
            )
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise ValueError(
            f"run_dir={folder} is not empty and holds no run (no config.yaml); choose another run_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(saved, dump(config))
    env_file = folder / "env.json"
    starts = json.loads(env_file.read_text())["starts"] if env_file.is_file() else []
    starts.append(
        {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "host_cores": os.cpu_count()}
    )
    write_json(env_file, {"program": program, "versions": versions(), "starts": starts})
    return folder


def refuse_inside(run_dir: str | Path, export: str, given: str, key: str) -> None:
    """ValueError when an input lies where the run will put its export, which replaces that folder as a whole."""
    target = (Path(run_dir) / export).resolve()
    if given and Path(given).resolve().is_relative_to(target):
        raise ValueError(
            f"{key}={given}: this run exports to {target} and would replace it; choose another run_dir"
        )


def flatten_yaml(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values()):
            flat[f"{prefix}{key}"] = sorted(value)  # the sources of a mixture: one more is another run
        flat.update(
            flatten_yaml(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def summary(config: Any) -> str:
    """The settings on lines `key = value`, for --dry-run."""
    return "\n".join(f"{key} = {value!r}" for key, value in flatten(config).items())


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], str]]:
    """SIGTERM, SIGINT and SIGUSR1 (slurm's warning) ask for a stop; the loop polls the yielded function: "" or the name."""
    received: list[str] = []

    def remember(number: int, _frame: Any) -> None:
        received.append(signal.Signals(number).name)

    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    try:
        previous = {number: signal.signal(number, remember) for number in wanted}
    except ValueError:  # not the main thread: the caller's own handling stays
        previous = {}
    try:
        yield lambda: received[0] if received else ""
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
