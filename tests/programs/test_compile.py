"""compile=true: the repeated blocks of both trainings are compiled, and nothing else about a run changes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipelines import cache_latents, train_latte
from pipelines.train_vae import main as train_vae
from pipelines.training.distributed import compile_blocks, make_accelerator

STEPS = ["steps=4", "save_every=2"]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, by torch's own graph and backward pass; without a compiler's code, which takes minutes."""
    from torch._dynamo.backends.debugging import aot_eager

    made, compile_module = [], nn.Module.compile

    def backend(graph, inputs):
        made.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: compile_module(self, backend=backend, **kw))
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


@pytest.fixture
def run(vae_settings, latte_settings, tmp_path, request):
    """run(stage, name, *settings): a training in a folder of the test; returns the folder."""

    def go(stage, name, *more):
        folder = tmp_path / name
        common = [f"run_dir={folder}", f"source.index_dir={tmp_path / 'index'}", *STEPS, *more]
        if stage == "vae":
            train_vae([*vae_settings, *common])
        else:
            vae = request.getfixturevalue("own_vae")
            settings = [*latte_settings, f"vae.path={vae}", f"cache.dir={tmp_path / 'cache'}", *common]
            cache_latents.main(settings)
            train_latte.main(settings)
        return folder

    return go


def tensors(folder):
    """{file: {name: tensor}} of all checkpoints and exports of a run."""
    return {str(f.relative_to(folder)): load_file(f) for f in sorted(folder.rglob("*.safetensors"))}


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[k] for line in lines for k in ("loss", "loss/nll") if k in line]


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("latte", []),
        ("latte", ["precision=bf16", "gradient_checkpointing=true"]),
        ("vae", []),
        ("vae", ["precision=bf16", "gradient_checkpointing=true"]),
    ],
)
def test_compiled_blocks_train_as_the_plain_ones_under_the_same_names(stage, settings, run, graphs):
    plain = run(stage, "plain", *settings)
    assert not graphs
    compiled = run(stage, "compiled", *settings, "compile=true")
    assert graphs
    before, after = tensors(plain), tensors(compiled)
    assert {f: list(t) for f, t in after.items()} == {f: list(t) for f, t in before.items()}
    # bf16 is rounded where kernels meet, and those are others
    assert losses(compiled) == pytest.approx(losses(plain), rel=0.02 if settings else 1e-5)


@pytest.mark.parametrize("stage", ["latte", "vae"])
def test_a_run_continues_with_and_without_compiled_blocks(stage, run, graphs, tmp_path):
    whole = run(stage, "whole")
    for name, settings in (("on", ["compile=true"]), ("off", [])):
        shutil.copytree(whole if name == "on" else tmp_path / "on", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_00000004")
        run(stage, name, *settings)
        assert losses(tmp_path / name) == pytest.approx(losses(whole), rel=1e-5)
    assert graphs


def test_a_model_without_repeated_blocks_is_refused():
    with pytest.raises(ValueError, match="compile=true: a Linear names no repeated blocks"):
        compile_blocks(nn.Linear(2, 2), make_accelerator())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["latte", "vae"])
def test_torch_s_own_compiler_trains_as_the_plain_blocks_do(stage, run):
    torch.compiler.reset()
    plain, compiled = run(stage, "plain"), run(stage, "compiled", "compile=true")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    torch.compiler.reset()
