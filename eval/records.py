"""One JSON line per number: what it is, what it was made from, where and with what."""

import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from data.core.environment import ROOT
from data.core.files import append_line
from data.core.lazy import lazy

torch = lazy("torch")


def _git(*arguments: str) -> bytes:
    """Run git in this source tree and return what it prints; b"" where it fails, as outside a repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def git_commit() -> str | None:
    """Return the commit of this source tree, "+changes" if it was edited; None outside a repository."""
    return _git("describe", "--always", "--dirty=+changes", "--abbrev=40").decode().strip() or None


def git_changes() -> bytes:
    """Return how this source tree differs from its commit, as a patch; b"" when it does not, or outside a repository.

    Files that git does not track are not in it.
    """
    return _git("diff", "--binary", "HEAD")


def environment(device: str) -> dict:
    """Describe the machine and the start: versions, device, command line, commit, time (UTC)."""
    packages = {}
    for name in ("torch", "numpy", "scipy", "av", "lpips"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "python": platform.python_version(),
        "versions": packages,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device) -> str:
    """Name a device: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def provenance_of_run(extractor, options, tag: str = "") -> dict:
    """Describe weights, machine, versions and settings of a run of `eval.extraction`, for its records."""
    made = {
        "tag": tag,
        "weights": extractor.provenance.as_dict(),
        "dtype": "float32",
        "tf32": False,
        "processes": options.ranks.world,
        "threads": torch.get_num_threads(),
        "batch_size": options.batch_size,
    }
    return {**made, **environment(device_name(extractor.device))}


def append_record(path: str | Path, record: dict) -> None:
    """Append one JSON line, whole or not at all; several programs can share a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(record, sort_keys=True, allow_nan=False))
