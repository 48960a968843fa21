"""A loss or gradient that is not finite: the step is left out, counted and logged; too many in a row end the run."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from pipelines import cache_latents, train_latte, train_vae
from pipelines.training.log import read_metrics
from tests.faults.disk import program


@pytest.fixture
def poisoned(vae_settings, latte_settings, own_vae, tmp_path, monkeypatch):
    """Train a stage whose samples of the named steps hold a NaN or an infinity; (exit code, run folder)."""

    def go(stage, steps, value, *more):
        from data.latents import LatentCache, LatentStream

        original = LatentStream.batch

        def poisoned_batch(self, numbers, *each):
            batch = original(self, numbers, *each)
            for row, n in enumerate(numbers):
                if n // 4 in steps:  # the global batch is 4
                    batch["mean"][row].view(-1)[0] = value
            return batch

        run = tmp_path / "run"
        if stage is train_vae:
            calls, original = itertools.count(), train_vae.to_float

            def poisoned_clip(clip):
                x = original(clip)
                if next(calls) // 2 in steps:  # two micro-batches a step
                    x.view(-1)[0] = value
                return x

            monkeypatch.setattr(train_vae, "to_float", poisoned_clip)
            settings = [*vae_settings, "val_every=99", "source.val_fraction=0"]
        else:
            settings = [*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"]
            cache_latents.main(settings)
            assert len(LatentCache(tmp_path / "cache")) == 16
            monkeypatch.setattr(LatentStream, "batch", poisoned_batch)
        return program(stage.main, *settings, f"run_dir={run}", *more), run

    return go


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [train_vae, train_latte])
def test_poisoned_steps_are_left_out_and_counted_and_the_weights_stay_finite(poisoned, caplog, stage, value):
    code, run = poisoned(
        stage, {1, 3}, value, "steps=6", "save_every=1", "keep_checkpoints=9", "max_skipped=3"
    )
    assert code == 0
    assert [r["step"] for r in read_metrics(run) if r.get("skipped")] == [2, 4]
    assert caplog.text.count("is not finite, update skipped") == 2
    name = {train_vae: "vae", train_latte: "latte"}[stage]
    weights = [
        load_file(run / f"checkpoints/step_{step:08d}/{name}/diffusion_pytorch_model.safetensors")
        for step in (1, 2, 6)
    ]
    assert all(bool(torch.isfinite(v).all()) for state in weights for v in state.values())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])
    state = torch.load(run / "checkpoints/step_00000006/trainer.pt", weights_only=True)
    judge = state.get("discriminator", {})  # step 3 of stage one is a step of the discriminator
    assert bool(judge) == (stage is train_vae)
    assert [k for k, v in judge.items() if not torch.isfinite(v).all()] == []


@pytest.mark.parametrize("stage", [train_vae, train_latte])
def test_too_many_in_a_row_end_the_run_with_one_line_that_names_the_last_good_checkpoint(
    poisoned, capfd, stage
):
    code, run = poisoned(stage, {3, 4, 5}, float("nan"), "steps=9", "save_every=2", "max_skipped=3")
    assert code == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "3 steps in a row had a non-finite loss or gradient" in line
    assert f"last good checkpoint: {run / 'checkpoints' / 'step_00000002'}" in line  # 4 was saved in the row
