"""The shipped launch files are read by accelerate itself, and the slurm script stops, queues itself and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
assert FILES, "configs/accelerate holds no launch files"
SLURM = ROOT / "scripts/slurm_stage2.sbatch"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_launch_files_are_read_by_accelerate_and_count_the_gpus_of_their_name(file):
    config = load_config_from_file(str(file))
    machines, gpus = re.search(r"(?:(\d+)x)?(\d+)?$", file.stem).groups()
    assert config.num_machines == int(machines or 1)
    assert config.num_processes == int(machines or 1) * int(gpus or 1)
    assert ("zero" in file.stem) == (str(config.distributed_type).endswith("DEEPSPEED"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_files_have_the_stage_of_their_name_and_are_found_from_any_folder(
    stage, tmp_path, monkeypatch
):
    from pipelines.training.distributed import _find_deepspeed_config

    files = [file for file in FILES if file.stem.startswith(f"zero{stage}")]
    assert files
    for file in files:
        folder = tmp_path / file.stem
        folder.mkdir()
        monkeypatch.chdir(folder)
        named = load_config_from_file(str(file)).deepspeed_config["deepspeed_config_file"]
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", named)
        _find_deepspeed_config()
        found = os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
        zero = DeepSpeedPlugin(hf_ds_config=found).deepspeed_config["zero_optimization"]
        assert zero["stage"] == stage
        # staging of 0.2 GB each, not DeepSpeed's default of 2 GB, which would be more than ZeRO saves with XL/2
        assert zero["reduce_bucket_size"] == zero.get("allgather_bucket_size", 5e7) == 5e7
        if (
            stage == 3
        ):  # below XL/2's 6.7e8 parameters, or all weights stay whole between forward and backward
            assert max(zero[f"stage3_max_{k}"] for k in ("live_parameters", "reuse_distance")) < 6.7e8
        (folder / named).parent.mkdir(parents=True)
        (folder / named).write_text("{}")  # a file of the user's own comes first
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", named)
        _find_deepspeed_config()
        assert os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == named


def test_the_slurm_script_is_bash_that_parses():
    subprocess.run(["bash", "-n", SLURM], check=True)


# What slurm does, on this machine: srun starts two tasks, scancel signals them, scontrol notes a requeue.
FAKES = {
    "srun": """shift
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" & echo $! >> "$FAKE/tasks"; done
code=0; for task in $(jobs -p); do wait "$task" || code=$?; done; : > "$FAKE/tasks"; exit $code""",
    "scancel": 'kill -USR1 $(cat "$FAKE/tasks")',
    "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$*" >> "$FAKE/requeued"',
}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_near_its_time_limit_saves_is_queued_again_and_the_same_command_goes_on(
    latte_settings, own_vae, tmp_path
):
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    run, python = tmp_path / "run", Path(sys.executable).parent
    env = os.environ | {"FAKE": str(tmp_path), "PATH": f"{tmp_path}:{python}:{os.environ['PATH']}"}
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here"}
    env |= {"VIRTUAL_ENV": str(python.parent), "CUDA_VISIBLE_DEVICES": "", "ENGINE": "zero2"}
    settings = [
        *latte_settings,
        f"vae.path={own_vae}",
        f"cache.dir={tmp_path / 'cache'}",
        f"run_dir={run}",
    ]
    settings += [f"source.index_dir={tmp_path / 'index'}", "save_every=100000", "precision=bf16"]

    def submit(steps):
        command = ["bash", SLURM, "--config", ROOT / "configs/stage2/demo.yaml", *settings, f"steps={steps}"]
        return subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    job = submit(100_000)
    until = time.monotonic() + 400
    while not (run / "metrics.jsonl").is_file() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    text = job.communicate(timeout=100)[1]
    assert job.returncode == 0, text[-3000:]
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    (saved,) = (run / "checkpoints").glob("step_*")
    step = int(saved.name[5:])
    job = submit(step + 2)
    text = job.communicate(timeout=400)[1]
    assert job.returncode == 0, text[-3000:]
    assert f"resuming {run} at step {step}" in text
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))
    assert (tmp_path / "requeued").read_text().count("\n") == 1
