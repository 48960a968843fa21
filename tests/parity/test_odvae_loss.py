"""Stage-one losses against Open-Sora-Plan v1.2.0's LPIPSWithDiscriminator3D (golden odvae_loss3d, LPIPS stubbed)."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.parity.rule import fill_by_rule
from vae.discriminator import PatchDiscriminator3D
from vae.interface import VideoGaussian
from vae.losses import adaptive_weight, generator_loss, hinge_d_loss, reconstruction_and_kl

DISC_WEIGHT = 0.5


@pytest.fixture
def frozen(golden):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden / "odvae_loss3d.npz").items()}
    return arrays, json.loads((golden / "odvae_loss3d.json").read_text())


def stub(x, y):
    return (x - y).abs().mean((1, 2, 3))


def test_discriminator_answers_as_upstream_in_both_modes(frozen):
    arrays, info = frozen
    disc = fill_by_rule(PatchDiscriminator3D())
    trained = {k: list(v.shape) for k, v in disc.named_parameters()}
    assert trained == info["disc_keys"]
    with torch.no_grad():
        evaluated = disc.eval()(arrays["x"])
        training = disc.train()(arrays["x"])
    torch.testing.assert_close(evaluated, arrays["disc_eval"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(training, arrays["disc_train"], atol=1e-4, rtol=1e-4)


def test_generator_and_discriminator_steps_give_upstreams_numbers(frozen):
    arrays, info = frozen
    want = info["results"]
    disc = fill_by_rule(PatchDiscriminator3D()).train()
    weight = nn.Parameter(arrays["last_layer"].clone())
    for step, gan in (("1", False), ("2", True)):
        weight.grad = None
        xhat = nn.functional.conv3d(arrays["feat"], weight)
        loss = reconstruction_and_kl(arrays["x"], xhat, VideoGaussian(arrays["moments"]), perceptual=stub)
        total = loss.total
        if gan:
            g_loss = generator_loss(disc(xhat))
            d_weight = DISC_WEIGHT * adaptive_weight(loss.nll, g_loss, weight)
            total = total + d_weight * g_loss
            assert g_loss.item() == pytest.approx(want["g_step2"]["g_loss"], rel=1e-4)
            assert d_weight.item() == pytest.approx(want["g_step2"]["d_weight"], rel=1e-3)
        total.backward()
        expected = want[f"g_step{step}"]
        assert total.item() == pytest.approx(expected["total_loss"], rel=1e-4)
        assert loss.nll.item() == pytest.approx(expected["nll_loss"], rel=1e-5)
        assert loss.kl.item() == pytest.approx(expected["kl_loss"], rel=1e-5)
        assert (loss.rec + loss.perceptual).item() == pytest.approx(expected["rec_loss"], rel=1e-5)
        torch.testing.assert_close(weight.grad, arrays[f"gradW_step{step}"], atol=0.05, rtol=2e-3)
    with torch.no_grad():
        real, fake = disc(arrays["x"]), disc(xhat)
    assert hinge_d_loss(real, fake).item() == pytest.approx(want["d_step2"]["disc_loss"], rel=1e-4)
    assert real.mean().item() == pytest.approx(want["d_step2"]["logits_real"], rel=1e-4)


def test_discriminator_sizes_are_the_papers():
    with torch.device("meta"):
        disc, deep = PatchDiscriminator3D(), PatchDiscriminator3D(n_layers=4)
        assert disc(torch.empty(1, 3, 25, 256, 256)).shape == (1, 1, 7, 32, 32)
    assert sum(p.numel() for p in disc.parameters()) == 4_665_729
    assert sum(p.numel() for p in deep.parameters()) == 11_744_641
