"""Packages that are too old are named in one line before a program starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.core import environment

ROOT = Path(__file__).parents[3]


def pretend(folder: Path, name: str, version: str) -> None:
    """Lay a package's metadata into a folder, as an environment with that version has it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_environment_is_new_enough():
    environment.check_packages()


@pytest.mark.parametrize("version", ["14.0.0", "9.2", "14.9.0rc1"])
def test_an_older_package_is_named_with_the_bound_and_the_way_out(tmp_path, monkeypatch, version):
    pretend(tmp_path, "av", version)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=rf"av is {version}.*>=15.*scripts/setup\.sh"):
        environment.check_packages()


def test_build_tags_and_later_previews_are_no_older_versions(tmp_path, monkeypatch):
    pretend(tmp_path, "torch", "2.6.0a0+ecf3bae40a.nv25.01")
    pretend(tmp_path, "diffusers", "0.43.0.dev0")
    monkeypatch.syspath_prepend(str(tmp_path))
    environment.check_packages()


@pytest.mark.parametrize("program", ["pipelines.train_vae", "pipelines.sample", "eval.fvd"])
def test_every_program_says_so_in_one_line_and_starts_nothing(tmp_path, program):
    pretend(tmp_path, "diffusers", "0.36.0")
    done = subprocess.run(
        [sys.executable, "-m", program, "run_dir=nowhere"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "diffusers is 0.36.0, this project needs >=0.38" in done.stderr
