"""Stage one on a mixture: resumed to the bit, the same command line form, refused when its parts change."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipelines.train_vae import main

PARTS = [
    "source.name=mixture",
    "source.parts.b.name=demo",
    "source.parts.b.demo_videos=6",
    "source.parts.b.demo_seed=1",
    "source.parts.demo.demo_videos=8",
]


@pytest.fixture
def train(vae_settings, tmp_path):
    common = [s for s in vae_settings if not s.startswith("source.")]

    def go(name, *more):
        assert main([*common, *PARTS, f"run_dir={tmp_path / name}", *more]) == 0
        return tmp_path / name

    return go


def test_a_resumed_run_on_a_mixture_equals_an_uninterrupted_one(train, tmp_path):
    whole = train("whole", "steps=4", "save_every=2")
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_00000004")
    train("parts", "steps=4", "save_every=2")
    states = [
        load_file(run / "checkpoints" / "step_00000004" / "vae" / "diffusion_pytorch_model.safetensors")
        for run in (whole, parts)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    assert any("val/psnr" in json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines())


def test_other_parts_or_weights_are_another_run(train):
    train("run", "steps=1", "save_every=1")
    with pytest.raises(ValueError, match=r"source\.parts: \['b', 'demo'\] -> \['b', 'c', 'demo'\]"):
        train("run", "steps=2", "source.parts.c.name=demo")
    with pytest.raises(ValueError, match=r"source\.parts\.b\.demo_seed: 1 -> 2"):
        train("run", "steps=2", "source.parts.b.demo_seed=2")
    train("run", "steps=2", "source.parts.b.root=001")  # a name, no number; where the data lie is no matter


def test_wrong_mixtures_say_what_to_do(train):
    for more, message in (
        (["source.parts.b.weight=1"], "give one to every part or to none"),
        (["source.parts.b.weight=0", "source.parts.demo.weight=1"], "above 0"),
        (["source.root=videos"], r"source\.parts\.NAME\.root"),
        (["source.name=demo"], "use source.name=mixture"),
        (["source.parts.b.name=mixture"], "holds no other mixture"),
        (["source.parts.b.fps=3"], "unknown key"),
    ):
        with pytest.raises(ValueError, match=message):
            train("wrong", "steps=1", *more)
