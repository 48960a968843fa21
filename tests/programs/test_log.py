"""What a run says and records: lines for a job without a terminal, hyperparameters, trackers of accelerate."""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import accelerate
import numpy as np
import pytest
from accelerate import tracking
from packaging.version import Version

from data.core.option import option
from pipelines.training import log as run_log
from pipelines.training.config import load
from pipelines.training.log import command, speed_line, step_line
from pipelines.training.trackers import tracker_names


class Recorder(tracking.GeneralTracker):
    """A tracker that writes lines; it fails at steps that a test names."""

    name, requires_logging_directory, main_process_only = "recorder", False, True
    fails_at: tuple[int, ...] = ()
    got: list = []  # noqa: RUF012

    def __init__(self, project, **kwargs):
        super().__init__()
        self.got.append(("project", project))

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.got.append(("settings", values))

    def log(self, values, step):
        if step in self.fails_at:
            raise RuntimeError("service is away")
        self.got.append((step, values))

    def finish(self):
        self.got.append(("end", None))


@pytest.fixture
def recorder(monkeypatch):
    if Version(accelerate.__version__) < Version("1.15"):
        pytest.skip("not run: this accelerate takes its own trackers only by name")
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "got", [])
    return Recorder


def test_a_line_says_step_loss_rate_speed_data_wait_memory_and_time_left():
    values = {"loss": 0.21341, "loss/rec": 0.5, "learning_rate": 1e-4, "grad_norm": 3.0}
    speed = {"eff/tspeed": 1.834, "eff/data_wait_share": 0.021, "eff/reserved_mib": 12_595.2}
    line = "step 500/200000, loss 0.2134, rec 0.5, lr 0.0001, 1.83 it/s, data wait 2 %, 12.30 GiB, about 30 h left"
    assert step_line(500, 200_000, values, speed, 108_000) == line
    slow = step_line(1, 2, {"learning_rate": 1e-4}, {"eff/tspeed": 0.02, "eff/reserved_mib": 0.0}, None)
    assert slow == "step 1/2, lr 0.0001, 50 s/it, 0.00 GiB"


def test_speed_is_said_in_words():
    memory = {"allocated_mib": None, "reserved_mib": 1024.0}
    summary = {"tspeed": 0.33567, "timed_steps": 40, "data_wait_share": 0.014, "tmem": memory}
    text = "TSpeed (online): 0.336 it/s, the median of 40 steps, data wait 1 %, reserved 1.00 GiB"
    assert speed_line(summary, "online") == text
    assert (
        speed_line(summary | {"tspeed": None}, "online")
        == "TSpeed (online): not measured, the run had too few steps"
    )


@dataclass
class Settings:
    root: str = option("", "")
    flip: bool = option(False, "")


def test_the_next_command_takes_over_what_differs_from_the_defaults():
    config = Settings(root="my videos", flip=True)
    assert command("x", "a=b", config=config, keys=("ro",)) == "python -m pipelines.x a=b 'root=my videos'"
    assert command("x", config=config, keys=("flip",)) == "python -m pipelines.x flip=true"


def test_a_tracker_that_is_not_there_is_refused_by_name(recorder):
    assert tracker_names("tensorboard, recorder,none") == ["recorder"]
    with pytest.raises(ValueError, match="'wandbb' is none of none, aim, .*wandb"):
        tracker_names("wandbb")
    missing = next(
        n
        for n in map(str, tracking.LOGGER_TYPE_TO_CLASS)
        if n not in map(str, tracking.get_available_trackers()) and n != "recorder"
    )
    with pytest.raises(ValueError, match=f"{missing} is not installed here"):
        tracker_names(missing)


def test_a_run_goes_to_its_trackers_and_survives_them(recorder, monkeypatch, tmp_path, vae_settings, caplog):
    from pipelines.train_vae import main

    monkeypatch.setattr(Recorder, "fails_at", (2,))
    caplog.set_level(logging.INFO)
    settings = [f"run_dir={tmp_path / 'run'}", f"source.index_dir={tmp_path}", "steps=3", "val_every=3"]
    assert main([*vae_settings, *settings, "log_with=tensorboard,recorder"]) == 0
    kinds = [kind for kind, _ in recorder.got]
    assert kinds[:2] == ["project", "settings"]
    assert kinds[-1] == "end"
    assert 2 not in kinds
    values = dict(recorder.got)
    assert values["settings"]["learning_rate"] == 1e-3
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in logged if "loss" in r and r["step"] == 3] == [
        v["loss"] for k, v in recorder.got if k == 3 and "loss" in v
    ]
    assert "cannot write to" in caplog.text
    assert "service is away" in caplog.text
    for words in (
        "step 3/3, ",
        "step 3: held-out EMA PSNR",
        "raw PSNR",
        "finished: 3 steps",
        "python -m pipelines.cache_latents",
    ):
        assert words in caplog.text
    tb = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tb").iterdir())
    assert b"_hparams_/session_start_info" in tb
    assert b"learning_rate = 0.001" in tb


class Painter(Recorder):
    """A tracker that takes pictures too, as those of W&B and TensorBoard do."""

    def log_images(self, values, step):
        if step in self.fails_at:
            raise RuntimeError("no room for pictures")
        self.got.append((step, values))


def test_videos_go_as_pictures_to_the_trackers_that_take_them(recorder, tmp_path, monkeypatch, caplog):
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(2, 2).repeat(3, 3)
    painter = Painter("p")
    log = run_log.MetricLog(tmp_path, -1, tensorboard=False, trackers=[recorder("p"), painter])
    log.video(7, "samples/ema", frames)
    (values,) = [values for step, values in painter.got if step == 7]  # one without log_images got nothing
    (strip,) = values["samples/ema"]
    assert strip.shape == (4, 6, 3)
    assert strip[0, ::2, 0].tolist() == [0, 2, 4]  # the first, the middle and the last frame
    monkeypatch.setattr(Painter, "name", "aim")  # takes one picture, not a list
    log.video(8, "samples/ema", frames)
    assert np.array_equal(painter.got[-1][1]["samples/ema"], strip)
    monkeypatch.setattr(Painter, "fails_at", (9,))
    log.video(9, "samples/ema", frames)
    assert "no room for pictures" in caplog.text
    assert log.lost == {"aim": 1}


def test_a_training_sends_its_previews_to_the_tracker(recorder, monkeypatch, tmp_path, vae_settings):
    from pipelines.train_vae import main

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Painter)
    main(
        [
            *vae_settings,
            f"run_dir={tmp_path / 'run'}",
            f"source.index_dir={tmp_path}",
            "steps=1",
            "log_with=recorder",
        ]
    )
    pictures = [values for _, values in recorder.got if "val/original_reconstruction_error" in (values or {})]
    assert len(pictures) == 2  # before the first step and after the last


def test_a_tracker_that_cannot_begin_is_one_line_with_a_way_out(
    recorder, monkeypatch, tmp_path, vae_settings, capsys
):
    from data.core.cli import run
    from pipelines.train_vae import main

    def no_login(self, values):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(Recorder, "store_init_configuration", no_login)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train_vae",
            *vae_settings,
            f"run_dir={tmp_path / 'run'}",
            f"source.index_dir={tmp_path}",
            "log_with=recorder",
        ],
    )
    with pytest.raises(SystemExit) as stop:
        run(main)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert said == [
        "error: log_with=recorder: cannot begin (api_key not configured (no-tty)); log in, or log_with=none"
    ]


def test_none_writes_no_tensorboard_and_loses_nothing(tmp_path, caplog):
    log = run_log.MetricLog(tmp_path, -1, tensorboard=False)
    log.scalars(1, {"loss": 1.0})
    log.close()
    assert (log.lost, [p.name for p in tmp_path.iterdir()]) == ({}, ["metrics.jsonl"])


@pytest.mark.parametrize(("share", "told"), [("0.01", "0.01"), ("0.05", "0.05"), ("0", "")])
def test_the_command_that_measures_a_run_takes_what_it_held_out(share, told, caplog):
    from pipelines.reconstruct import config_from
    from pipelines.train_vae import TrainVAEConfig

    caplog.set_level("INFO")
    settings = ["source.root=/v", f"source.val_fraction={share}", "clip.num_frames=9"]
    run_log.end_of_stage_one(load(TrainVAEConfig, None, settings), Path("run/vae"))
    lines = {
        line.split()[0]: line.split()[4:] for line in caplog.messages[-1].splitlines() if "pipelines." in line
    }
    config, _ = config_from(lines["measure"])
    assert (config.source.root, config.clip.num_frames, config.vae.path) == ("/v", 9, "run/vae")
    assert (config.held_out, config.source.val_fraction) == (bool(told), float(told or 0))
    assert not any("val_fraction" in word for word in lines["next"])
