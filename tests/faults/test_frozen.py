"""What commit 397c5c1 wrote is read by today's code: checkpoints of both stages, cache, exports (tests/faults/frozen)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.video import read_frames
from pipelines import cache_latents, sample, train_latte, train_vae
from vae import load_vae

FROZEN = Path(__file__).with_name("frozen")


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    """A copy, and the folder that its relative paths count from."""
    shutil.copytree(FROZEN, tmp_path / "frozen")
    monkeypatch.chdir(tmp_path / "frozen")
    return tmp_path / "frozen"


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("stage", "program", "export", "raw"),
    [("stage1", train_vae, "vae", "vae"), ("stage2", train_latte, "pipeline/transformer", "latte")],
)
def test_a_frozen_run_goes_on_to_the_end_that_it_had_then(frozen, caplog, stage, program, export, raw):
    run = frozen / stage
    then, weights = records(run), load_file(run / export / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(run / export.split("/")[0])  # of step 4: made anew
    caplog.set_level("INFO")
    program.main(["--config", f"{stage}/config.yaml"])
    assert "at step 2" in caplog.text
    now = records(run)
    assert [record["step"] for record in now] == [record["step"] for record in then]
    for a, b in zip(then, now, strict=True):
        assert {name: b[name] for name in a} == pytest.approx(a, rel=2e-3, abs=1e-4)
    ended = load_file(run / export / "diffusion_pytorch_model.safetensors")
    assert ended.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.allclose(ended[name], value, atol=1e-5), name
    # The averages hardly move in two steps; the weights that are trained do.
    file = "diffusion_pytorch_model.safetensors"
    begun, ended = (load_file(run / f"checkpoints/step_0000000{n}" / raw / file) for n in (2, 4))
    expected = load_file(run / "raw_step_4.safetensors")
    assert distance(ended, expected) < 0.01 * distance(begun, expected)


def distance(one, other):
    """Of two sets of weights, over all their elements."""
    return sum((one[name] - value).double().square().sum() for name, value in other.items()) ** 0.5


def test_a_frozen_cache_is_whole_and_of_its_vae(frozen):
    assert cache_latents.main(["--config", "stage2/config.yaml", "--verify"]) in (0, None)
    before = load_file(frozen / "cache/latents-00000.safetensors")
    cache_latents.main(["--config", "stage2/config.yaml", "cache.dir=again"])
    after = load_file(frozen / "again/latents-00000.safetensors")
    assert before.keys() <= after.keys()
    for name, value in before.items():
        assert torch.allclose(after[name].float(), value.float(), atol=1e-4), name


def test_frozen_exports_load_and_sample_what_they_sampled(frozen):
    vae = load_vae("odvae", frozen / "stage1/vae")
    assert vae.config.latents_mean == pytest.approx(
        json.loads((frozen / "cache/index.json").read_text())["statistics"]["mean"]
    )
    more = ["num_videos=2", "num_steps=4", "batch=1"]
    sample.main(["pipeline=stage2/pipeline", "out=now", *more])
    for name in ("000000.mkv", "000001.mkv"):
        then, now = (
            read_frames(frozen / folder / name, range(5)).astype(int) for folder in ("samples", "now")
        )
        assert np.abs(then - now).max() <= 1
    sample.main(["pipeline=stage2/pipeline", "out=samples", *more])  # they are all there
