"""Two processes, launched as a user launches them (gloo on CPU), train as one process does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ZERO2 = """compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {config}, zero3_init_flag: false}}
machine_rank: 0
num_machines: 1
num_processes: 2
main_process_port: 29541
use_cpu: true
"""
pytestmark = pytest.mark.slow


def launch(kind, module, settings, tmp_path):
    bin_folder = Path(sys.executable).parent
    launcher = {
        "one": [sys.executable],
        "ddp": [bin_folder / "torchrun", "--standalone", "--nproc_per_node", "2"],
        "zero2": [bin_folder / "accelerate", "launch", "--config_file", tmp_path / "zero2.yaml"],
    }[kind]
    (tmp_path / "zero2.yaml").write_text(ZERO2.format(config=ROOT / "configs/deepspeed/zero2.json"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [*map(str, launcher), "-m", f"pipelines.{module}", *settings, f"run_dir={tmp_path / kind}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / kind


def curve(run, *names):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r[n] for r in records for n in names if n in r]


@pytest.fixture
def stage_two(latte_settings, own_vae, tmp_path):
    more = [
        f"vae.path={own_vae}",
        f"cache.dir={tmp_path / 'cache'}",
        f"source.index_dir={tmp_path / 'index'}",
    ]
    settings = [*latte_settings, *more, "steps=4", "save_every=2"]
    launch("one", "cache_latents", settings, tmp_path)
    return settings


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_two_processes_train_latte_as_one_does_and_resume(kind, stage_two, tmp_path):
    one = launch("one", "train_latte", stage_two, tmp_path)
    two = launch(kind, "train_latte", stage_two, tmp_path)
    assert curve(two, "loss", "grad_norm") == pytest.approx(curve(one, "loss", "grad_norm"), rel=1e-4)
    whole = curve(two, "loss", "grad_norm")
    shutil.rmtree(two / "checkpoints" / "step_00000004")
    launch(kind, "train_latte", stage_two, tmp_path)
    assert curve(two, "loss", "grad_norm") == whole


def test_two_processes_train_the_vae_as_one_does(vae_settings, tmp_path):
    settings = [*vae_settings, f"source.index_dir={tmp_path / 'index'}", "steps=2", "loss.gan_weight=0"]
    one = launch("one", "train_vae", settings, tmp_path)
    two = launch("ddp", "train_vae", settings, tmp_path)
    names = ("loss/nll", "loss/kl", "grad_norm/vae", "val/psnr")
    assert curve(two, *names) == pytest.approx(curve(one, *names), rel=1e-3)


def test_two_processes_train_the_gan_without_a_deadlock(vae_settings, tmp_path):
    run = launch(
        "ddp", "train_vae", [*vae_settings, f"source.index_dir={tmp_path / 'index'}", "steps=5"], tmp_path
    )
    assert len(curve(run, "gan/discriminator")) == 1  # step 3 of 0..4 with gan_start=2


def test_two_processes_share_a_cache(latte_settings, own_vae, tmp_path):
    more = [f"vae.path={own_vae}", f"source.index_dir={tmp_path / 'index'}"]
    for kind in ("one", "ddp"):
        settings = [*latte_settings, *more, f"cache.dir={tmp_path / ('cache-' + kind)}"]
        launch(kind, "cache_latents", settings, tmp_path)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / f"cache-{k}").glob("*.safetensors")}
        for k in ("one", "ddp")
    ]
    assert len(files[0]) == 3
    assert files[0] == files[1]
