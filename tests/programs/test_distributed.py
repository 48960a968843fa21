"""Two processes, launched as a user launches them with the shipped files (gloo on CPU), train as one process does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import cache_latents, train_latte, train_vae

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed
LAUNCHES = {"ddp": "ddp8", "zero1": "zero1_8", "zero2": "zero2_8", "zero3": "zero3_8"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start(file, module, settings, folder, *options):
    """A launcher as a subprocess, in a folder that is not the repository's."""
    folder.mkdir(exist_ok=True)
    launcher = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", file, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [*map(str, launcher), "-m", f"pipelines.{module}", *settings]
    return subprocess.Popen(
        command, cwd=folder, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def launch(kind, module, settings, folder, code=0):
    """Two processes of a shipped launch file; the text on stderr."""
    file = ROOT / "configs/accelerate" / f"{LAUNCHES[kind]}.yaml"
    options = ["--num_processes", "2", "--main_process_port", free_port()]
    process = start(file, module, settings, folder, *options)
    text = process.communicate(timeout=500)[1]
    assert (process.returncode == 0) == (code == 0), text[-3000:]
    return text


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run, *names):
    return [r[n] for r in records(run) for n in names if n in r]


def checkpoint(run, step):
    return run / "checkpoints" / f"step_{step:08d}"


def only_until(source, step, target):
    """A copy of a run as if it had been killed after `step`."""
    shutil.copytree(source, target)
    for later in [p for p in (target / "checkpoints").glob("step_*") if int(p.name[5:]) > step]:
        shutil.rmtree(later)
    return target


def tensors(run, step, *models):
    """Everything that the next step depends on, by name."""
    folder = checkpoint(run, step)
    found = {
        f"{m}.{k}": v
        for m in models
        for k, v in load_file(folder / m / "diffusion_pytorch_model.safetensors").items()
    }
    state = torch.load(folder / "trainer.pt", weights_only=True)
    for name in ("optimizer", "judge_optimizer"):
        for number, moments in state.get(name, {"state": {}})["state"].items():
            found |= {f"{name}.{number}.{k}": v for k, v in moments.items()}
    weights = {k: v for k, v in state.get("discriminator", {}).items() if k.endswith(("weight", "bias"))}
    return found | {f"d.{k}": v for k, v in weights.items()}


def distance(a, b):
    """Largest |a - b| of all tensors, in units of each tensor's largest value (at least 1e-3)."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)).item() for k in a)


LATTE = ("latte", "latte_ema")


@pytest.fixture
def stage_two(latte_settings, own_vae, tmp_path):
    """Settings of a run over a ready cache; clip_start lies inside, so that both kinds of update are made."""
    more = [
        f"vae.path={own_vae}",
        f"cache.dir={tmp_path / 'cache'}",
        f"source.index_dir={tmp_path / 'index'}",
    ]
    settings = [*latte_settings, *more, "save_every=2", "keep_checkpoints=9", "clip_start=2"]
    cache_latents.main(settings)
    return settings


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_a_run_goes_from_one_process_to_two_and_back_as_if_on_one(kind, stage_two, tmp_path):
    one, two, run = tmp_path / "one", tmp_path / kind, tmp_path / "back"
    settings = [*stage_two, "save_every=1", "log_every=4"]  # both moves, 2 and 3, fall into a log window
    train_latte.main([*settings, f"run_dir={one}", "steps=6"])
    only_until(one, 2, two)
    launch(kind, "train_latte", [*settings, f"run_dir={two}", "steps=4"], tmp_path / "elsewhere")
    only_until(two, 3, run)
    train_latte.main([*settings, f"run_dir={run}", "steps=6"])
    for mine, theirs in zip(records(run), records(one), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert distance(tensors(one, 6, *LATTE), tensors(run, 6, *LATTE)) < 1e-5
    assert (
        distance(tensors(one, 6, *LATTE), tensors(run, 4, *LATTE)) > 1e-3
    )  # what a lost step would look like


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(LAUNCHES))
def test_two_processes_accumulate_as_one_does_and_resume_to_the_bit(kind, stage_two, tmp_path):
    settings = [*stage_two, "micro_batch=1", "steps=4"]  # 2 micro-batches on two processes, 4 on one
    one, whole, parts = tmp_path / "one", tmp_path / "whole", tmp_path / "parts"
    train_latte.main([*settings, f"run_dir={one}"])
    launch(kind, "train_latte", [*settings, f"run_dir={whole}"], tmp_path)
    assert curve(whole, "loss", "grad_norm") == pytest.approx(curve(one, "loss", "grad_norm"), rel=1e-5)
    assert distance(tensors(one, 4, *LATTE), tensors(whole, 4, *LATTE)) < 1e-5
    only_until(whole, 2, parts)
    launch(kind, "train_latte", [*settings, f"run_dir={parts}"], tmp_path)
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert distance(tensors(whole, 4, *LATTE), tensors(parts, 4, *LATTE)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_zero3_that_cuts_every_tensor_saves_what_one_process_reads(
    precision, tolerance, stage_two, tmp_path, monkeypatch
):
    settings = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else small tensors stay whole
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    text = (ROOT / "configs/accelerate/zero3_8.yaml").read_text()
    (tmp_path / "zero3.yaml").write_text(
        text.replace("configs/deepspeed/zero3.json", str(tmp_path / "zero3.json"))
    )
    monkeypatch.setitem(LAUNCHES, "cut", tmp_path / "zero3")
    one, run = tmp_path / "one", tmp_path / "run"
    cache_latents.main([*stage_two, "source.demo_seed=9", f"cache.dir={tmp_path / 'held'}"])
    held_out = ["val.every=2", f"val.latents={tmp_path / 'held'}"]
    settings = [*stage_two, f"run_dir={run}", f"precision={precision}", "samples.every=2", *held_out]
    train_latte.main([*settings, f"run_dir={one}", "steps=6"])
    only_until(one, 2, run)
    launch("cut", "train_latte", [*settings, "steps=4"], tmp_path)
    saved = tensors(run, 4, *LATTE)
    for name in ("val/loss", "val/loss_raw"):  # at step 4 by the first of two processes, with whole weights
        assert curve(run, name)[-1] == pytest.approx(curve(one, name)[2], rel=tolerance)
    assert curve(run, "val/loss")[-1] != curve(run, "val/loss_raw")[-1]
    train_latte.main([*settings, "steps=6"])
    assert distance(tensors(one, 6, *LATTE), tensors(run, 6, *LATTE)) < tolerance
    rounded = [torch.equal(v, v.bfloat16().float()) for k, v in saved.items() if "attn.qkv.weight" in k]
    assert rounded
    assert not any(rounded)  # they travel as fp32, also when the arithmetic is bf16
    assert (run / "media" / "samples_00000004.mp4").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_a_step_that_is_not_finite_changes_nothing_and_ends_the_run_when_it_persists(
    kind, stage_two, tmp_path
):
    # one update of this size, and every later loss is infinite or NaN
    settings = [*stage_two, "learning_rate=1e30", "steps=9", "save_every=1", "max_skipped=3"]
    run = tmp_path / "run"
    text = launch(kind, "train_latte", [*settings, f"run_dir={run}"], tmp_path, code=2)
    assert "error: 3 steps in a row had a non-finite loss or gradient" in text
    assert distance(tensors(run, 1, *LATTE), tensors(run, 2, *LATTE)) == 0
    assert all(v.isfinite().all() for v in tensors(run, 2, *LATTE).values())


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp_4x8", "zero2_4x8"])
def test_two_machines_train_as_one_process_does(file, stage_two, tmp_path):
    one, run, port = tmp_path / "one", tmp_path / "run", free_port()
    train_latte.main([*stage_two, f"run_dir={one}", "steps=2"])
    settings = [*stage_two, f"run_dir={run}", "steps=2"]
    machines = []
    for rank in ("0", "1"):  # two launchers on this machine stand for two machines
        options = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", rank]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        path = ROOT / f"configs/accelerate/{file}.yaml"
        machines.append(start(path, "train_latte", settings, tmp_path / f"machine{rank}", *options))
    texts = [m.communicate(timeout=500)[1] for m in machines]
    assert [m.returncode for m in machines] == [0, 0], texts[0][-2000:] + texts[1][-2000:]
    assert curve(run, "loss", "grad_norm") == pytest.approx(curve(one, "loss", "grad_norm"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["alternate", "both"])
def test_two_processes_train_the_vae_and_the_discriminator_as_one_does(schedule, vae_settings, tmp_path):
    more = [f"source.index_dir={tmp_path / 'index'}", "save_every=3", "keep_checkpoints=9"]
    settings = [*vae_settings, *more, f"loss.gan_schedule={schedule}", "loss.gan_start=1", "steps=6"]
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    train_vae.main([*settings, f"run_dir={one}"])
    launch("ddp", "train_vae", [*settings, f"run_dir={two}"], tmp_path)
    only_until(two, 3, resumed)
    train_vae.main([*settings, f"run_dir={resumed}"])  # the second half on one process
    names = ("loss/nll", "gan/discriminator", "gan/logits_fake", "gan/weight", "grad_norm/vae", "val/psnr")
    assert len(curve(one, "gan/weight")) == (2 if schedule == "alternate" else 5)
    for run in (two, resumed):
        assert curve(run, *names) == pytest.approx(curve(one, *names), rel=1e-4)
        assert distance(tensors(one, 6, "vae", "vae_ema"), tensors(run, 6, "vae", "vae_ema")) < 1e-3


@pytest.mark.slow
def test_two_processes_share_a_cache(latte_settings, own_vae, tmp_path):
    more = [f"vae.path={own_vae}", f"source.index_dir={tmp_path / 'index'}"]
    settings = [*latte_settings, *more]
    cache_latents.main([*settings, f"cache.dir={tmp_path / 'cache-one'}"])
    launch("ddp", "cache_latents", [*settings, f"cache.dir={tmp_path / 'cache-ddp'}"], tmp_path)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / f"cache-{k}").glob("*.safetensors")}
        for k in ("one", "ddp")
    ]
    assert len(files[0]) == 3
    assert files[0] == files[1]
