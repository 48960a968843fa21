"""What every video VAE of this project answers: the VideoVAE mixin and the Gaussian posterior over a clip.

Letters: B batch, C latent channels, T H W frames and pixels, t h w latent frames and positions.
Pixels are float in [-1, 1], shape (B, 3, T, H, W); latents are (B, C, t, h, w).
"""

from typing import Any

import torch
from torch import Tensor, nn


class VideoGaussian:
    """Diagonal Gaussian posterior over a latent clip; answers as diffusers' DiagonalGaussianDistribution.

    parameters: (B, 2C, t, h, w), mean and log-variance stacked along dim 1. `logvar` is clamped to [-30, 20].
    Unlike diffusers' class, `kl()` sums over every dimension but the batch, time included.
    """

    def __init__(self, parameters: Tensor):
        if parameters.ndim < 2 or parameters.shape[1] % 2:
            raise ValueError(
                f"parameters have shape {tuple(parameters.shape)}: dim 1 must hold mean and logvar, 2C channels"
            )
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw once, (B, C, t, h, w); a CPU generator gives the same noise on every device."""
        mean = self.mean
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return mean + self.std * noise.to(mean.device)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """Compute the KL to the standard normal in nats, (B,): summed over channels, time and space."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).flatten(1).sum(1)


class PointPosterior(VideoGaussian):
    """A latent clip without a spread, of an encoder that gives no Gaussian: std 0, kl 0, every sample is the mean.

    mean: (B, C, t, h, w). `logvar` is -30, the lowest there is, so that moments can be stored as those of others.
    """

    def __init__(self, mean: Tensor):
        super().__init__(torch.cat([mean, torch.full_like(mean, -30.0)], dim=1))

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean)

    var = std

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        return self.mean.new_zeros(self.mean.shape[0])


class VideoVAE:
    """Mixin of every video VAE, before diffusers' bases; the model's `config` may hold scaling_factor, latents_mean, latents_std.

    Class attributes say what the model is; subclasses set them. `causal`: no latent and no decoded frame depends on
    later frames. `frame_rule` names the clip lengths it takes: "any", "4n+1" (a first frame alone, then groups of
    four) or "4n"; `clip_lengths` says them in numbers. `trainable`: False where only its outputs are right.
    `has_posterior`: False where the latents have no spread.
    """

    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 1
    causal: bool = False
    discrete: bool = False
    trainable: bool = True
    has_posterior: bool = True
    frame_rule: str = "any"

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Reconstruct: sample (B, 3, T, H, W) in [-1, 1] -> DecoderOutput of the same shape.

        sample_posterior draws the latents (with `generator`), else the posterior's mode is decoded; a discrete
        VAE decodes its codes.
        """
        if self.discrete:
            z = self.encode(sample).latents
        else:
            posterior = self._posterior(sample, sample_posterior, generator)
            z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, num_frames=sample.shape[2], return_dict=return_dict)

    def plain_code(self) -> list[str]:
        """Return the lines that take a clip `x` to `z` and `video` where `vae` was loaded without this project."""
        found = "latents" if self.discrete else "latent_dist.mode()"
        return [f"z = vae.encode(x).{found}", "video = vae.decode(z).sample"]

    def _posterior(self, sample: Tensor, sample_posterior: bool, generator: torch.Generator | None) -> Any:
        return self.encode(sample).latent_dist

    @property
    def latent_channels(self) -> int:
        """Return C of the latents; diffusers' configs have three names for it."""
        config = self.config
        return next(config[k] for k in ("latent_channels", "z_dim", "z_channels") if k in config)

    @property
    def clip_lengths(self) -> tuple[int, int]:
        """Return (group, first): a clip has first + group * k frames; at least one group where no frame is first."""
        s = self.temporal_compression_ratio
        return {"4n+1": (s, 1), "4n": (s, 0)}.get(self.frame_rule, (1, 0))

    def latent_frames(self, T: int) -> int:
        """Count the latent frames of a clip of T frames. Raises ValueError where `check_frames` does."""
        self.check_frames(T)
        alone = int(self.clip_lengths[1] == 1)  # a first frame has a latent frame of its own
        return (T - alone) // self.temporal_compression_ratio + alone

    def pixel_frames(self, t: int) -> int:
        """Count the frames decoded from t latent frames."""
        if t < 1:
            raise ValueError(f"t={t}: a clip has at least one latent frame")
        alone = int(self.clip_lengths[1] == 1)
        return (t - alone) * self.temporal_compression_ratio + alone

    def check_frames(self, T: int) -> None:
        """Raise ValueError, naming the nearest valid length, if the model cannot encode T frames."""
        group, first = self.clip_lengths
        least = first or group
        if T < least or (T - first) % group:
            rule = f"T = {group}k" + (f" + {first}" if first else "") + " frames"
            rule = "at least 1 frame" if self.frame_rule == "any" else rule
            nearest = max(least, round((T - first) / group) * group + first)
            raise ValueError(f"T={T}: {type(self).__name__} needs {rule}, e.g. {nearest}")

    def check_sides(self, H: int, W: int) -> None:
        """Raise ValueError unless the model can divide frames of H x W pixels."""
        s = self.spatial_compression_ratio
        if H < s or W < s or H % s or W % s:
            near = tuple(max(1, n // s) * s for n in (H, W))
            raise ValueError(
                f"H={H}, W={W}: sides must be multiples of {s}, e.g. crop to {near[0]} x {near[1]}"
            )

    def check_video(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, 3, T, H, W) with a valid T and sides that the model can divide."""
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(
                f"video of shape {tuple(x.shape)}: needs (B, 3, T, H, W); an image is T = 1, e.g. x[:, :, None]"
            )
        if x.shape[0] < 1:
            raise ValueError(f"video of shape {tuple(x.shape)}: B = 0, a batch needs at least one clip")
        if not x.is_floating_point():
            raise ValueError(f"video of dtype {x.dtype}: needs float in [-1, 1], e.g. x.float() / 127.5 - 1")
        self.check_frames(x.shape[2])
        self.check_sides(*x.shape[3:])
        self._check_dtype(x, "video")

    def check_latents(self, z: Tensor, num_frames: int | None = None) -> int:
        """Count the frames that z decodes to; ValueError unless z is (B, C, t, h, w) and agrees with `num_frames`, if given."""
        C = self.latent_channels
        if z.ndim != 5 or z.shape[1] != C or min(z.shape) < 1:
            raise ValueError(
                f"latents of shape {tuple(z.shape)}: {type(self).__name__} needs (B, {C}, t, h, w), each at least 1"
            )
        self._check_dtype(z, "latents")
        t = z.shape[2]
        if num_frames is None:
            return self.pixel_frames(t)
        if self.latent_frames(num_frames) != t:
            raise ValueError(
                f"num_frames={num_frames} is {self.latent_frames(num_frames)} latent frames, but z has {t}"
            )
        return num_frames

    def _check_dtype(self, x: Tensor, what: str) -> None:
        # of a model of diffusers what it computes in, which may differ from what it stores
        dtype = getattr(self, "dtype", None) or next(self.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"{what} of dtype {x.dtype}, weights of {dtype}: they must agree, e.g. x.to({dtype}), "
                f"or load_vae(..., dtype={x.dtype})"
            )

    def latent_rule(self) -> dict[str, Any]:
        """Say how latents are scaled: scaling_factor, latents_mean, latents_std, None for what there is not."""
        return {key: self.config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std")}

    def _latent_statistics(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and std of the config's channels, shaped for z and where z is; None without them."""
        rule = self.latent_rule()
        mean, std = rule["latents_mean"], rule["latents_std"]
        if mean is None or std is None:
            return None
        # One value per channel, along dim 1 of latents with or without an axis of time.
        shape = (1, -1) + (1,) * (z.ndim - 2)
        mean, std = torch.tensor(mean, dtype=z.dtype), torch.tensor(std, dtype=z.dtype)
        return mean.view(shape).to(z.device, non_blocking=True), std.view(shape).to(
            z.device, non_blocking=True
        )

    @property
    def has_scaling_rule(self) -> bool:
        """Tell whether latents can be normalised: by channel statistics or a scaling factor."""
        rule = self.latent_rule()
        return None not in (rule["latents_mean"], rule["latents_std"]) or rule["scaling_factor"] is not None

    def _scaling_factor(self) -> float:
        if self.config.get("scaling_factor") is None:
            raise ValueError(
                f"{type(self).__name__} has no scaling rule: measure latent statistics first "
                "and give them to set_latent_statistics(mean, std)"
            )
        return self.config["scaling_factor"]

    def normalize(self, z: Tensor) -> Tensor:
        """Turn posterior latents (B, C, t, h, w) into what a diffusion model sees.

        (z - mean) / std per channel if the config holds latents_mean and latents_std, else z * scaling_factor.
        """
        statistics = self._latent_statistics(z)
        if statistics is None:
            return z * self._scaling_factor()
        mean, std = statistics
        return (z - mean) / std

    def denormalize(self, z: Tensor) -> Tensor:
        """Undo `normalize`."""
        statistics = self._latent_statistics(z)
        if statistics is None:
            return z / self._scaling_factor()
        mean, std = statistics
        return z * std + mean

    def set_latent_statistics(self, mean, std) -> None:
        """Store per-channel mean and std (sequences of C floats) in the config; save_pretrained keeps them."""
        mean, std = list(map(float, mean)), list(map(float, std))
        channels = self.latent_channels
        if len(mean) != len(std) or len(mean) != channels:
            raise ValueError(
                f"{len(mean)} means and {len(std)} stds: both need one value per latent channel ({channels})"
            )
        if not all(s > 0 for s in std):
            raise ValueError(f"latent std {std}: every value must be above 0")
        self.register_to_config(latents_mean=mean, latents_std=std)


DECODER = ("decoder", "post_quant_conv")


def makes_latents(name: str) -> bool:
    """Tell whether a tensor of a VAE, by its name, has a part in the latents: all but those of the decoder."""
    return not any(part in DECODER for part in name.split("."))


class Autoencode(nn.Module):
    """Map a clip and noise to its reconstruction and posterior in one forward, which is what DDP wraps.

    An encoder of which nothing is trained runs without gradients.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.encoder_trains = any(p.requires_grad for n, p in vae.named_parameters() if makes_latents(n))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct x (B, 3, T, H, W) in [-1, 1] with noise (B, C, t, h, w).

        Returns the clip and the moments (B, 2C, t, h, w).
        """
        with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
            posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise  # the reparameterised draw
        return self.vae.decode(z).sample, posterior.parameters
