import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.train_vae import TrainVAEConfig
from pipelines.training import folder as run_folder
from pipelines.training.checkpoints import Checkpoints, export_folder
from pipelines.training.distributed import accumulation_steps, draw_seed, generators, normal
from pipelines.training.folder import refuse_inside, stop_on_signal
from pipelines.training.log import MetricLog, read_metrics

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def save(checkpoints, step, text="x"):
    checkpoints.save(step, lambda folder: (folder / "a.txt").write_text(text), {"samples": step * 8}, ALONE)


def test_a_failed_save_leaves_the_older_checkpoint_and_no_half_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)

    def fails(folder):
        (folder / "a.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        OSError, match=r"cannot write .*step_00000002: No space left .* needs about \d+ bytes"
    ):
        checkpoints.save(2, fails, {}, ALONE)
    assert checkpoints.latest() == 1
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step_00000001"]


def test_a_save_cut_short_by_a_kill_is_no_checkpoint_and_does_not_hinder_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    half = checkpoints.folder / ".step_00000002.tmp"
    half.mkdir()
    (half / "a.txt").write_text("half")
    assert checkpoints.latest() == 1
    save(checkpoints, 2, "whole")
    assert (checkpoints.path(2) / "a.txt").read_text() == "whole"


def test_only_the_newest_are_kept_and_never_fewer_than_two(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(checkpoints, step)
    assert checkpoints.steps() == [20, 30]
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_any_damage_is_found_and_the_previous_checkpoint_used(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2, "content")
    file = checkpoints.path(2) / ("manifest.json" if damage == "manifest" else "a.txt")
    if damage == "delete":
        file.unlink()
    else:
        file.write_text({"flip": "contenu", "truncate": "conte", "manifest": "{"}[damage])
    assert checkpoints.damage(2)
    assert checkpoints.latest() == 1


def test_export_replaces_a_folder_as_a_whole(tmp_path):
    target = tmp_path / "vae"
    for step, name in enumerate(("one", "two")):

        def write(folder, name=name):
            folder.mkdir()
            (folder / name).write_text(name)

        assert export_folder(target, write, {"step": step})
        assert not export_folder(target, write, {"step": step})
    assert sorted(p.name for p in target.iterdir()) == ["export.json", "two"]
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_signals_are_remembered_until_the_loop_asks():
    before = signal.getsignal(signal.SIGUSR1)
    with stop_on_signal() as stopping:
        assert stopping() == 0
        signal.raise_signal(signal.SIGUSR1)
        assert stopping() == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before


def test_log_drops_what_a_lost_step_had_written_and_half_lines(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step / 2, "nothing": None, "bad": float("nan")})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    MetricLog(tmp_path, 2).close()
    assert read_metrics(tmp_path)[-1] == {"step": 2, "loss": 1.0, "nothing": None, "bad": None}


@pytest.mark.parametrize(
    "garbage", [b"{", b"\xff\0", b"[1]", b'{"step": "x"}', b'{"step": null}', b"[" * 99_999]
)
def test_a_line_that_is_no_record_costs_no_other(tmp_path, garbage):
    lines = [b'{"step": 1}', garbage, b'{"step": 2}', b'{"step": 3}', b'{"step": 4']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    MetricLog(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(lines[:3]) + b"\n"


def test_a_full_disk_ends_the_logging_not_the_training(tmp_path, monkeypatch, caplog):
    log = MetricLog(tmp_path, 0)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.writer, "add_scalar", full)
    log.scalars(1, {"loss": 1.0})
    log.scalars(2, {"loss": 1.0})
    assert caplog.text.count("training continues") == 1


def test_videos_reach_tensorboard_as_animated_webp(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.video(1, "clip", np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), np.uint8))
    log.close()
    content = b"".join(p.read_bytes() for p in (tmp_path / "tb").iterdir())
    assert b"WEBP" in content
    assert b"ANIM" in content


def test_draws_of_a_sample_depend_on_seed_and_number_only():
    shape = (2, 3)
    whole = normal(generators(5, range(6)), shape, torch.device("cpu"))
    parts = [normal(generators(5, n), shape, torch.device("cpu")) for n in ([4], [5, 0])]
    assert torch.equal(parts[0][0], whole[4])
    assert torch.equal(parts[1], whole[[5, 0]])
    assert not torch.equal(normal(generators(6, [4]), shape, torch.device("cpu"))[0], whole[4])
    assert len({draw_seed(s, n) for s in range(50) for n in range(200)}) == 10_000


def test_accumulation_is_derived_or_refused_with_a_batch_that_fits():
    assert accumulation_steps(16, 2, 4) == 2
    with pytest.raises(ValueError, match="choose e.g. global_batch=12"):
        accumulation_steps(10, 3, 2)


def test_the_checkpoint_just_written_survives_damaged_ones_of_higher_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 6):
        save(checkpoints, step)
        (checkpoints.path(step) / "a.txt").write_text("damaged")
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert checkpoints.steps() == [2, 3, 4, 6]
    assert checkpoints.latest() == 3


def test_when_every_checkpoint_is_damaged_the_run_does_not_begin_anew_by_itself(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (checkpoints.path(1) / "a.txt").write_text("damaged")
    with pytest.raises(ValueError, match="all checkpoints .* are damaged; restore one"):
        checkpoints.latest()


def test_an_input_inside_the_export_is_refused(tmp_path):
    refuse_inside(tmp_path, "vae", str(tmp_path / "other"), "model.init_from")
    with pytest.raises(ValueError, match=r"model.init_from=.* would replace it"):
        refuse_inside(tmp_path, "vae", str(tmp_path / "vae"), "model.init_from")


def test_what_the_code_differed_in_from_its_commit_is_kept_with_the_run(tmp_path, monkeypatch):
    changes = [b""]
    monkeypatch.setattr(run_folder, "git_changes", lambda: changes[0])
    config, run = TrainVAEConfig(run_dir=str(tmp_path / "run")), tmp_path / "run"
    for changes[0] in (b"", b"+ one line", b"+ one line", b"+ two lines"):
        run_folder.open_run(run, config, "train_vae")
    named = [start.get("patch") for start in json.loads((run / "env.json").read_text())["starts"]]
    assert [None if n is None else (run / n).read_bytes() for n in named] == [
        None,
        b"+ one line",
        b"+ one line",
        b"+ two lines",
    ]
    assert len(list(run.glob("code-*.patch"))) == 2
