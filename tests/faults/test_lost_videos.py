"""Videos that vanish or break after the scan: listed, counted, replaced in a fixed way; too many of them end the run."""

import json

import numpy as np
import pytest

from data.demo import DemoVideos
from data.encode import write_mp4
from pipelines import train_vae
from pipelines.training.log import read_metrics
from pipelines.training.quarantine import Quarantine
from tests.faults.disk import program


@pytest.fixture
def videos(tmp_path):
    """Ten videos of 20 frames."""
    scenes = DemoVideos(10, num_frames=20, size=32)
    for n in range(10):
        write_mp4(tmp_path / "videos" / f"{n}.mp4", scenes.frames(n, range(20)), 8)
    return tmp_path / "videos"


@pytest.fixture
def train(vae_settings, videos, tmp_path, monkeypatch):
    """Train on the videos; `damage` is called after the scan."""

    def go(name, damage, *more, steps=6):

        original = train_vae.VAETrainer.fit

        def damaged_fit(*args, **kwargs):
            damage(videos)
            return original(*args, **kwargs)

        settings = [s for s in vae_settings if not s.startswith("source.")]
        source = [f"source.root={videos}", "source.val_fraction=0", f"source.index_dir={tmp_path / 'index'}"]
        source += ["source.scan_workers=1"]  # each is a new process with its imports
        with monkeypatch.context() as patch:
            patch.setattr(train_vae.VAETrainer, "fit", damaged_fit)
            code = program(
                train_vae.main, *settings, *source, f"run_dir={tmp_path / name}", f"steps={steps}", *more
            )
        return code, tmp_path / name

    return go


def lose_two(videos):
    (videos / "3.mp4").unlink(missing_ok=True)
    (videos / "7.mp4").write_bytes((videos / "7.mp4").read_bytes()[:200])


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_vanished_and_truncated_videos_are_listed_and_counted_and_training_goes_on(train, caplog, workers):
    code, run = train("run", lose_two, "source.max_failed_share=0.2", f"workers={workers}")
    assert code == 0
    listed = dict(line.split("\t") for line in (run / "quarantine.tsv").read_text().splitlines())
    assert sorted(listed) == ["folder/3.mp4", "folder/7.mp4"]
    assert "no such file" in listed["folder/3.mp4"].lower()
    shares = [r["data/substituted"] for r in read_metrics(run) if "data/substituted" in r]
    assert len(shares) == 6
    # 24 samples: two passes over ten videos and four more
    assert sum(shares) * 4 in (4, 5, 6)
    assert caplog.text.count("video folder/3.mp4 cannot be read any more") == 1


def test_substitutes_are_the_same_in_a_resumed_run(train, videos, monkeypatch):
    _, whole = train("whole", lose_two, "source.max_failed_share=0.2", "save_every=3")
    import shutil

    parts = shutil.copytree(whole, whole.with_name("parts"))
    shutil.rmtree(parts / "checkpoints/step_00000006")
    # the scan of the resumed run must know the same ten videos
    scenes = DemoVideos(10, num_frames=20, size=32)
    for n in (3, 7):
        write_mp4(videos / f"{n}.mp4", scenes.frames(n, range(20)), 8)
    train("parts", lose_two, "source.max_failed_share=0.2", "save_every=3")
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    file = "checkpoints/step_00000006/vae/diffusion_pytorch_model.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()


def test_more_than_the_allowed_share_ends_the_run_with_the_names_and_the_way_out(train, capfd):
    code, run = train("run", lose_two)
    assert code == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "of 10 videos (" in line
    assert "e.g. folder/" in line
    assert str(run / "quarantine.tsv") in line
    assert "source.max_failed_share=" in line


def test_a_share_outside_0_to_1_is_refused(train, capfd):
    assert train("run", lambda videos: None, "source.max_failed_share=1.5", steps=1)[0] == 2
    assert "source.max_failed_share=1.5: must be in [0, 1]" in capfd.readouterr().err


def test_a_healthy_run_lists_nothing_and_logs_a_share_of_zero(train):
    code, run = train("run", lambda videos: None, steps=2)
    assert code == 0
    assert not (run / "quarantine.tsv").exists()
    assert [r["data/substituted"] for r in read_metrics(run)] == [0.0, 0.0]


def test_the_share_counts_each_video_once_and_the_limit_itself_is_allowed(tmp_path):
    from types import SimpleNamespace

    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    quarantine = Quarantine(tmp_path, np.zeros(10), 0.2, accelerator)
    for name in ("a", "a", "b", "a"):
        quarantine.record({"passed_over": ["", json.dumps({name: "gone"})]})
        quarantine.check()
    assert (tmp_path / "quarantine.tsv").read_text() == "a\tgone\nb\tgone\n"
    quarantine.record({"passed_over": [json.dumps({"c": "gone"})]})
    with pytest.raises(ValueError, match=r"3 of 10 videos \(30.0%\)"):
        quarantine.check()
