"""Asked to stop, a program saves, ends with 128 + the signal's number, and takes along whatever called it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pipelines import cache_latents, demo, train_latte, train_vae
from pipelines.train_vae import main
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.folder import ROOT, STOPS
from pipelines.training.open import warn_if_unfinished


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


def test_latents_of_a_vae_whose_training_was_stopped_come_with_a_warning(
    vae_settings, latte_settings, tmp_path, monkeypatch, caplog
):
    one = [*vae_settings, f"run_dir={tmp_path / 'one'}", "steps=4", "val_every=99", "loss.gan_weight=0"]
    vae = tmp_path / "one/vae"
    two = [
        *latte_settings,
        f"vae.path={vae}",
        f"cache.dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'two'}",
    ]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            main(one)
    warning = f"{vae}: exported at step 2 of 4; that training is not finished"
    for program in (cache_latents, train_latte):
        caplog.clear()
        program.main([*two, "steps=1"])
        assert caplog.messages.count(warning) == 1
    known = json.loads((vae / "export.json").read_text())
    copy = shutil.copytree(vae, tmp_path / "copied")  # alone, it knows what it wrote down itself
    before = shutil.copytree(
        vae, tmp_path / "one/before"
    )  # earlier exports did not: the run beside them does
    (before / "export.json").write_text(json.dumps({"step": known["step"]}))
    for folder in (copy, before):
        caplog.clear()
        warn_if_unfinished(folder)
        assert caplog.messages == [warning.replace(str(vae), str(folder))]
    main(one)
    (copy / "export.json").write_text("[")  # what is not ours to read does not matter
    for folder in (vae, copy, ""):
        caplog.clear()
        warn_if_unfinished(folder)
        assert not caplog.messages
