"""What the baselines share: frame micro-batches, the output of a discrete VAE, reconstruction, refusals."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils import BaseOutput
from torch import Tensor

from vae.interface import VideoGaussian, VideoVAE


@dataclass
class VideoVQOutput(BaseOutput):
    """Encoding of a discrete VAE: latents (B, C, t, h, w), the chosen codebook entries; codes (B, t, h, w) int64."""

    latents: Tensor
    codes: Tensor


class Baseline(VideoVAE, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Base of the six baselines; a subclass gives `encode`, `decode` and what VideoVAE asks for."""

    _tiling_refusal = "it has no temporal tiling"

    def enable_tiling(self, *args, **kwargs) -> None:
        raise ValueError(f"{type(self).__name__}: tiling cannot be switched on: {self._tiling_refusal}")

    enable_slicing = enable_spatial_tiling = enable_tiling


def fold(x: Tensor) -> Tensor:
    """Turn clips into a batch of frames: (B, C, T, H, W) -> (B T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, B: int) -> Tensor:
    """Turn a batch of frames into clips again: (B T, C, H, W) -> (B, C, T, H, W)."""
    return x.unflatten(0, (B, -1)).transpose(1, 2)


def map_frames(fn: Callable[[Tensor], Tensor], x: Tensor, frame_batch: int) -> Tensor:
    """Apply an image function to every frame of x (B, C, T, H, W), at most `frame_batch` frames at a time."""
    return unfold(torch.cat([fn(part) for part in fold(x).split(frame_batch)]), x.shape[0])


def check_frame_batch(frame_batch: int) -> None:
    if frame_batch < 1:
        raise ValueError(f"frame_batch={frame_batch}: at least one frame goes through the network at a time")


def posterior_output(moments: Tensor, return_dict: bool):
    """Wrap moments (B, 2C, t, h, w) in an AutoencoderKLOutput, or a 1-tuple."""
    posterior = VideoGaussian(moments)
    return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


def decoder_output(x: Tensor, return_dict: bool):
    return DecoderOutput(sample=x) if return_dict else (x,)
