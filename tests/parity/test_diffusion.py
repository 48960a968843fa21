"""Diffusion, loss and samplers against frozen outputs of Vchitect/Latte @ b27c24a (CPU, float32).

The model of these outputs is analytic: k = (t + 1) / 1000, noise = 0.9 sqrt(k) x + 0.1 sin(3x + 2k), v =
cos(2x - k).
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from denoiser import sampling
from denoiser.diffusion import GaussianDiffusion, respaced_timesteps
from denoiser.sampling import make_scheduler, sample_latents


def load(golden, name):
    return {
        key: torch.from_numpy(np.asarray(value)) for key, value in np.load(golden / f"{name}.npz").items()
    }


def video(x):
    """Upstream (B, F, C, H, W) -> ours (B, C, T, H, W)."""
    return x.transpose(1, 2)


class Analytic(torch.nn.Module):
    """Stands where a Latte stands in `sample_latents`."""

    device = torch.device("cpu")
    null_label = None

    def forward(self, x, t, y=None):
        k = (t.view(-1, 1, 1, 1, 1).float() + 1) / 1000
        noise = 0.9 * k.sqrt() * x + 0.1 * torch.sin(3 * x + 2 * k)
        return SimpleNamespace(sample=torch.cat([noise, torch.cos(2 * x - k)], dim=1))


@pytest.fixture
def terms(golden):
    return load(golden, "diffusion_terms")


def test_tables_equal_upstream_in_float64(terms):
    # Upstream recovers its betas from the kept alpha_bar: 1 - a / b, good to 1e-16 absolute.
    ours = GaussianDiffusion()
    assert np.array_equal(ours.alphas_cumprod, terms["alphas_cumprod"].numpy())
    for name in ("betas", "posterior_variance", "posterior_log_variance_clipped"):
        np.testing.assert_allclose(getattr(ours, name), terms[name].numpy(), rtol=1e-12, atol=0, err_msg=name)


def test_q_sample_equals_upstream_to_the_bit(terms):
    assert torch.equal(GaussianDiffusion().q_sample(terms["x0"], terms["noise"], terms["t"]), terms["x_t"])


def test_loss_terms_equal_upstream(terms):
    x0, noise, out = video(terms["x0"]), video(terms["noise"]), video(terms["model_out"])
    ours = GaussianDiffusion().training_loss(out, x0, noise, terms["t"])
    torch.testing.assert_close(ours["mse"], terms["mse"], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["vb"][1:], terms["vb"][1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["loss"][1:], terms["loss"][1:], atol=1e-6, rtol=0)
    # t = 0: upstream's float32 cancellation is worth 4.4e-6 of 2.25; against float64 ours is the closer one.
    torch.testing.assert_close(ours["loss"][:1], terms["loss"][:1], atol=5e-6, rtol=0)
    exact = GaussianDiffusion().training_loss(out.double(), x0.double(), noise.double(), terms["t"])
    assert (ours["vb"] - exact["vb"]).abs().max() < 5e-7 < (terms["vb"] - exact["vb"]).abs().max()


def test_respaced_timesteps_equal_upstream(golden):
    frozen = json.loads((golden / "diffusion_respaced_timesteps.json").read_text())
    for spacing, kept in frozen.items():
        if spacing.startswith("ddim"):
            ours = make_scheduler("ddim", int(spacing.removeprefix("ddim"))).timesteps.tolist()[::-1]
        else:
            ours = respaced_timesteps(int(spacing))
            assert make_scheduler("ddpm", int(spacing)).timesteps.tolist()[::-1] == kept
        assert ours == kept, spacing


def test_one_ancestral_step_has_upstreams_mean_and_variance(terms, monkeypatch):
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    scheduler = make_scheduler("ddpm", 1000)
    out, x_t, noise = (video(terms[key]) for key in ("model_out", "x_t", "noise"))
    for i, t in enumerate(terms["t"].tolist()):
        step = scheduler.step(out[i : i + 1], t, x_t[i : i + 1])
        posterior = scheduler.step(torch.cat([noise, noise], 1)[i : i + 1], t, x_t[i : i + 1])
        log_variance = scheduler._get_variance(t, predicted_variance=out[i : i + 1, 4:])
        frozen = {
            key: video(terms[key])[i : i + 1]
            for key in ("pmv_mean", "pmv_pred_xstart", "pmv_logvar", "qpost_mean")
        }
        atol = 1e-6 / float(scheduler.alphas_cumprod[t]) ** 0.5  # x_0 = (x_t - ...) / sqrt(alpha_bar)
        torch.testing.assert_close(step.pred_original_sample, frozen["pmv_pred_xstart"], atol=atol, rtol=0)
        torch.testing.assert_close(step.prev_sample, frozen["pmv_mean"], atol=2e-6, rtol=0)
        torch.testing.assert_close(posterior.prev_sample, frozen["qpost_mean"], atol=2e-6, rtol=0)
        if t > 0:  # at 0 no noise is added, and diffusers does not clip beta tilde_0 as upstream does
            torch.testing.assert_close(log_variance, frozen["pmv_logvar"], atol=2e-6, rtol=0)


def feed_noise(monkeypatch, start, noises):
    """Replace every draw of the sampler by the frozen one, in step order."""
    queue = iter(noises)
    monkeypatch.setattr(sampling, "randn_tensor", lambda *_, **__: start)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(queue))


def trajectory(monkeypatch, kind, num_steps, z, noises):
    """Every x_{t-1} of one run of `sample_latents` with the analytic model."""
    scheduler = make_scheduler(kind, num_steps)
    seen, step = [], scheduler.step
    scheduler.step = lambda *args, **kwargs: seen.append(step(*args, **kwargs)) or seen[-1]
    feed_noise(monkeypatch, video(z), [video(noise) for noise in noises])
    generators = [torch.Generator() for _ in z]
    final = sample_latents(Analytic(), video(z).shape, None, scheduler, generators=generators)
    assert torch.equal(final, seen[-1].prev_sample)
    return seen


@pytest.mark.parametrize(
    ("kind", "name"), [("ddpm", "diffusion_ddpm10"), ("ddim_upstream", "diffusion_ddim_resp10")]
)
def test_ten_steps_follow_upstream(golden, monkeypatch, kind, name):
    frozen = load(golden, name)
    seen = trajectory(monkeypatch, kind, 10, frozen["z"], frozen["noises"])
    for i, step in enumerate(seen):
        torch.testing.assert_close(video(step.prev_sample), frozen["samples"][i], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            video(step.pred_original_sample), frozen["pred_xstart"][i], atol=1e-4, rtol=0
        )
