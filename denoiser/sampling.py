"""Sampling latents: diffusers schedulers set up for Latte, classifier-free guidance, the denoising loop.

diffusers' defaults would be wrong here in three ways: clipping, fixed variance, float32 tables.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from data.core.registry import samplers
from denoiser.diffusion import BETA_END, BETA_START, NUM_TRAIN_STEPS, linear_betas, respaced_timesteps

_LINEAR = {
    "num_train_timesteps": NUM_TRAIN_STEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,  # latents are not bounded by 1
}

KINDS = ("ddpm", "ddim", "ddim_upstream")


class RespacedDDIMScheduler(DDIMScheduler):
    """Deterministic DDIM on the steps that `respaced_timesteps` keeps: Latte's `sample_method: ddim`.

    diffusers' own DDIM steps to t - 1000 // N, which is not a kept step here (error 0.31 at 50 steps); this one
    steps to the next kept step.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        kept = respaced_timesteps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(kept[::-1], device=device)
        self._next = dict(zip(kept[1:], kept[:-1], strict=True))  # the last step leads to x_0

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, generator=None
    ) -> DDIMSchedulerOutput:
        """Take one step of DDIM Eq. (12) with sigma = 0, so `generator` is not drawn from.

        model_output: predicted noise, shaped as sample.
        """
        alpha_bar = float(self.alphas_cumprod[int(timestep)])
        following = self._next.get(int(timestep))
        next_alpha_bar = 1.0 if following is None else float(self.alphas_cumprod[following])
        # The x_0 that the predicted noise means, noised again to the next kept step with the same noise.
        x0 = (sample - (1.0 - alpha_bar) ** 0.5 * model_output) / alpha_bar**0.5
        prev_sample = next_alpha_bar**0.5 * x0 + (1.0 - next_alpha_bar) ** 0.5 * model_output
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)


def make_scheduler(kind: str = "ddpm", num_steps: int = 250) -> DDPMScheduler | DDIMScheduler:
    """Make a scheduler ready to loop over `.timesteps`, with float64 tables.

    kind "ddpm": ancestral sampling with the learned variance, Latte's default at 250 steps, 999 to 0.
    kind "ddim": diffusers' deterministic DDIM, equal strides from 0; num_steps must divide 1000.
    kind "ddim_upstream": deterministic DDIM on the steps of "ddpm", what Latte's `sample_method: ddim` runs.
    Any other kind is one that was added to data.core.registry.samplers, and stays as it is.
    Raises ValueError for another kind or number of steps.
    """
    # A sampler of the user's own, as it is.
    if kind not in KINDS:
        if (make := samplers.find(kind)) is None:
            raise ValueError(f"sampler {kind!r}: use {', '.join([*KINDS, *samplers])}")
        return make(num_steps)
    # One of diffusers, set up as Latte samples.
    kept = respaced_timesteps(num_steps)
    if kind == "ddpm":
        scheduler = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace", **_LINEAR)
        scheduler.set_timesteps(timesteps=kept[::-1])
        scheduler.num_inference_steps = num_steps
    elif kind == "ddim":
        if NUM_TRAIN_STEPS % num_steps:
            raise ValueError(
                f"num_steps={num_steps}: ddim needs a divisor of 1000, e.g. 50; ddim_upstream takes any"
            )
        scheduler = DDIMScheduler(
            set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading", **_LINEAR
        )
        scheduler.set_timesteps(num_steps)
    else:
        scheduler = RespacedDDIMScheduler(timestep_spacing="linspace", **_LINEAR)
        scheduler.set_timesteps(num_steps)
    return with_float64_tables(scheduler)


def with_float64_tables(scheduler):
    """Replace the float32 tables of a diffusers scheduler in place; call it after loading one from a folder.

    float64: with diffusers' float32 product 1000 ancestral steps end 3.8e-4 away, with this 5.5e-6.
    """
    betas = linear_betas()
    scheduler.betas = torch.from_numpy(betas)
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1.0 - betas))
    return scheduler


def cfg_forward(model, x: Tensor, t: Tensor | int, y: Tensor | None, guidance_scale: float = 1.0) -> Tensor:
    """Run the model with classifier-free guidance: noise = null + scale * (class - null).

    model: a Latte. x: (B, C, t, h, w). t: (B,) or scalar int. y: (B,) int64, None for an unconditional model.
    Only the C noise channels are guided; the variance channels are those of the class, as Latte samples.
    Scale 1 is the class itself, at the cost of one pass; other scales run a batch of 2B.
    Returns what the model returns, (B, 2C or C, t, h, w). Raises ValueError if guidance is asked of a model
    that cannot give it.
    """
    if guidance_scale == 1:
        return model(x, t, y).sample
    null_label = model.null_label
    if null_label is None:
        raise ValueError(
            f"guidance_scale={guidance_scale}: this model has no null class, use guidance_scale=1"
        )
    if y is None:
        raise ValueError(f"guidance_scale={guidance_scale}: guidance needs labels y, (B,) int64")
    # One batch of 2B: with the class, and with none.
    if isinstance(t, Tensor) and t.ndim == 1 and len(t) == len(x):
        t = torch.cat([t, t])
    out = model(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, null_label)])).sample
    # Guide the noise; the variance channels, if there are any, stay those of the class.
    C = x.shape[1]
    conditional, null = out.chunk(2)
    noise = null[:, :C] + guidance_scale * (conditional[:, :C] - null[:, :C])
    return torch.cat([noise, conditional[:, C:]], dim=1)


@torch.no_grad()
def sample_latents(
    model,
    noise_shape: Sequence[int],
    y: Tensor | None,
    scheduler,
    guidance_scale: float | Callable[[], float] = 1.0,
    *,
    generators: Sequence[torch.Generator] | torch.Generator,
    latents: Tensor | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
    on_step: Callable[[int, int, Tensor], Tensor] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Denoise from pure noise. Returns (B, C, t, h, w) float32 latents, scaled as in training.

    noise_shape: (B, C, t, h, w). y: (B,) int64 labels, None for an unconditional model. scheduler: from
    `make_scheduler`. guidance_scale: a number, or a function that gives it before each step. generators: B of them,
    one per sample (a CPU one gives the same noise on every device): all noise of a sample comes from its own, so the
    others in its batch do not change it, to rounding; or one generator for the whole batch. latents: x_T, in place
    of a draw. progress: wraps the timesteps, e.g. tqdm. on_step: takes (number of the step, timestep, x) after each
    step and returns x. device: where to compute, when the model's weights lie elsewhere between calls.
    x_t and the scheduler's step are float32 whatever the model runs in; for bf16 call this inside `torch.autocast`.
    The model is put in evaluation mode, then back.
    Raises ValueError if the counts differ, or if ddpm (learned variance) meets a model without learn_sigma.
    """
    # One generator and one label per sample, or one generator for all.
    B, C = noise_shape[:2]
    one = isinstance(generators, torch.Generator)
    if (not one and len(generators) != B) or (y is not None and len(y) != B):
        labels = "no" if y is None else len(y)
        raise ValueError(
            f"{1 if one else len(generators)} generators, {labels} labels: a batch of {B} needs one of each per sample"
        )
    generators = generators if one else list(generators)
    if latents is not None and tuple(latents.shape) != tuple(noise_shape):
        raise ValueError(f"latents of shape {tuple(latents.shape)}: this model's are {tuple(noise_shape)}")
    # Labels are checked while they are on the CPU, and the start is drawn, or given.
    learned_range = getattr(scheduler, "variance_type", None) == "learned_range"
    device = device or model.device
    if y is not None:
        if y.device.type == "cpu" and hasattr(model, "check_labels"):
            model.check_labels(y)
        y = y.to(device)
    if latents is None:
        x = randn_tensor(tuple(noise_shape), generator=generators, device=device, dtype=torch.float32)
    else:
        x = latents.to(device, torch.float32)
    was_training = model.training
    model.eval()
    try:
        # Ids as Python ints: the scheduler's tables stay on the CPU and no step waits for the GPU.
        for i, t in enumerate((progress or iter)(scheduler.timesteps.tolist())):
            # Predict the noise; ids are a tensor, for a compiled model would recompile for each int.
            ids = torch.full((B,), t, device=device)
            scale = guidance_scale() if callable(guidance_scale) else guidance_scale
            out = cfg_forward(model, x, ids, y, scale).float()
            if learned_range and out.shape[1] != 2 * C:
                raise ValueError(f"{out.shape[1]} output channels: ddpm here needs learn_sigma; use ddim")
            # x_t -> x of the next kept step; the variance is for a scheduler that uses it.
            out = out if learned_range else out[:, :C]
            x = scheduler.step(out, t, x, generator=generators).prev_sample
            x = on_step(i, t, x) if on_step else x
    finally:
        model.train(was_training)
    return x
