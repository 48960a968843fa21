"""What fine-tuning a VAE of diffusers needs, on the pretended GPU."""

from functools import partial

import diffusers
import pytest

from pipelines.plan import programs
from pipelines.train_vae import TrainVAEConfig, VAETrainer
from pipelines.training.config import load
from tests.parity.diffusers_small import SMALL


@pytest.fixture
def peak(tmp_path):
    """peak(name, config, *settings): the most bytes of a step beyond what stays."""

    def go(name, config, *more):
        getattr(diffusers, SMALL[name][0])(**config).save_config(tmp_path)
        words = [
            "model.init=weights",
            f"model.init_from={tmp_path}",
            "loss.perceptual_weight=0",
            "global_batch=1",
        ]
        found = partial(programs.stage_one, VAETrainer)(load(TrainVAEConfig, None, [*words, *more]))
        return found.peak - sum(found.resident.values())

    return go


def test_wan_by_chunks_takes_half_the_memory(peak):
    clip = ["clip.num_frames=25", "clip.size=96", "model.train=all", "loss.gan_weight=0"]
    whole = peak("wan", {"base_dim": 32, "num_res_blocks": 1}, *clip)
    assert (
        peak("wan", {"base_dim": 32, "num_res_blocks": 1}, *clip, "gradient_checkpointing=true")
        <= 0.55 * whole
    )


def test_the_adversarial_term_does_not_bring_the_activations_back(peak):
    clip = ["clip.num_frames=17", "clip.size=64", "model.train=decoder", "gradient_checkpointing=true"]
    small = ["loss.gan_start=0", "loss.discriminator_width=4"]
    without = peak("wan", {"base_dim": 32, "num_res_blocks": 1}, *clip, "loss.gan_weight=0")
    assert peak("wan", {"base_dim": 32, "num_res_blocks": 1}, *clip, *small) <= 1.3 * without
