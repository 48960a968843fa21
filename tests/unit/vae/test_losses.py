"""Losses of stage one: laws that hold whatever the numbers."""

import pytest
import torch
from torch import nn

from vae.discriminator import PatchDiscriminator3D
from vae.interface import VideoGaussian
from vae.losses import (
    LPIPSLoss,
    adaptive_weight,
    generator_loss,
    hinge_d_loss,
    reconstruction_and_kl,
)


def pair(B=2, T=5):
    return torch.randn(B, 3, T, 8, 8), torch.randn(B, 3, T, 8, 8), VideoGaussian(torch.randn(B, 8, 2, 1, 1))


def test_reconstruction_is_summed_over_pixels_and_averaged_over_frames():
    x, xhat, posterior = pair()
    for name, error in (("l1", (x - xhat).abs()), ("l2", (x - xhat) ** 2)):
        loss = reconstruction_and_kl(x, xhat, posterior, loss_type=name)
        torch.testing.assert_close(loss.nll, error.sum((1, 3, 4)).mean())
        torch.testing.assert_close(loss.rec, error.mean())
    torch.testing.assert_close(loss.kl, posterior.kl().mean())
    torch.testing.assert_close(loss.total, loss.nll + 1e-6 * loss.kl)


def test_a_frames_perceptual_distance_is_counted_once_per_value_of_the_frame():
    x, xhat, posterior = pair()
    distance = lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True)  # noqa: E731
    plain = reconstruction_and_kl(x, xhat, posterior)
    both = reconstruction_and_kl(x, xhat, posterior, perceptual=distance, perceptual_weight=0.5)
    mean = (x - xhat).square().mean()
    torch.testing.assert_close(both.perceptual, mean)
    torch.testing.assert_close(both.nll - plain.nll, 0.5 * 3 * 8 * 8 * mean, atol=1e-3, rtol=1e-4)
    off = reconstruction_and_kl(x, xhat, posterior, perceptual=distance, perceptual_weight=0.0)
    assert off.nll == plain.nll


def test_adaptive_weight_is_the_ratio_of_gradient_norms_and_carries_no_gradient():
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight((layer * 6).sum(), (layer * 2).sum(), layer)
    assert weight.item() == pytest.approx(3, rel=1e-3)
    assert not weight.requires_grad
    assert adaptive_weight((layer * 6).sum(), (layer * 0).sum(), layer).item() == pytest.approx(1e4)


def test_hinge_loss_is_zero_for_confident_logits_and_one_for_none():
    assert hinge_d_loss(torch.full((3,), 2.0), torch.full((3,), -2.0)) == 0
    assert hinge_d_loss(torch.zeros(3), torch.zeros(3)) == 1
    assert generator_loss(torch.tensor([1.0, 3.0])) == -2


def test_wrong_shapes_and_names_are_refused():
    x, xhat, posterior = pair()
    with pytest.raises(ValueError, match="xhat is"):
        reconstruction_and_kl(x, xhat[:, :, :1], posterior)
    with pytest.raises(ValueError, match="loss_type"):
        reconstruction_and_kl(x, xhat, posterior, loss_type="huber")
    with pytest.raises(ValueError, match="n_layers=0"):
        PatchDiscriminator3D(n_layers=0)


def test_lpips_passes_gradients_to_frames_only_and_stays_in_eval_mode():
    from eval.fidelity import load_lpips

    lpips = LPIPSLoss(load_lpips("random:0")[0]).train()
    assert not lpips.lpips.training
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    assert lpips(x, x).abs().max() == 0
    distance = lpips(x, y)
    assert distance.shape == (2,)
    assert distance.min() > 0
    distance.sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in lpips.parameters())


def test_lpips_of_a_large_clip_is_computed_in_parts_and_again_in_backward(monkeypatch):
    from eval.fidelity import load_lpips

    monkeypatch.setattr("vae.losses.AT_ONCE", 2 * 32 * 32)
    network = load_lpips("random:0")[0]
    seen = []
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    x, y = torch.rand(2, 5, 3, 32, 32) * 2 - 1
    found = []
    for recompute in (False, True):
        xhat = y.clone().requires_grad_()
        distance = LPIPSLoss(network, recompute)(x, xhat)
        distance.sum().backward()
        found.append((distance.detach(), xhat.grad))
    assert seen == [5, 2, 2, 1, 1, 2, 2]  # in backward the last part comes first
    torch.testing.assert_close(found[0], found[1])


def test_the_discriminator_begins_as_pix2pix():
    for module in PatchDiscriminator3D(base=32).modules():
        if isinstance(module, nn.Conv3d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
        elif isinstance(module, nn.BatchNorm3d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert 0 < module.weight.std().item() < 0.04
            assert module.bias.abs().max() == 0
