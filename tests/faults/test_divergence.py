"""A training that diverges is caught before it is saved, and the advice that it gives works."""

import json

import pytest
from safetensors.torch import load_file

from pipelines import cache_latents, train_vae
from pipelines.train_vae import main
from pipelines.training.checkpoints import Checkpoints

QUIET = ["loss.gan_weight=0", "val_every=99", "log_every=1"]


def test_the_advice_followed_a_diverged_run_goes_on_from_its_last_good_checkpoint(
    vae_settings, tmp_path, monkeypatch
):
    settings = [*vae_settings, *QUIET, f"run_dir={tmp_path}", "save_every=1", "max_skipped=3", "steps=9"]
    original = train_vae.VAETrainer.vae_loss

    def diverging(self, x, noise):
        loss, xhat, logged = original(self, x, noise)
        return (
            (loss * float("nan") if self.config.learning_rate == 1e-3 and self.step >= 4 else loss),
            xhat,
            logged,
        )

    monkeypatch.setattr(train_vae.VAETrainer, "vae_loss", diverging)
    with pytest.raises(
        ValueError, match=r"last good checkpoint: .*step_00000003; resume .*resume.change=learning_rate"
    ):
        main(settings)
    checkpoints = Checkpoints(tmp_path)
    assert [checkpoints.manifest(s)["skipped_in_row"] for s in checkpoints.steps()][-2:] == [1, 2]
    assert 3 in checkpoints.steps()  # kept for as long as it is the last good one
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.0005.*resume.change=learning_rate"):
        main([*settings, "learning_rate=5e-4"])
    with pytest.raises(ValueError, match="with other settings .*ema_decay"):
        main([*settings, "learning_rate=5e-4", "ema_decay=0.5", "resume.change=learning_rate"])
    with pytest.raises(ValueError, match="seed is none of learning_rate, grad_clip"):
        main([*settings, "seed=4", "resume.change=seed"])
    main([*settings, "learning_rate=5e-4", "grad_clip=1", "resume.change=learning_rate,grad_clip"])
    aside = {"set_aside_step_00000005", "set_aside_step_00000006"}
    assert aside <= {
        path.name for path in (tmp_path / "checkpoints").iterdir()
    }  # not found by a plain restart
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/nll" in row] == [*range(1, 10)]
    assert not any("skipped" in row for row in rows)
    starts = json.loads((tmp_path / "env.json").read_text())["starts"]
    assert starts[-1]["changed"] == {"learning_rate": [0.001, 0.0005], "grad_clip": [0.0, 1.0]}
    main([*settings, "learning_rate=5e-4", "grad_clip=1", "steps=10"])  # it is the run's rate now
    monkeypatch.setattr(Checkpoints, "set_aside_after", lambda *_: pytest.fail("nothing has changed"))
    main(
        [*settings, "learning_rate=5e-4", "grad_clip=1", "steps=11", "resume.change=learning_rate,grad_clip"]
    )


def test_a_checkpoint_is_good_once_a_step_that_begins_from_it_is_finite(vae_settings, tmp_path, monkeypatch):
    original = train_vae.VAETrainer.vae_loss

    def diverging(self, x, noise):
        loss, xhat, logged = original(self, x, noise)
        return (loss * float("nan") if self.step >= 4 else loss), xhat, logged

    monkeypatch.setattr(train_vae.VAETrainer, "vae_loss", diverging)
    settings = [*vae_settings, *QUIET, "log_every=9", f"run_dir={tmp_path}", "save_every=2", "max_skipped=3"]
    with pytest.raises(ValueError, match="last good checkpoint: .*step_00000002;"):
        main([*settings, "steps=9"])
    assert Checkpoints(tmp_path).steps() == [2, 4, 6]  # 2 is kept: nothing is known of 4


def test_weights_that_are_not_finite_are_not_saved(vae_settings, tmp_path, monkeypatch):
    original = train_vae.VAETrainer.train_step

    def ruined(self, batches):
        original(self, batches)
        if self.step == 4:
            next(self.vae.parameters()).data[0] = float("inf")

    monkeypatch.setattr(train_vae.VAETrainer, "train_step", ruined)
    with pytest.raises(ValueError, match=r"step 4: the weights are not finite.*step_00000002"):
        main([*vae_settings, *QUIET, f"run_dir={tmp_path}", "save_every=2", "steps=6"])
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_loss_that_grows_by_orders_of_magnitude_warns(vae_settings, tmp_path, caplog):
    main([*vae_settings, *QUIET, f"run_dir={tmp_path}", "learning_rate=30", "steps=6"])
    assert "does the training diverge?" in caplog.text


def test_latents_that_are_not_finite_are_sealed_into_no_cache(latte_settings, own_vae, tmp_path):
    from safetensors.torch import save_file

    file = own_vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in weights:
        weights[name].fill_(float("nan"))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="latents of .* are not finite"):
        cache_latents.main([*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"])
    assert not json.loads((tmp_path / "cache/index.json").read_text())["complete"]
    assert not list((tmp_path / "cache").glob("*.safetensors"))
