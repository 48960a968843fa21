import json
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.clip import ClipSpec
from data.encode import write_mp4
from pipelines.train_vae import main
from pipelines.training.open import open_clips
from pipelines.training.settings import SourceConfig


def weights(run, step, name="vae"):
    return load_file(run / "checkpoints" / f"step_{step:08d}" / name / "diffusion_pytorch_model.safetensors")


def trainer_state(run, step):
    return torch.load(run / "checkpoints" / f"step_{step:08d}" / "trainer.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_resumed_training_equals_uninterrupted_to_the_bit(train, tmp_path):
    # step 3 falls into a log window, after gan_start, between a VAE step and a discriminator step
    whole = train("whole", "steps=6", "save_every=3", "log_every=2")
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_00000006")  # as if killed between steps 3 and 6
    train("parts", "steps=6", "save_every=3", "log_every=2")
    for name in ("vae", "vae_ema"):
        assert same(weights(whole, 6, name), weights(parts, 6, name))
    assert same(trainer_state(whole, 6), trainer_state(parts, 6))
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    assert not same(weights(whole, 6), weights(parts, 3))


def test_discriminator_trains_on_odd_steps_only_and_the_vae_on_even_ones(train):
    run = train("alternate", "steps=6", "save_every=1", "keep_checkpoints=7")
    judge = [trainer_state(run, step)["discriminator"] for step in range(1, 7)]
    moved = [not same(a, b) for a, b in zip(judge[:-1], judge[1:], strict=True)]
    # D's batch statistics move whenever it sees a clip, its weights only in its own steps (3, 5: the 4th and 6th)
    weights_moved = [
        not torch.equal(a[k], b[k]) for a, b in zip(judge[:-1], judge[1:], strict=True) for k in list(a)[:1]
    ]
    assert any(moved)
    assert weights_moved == [False, False, True, False, True]
    vae_moved = [not same(weights(run, s), weights(run, s + 1)) for s in range(1, 6)]
    assert vae_moved == [True, True, False, True, False]


def test_accumulated_small_batches_train_as_one_large_batch(train):
    def curve(name, *more):
        run = train(name, "steps=3", "loss.gan_weight=0", *more)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [r[k] for r in records if "loss/nll" in r for k in ("loss/nll", "loss/kl", "grad_norm/vae")]

    large = curve("large", "micro_batch=4")
    assert curve("small", "micro_batch=1") == pytest.approx(large, rel=1e-4)
    assert curve("other", "micro_batch=4", "seed=1") != pytest.approx(large, rel=1e-2)


def test_sigterm_saves_and_the_same_command_goes_on(train, monkeypatch, tmp_path):
    from pipelines import train_vae

    original = train_vae.VAETrainer.train_step

    def interrupted(self, batches):
        original(self, batches)
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_vae.VAETrainer, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        train("stopped", "steps=5", "save_every=100")
    assert stop.value.code == 128 + signal.SIGTERM
    run = tmp_path / "stopped"
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_00000002"]
    monkeypatch.undo()
    stopped = train("stopped", "steps=5", "save_every=100")
    assert same(weights(stopped, 5), weights(train("whole", "steps=5", "save_every=100"), 5))


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(train, caplog):
    run = train("run", "steps=4", "save_every=2")
    file = run / "checkpoints" / "step_00000004" / "trainer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train("run", "steps=4", "save_every=2")
    assert "step_00000004 is damaged (trainer.pt: sha256 differs" in caplog.text
    assert same(weights(run, 4), weights(train("whole", "steps=4", "save_every=2"), 4))


def test_nan_gradients_are_left_out_counted_and_end_the_run_when_they_persist(train, monkeypatch):
    from pipelines import train_vae

    original = train_vae.VAETrainer.vae_loss

    def poisoned(self, x, noise):
        loss, xhat, logged = original(self, x, noise)
        return (loss * float("nan") if self.step >= 2 else loss), xhat, logged

    monkeypatch.setattr(train_vae.VAETrainer, "vae_loss", poisoned)
    with pytest.raises(ValueError, match=r"3 steps in a row .* last good checkpoint: .*step_0000000[24]"):
        train("nan", "steps=9", "save_every=2", "max_skipped=3", "loss.gan_weight=0")


def test_a_run_dir_of_other_settings_is_refused_with_the_setting(train):
    train("run", "steps=1")
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.1"):
        train("run", "steps=1", "learning_rate=0.1")


def test_gan_off_perceptual_off_needs_no_weights_and_perceptual_on_names_the_option(train):
    with pytest.raises(ValueError, match=r"perceptual_weight=0"):
        train("lpips", "steps=1", "loss.perceptual_weight=1")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clip.num_frames=8", "4k \\+ 1 frames, e.g. 9"),
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'"),
        ("loss.gan_strat=3", "did you mean 'loss.gan_start'"),
        ("steps=many", "steps"),
        ("model.init=tail", "model.init_from"),
        ("model.variant=5", "variants 1, 2, 3 and 4"),
        ("micro_batch=3", "not a multiple of micro_batch=3"),
        ("source.name=nowhere", "choose one of ucf101"),
    ],
)
def test_wrong_settings_are_one_clear_line_and_leave_nothing_behind(train, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        train("wrong", "steps=1", setting)
    assert not (tmp_path / "wrong").exists()


def test_exported_folder_opens_as_a_diffusers_model_with_the_ema_weights(train):
    from vae import ODVAE

    run = train("run", "steps=3", "save_every=3")
    vae = ODVAE.from_pretrained(run / "vae")
    ema = weights(run, 3, "vae_ema")
    assert all(torch.equal(v, ema[k]) for k, v in vae.state_dict().items())
    assert not same(ema, weights(run, 3))


def test_validation_pictures_and_scores_are_written(train):
    run = train("run", "steps=2")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val/psnr" in r] == [0, 2]
    first, last = (r for r in records if "val/psnr" in r)
    assert first["val/psnr_raw"] == first["val/psnr"]  # EMA begins where the weights do
    assert last["val/psnr_raw"] != last["val/psnr"]
    assert abs(last["val/psnr_raw"] - first["val/psnr"]) > abs(last["val/psnr"] - first["val/psnr"])
    assert (run / "media" / "val_00000002.mp4").stat().st_size > 0
    assert any(b"WEBP" in file.read_bytes() for file in (run / "tb").iterdir())
    assert {"config.yaml", "env.json", "efficiency.json"} <= {p.name for p in run.iterdir()}


def test_dry_run_prints_the_paper_s_model_and_writes_nothing(capsys, tmp_path):
    main(["--dry-run", "source.name=demo", f"run_dir={tmp_path / 'x'}"])
    text = capsys.readouterr().out
    assert "239,189,991 parameters" in text
    assert "3 x 25 x 256 x 256 -> latent 4 x 7 x 32 x 32" in text
    assert "learning_rate = 1e-05" in text
    assert "demo: 256 videos, 256 held_out, 0 damaged, 0 short" in text
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="/nowhere' is not a folder"):
        main(["--dry-run", "source.root=/nowhere"])


def test_checkpointed_activations_change_the_memory_not_the_training(train):
    plain = weights(train("plain", "steps=2", "save_every=2"), 2)
    saved = weights(train("saved", "steps=2", "save_every=2", "gradient_checkpointing=true"), 2)
    assert all(torch.allclose(plain[k], saved[k], atol=1e-6) for k in plain)


def test_bf16_trains_near_fp32_and_keeps_fp32_weights(train):
    runs = [
        train(p, "steps=3", "save_every=3", f"precision={p}", "loss.gan_weight=0") for p in ("fp32", "bf16")
    ]
    losses = [
        [json.loads(line).get("loss/nll") for line in (r / "metrics.jsonl").read_text().splitlines()]
        for r in runs
    ]
    fp32, bf16 = ([v for v in curve if v is not None] for curve in losses)
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.05)
    assert all(v.dtype == torch.float32 for v in weights(runs[1], 3).values())


def test_a_folder_of_other_things_is_no_run_dir(train, tmp_path):
    (tmp_path / "mine" / "vae").mkdir(parents=True)
    (tmp_path / "mine" / "vae" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train("mine", "steps=1")
    assert (tmp_path / "mine" / "vae" / "precious.txt").read_text() == "x"


def test_a_finished_run_called_again_leaves_its_export_alone(train):
    run = train("run", "steps=2")
    config = run / "vae" / "config.json"
    measured = json.loads(config.read_text()) | {"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}
    config.write_text(json.dumps(measured))
    train("run", "steps=2")
    assert json.loads(config.read_text()) == measured


def test_two_trainings_in_one_folder_are_refused(train, tmp_path):
    from filelock import FileLock

    run = train("run", "steps=1")
    with FileLock(run / ".lock"), pytest.raises(ValueError, match="another process is training here"):
        train("run", "steps=2")


@pytest.mark.parametrize(
    "setting",
    [
        "grad_clip=-1",
        "ema_decay=2",
        "loss.kl_weight=-1",
        "warmup_steps=-5",
        "val_videos=0",
        "adam_betas=[0.9]",
        "seed=-1",
        "max_skipped=0",
    ],
)
def test_values_that_would_wreck_the_training_are_refused_by_name(train, setting):
    with pytest.raises(ValueError, match=setting.split("=")[0]):
        train("wrong", "steps=1", setting)


def test_held_out_videos_that_are_all_too_short_are_named_as_such(tmp_path):
    for name in "ab":
        write_mp4(tmp_path / "videos" / f"{name}.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    source = SourceConfig(root=str(tmp_path / "videos"), val_fraction=0.5, index_dir=str(tmp_path / "index"))
    spec = ClipSpec(num_frames=9, size=16)
    held_out = tmp_path / "videos" / open_clips(source, spec, 0, held_out=True).name(0)
    write_mp4(held_out, np.zeros((5, 32, 32, 3), np.uint8), 8)
    assert len(open_clips(source, spec, 0)) == 1
    with pytest.raises(
        ValueError, match=r"^of the videos that are held out .*val_fraction=0.5.*no usable video"
    ):
        open_clips(source, spec, 0, held_out=True)
