"""Two processes, launched as a user launches them (gloo on CPU), reconstruct as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.encode import write_ffv1

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def videos(tmp_path):
    """Five videos: two processes get three and two."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for n, frames in enumerate((9, 14, 21, 10, 17)):
        pixels = np.random.default_rng(n).integers(0, 255, (frames, 16, 16, 3), np.uint8)
        write_ffv1(folder / f"{n}.mkv", pixels, 8)
    return folder


def launch(kind, settings, tmp_path):
    launcher = {
        "one": [sys.executable],
        "two": [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"],
    }[kind]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [*map(str, launcher), "-m", "pipelines.reconstruct", *settings, f"out={tmp_path / kind}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / kind, done.stdout


@pytest.mark.parametrize("more", [["clip.num_frames=9", "clip.position=random"], ["--stream"]])
def test_two_processes_write_the_records_and_the_summary_of_one(more, own_vae, videos, tmp_path):
    settings = [f"vae.path={own_vae}", f"source.root={videos}", f"source.index_dir={tmp_path / 'index'}"]
    settings += ["lpips=false", "clip.size=16", "pictures=2", *more]
    one, printed_by_one = launch("one", settings, tmp_path)
    two, printed_by_two = launch("two", settings, tmp_path)
    records = (one / "videos.jsonl").read_text()
    assert len(records.splitlines()) == 5
    assert (two / "videos.jsonl").read_text() == records
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    for summary in summaries:
        summary["settings"].pop("out")
    assert summaries[0] == summaries[1]
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert printed_by_two.count("Method") == printed_by_one.count("Method") == 1
