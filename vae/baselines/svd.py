"""SVD-VAE: Stable Video Diffusion's VAE, image encoder and temporal decoder (paper Table 1).

Weights: stabilityai/stable-video-diffusion-img2vid, subfolder vae (its own community licence, gated).
The network is diffusers' AutoencoderKLTemporalDecoder; its folder opens as it is.
"""

import torch
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - a pipeline looks here for what can load it
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from vae.baselines.common import (
    Baseline,
    check_frame_batch,
    decoder_output,
    fold,
    map_frames,
    posterior_output,
    unfold,
)

_COPIED = (
    "in_channels out_channels latent_channels block_out_channels layers_per_block scaling_factor".split()
)


class SVDVAE(Baseline):
    """An AutoencoderKLTemporalDecoder that takes clips. Any T; latents (B, 4, T, H/8, W/8).

    The encoder sees `frame_batch` frames at a time. The decoder's temporal convolutions see
    `decode_chunk_size` frames of one clip at a time, None = the whole clip (as the paper measured it); chunks
    are decoded apart, so their length changes the result.
    """

    _tiling_refusal = (
        "set config.frame_batch (encoder) and config.decode_chunk_size (decoder) to bound the memory"
    )

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        scaling_factor: float = 0.18215,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        frame_batch: int = 8,
        decode_chunk_size: int | None = None,
    ):
        super().__init__()
        check_frame_batch(frame_batch)
        if decode_chunk_size is not None and decode_chunk_size < 1:
            raise ValueError(
                f"decode_chunk_size={decode_chunk_size}: give frames per chunk, or None = whole clip"
            )
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        self.autoencoder = AutoencoderKLTemporalDecoder(
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
            layers_per_block=layers_per_block,
        )

    @classmethod
    def from_diffusers(
        cls,
        autoencoder: AutoencoderKLTemporalDecoder,
        frame_batch: int = 8,
        decode_chunk_size: int | None = None,
    ) -> "SVDVAE":
        """Wrap a loaded AutoencoderKLTemporalDecoder without copying its weights."""
        config = {key: autoencoder.config[key] for key in _COPIED}
        with torch.device("meta"):  # the network is replaced in the next line
            model = cls(**config, frame_batch=frame_batch, decode_chunk_size=decode_chunk_size)
        model.autoencoder = autoencoder
        return model.train(autoencoder.training)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True):
        """Encode x (B, 3, T, H, W) in [-1, 1] to a posterior over (B, 4, T, H/8, W/8)."""
        self.check_video(x)
        net = self.autoencoder
        moments = map_frames(lambda part: net.quant_conv(net.encoder(part)), x, self.config.frame_batch)
        return posterior_output(moments, return_dict)

    @apply_forward_hook
    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True):
        """Decode z (B, 4, T, h, w) to DecoderOutput of (B, 3, T, 8h, 8w)."""
        T = self.check_latents(z, num_frames)
        # Chunks in time, each decoded on its own; diffusers takes frames as a batch and the length of a clip.
        parts = []
        for part in z.split(self.config.decode_chunk_size or T, dim=2):
            frames = self.autoencoder.decode(fold(part), num_frames=part.shape[2]).sample
            parts.append(unfold(frames, part.shape[0]))
        return decoder_output(torch.cat(parts, dim=2), return_dict)
