"""OPS-VAE: the two-stage VAE of Open-Sora v1.2 (hpcaitech/Open-Sora, Apache-2.0; paper Table 1 and 2, "OPS-VAE").

Official file: hpcai-tech/OpenSora-VAE-v1.2, model.safetensors (both stages; the 2D one began as PixArt's SDXL VAE,
openrail++). Frames go through an AutoencoderKL, its latents times 0.18215 through a causal temporal VAE.
Module names are the release's; its buffers `shift` and `scale` are config.latents_mean and latents_std here.

Known deviations: upstream samples the 2D posterior on every encode; here its mode is used unless
`sample_posterior=True`. Upstream's encode returns normalised latents; here `normalize` does that, as everywhere.
The release's inference configs use chunks of 17 frames (`micro_frame_size=17`: 81 frames -> 24 latents); the
paper's memory figures fit 21 latents, so None is the default.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - a pipeline looks here for what can load it
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vae.baselines.common import Baseline, check_frame_batch, decoder_output, map_frames, posterior_output
from vae.interface import VideoGaussian


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame: zeros in front in time, zeros on all sides in space."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, time_stride: int = 1, bias: bool = True
    ):
        super().__init__()
        self.front = (kernel - 1) + (1 - time_stride)
        self.conv = nn.Conv3d(
            in_channels, out_channels, kernel, (time_stride, 1, 1), (0, kernel // 2, kernel // 2), bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, self.front, 0)) if self.front else x)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        self.conv3 = None
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


class TemporalEncoder(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, widths: list[int], blocks: int, halve, groups: int
    ):
        super().__init__()
        width = widths[0]
        self.conv_in = CausalConv3d(in_channels, width, 3, bias=False)
        # Levels: residual blocks, then, but for the last, a convolution that halves time or nothing.
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        for level, after in enumerate(widths):
            level_blocks = nn.ModuleList()
            for _ in range(blocks):
                level_blocks.append(ResBlock(width, after, groups))
                width = after
            self.block_res_blocks.append(level_blocks)
            if level < len(widths) - 1:
                down = CausalConv3d(width, width, 3, time_stride=2) if halve[level] else nn.Identity()
                self.conv_blocks.append(down)
        # The middle and the head.
        self.res_blocks = nn.Sequential(*(ResBlock(width, width, groups) for _ in range(blocks)))
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = CausalConv3d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, 128, T, h, w), widths of the release; h and w stay
        for level, level_blocks in enumerate(self.block_res_blocks):
            # 128, 256, 256, 512 channels
            for block in level_blocks:
                h = block(h)
            # T halved after levels 1 and 2
            if level < len(self.conv_blocks):
                h = self.conv_blocks[level](h)
        return self.conv2(F.silu(self.norm1(self.res_blocks(h))))  # (B, 2C, T / 4, h, w)


class TemporalDecoder(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, widths: list[int], blocks: int, halve, groups: int
    ):
        super().__init__()
        width = widths[-1]
        self.conv1 = CausalConv3d(in_channels, width, 3)
        self.res_blocks = nn.Sequential(*(ResBlock(width, width, groups) for _ in range(blocks)))
        levels, ups = [], []
        for level in reversed(range(len(widths))):  # built deepest first, stored shallowest first
            level_blocks = nn.ModuleList()
            for _ in range(blocks):
                level_blocks.append(ResBlock(width, widths[level], groups))
                width = widths[level]
            levels.insert(0, level_blocks)
            if level > 0:
                ups.insert(0, CausalConv3d(width, 2 * width, 3) if halve[level - 1] else nn.Identity())
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(levels), nn.ModuleList(ups)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv_out = CausalConv3d(width, out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.res_blocks(self.conv1(z))  # (B, 512, t, h, w)
        # From the deepest level up; T doubled after levels 3 and 2.
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                h = block(h)
            if level > 0 and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                # channel 2c + s of frame t becomes channel c of frame 2t + s
                h = self.conv_blocks[level - 1](h).unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(h)))


class TemporalVAE(nn.Module):
    """Open-Sora's VAE_Temporal: 4x in time on 2D latents; any T, zeros in front up to a multiple of the ratio."""

    def __init__(self, channels: int, filters: int, multipliers, blocks: int, halve, groups: int):
        super().__init__()
        widths = [filters * m for m in multipliers]
        self.ratio = 2 ** sum(map(bool, halve))
        self.encoder = TemporalEncoder(channels, 2 * channels, widths, blocks, halve, groups)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)
        self.decoder = TemporalDecoder(channels, channels, widths, blocks, halve, groups)

    def moments(self, x: Tensor) -> Tensor:
        """Encode x (B, C, T, h, w) to moments (B, 2C, ceil(T / 4), h, w)."""
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.ratio, 0))))

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Decode z (B, C, t, h, w) to the last num_frames of its 4t frames."""
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames % self.ratio :]


class OPSVAE(Baseline):
    """Open-Sora v1.2's VAE. Any T; latents (B, 4, ceil(T/4), H/8, W/8), or 5 latents per 17 frames when chunked.

    Decoding without `num_frames` gives 4t frames; the surplus of a clip with T not a multiple of 4 is at its
    front. `micro_frame_size` frames go through the temporal VAE at a time (None: all of them), `frame_batch`
    through the 2D one.
    """

    temporal_compression_ratio = 4
    _tiling_refusal = "its own chunking is config.micro_frame_size, e.g. 17"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        spatial_block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        spatial_layers_per_block: int = 2,
        filters: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        num_res_blocks: int = 4,
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        norm_num_groups: int = 32,
        spatial_scaling_factor: float = 0.18215,
        latents_mean: list[float] | None = (-0.10, 0.34, 0.27, 0.98),
        latents_std: list[float] | None = (3.85, 2.32, 2.33, 3.06),
        micro_frame_size: int | None = None,
        frame_batch: int = 4,
    ):
        super().__init__()
        check_frame_batch(frame_batch)
        if micro_frame_size is not None and micro_frame_size < 1:
            raise ValueError(f"micro_frame_size={micro_frame_size}: give frames per chunk, e.g. 17, or None")
        # The first stage, on frames; the second, on their latents.
        levels = len(spatial_block_out_channels)
        self.spatial_compression_ratio = 2 ** (levels - 1)
        self.spatial_vae = nn.Module()
        self.spatial_vae.module = AutoencoderKL(
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            block_out_channels=tuple(spatial_block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=spatial_layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        self.temporal_vae = TemporalVAE(
            latent_channels,
            filters,
            channel_multipliers,
            num_res_blocks,
            temporal_downsample,
            norm_num_groups,
        )
        self.temporal_compression_ratio = self.temporal_vae.ratio

    def latent_frames(self, T: int) -> int:
        self.check_frames(T)
        ratio, micro = self.temporal_compression_ratio, self.config.micro_frame_size
        if micro is None:
            return -(-T // ratio)
        return T // micro * -(-micro // ratio) + -(-(T % micro) // ratio)

    def pixel_frames(self, t: int) -> int:
        if t < 1:
            raise ValueError(f"t={t}: a clip has at least one latent frame")
        ratio, micro = self.temporal_compression_ratio, self.config.micro_frame_size
        if micro is None:
            return ratio * t
        whole, rest = divmod(t, -(-micro // ratio))
        return micro * whole + ratio * rest

    @apply_forward_hook
    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
    ):
        """Encode x (B, 3, T, H, W) in [-1, 1] to a posterior over (B, 4, t, H/8, W/8), not normalised.

        sample_posterior: draw the 2D latents (upstream's way) instead of taking their mode.
        """
        self.check_video(x)
        # Latents of all frames: (B, 4, T, h, w)
        spatial = VideoGaussian(map_frames(self.spatial_vae.module._encode, x, self.config.frame_batch))
        h = spatial.sample(generator) if sample_posterior else spatial.mode()
        h = h * self.config.spatial_scaling_factor
        # Moments of each chunk in time, on its own.
        chunks = h.split(self.config.micro_frame_size or h.shape[2], dim=2)
        return posterior_output(torch.cat([self.temporal_vae.moments(c) for c in chunks], dim=2), return_dict)

    @apply_forward_hook
    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True):
        """Decode z (B, 4, t, h, w), not normalised, to DecoderOutput of (B, 3, num_frames or 4t, 8h, 8w)."""
        left = self.check_latents(z, num_frames)
        # Latents of all frames again, chunk by chunk: (B, 4, T, h, w)
        micro = self.config.micro_frame_size
        parts = []
        for part in z.split(-(-(micro or left) // self.temporal_compression_ratio), dim=2):
            frames = min(micro or left, left)
            parts.append(self.temporal_vae.decode(part, frames))
            left -= frames
        # Frames, by the first stage.
        h = torch.cat(parts, dim=2) / self.config.spatial_scaling_factor
        decode = self.spatial_vae.module._decode
        return decoder_output(map_frames(lambda f: decode(f).sample, h, self.config.frame_batch), return_dict)

    def _posterior(self, sample: Tensor, sample_posterior: bool, generator: torch.Generator | None):
        return self.encode(sample, sample_posterior=sample_posterior, generator=generator).latent_dist
