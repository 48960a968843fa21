"""Laws of the diffusion: tables, forward process, the two loss terms and where their gradients go."""

import math

import numpy as np
import pytest
import torch

from denoiser.diffusion import GaussianDiffusion, respaced_timesteps


@pytest.fixture
def diffusion():
    return GaussianDiffusion()


def draw(B=4, dtype=torch.float32):
    return torch.randn(B, 4, 3, 8, 8, dtype=dtype), torch.randn(B, 4, 3, 8, 8, dtype=dtype)


def test_first_loss_of_a_fresh_latte_is_mse_1_and_vb_0161(diffusion):
    t = torch.arange(1000)
    x0, noise = torch.randn(1000, 4, 1, 8, 8), torch.randn(1000, 4, 1, 8, 8)
    terms = diffusion.training_loss(
        torch.zeros(1000, 8, 1, 8, 8), x0, noise, t
    )  # a fresh Latte returns zeros
    assert terms["loss"].shape == terms["mse"].shape == terms["vb"].shape == (1000,)
    assert abs(terms["mse"].mean() - 1) < 0.01
    assert abs(terms["vb"].mean() - 0.0161) < 0.0002  # over all 1000 timesteps once
    assert abs(terms["vb"][0] - 1.98) < 0.15
    assert torch.equal(terms["loss"], terms["mse"] + terms["vb"])


def test_vb_teaches_the_variance_only_and_mse_the_noise_only(diffusion):
    x0, noise = draw()
    t = torch.tensor([0, 1, 500, 999])
    out = torch.randn(4, 8, 3, 8, 8, requires_grad=True)
    terms = diffusion.training_loss(out, x0, noise, t)
    (of_vb,) = torch.autograd.grad(terms["vb"].sum(), out, retain_graph=True)
    (of_mse,) = torch.autograd.grad(terms["mse"].sum(), out)
    assert of_vb[:, :4].abs().max() == 0
    assert (of_vb[:, 4:].flatten(1).abs().amax(dim=1) > 0).all()
    assert of_mse[:, 4:].abs().max() == 0
    torch.testing.assert_close(of_mse[:, :4], 2 * (out.detach()[:, :4] - noise) / noise[0].numel())


def test_gradient_of_vb_is_the_derivative_in_float64(diffusion):
    x0, noise = draw(3, torch.float64)
    x0, noise = x0[:, :1, :1, :2, :2], noise[:, :1, :1, :2, :2]
    t = torch.tensor([0, 1, 700])
    predicted = noise + 0.1 * torch.randn_like(noise)
    v = torch.rand_like(noise).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: diffusion.training_loss(torch.cat([predicted, v], 1), x0, noise, t)["vb"], v
    )


def test_vb_is_the_kl_between_the_two_gaussians(diffusion):
    x0, noise = draw(3, torch.float64)
    t = torch.tensor([1, 400, 999])
    out = torch.randn(3, 8, 3, 8, 8, dtype=torch.float64)
    x_t = diffusion.q_sample(x0, noise, t)
    betas, alpha_bar = diffusion.betas, diffusion.alphas_cumprod
    kl = []
    for i, n in enumerate(t.tolist()):
        before = alpha_bar[n - 1]
        a = before**0.5 * betas[n] / (1 - alpha_bar[n])  # DDPM Eq. (7)
        b = (1 - betas[n]) ** 0.5 * (1 - before) / (1 - alpha_bar[n])
        predicted_x0 = (x_t[i] - (1 - alpha_bar[n]) ** 0.5 * out[i, :4]) / alpha_bar[n] ** 0.5  # DDPM Eq. (9)
        tilde = betas[n] * (1 - before) / (1 - alpha_bar[n])
        frac = (out[i, 4:] + 1) / 2
        sigma = torch.exp(frac * math.log(betas[n]) + (1 - frac) * math.log(tilde)).sqrt()
        posterior = torch.distributions.Normal(a * x0[i] + b * x_t[i], tilde**0.5)
        model = torch.distributions.Normal(a * predicted_x0 + b * x_t[i], sigma)
        kl.append(torch.distributions.kl_divergence(posterior, model).mean() / math.log(2))
    torch.testing.assert_close(
        diffusion.training_loss(out, x0, noise, t)["vb"], torch.stack(kl), rtol=1e-9, atol=0
    )


def test_perfect_prediction_with_the_posterior_variance_costs_nothing(diffusion):
    x0, noise = draw(2)
    out = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # v = -1 is beta tilde
    terms = diffusion.training_loss(out, x0, noise, torch.tensor([2, 900]))
    assert terms["loss"].abs().max() == 0


def test_a_model_without_learned_sigma_pays_mse_only(diffusion):
    x0, noise = draw()
    terms = diffusion.training_loss(torch.zeros_like(x0), x0, noise, torch.arange(4))
    assert terms["vb"].abs().max() == 0
    assert torch.equal(terms["loss"], noise.square().flatten(1).mean(1))


def test_noised_samples_keep_unit_variance_and_end_as_noise(diffusion):
    squares = diffusion.alphas_cumprod + np.sqrt(1 - diffusion.alphas_cumprod) ** 2
    np.testing.assert_allclose(squares, 1, rtol=1e-14)
    x0, noise = draw(2)
    x_t = diffusion.q_sample(x0, noise, torch.tensor([0, 999]))
    assert (x_t[0] - x0[0]).abs().max() < 0.05
    assert (x_t[1] - noise[1]).abs().max() < 0.05


def test_the_loss_is_float32_for_bf16_outputs_and_float64_for_float64(diffusion):
    x0, noise = draw(2)
    t = torch.tensor([3, 4])
    out = torch.zeros(2, 8, 3, 8, 8)
    assert diffusion.training_loss(out.bfloat16(), x0, noise, t)["loss"].dtype == torch.float32
    double = diffusion.training_loss(out.double(), x0.double(), noise.double(), t)["loss"]
    assert double.dtype == torch.float64
    torch.testing.assert_close(
        diffusion.training_loss(out, x0, noise, t)["loss"].double(), double, rtol=1e-5, atol=0
    )


def test_timesteps_are_drawn_from_0_to_999_and_repeat_with_the_generator(diffusion):
    first = diffusion.sample_timesteps(20_000, generator=torch.Generator().manual_seed(1))
    assert (first.min(), first.max(), first.dtype) == (0, 999, torch.int64)
    assert torch.equal(first, diffusion.sample_timesteps(20_000, generator=torch.Generator().manual_seed(1)))


def test_wrong_shapes_are_refused(diffusion):
    x0, noise = draw(2)
    with pytest.raises(ValueError, match="8 \\(noise and variance\\)"):
        diffusion.training_loss(torch.zeros(2, 6, 3, 8, 8), x0, noise, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one timestep per sample"):
        diffusion.q_sample(x0, noise, torch.tensor([0]))


@pytest.mark.parametrize("num_steps", [2, 7, 250, 999, 1000])
def test_respacing_keeps_both_ends_and_never_repeats(num_steps):
    kept = respaced_timesteps(num_steps)
    assert (kept[0], kept[-1], len(set(kept))) == (0, 999, num_steps)


@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_impossible_step_counts_are_refused(num_steps):
    with pytest.raises(ValueError, match="2 to 1000"):
        respaced_timesteps(num_steps)
