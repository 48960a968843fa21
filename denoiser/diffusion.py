"""Gaussian diffusion as Latte trains it: 1000 linear steps, noise prediction, learned variance.

Equations: DDPM (Ho et al. 2020) and IDDPM (Nichol & Dhariwal 2021), the recipe of DiT and Latte. Sampling is
in denoiser/sampling.py. Tables are float64: a float32 product of the alphas is off by up to 1.7e-4 of
1 - alpha_bar.
"""

import math

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN_STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


def linear_betas() -> np.ndarray:
    """Make the (1000,) float64 noise variances beta_t, from 1e-4 to 0.02 (DDPM section 4)."""
    return np.linspace(BETA_START, BETA_END, NUM_TRAIN_STEPS, dtype=np.float64)


def respaced_timesteps(num_steps: int) -> list[int]:
    """Choose the ids that sampling in num_steps keeps, ascending, 0 and 999 included (IDDPM section 4).

    Strides of 999 / (num_steps - 1), summed up and rounded as DiT and Latte do: [0, 111, ..., 999] for 10.
    Raises ValueError outside 2 .. 1000: a single step would be t = 0, which cannot start from noise.
    """
    if not 2 <= num_steps <= NUM_TRAIN_STEPS:
        raise ValueError(f"num_steps={num_steps}: sampling takes 2 to {NUM_TRAIN_STEPS} steps, e.g. 250")
    stride = (NUM_TRAIN_STEPS - 1) / (num_steps - 1)
    position, kept = 0.0, []
    for _ in range(num_steps):
        kept.append(round(position))
        position += stride
    return kept


class GaussianDiffusion:
    """The forward process and the training loss of Latte.

    Attributes are (1000,) float64 arrays indexed by t: betas, alphas_cumprod, posterior_variance (beta tilde)
    and posterior_log_variance_clipped, whose entry 0 repeats entry 1 because beta tilde_0 = 0.
    """

    num_steps = NUM_TRAIN_STEPS

    def __init__(self):
        # alpha_bar_t, and the posterior's variance beta tilde_t: DDPM Eq. (7).
        self.betas = linear_betas()
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = self.betas * (1.0 - previous) / (1.0 - self.alphas_cumprod)
        self.posterior_log_variance_clipped = np.log(
            np.append(self.posterior_variance[1], self.posterior_variance[1:])
        )
        # The rows that a training step looks up: (5, 1000).
        rows = [
            np.sqrt(self.alphas_cumprod),
            np.sqrt(1.0 - self.alphas_cumprod),
            # DDPM Eq. (11): posterior mean = (x_t - this * noise) / sqrt(alpha_t), division included.
            self.betas / np.sqrt((1.0 - self.betas) * (1.0 - self.alphas_cumprod)),
            np.log(self.betas),
            self.posterior_log_variance_clipped,
        ]
        self._rows = torch.from_numpy(np.stack(rows))
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def sample_timesteps(
        self, batch_size: int, device=None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw (B,) int64 timesteps, uniform over 0 .. 999, one per sample."""
        return torch.randint(self.num_steps, (batch_size,), device=device, generator=generator)

    def q_sample(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise x0: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, DDPM Eq. (4).

        x0, noise: (B, ...), t: (B,) int64. Use float32 or float64: half precision loses small noise levels.
        """
        sqrt_alpha_bar, sqrt_one_minus, *_ = self._coefficients(t, x0)
        return sqrt_alpha_bar * x0 + sqrt_one_minus * noise

    def training_loss(self, model_output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Compute the loss of each sample: {"loss", "mse", "vb"}, each (B,); the objective is `loss.mean()`.

        model_output: the model at x_t = q_sample(x0, noise, t): (B, 2C, ...), predicted noise then variance
        fraction v, or (B, C, ...) for a model without learn_sigma, whose vb is 0.
        x0, noise: (B, C, ...). t: (B,) int64.
        loss = mse + vb, IDDPM Eq. (16) with weight 1 on means over elements: mse is DDPM Eq. (14), vb is one
        term of the variational bound in bits per element. vb sees the predicted noise detached, so it teaches
        v only. Computed in float32 at least. Raises ValueError if the channels are neither C nor 2C.
        """
        dtype = torch.promote_types(x0.dtype, torch.float32)
        model_output, x0, noise = model_output.to(dtype), x0.to(dtype), noise.to(dtype)
        C = x0.shape[1]
        if model_output.shape[1] not in (C, 2 * C) or model_output.shape[2:] != x0.shape[2:]:
            raise ValueError(
                f"model_output of shape {tuple(model_output.shape)}: for x0 {tuple(x0.shape)} the model "
                f"must return {C} channels (noise) or {2 * C} (noise and variance)"
            )
        # The noise, DDPM Eq. (14).
        predicted = model_output[:, :C]
        mse = _mean_per_sample((noise - predicted) ** 2)
        if model_output.shape[1] == C:
            return {"loss": mse, "mse": mse, "vb": torch.zeros_like(mse)}
        # The variance, which alone is taught by the bound.
        vb = self._variational_bound(predicted.detach(), model_output[:, C:], x0, noise, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(
        self, predicted: Tensor, v: Tensor, x0: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        """Compute one term of the bound, IDDPM Eq. (4) to (6), in bits per element: (B,)."""
        _, _, noise_to_mean, log_beta, log_posterior = self._coefficients(t, x0)
        # log sigma^2 - log beta tilde; IDDPM Eq. (15): sigma^2 runs from beta tilde (v=-1) to beta (v=1).
        log_ratio = (v + 1) / 2 * (log_beta - log_posterior)
        log_variance = log_posterior + log_ratio
        # DDPM Eq. (12): both means are affine in the same x_t, so their difference is the noise error alone.
        # Upstream subtracts two float32 means instead: at t = 0 its term is 4e-6 off, this one 2e-7.
        mean_error = noise_to_mean * (predicted - noise)  # true mean - model mean
        # KL of two Gaussians; at t = 0 the likelihood of x0 instead.
        kl = 0.5 * (log_ratio - 1 + torch.exp(-log_ratio) + mean_error**2 * torch.exp(-log_variance))
        nll = -_discretized_log_likelihood(x0, mean_error, 0.5 * log_variance)
        first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
        return _mean_per_sample(torch.where(first, nll, kl)) / math.log(2.0)

    def _coefficients(self, t: Tensor, like: Tensor) -> Tensor:
        """Look up the five table rows at t, each (B, 1, ..., 1), on the device of `like` and in its dtype."""
        if t.shape != like.shape[:1]:
            raise ValueError(f"t of shape {tuple(t.shape)}: one timestep per sample, ({like.shape[0]},)")
        key = like.device, like.dtype
        if key not in self._on_device:  # in that dtype first: Apple's devices have no float64
            self._on_device[key] = self._rows.to(like.dtype).to(like.device, non_blocking=True)
        rows = self._on_device[key][:, t.to(like.device)]
        return rows.view(len(rows), -1, *[1] * (like.ndim - 1))


def _mean_per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _discretized_log_likelihood(x: Tensor, centered: Tensor, log_scale: Tensor) -> Tensor:
    """Compute the log mass of the bin of width 2/255 around x under a Gaussian, in nats, DDPM Eq. (13).

    centered: x - mean. The bins and the open ends at +-0.999 were made for 8-bit pixels and mean nothing for
    latents; they act at t = 0 only and are part of the recipe. The Gaussian CDF is the tanh approximation.
    """
    inverse_scale = torch.exp(-log_scale)
    below = _approximate_normal_cdf(inverse_scale * (centered - 1.0 / 255.0))
    up_to = _approximate_normal_cdf(inverse_scale * (centered + 1.0 / 255.0))
    # The lowest and the highest bin are open.
    mass = torch.where(x < -0.999, up_to, torch.where(x > 0.999, 1.0 - below, up_to - below))
    return torch.log(mass.clamp(min=1e-12))


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
