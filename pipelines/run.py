"""A run's folder: settings, versions, checkpoints that are complete or absent, and a clean stop on signals.

runs/<name>/
    config.yaml  env.json  metrics.jsonl  tb/  media/
    checkpoints/step_00000500/{manifest.json, ...}
"""

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from data.files import fsync, sha256_of, write_atomic, write_json
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
    "decord",
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


def open_run(run_dir: str | Path, config: Any, program: str) -> Path:
    """Create the folder, or re-enter it: a run goes on only with the settings it began with.

    Settings marked `free` (steps, logging, workers) may differ. Raises ValueError with the differing keys otherwise.
    """
    from omegaconf import OmegaConf

    folder = Path(run_dir)
    saved = folder / "config.yaml"
    if saved.is_file():
        old = flatten_yaml(OmegaConf.to_container(OmegaConf.load(saved)))
        new = flatten_yaml(OmegaConf.to_container(OmegaConf.create(dump(config))))
        free = free_keys(config)
        # a key that the old run did not know has its default there
        differing = sorted(k for k in old.keys() & new.keys() if old[k] != new[k] and k not in free)
        if differing:
            text = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in differing[:5])
            raise ValueError(
                f"run_dir={folder} holds a run with other settings ({text}); choose another run_dir"
            )
    elif folder.is_dir() and any(folder.iterdir()):
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
        flat.update(
            flatten_yaml(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def summary(config: Any) -> str:
    """The settings on lines `key = value`, for --dry-run."""
    return "\n".join(f"{key} = {value!r}" for key, value in flatten(config).items())


class Checkpoints:
    """Folders step_XXXXXXXX, each complete (manifest with sha256 of every file, written last) or not there at all.

    A save goes to a hidden folder, is flushed to disk and renamed; only then older ones are deleted, so at every
    moment the newest complete checkpoint survives a crash.
    """

    def __init__(self, run_dir: Path, keep: int = 2):
        if keep < 2:
            raise ValueError(
                f"keep_checkpoints={keep}: at least 2, so that a damaged newest one can be replaced"
            )
        self.folder = run_dir / "checkpoints"
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of all renamed (hence once complete) checkpoints, ascending."""
        return sorted(int(p.name[5:]) for p in self.folder.glob("step_*") if p.name[5:].isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, write: Callable[[Path], None], info: dict[str, Any], accelerator: Any) -> Path:
        """Call on every process; `write(folder)` runs on every process, everything else on the main one."""
        target, temporary = self.path(step), self.folder / f".step_{step:08d}.tmp"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            write(temporary)
        except OSError as error:
            size = sum(
                f.stat().st_size for s in self.steps()[-1:] for f in self.path(s).rglob("*") if f.is_file()
            )
            shutil.rmtree(temporary, ignore_errors=True)
            need = f"; a checkpoint takes {size:,} bytes" if size else ""
            raise OSError(f"cannot write checkpoint {target}: {error.strerror or error}{need}") from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._seal(temporary, {"step": step, **info})
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
            fsync(self.folder)
            # Those with a higher number are damaged, or the run would have begun there: they do not count.
            for old in [s for s in self.steps() if s < step][: 1 - self.keep]:
                shutil.rmtree(self.path(old))
        accelerator.wait_for_everyone()
        return target

    @staticmethod
    def _seal(folder: Path, info: dict[str, Any]) -> None:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        digests = {}
        for file in files:
            fsync(file)
            digests[str(file.relative_to(folder))] = sha256_of(file)
        write_json(folder / "manifest.json", {**info, "files": digests})
        fsync(folder)

    def damage(self, step: int) -> str:
        """ "" when every file is as it was written, else what is wrong with the first that is not."""
        folder = self.path(step)
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"manifest.json: {error}"
        for name, digest in files.items():
            file = folder / name
            if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
                return f"{name}: missing"
            if sha256_of(file) != digest:
                return f"{name}: sha256 differs from the manifest"
        return ""

    def latest(self) -> int | None:
        """Step of the newest undamaged checkpoint, None when there are none; each damaged one is named in the log.

        Raises ValueError when there are checkpoints and all are damaged: to begin anew is the user's decision.
        """
        steps = self.steps()
        for step in reversed(steps):
            damage = self.damage(step)
            if not damage:
                return step
            log.warning(
                "checkpoint %s is damaged (%s): falling back to an older one", self.path(step), damage
            )
        if steps:
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged; restore one, or choose another run_dir to begin anew"
            )
        return None


def export_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder and put it in the place of `target` as a whole."""
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    for file in temporary.rglob("*"):
        if file.is_file():
            fsync(file)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)


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
