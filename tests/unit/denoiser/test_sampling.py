"""Laws of sampling: schedulers, guidance, and independence of the batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from denoiser.diffusion import GaussianDiffusion
from denoiser.latte import Latte
from denoiser.sampling import cfg_forward, make_scheduler, sample_latents, with_float64_tables

KINDS = ["ddpm", "ddim", "ddim_upstream"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = Latte(depth=2, hidden_size=32, num_heads=4, num_frames=2, sample_size=4, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(model, kind, seeds, labels, scale=3.0, num_steps=5):
    y = torch.tensor(labels)
    return sample_latents(
        model,
        (len(seeds), 4, 2, 4, 4),
        y,
        make_scheduler(kind, num_steps),
        scale,
        generators=generators(*seeds),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_the_others_in_its_batch(model, kind):
    together = draw(model, kind, [10, 11, 12], [0, 1, 2])
    alone = draw(model, kind, [11], [1])
    swapped = draw(model, kind, [12, 11], [2, 1])
    scale = together.abs().max()
    assert (together[1] - alone[0]).abs().max() < 1e-5 * scale
    assert (together[1] - swapped[1]).abs().max() < 1e-5 * scale
    assert (together[1] - draw(model, kind, [13], [1])[0]).abs().max() > 0.1 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generators_give_the_same_sample(model, kind):
    assert torch.equal(draw(model, kind, [1], [4]), draw(model, kind, [1], [4]))


class OnePoint(torch.nn.Module):
    """The exact noise prediction for data that is a single point x0; the smallest variance (v = -1)."""

    device = torch.device("cpu")
    null_label = None

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0
        self.alphas_cumprod = torch.from_numpy(GaussianDiffusion().alphas_cumprod)

    def forward(self, x, t, y=None):
        a = self.alphas_cumprod[t].to(x.dtype).view(-1, 1, 1, 1, 1)
        noise = (x - a.sqrt() * self.x0) / (1 - a).sqrt()
        return SimpleNamespace(sample=torch.cat([noise, torch.full_like(noise, -1.0)], dim=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [2, 10, 250])
def test_with_the_exact_denoiser_every_sampler_finds_the_point(kind, num_steps):
    x0 = torch.linspace(-3, 3, 128).view(1, 4, 2, 4, 4)
    found = sample_latents(
        OnePoint(x0), x0.shape, None, make_scheduler(kind, num_steps), generators=generators(0)
    )
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


def test_ddim_of_diffusers_with_equal_strides_is_ddim_on_its_grid():
    """DDIM Eq. (12) written out in float64, with the noise an analytic function of (x, t)."""

    def predict(x, t):
        return 0.9 * ((t + 1) / 1000) ** 0.5 * x + 0.1 * torch.sin(3 * x)

    scheduler, alpha_bar = make_scheduler("ddim", 50), GaussianDiffusion().alphas_cumprod
    x = start = torch.randn(1, 4, 2, 4, 4, dtype=torch.float64)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(predict(x, t), t, x).prev_sample
    expected = start
    for t in range(980, -1, -20):
        noise, after = predict(expected, t), alpha_bar[t - 20] if t else 1.0
        x0 = (expected - (1 - alpha_bar[t]) ** 0.5 * noise) / alpha_bar[t] ** 0.5
        expected = after**0.5 * x0 + (1 - after) ** 0.5 * noise
    torch.testing.assert_close(x, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_carry_float64_tables_also_after_a_reload(kind):
    scheduler = make_scheduler(kind, 10)
    reloaded = type(scheduler).from_config(scheduler.config)
    assert reloaded.alphas_cumprod.dtype == torch.float32
    for ready in (scheduler, with_float64_tables(reloaded)):
        assert np.array_equal(ready.alphas_cumprod.numpy(), GaussianDiffusion().alphas_cumprod)
    reloaded.set_timesteps(10)
    assert torch.equal(reloaded.timesteps, scheduler.timesteps)


def test_ddpm_steps_are_latte_ids_for_the_default_250():
    timesteps = make_scheduler().timesteps.tolist()
    assert timesteps[:3] == [999, 995, 991]
    assert timesteps[-3:] == [8, 4, 0]


def test_guidance_scale_1_is_the_class_alone_in_one_pass_of_batch_b(model):
    x, t, y = torch.randn(2, 4, 2, 4, 4), torch.tensor([3, 900]), torch.tensor([0, 4])
    rows = []
    handle = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out = cfg_forward(model, x, t, y, 1.0)
    guided = cfg_forward(model, x, t, y, 1.0 + 1e-7)
    handle.remove()
    assert rows == [2, 4]
    assert torch.equal(out, model(x, t, y).sample)
    torch.testing.assert_close(guided, out, atol=1e-5, rtol=0)


def test_guidance_moves_the_noise_away_from_null_and_leaves_the_variance_to_the_class(model):
    x, t, y = torch.randn(2, 4, 2, 4, 4), 500, torch.tensor([0, 4])
    conditional, null = model(x, t, y).sample, model(x, t, torch.tensor([5, 5])).sample
    out = cfg_forward(model, x, t, y, 7.0)
    torch.testing.assert_close(
        out[:, :4], null[:, :4] + 7 * (conditional[:, :4] - null[:, :4]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(out[:, 4:], conditional[:, 4:], atol=1e-6, rtol=0)
    assert not torch.allclose(conditional[:, 4:], null[:, 4:], atol=1e-3)


def test_sampling_runs_in_evaluation_mode_and_gives_the_mode_back(model):
    expected = draw(model, "ddim", [1], [4])
    model.train()
    try:
        assert torch.equal(draw(model, "ddim", [1], [4]), expected)
        assert model.training
    finally:
        model.eval()


def test_progress_wraps_the_timesteps(model):
    seen = []
    sample_latents(
        model,
        (1, 4, 2, 4, 4),
        None,
        make_scheduler("ddim", 5),
        generators=generators(0),
        progress=lambda steps: seen.extend(steps) or seen,
    )
    assert seen == [800, 600, 400, 200, 0]


def test_impossible_requests_are_refused(model):
    x = torch.randn(1, 4, 2, 4, 4)
    uncond = Latte(depth=2, hidden_size=32, num_heads=4, num_frames=2, sample_size=4, learn_sigma=False)
    with pytest.raises(ValueError, match="no null class"):
        cfg_forward(uncond, x, 0, None, 7.0)
    with pytest.raises(ValueError, match="needs labels"):
        cfg_forward(model, x, 0, None, 7.0)
    with pytest.raises(ValueError, match="learn_sigma"):
        sample_latents(uncond, x.shape, None, make_scheduler("ddpm", 2), generators=generators(0))
    with pytest.raises(ValueError, match="2 generators"):
        sample_latents(
            model, x.shape, torch.tensor([0]), make_scheduler("ddpm", 2), generators=generators(0, 1)
        )
    with pytest.raises(ValueError, match="divisor"):
        make_scheduler("ddim", 300)
    with pytest.raises(ValueError, match="ddim_upstream"):
        make_scheduler("plms", 10)
