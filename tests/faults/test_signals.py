"""Asked to stop, a program saves, ends with 128 + the signal's number, and takes along whatever called it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipelines import demo, train_vae
from pipelines.train_vae import main
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.folder import ROOT, STOPS


def stop_at(monkeypatch, step, number):
    """Let the process get the signal after a step of stage one."""
    original = train_vae.VAETrainer.train_step

    def interrupted(self, batches):
        original(self, batches)
        if self.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(train_vae.VAETrainer, "train_step", interrupted)


@pytest.mark.parametrize("number", STOPS)
def test_each_signal_saves_exports_and_ends_with_its_own_code(vae_settings, tmp_path, monkeypatch, number):
    settings = [*vae_settings, f"run_dir={tmp_path}", "val_every=99", "save_every=99", "loss.gan_weight=0"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        with pytest.raises(SystemExit) as stopped:
            main([*settings, "steps=4"])
    assert stopped.value.code == 128 + number
    assert Checkpoints(tmp_path).steps() == [2]
    assert json.loads((tmp_path / "vae" / "export.json").read_text())["step"] == 2
    with monkeypatch.context() as patch:  # in the last step there is nothing left to stop
        stop_at(patch, 4, number)
        main([*settings, "steps=4"])
    assert Checkpoints(tmp_path).latest() == 4


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_stops_a_training_with_reading_processes(vae_settings, tmp_path, number):
    settings = [*vae_settings, f"run_dir={tmp_path / 'run'}", "steps=100000", "workers=2", "val_every=100000"]
    command = [sys.executable, "-m", "pipelines.train_vae", *settings]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    program = subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 200
    while not (tmp_path / "run/metrics.jsonl").is_file() and program.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(program.pid, number)
    text = program.communicate(timeout=100)[1]
    assert program.returncode == 128 + number, text
    assert "Traceback" not in text
    assert len(Checkpoints(tmp_path / "run").steps()) == 1


def test_a_demo_that_is_stopped_begins_no_other_part_and_goes_on_with_the_first(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            demo.main(["--short", "--out", str(tmp_path)])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["image"]
    monkeypatch.setattr(
        "pipelines.cache_latents.build_cache", lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--short", "--out", str(tmp_path)])
    assert [Checkpoints(tmp_path / name).latest() for name in ("image", "vae")] == [6, 6]


def test_a_run_that_began_with_other_weights_is_refused(vae_settings, tmp_path):
    image = [
        *vae_settings,
        f"run_dir={tmp_path / 'image'}",
        "clip.num_frames=1",
        "loss.gan_weight=0",
        "steps=2",
    ]
    main([*image, "save_every=2"])
    settings = [word for word in vae_settings if not word.startswith("model.init")]
    settings += [
        f"model.init_from={tmp_path / 'image/vae'}",
        f"run_dir={tmp_path / 'run'}",
        "loss.gan_weight=0",
    ]
    main([*settings, "steps=1"])
    main([*settings, "steps=2"])
    main([*image[:-1], "steps=4"])  # other weights in its export
    with pytest.raises(ValueError, match="began with other weights"):
        main([*settings, "steps=3"])
