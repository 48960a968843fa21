"""TATS' 3D VQGAN: 4 x 8 x 8 compression, 16384 codes (songweige/TATS, MIT; paper Table 1, "TATS").

Official files: Google Drive ids in the TATS README; the paper's numbers are from the Sky Time-lapse one,
vqgan_sky_128_488_epoch_12-step_29999-train.ckpt (config: batch norm, 32 hidden channels, downsample 4 8 8).
Module names are the release's.

Known deviations: TATS works in [-0.5, 0.5]; here pixels are in [-1, 1] and are halved on the way in and doubled
on the way out (the paper's authors probably did not, which can only lower their PSNR). The paper's 52.19 M
parameters count the whole training module, discriminators and LPIPS included; the autoencoder has 23.65 M.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vae.baselines.common import Baseline, VideoVQOutput, decoder_output

_ROWS_AT_ONCE = 4096  # positions compared with the codebook at a time: 256 MiB of distances at 16384 codes


def _same_padding(kernel: int, stride: tuple[int, ...]) -> list[int]:
    """Make F.pad's list (last axis first): kernel - stride in total per axis, the odd one in front."""
    sides = []
    for s in reversed(stride):
        total = kernel - s
        sides += [total - total // 2, total // 2]
    return sides


class SamePadConv3d(nn.Module):
    """Replicate-padded convolution: T, H, W -> T/s, H/s, W/s."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride=(1, 1, 1)):
        super().__init__()
        self.padding = _same_padding(kernel, stride)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding, mode="replicate"))


class SamePadConvTranspose3d(nn.Module):
    """Replicate-padded transposed convolution: T, H, W -> sT, sH, sW."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride=(1, 1, 1)):
        super().__init__()
        self.padding = _same_padding(kernel, stride)
        self.convt = nn.ConvTranspose3d(in_channels, out_channels, kernel, stride, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convt(F.pad(x, self.padding, mode="replicate"))


def _norm(channels: int, norm_type: str) -> nn.Module:
    # Upstream's SyncBatchNorm is BatchNorm3d for one process: the same tensors, the same result.
    return nn.BatchNorm3d(channels) if norm_type == "batch" else nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, channels: int, norm_type: str):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels, norm_type), _norm(channels, norm_type)
        self.conv1, self.conv2 = (SamePadConv3d(channels, channels, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _level_strides(downsample: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Split factors into strides: (4, 8, 8) -> (2, 2, 2), (2, 2, 2), (1, 2, 2); an axis is halved until its factor is used up."""
    halvings = [int(math.log2(d)) for d in downsample]
    if any(2**n != d for n, d in zip(halvings, downsample, strict=True)):
        raise ValueError(f"downsample={tuple(downsample)}: every factor must be a power of 2")
    return [tuple(2 if n > level else 1 for n in halvings) for level in range(max(halvings))]


class Encoder(nn.Module):
    def __init__(self, in_channels: int, hidden: int, downsample: tuple[int, ...], norm_type: str):
        super().__init__()
        self.conv_first = SamePadConv3d(in_channels, hidden, 3)
        self.conv_blocks = nn.ModuleList()
        for stride in _level_strides(downsample):
            down = SamePadConv3d(hidden, 2 * hidden, 4, stride)
            hidden *= 2
            self.conv_blocks.append(nn.ModuleDict({"down": down, "res": ResBlock(hidden, norm_type)}))
        self.final_block = nn.Sequential(_norm(hidden, norm_type), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_first(x)  # (B, 32, T, H, W), widths of the release
        for block in self.conv_blocks:
            # 64, 128, 256 channels; in the end (B, 256, T / 4, H / 8, W / 8)
            h = block["res"](block["down"](h))
        return self.final_block(h)


class Decoder(nn.Module):
    def __init__(self, out_channels: int, hidden: int, downsample: tuple[int, ...], norm_type: str):
        super().__init__()
        strides = _level_strides(downsample)
        width = hidden * 2 ** len(strides)
        self.final_block = nn.Sequential(_norm(width, norm_type), nn.SiLU())
        self.conv_blocks = nn.ModuleList()
        for level, stride in enumerate(strides):
            after = hidden * 2 ** (len(strides) - level)
            block = {"up": SamePadConvTranspose3d(width, after, 4, stride)}
            block |= {name: ResBlock(after, norm_type) for name in ("res1", "res2")}
            self.conv_blocks.append(nn.ModuleDict(block))
            width = after
        self.conv_last = SamePadConv3d(width, out_channels, 3)

    def forward(self, h: Tensor) -> Tensor:
        h = self.final_block(h)  # (B, 256, t, h, w)
        for block in self.conv_blocks:
            # 256, 128, 64 channels; in the end (B, 64, T, H, W)
            h = block["res2"](block["res1"](block["up"](h)))
        return self.conv_last(h)


class Codebook(nn.Module):
    """Entries (buffers, updated by moving averages in TATS' training; N and z_avg are that state)."""

    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        self.register_buffer("embeddings", torch.randn(num_codes, dim))
        self.register_buffer("N", torch.zeros(num_codes))
        self.register_buffer("z_avg", self.embeddings.clone())

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest entries (Euclidean) of h (B, C, t, h, w): (B, C, t, h, w), and their indices (B, t, h, w)."""
        rows, table = h.movedim(1, -1).float(), self.embeddings.float()  # (B, t, h, w, C), (codes, C)
        # |row - entry|^2 / 2 without |row|^2 / 2, which is the same for all entries.
        half_norms = 0.5 * table.square().sum(1)
        codes = [(half_norms - part @ table.T).argmin(1) for part in rows.flatten(0, -2).split(_ROWS_AT_ONCE)]
        codes = torch.cat(codes).view(rows.shape[:-1])
        return F.embedding(codes, self.embeddings).movedim(-1, 1), codes


class TATSVQGAN(Baseline):
    """Discrete video VAE. T = 4k; latents (B, 256, T/4, H/8, W/8), codes (B, T/4, H/8, W/8).

    After `enable_frame_padding()` any T is accepted: `encode` repeats the last frame up to the next multiple
    of 4 and `decode(z, num_frames=T)` cuts the surplus off. Reconstruction only: no scaling rule, no stage two.
    """

    temporal_compression_ratio = 4
    discrete = True
    frame_rule = "4n"
    pad_frames = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 256,
        num_codes: int = 16384,
        hidden_channels: int = 32,
        downsample: tuple[int, int, int] = (4, 8, 8),
        norm_type: str = "batch",
    ):
        super().__init__()
        if norm_type not in ("batch", "group"):
            raise ValueError(f"norm_type={norm_type!r}: must be 'batch' or 'group'")
        self.temporal_compression_ratio, self.spatial_compression_ratio = downsample[:2]
        self.encoder = Encoder(in_channels, hidden_channels, downsample, norm_type)
        width = hidden_channels * max(downsample)
        self.pre_vq_conv = SamePadConv3d(width, latent_channels, 1)
        self.codebook = Codebook(num_codes, latent_channels)
        self.post_vq_conv = SamePadConv3d(latent_channels, width, 1)
        self.decoder = Decoder(out_channels, hidden_channels, downsample, norm_type)

    @property
    def num_training_parameters(self) -> int:
        """Count the parameters of TATS' image and video discriminators and LPIPS, which the paper's Table 1 counts too."""
        patch = [self.config.in_channels, 64, 128, 256, 512, 1]
        vgg16 = [3, 64, 64, 128, 128, 256, 256, 256] + [512] * 6
        total = _conv_parameters(patch, 4**2) + _conv_parameters(patch, 4**3) + _conv_parameters(vgg16, 3**2)
        batch_norms, lpips_heads = 2 * 2 * (128 + 256 + 512), 64 + 128 + 256 + 512 + 512
        return total + batch_norms + lpips_heads

    def enable_frame_padding(self) -> None:
        """Accept any T (see the class). Off by default: T = 25 is then an error."""
        self.pad_frames = True

    def disable_frame_padding(self) -> None:
        self.pad_frames = False

    def check_frames(self, T: int) -> None:
        if not (self.pad_frames and T >= 1):
            super().check_frames(T)

    def latent_frames(self, T: int) -> int:
        self.check_frames(T)
        return -(-T // self.temporal_compression_ratio)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True):
        """Encode x (B, 3, T, H, W) in [-1, 1] to latents (B, C, t, h, w), the chosen entries, and codes (B, t, h, w)."""
        self.check_video(x)
        # With frame padding: the last frame repeated up to a multiple of 4.
        surplus = -x.shape[2] % self.temporal_compression_ratio
        if surplus:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, surplus, -1, -1)], dim=2)
        # Pixels in [-0.5, 0.5], features, the nearest entry of each.
        latents, codes = self.codebook(self.pre_vq_conv(self.encoder(0.5 * x)))
        return VideoVQOutput(latents=latents, codes=codes) if return_dict else (latents, codes)

    def embed(self, codes: Tensor) -> Tensor:
        """Look up the latents (B, C, t, h, w) of codes (B, t, h, w)."""
        return F.embedding(codes, self.codebook.embeddings).movedim(-1, 1)

    @apply_forward_hook
    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True):
        """Decode z (B, C, t, h, w), codebook entries, to DecoderOutput of (B, 3, num_frames or 4t, 8h, 8w)."""
        T = self.check_latents(z, num_frames)
        return decoder_output(2.0 * self.decoder(self.post_vq_conv(z))[:, :, :T], return_dict)


def _conv_parameters(widths: list[int], kernel_size: int) -> int:
    return sum(kernel_size * a * b + b for a, b in itertools.pairwise(widths))
