"""A run's folder: settings, versions, and a clean stop on signals.

runs/<name>/
    config.yaml  env.json  metrics.jsonl  speed.jsonl  tb/  media/  quarantine.tsv  code-*.patch
    checkpoints/step_00000500/   see checkpoints.py
"""

import contextlib
import hashlib
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

from data.core.files import read_json, write_atomic, write_json
from eval.records import git_changes, git_commit
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.config import dump, flatten, free_keys, parse_yaml, read_yaml
from pipelines.training.settings import MAY_CHANGE

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "diffusers", "accelerate", "deepspeed", "timm", "av", "scipy", "numpy", "lpips")


def versions() -> dict[str, str]:
    """Versions of what decides numbers: Python, the packages, git."""
    found = {"python": platform.python_version(), "git": git_commit() or "unknown"}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _plain(config: Any) -> dict[str, Any]:
    return parse_yaml(dump(config))


def check_run(run_dir: str | Path, config: Any) -> dict[str, list[Any]]:
    """Return the settings that differ from those of the run in this folder, {key: [old, new]}; {} for a new run.

    Settings marked `free` (steps, logging, workers) may differ, and those that resume.change names. Raises ValueError with
    the differing keys otherwise, and for a folder of other things.
    """
    folder = Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run_dir={folder}: a file; give the name of a folder")
    # A new run wants a place that is new or empty.
    saved = folder / "config.yaml"
    if not saved.is_file():
        if is_in_use(folder):
            raise ValueError(
                f"run_dir={folder} is not empty and holds no run (no config.yaml); choose another run_dir"
            )
        return {}
    # An old one wants the settings it began with, but for free ones and those named in resume.change.
    old, new, free = flatten_yaml(read_yaml(saved)), flatten_yaml(_plain(config)), free_keys(config)
    if not old.keys() & new.keys():
        raise ValueError(
            f"{saved} is damaged: none of the settings is in it; restore it, or choose another run_dir"
        )
    # A key that the old run did not know has its default there.
    defaults = flatten_yaml(_plain(type(config)()))
    old = {key: defaults[key] for key in new.keys() & defaults.keys()} | old
    wanted = config.resume.names if hasattr(config, "resume") else []
    differing = [k for k in sorted(old.keys() & new.keys() - free) if old[k] != new[k]]
    refused = [k for k in differing if k not in wanted]
    text = ", ".join(f"{k}: {old[k]!r} -> {new[k]!r}" for k in refused[:5])
    if refused and hasattr(config, "resume") and set(refused) <= set(MAY_CHANGE):
        raise ValueError(
            f"run_dir={folder}: {text}: this changes what the run becomes; to continue with it say "
            f"resume.change={','.join(dict.fromkeys([*wanted, *refused]))}, or choose another run_dir"
        )
    if refused:
        raise ValueError(f"run_dir={folder} holds a run with other settings ({text}); choose another run_dir")
    return {k: [old[k], new[k]] for k in differing}


def is_in_use(folder: Path) -> bool:
    """Whether there is anything in a folder but hidden files."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def open_run(run_dir: str | Path, config: Any, program: str, weights: dict[str, dict] | None = None) -> Path:
    """Create the folder, or re-enter it, under the rules of `check_run`; what resume.change changes is noted in env.json.

    Changes of the source tree since its commit are kept as code-*.patch, named in env.json by the start.

    weights: provenance of the judging networks that take part, for env.json. Call it while the folder is this process's own.
    """
    folder = Path(run_dir)
    changed = check_run(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    # Earlier starts
    env_file = folder / "env.json"
    starts = read_json(env_file, "starts", way_out="remove it")["starts"] if env_file.is_file() else []
    if not isinstance(starts, list):
        raise ValueError(f"{env_file} is damaged (starts is not a list); remove it")
    write_atomic(folder / "config.yaml", dump(config))
    # Every start is kept: its time, command, changed settings, and how the code differed from its commit.
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "host_cores": os.cpu_count()}
    start |= {"changed": changed} if changed else {}
    if changes := git_changes():
        start["patch"] = f"code-{hashlib.sha256(changes).hexdigest()[:8]}.patch"
        write_atomic(folder / start["patch"], changes)
    starts.append(start | ({"weights": weights} if weights else {}))
    write_json(env_file, {"program": program, "versions": versions(), "starts": starts})
    return folder


def check_new_run(config: Any, export: str, inputs: dict[str, str]) -> None:
    """Check, before anything is written, that run_dir is free for these settings and that it swallows no input.

    export: the folder that the run will replace as a whole at its end. inputs: {setting: path} of weights that are read.
    Raises ValueError with the setting that is wrong.
    """
    check_run(config.run_dir, config)
    refuse_in_data(config.run_dir, "run_dir", config.source)
    for key, path in inputs.items():
        refuse_inside(config.run_dir, export, path, key)


def needs_initial_weights(config: Any) -> bool:
    """Whether a start reads the weights that a run begins with.

    That of a new run does, and one with resume.change, whose run may have to go back to its beginning.
    """
    saved = Checkpoints(Path(config.run_dir), config.keep_checkpoints).steps()
    return not saved or bool(config.resume.names)


def refuse_inside(run_dir: str | Path, export: str, given: str, key: str) -> None:
    """ValueError when an input lies where the run will put its export, which replaces that folder as a whole."""
    target = (Path(run_dir) / export).resolve()
    if given and Path(given).resolve().is_relative_to(target):
        raise ValueError(
            f"{key}={given}: this run exports to {target} and would replace it; choose another run_dir"
        )


def refuse_in_data(path: str | Path, key: str, source: Any) -> None:
    """ValueError when what is written would lie among the videos that are read: previews would become training videos."""
    for part in (source, *source.parts.values()):
        if part.root and Path(path).resolve().is_relative_to(Path(part.root).resolve()):
            raise ValueError(f"{key}={path}: lies inside the data {part.root}; choose a folder outside")


def flatten_yaml(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values()):
            flat[f"{prefix}{key}"] = sorted(value)  # the sources of a mixture: one more is another run
        if isinstance(value, dict):
            flat.update(flatten_yaml(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def summary(config: Any) -> str:
    """The settings on lines `key = value`, for --dry-run."""
    return "\n".join(f"{key} = {value!r}" for key, value in flatten(config).items())


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stopped(SystemExit):
    """The program was asked to stop and has saved what it had: exit code 128 + the signal's number, for all its callers."""

    def __init__(self, number: int):
        super().__init__(128 + number)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], int]]:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 (slurm's warning) ask for a stop; the loop polls the yielded function.

    It returns the number of the first signal, 0 for none.
    """
    # Remember the first signal; the loop looks between its steps.
    received: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        received.append(number)

    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: the caller's own handling stays
        for number in STOPS:
            previous[number] = signal.signal(number, remember)
    try:
        yield lambda: received[0] if received else 0
    # Signals are as before once the loop has ended.
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
