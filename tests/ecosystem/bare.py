"""A Python with torch, diffusers and what they need, and nothing else: what another project has."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def site_of(folder: Path, *packages: str) -> Path:
    """A folder for sys.path with links to these installed packages and to all that they require."""
    folder.mkdir()
    todo, done = list(packages), set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name.lower())
        for top in {
            file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    return folder


def run(code: str, site: Path, home: Path) -> str:
    """What the code prints in such a Python; nothing of this checkout can be imported there."""
    guard = f"""
import importlib.util, sys
sys.path.append({str(site)!r})
for room in ("data", "vae", "denoiser", "eval", "pipelines", "accelerate", "omegaconf", "lpips", "av"):
    assert importlib.util.find_spec(room) is None, room
"""
    env = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-S", "-c", guard + code]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
