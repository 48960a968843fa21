"""The starters in scripts/, as a user calls them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.encode import write_mp4
from tests.programs.runs import noise

ROOT = Path(__file__).parents[2]


def bash(script, *arguments, cwd, **env):
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **env,
    }
    command = ["bash", str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_stage_one_plans_the_paper_s_run_from_any_directory(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / "videos" / name, noise(25, 64, 64), 25)
    data, index = tmp_path / "videos", f"source.index_dir={tmp_path / 'index'}"
    done = bash("stage1_vae.sh", "--dry-run", "--data", data, index, "model.init=random", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "OD-VAE variant 4: 239,189,991 parameters" in done.stdout
    assert "folder: 1 videos, 1 held_out, 0 damaged, 0 short" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"videos", "index"}


def test_a_wrong_key_is_one_line_and_exit_code_2(tmp_path):
    done = bash("stage1_vae.sh", "--dry-run", "stepz=1", cwd=tmp_path)
    assert done.returncode == 2
    line = "error: config: unknown key 'stepz'; did you mean 'steps'? (--help lists all keys)"
    assert done.stderr.strip() == line


def test_stage_two_without_weights_names_the_way_out(tmp_path):
    done = bash(
        "stage2_latte.sh", "--vae", "odvae", "--data", tmp_path, cwd=tmp_path, OMNILATTE_WEIGHTS=str(tmp_path)
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no weights for VAE 'odvae'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_stage_two_caches_then_trains_then_samples_then_is_judged(tmp_path, own_vae, latte_settings):
    config = tmp_path / "demo.yaml"
    config.write_text("run_dir: run\nsource: {name: demo, demo_videos: 8}\n")
    settings = [s for s in latte_settings if not s.startswith("source.")]
    more = ["steps=2", "clip.num_frames=17", "source.index_dir=index", "cache.dir=cache"]
    settings = [s for s in settings if not s.startswith("clip.num_frames")]
    done = bash(
        "stage2_latte.sh",
        "--config",
        config,
        "--vae",
        "odvae",
        "--vae-path",
        own_vae,
        "--dataset",
        "demo",
        *settings,
        *more,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for out in ("a", "b"):
        done = bash(
            "sample.sh", "pipeline=run/pipeline", f"out={out}", "num_videos=2", "num_steps=3", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    done = bash("evaluate.sh", "a", "b", "--num-videos", 2, "--weights", "random:0", cwd=tmp_path)
    assert "random-feature FVD (I3D, seed 0)" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_demo_s_parts_all_run_and_make_a_page_with_pictures(tmp_path):
    done = bash("demo.sh", "--short", "--out", tmp_path / "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/webp") == 3
    assert page.count("data:image/svg+xml") == 3
    assert "random-feature FVD" in page
    assert "stage one without LPIPS" in done.stderr


@pytest.mark.slow
def test_with_real_networks_the_demo_trains_with_lpips_and_its_page_shows_fvd(tmp_path, real_weights):
    done = bash(
        "demo.sh", "--short", "--out", tmp_path / "demo", cwd=tmp_path, OMNILATTE_WEIGHTS=str(real_weights)
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "random" not in re.sub(r"data:[^\"]*", "", page.partition("<h2>Curves")[0])
    for name in ("FVD", "KVD", "LPIPS"):
        assert f">{name}</td>" in page
    assert "loss/lpips" in (tmp_path / "demo" / "vae" / "metrics.jsonl").read_text()


def test_fetching_offline_is_one_line_and_leaves_nothing(tmp_path):
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = bash("fetch_weights.sh", tmp_path / "weights", cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: the judging networks cannot be downloaded: pip: .*connection.*\n", done.stderr
    )
    assert not list(tmp_path.glob("weights/*"))


def test_an_older_python_is_named_and_nothing_is_made(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18 && exit 0\nexit 1\n')
    old.chmod(0o755)
    for python, said in ((old, "Python 3.9.18"), (tmp_path / "nowhere", f"no {tmp_path}/nowhere")):
        done = bash("setup.sh", cwd=tmp_path, PYTHON=str(python), OMNILATTE_VENV=str(tmp_path / "venv"))
        assert done.returncode == 2
        assert (
            done.stderr == f"error: Python >= 3.11 is needed, there is {said}; set PYTHON=/path/to/python\n"
        )
        assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("free", "code", "said"), [(6, 2, "error: 6 GiB"), (8, 9, "warning: 8 GiB"), (10, 9, "")]
)
def test_setup_stops_only_where_the_environment_cannot_fit(tmp_path, free, code, said):
    # 8 GiB hold it: the downloads may lie on another disk, so this is a warning and the set-up goes on
    python = 'case "$1" in -c) exit 0;; -m) echo "made $3" >&2; exit 9;; esac\n'
    df = f"echo Filesystem blocks used available; echo disk 0 0 {free * 1048576}\n"
    for name, body in (("df", df), ("python", python)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}")
        (tmp_path / name).chmod(0o755)
    venv = tmp_path / "venv"
    done = bash(
        "setup.sh",
        cwd=tmp_path,
        PYTHON=str(tmp_path / "python"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        OMNILATTE_VENV=str(venv),
    )
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert ("warning" in done.stderr) == (free == 8)
    assert ("OMNILATTE_VENV=FOLDER" in done.stderr) == (code == 2)
    assert (f"made {venv}" in done.stderr) == (code == 9)
