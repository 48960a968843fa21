"""CV-VAE (AILab-CVC/CV-VAE; paper Table 1 and 2, "CV-VAE"). Licence unknown: the repository has no licence file.

Official files: AILab-CVC/CV-VAE, subfolder vae3d (the paper's; vae3d_v1-1 is of the same class). Module names are
the release's. Causal encoder, non-causal decoder, "half 3D" residual blocks (first convolution 3D, second 2D).
The model encodes 17 frames at a time with one shared frame, as its release does: that is part of its result.
Upstream needs xformers; here attention is torch's scaled_dot_product_attention, which computes the same.

Known deviation: lengths other than 4k + 1 are an error here; upstream drops the surplus frames.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - a pipeline looks here for what can load it
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vae.baselines.common import Baseline, decoder_output, fold, posterior_output, unfold
from vae.tiling import tile_starts


class CausalConv3d(nn.Conv3d):
    """Convolution that sees no later frame: the first frame repeated in front, zeros around in space."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride=1, pad_space: bool = True):
        side = kernel // 2 if pad_space else 0
        super().__init__(in_channels, out_channels, kernel, stride, (0, side, side))
        self.front = kernel - 1

    def forward(self, x: Tensor) -> Tensor:
        if self.front:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.front, -1, -1), x], dim=2)
        return super().forward(x)


class FrameConv2d(nn.Conv2d):
    """2D convolution of every frame."""

    def forward(self, x: Tensor) -> Tensor:
        return unfold(super().forward(fold(x)), x.shape[0])


def _conv(in_channels: int, out_channels: int, kernel: int, causal: bool) -> nn.Conv3d:
    if causal:
        return CausalConv3d(in_channels, out_channels, kernel)
    return nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    """Norms see the whole clip; conv1 is 3D, conv2 2D."""

    def __init__(self, in_channels: int, out_channels: int, causal: bool, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, causal)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = FrameConv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = _conv(in_channels, out_channels, 1, causal)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """Single-head attention over the positions of each frame."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def attend(self, frames: Tensor) -> Tensor:
        """Attend within each frame: (N, C, h, w) -> (N, C, h, w), without the residual."""
        h = self.norm(frames)
        q, k, v = (conv(h).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))  # (N, 1, h w, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.unflatten(2, frames.shape[2:])
        return self.proj_out(h)

    def forward(self, x: Tensor) -> Tensor:
        return x + unfold(self.attend(fold(x)), x.shape[0])


class SpatioTemporalAttention(SpatialAttention):
    """Spatial attention, then attention over the frames of each position, then one residual around both."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, groups)
        self.q_t, self.k_t, self.v_t, self.proj_out_t = (nn.Linear(channels, channels) for _ in range(4))
        self.norm_t = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        # Along space.
        h = unfold(self.attend(fold(x)), x.shape[0])  # (B, C, T, h, w)
        # Along time, one sequence per position: three (B h w, 1, T, C).
        h = self.norm_t(h.permute(0, 3, 4, 2, 1))  # (B, h, w, T, C)
        q, k, v = (linear(h).flatten(0, 2).unsqueeze(1) for linear in (self.q_t, self.k_t, self.v_t))
        out = F.scaled_dot_product_attention(q, k, v).view(h.shape)
        return x + self.proj_out_t(out).permute(0, 4, 3, 1, 2)


class Downsample(nn.Module):
    """Halves space, and time where `time`: 2k + 1 -> k + 1 frames."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, (2 if time else 1, 2, 2), pad_space=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles space; where `time`, also time without the first frame: k + 1 -> 2k + 1 frames. Not causal."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv3d(channels, channels * (2 if time else 1), 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")  # (B, C, T, 2h, 2w)
        x = self.conv(torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2))  # (B, 2C, T, 2h, 2w) where `time`
        if not self.time:
            return x
        # channel s C + c of frame t becomes channel c of frame 2t + s
        return x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)[:, :, 1:]


class Mid(nn.Module):
    def __init__(self, channels: int, causal: bool, attention: type[SpatialAttention], groups: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, causal, groups)
        self.attn_1 = attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, causal, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks, then the resampling of this level if it has one."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, causal: bool, groups: int, **resample
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResBlock(a, b, causal, groups) for a, b in itertools.pairwise(widths))
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            for part in module if isinstance(module, nn.ModuleList) else (module,):
                x = part(x)
        return x


class Encoder(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, widths: list[int], blocks: int, groups: int):
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], 3)
        # Space is halved after every level but the last, time after every other one.
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            last = i == len(widths) - 1
            resample = {} if last else {"downsample": Downsample(width, time=i % 2 == 0)}
            self.down.append(Level(before, width, blocks, True, groups, **resample))
        self.mid = Mid(widths[-1], True, SpatialAttention, groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, 128, T, H, W), widths of the release
        for level in self.down:
            h = level(h)  # 128, 256, 512, 512 channels; in the end (B, 512, (T - 1) / 4 + 1, H / 8, W / 8)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))  # (B, 2C, t, h, w)


class Decoder(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, widths: list[int], blocks: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv3d(in_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], False, SpatioTemporalAttention, groups)
        levels, before = [], widths[-1]
        for i in reversed(range(len(widths))):  # walked deepest first, stored shallowest first
            resample = {"upsample": Upsample(widths[i], time=i % 2 == 1)} if i else {}
            levels.insert(0, Level(before, widths[i], blocks, False, groups, **resample))
            before = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv3d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, 512, t, h, w)
        for level in reversed(self.up):
            h = level(h)  # 512, 512, 256, 128 channels; in the end (B, 128, 4 (t - 1) + 1, 8 h, 8 w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, T, H, W)


class CVVAE(Baseline):
    """CV-VAE. T = 4k + 1; latents (B, 4, k + 1, H/8, W/8).

    frames_at_a_time: groups of that many frames plus one shared with the group before (None: the whole clip);
    tile_spatial_size: pixels per side of a spatial tile (None: no tiles), tile_overlap_ratio: its shared part.
    """

    temporal_compression_ratio = 4
    frame_rule = "4n+1"
    _tiling_refusal = "its own groups and tiles are config.frames_at_a_time and config.tile_spatial_size"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        frames_at_a_time: int | None = 16,
        tile_spatial_size: int | None = 576,
        tile_overlap_ratio: float = 0.2222,
    ):
        super().__init__()
        widths, levels = list(block_out_channels), len(block_out_channels)
        self.spatial_compression_ratio = 2 ** (levels - 1)
        self.temporal_compression_ratio = 2 ** (levels // 2)  # time halves at every other level
        if frames_at_a_time is not None and (
            frames_at_a_time < 1 or frames_at_a_time % self.temporal_compression_ratio
        ):
            raise ValueError(
                f"frames_at_a_time={frames_at_a_time}: must be a multiple of "
                f"{self.temporal_compression_ratio}, e.g. 16, or None"
            )
        groups = norm_num_groups
        self.encoder = Encoder(in_channels, 2 * latent_channels, widths, layers_per_block, groups)
        self.decoder = Decoder(latent_channels, out_channels, widths, layers_per_block + 1, groups)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True):
        """Encode x (B, 3, T, H, W) in [-1, 1], T = 4k + 1, to a posterior over (B, 4, k + 1, H/8, W/8)."""
        self.check_video(x)
        size, s = self.config.tile_spatial_size, self.spatial_compression_ratio
        moments = self._by_groups(x, self.config.frames_at_a_time, self.encoder, size, size and size // s)
        return posterior_output(moments, return_dict)

    @apply_forward_hook
    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True):
        """Decode z (B, 4, t, h, w) to DecoderOutput of (B, 3, 4(t - 1) + 1, 8h, 8w)."""
        self.check_latents(z, num_frames)
        frames, size = self.config.frames_at_a_time, self.config.tile_spatial_size
        group = frames and frames // self.temporal_compression_ratio
        latent_size = size and size // self.spatial_compression_ratio
        return decoder_output(self._by_groups(z, group, self.decoder, latent_size, size), return_dict)

    def _by_groups(self, x: Tensor, stride: int | None, fn: Callable, size, out_size) -> Tensor:
        """Apply fn to x[n stride : (n + 1) stride + 1] for each n; the shared first frame of n > 0 is dropped."""
        T = x.shape[2]
        stride = stride or T
        parts = []
        for n in range(max(1, math.ceil((T - 1) / stride))):
            part = x[:, :, n * stride : (n + 1) * stride + 1]
            y = _tiled(fn, part, size, out_size, self.config.tile_overlap_ratio) if size else fn(part)
            parts.append(y[:, :, 1:] if n else y)
        return torch.cat(parts, dim=2)


def _tiled(fn: Callable, x: Tensor, size: int, out_size: int, ratio: float) -> Tensor:
    """Apply fn to overlapping squares of `size`, blended linearly over the overlap of the squares of `out_size`."""
    stride, overlap = round(size * (1 - ratio)), round(out_size * ratio)
    # Each tile is blended with its upper neighbour, then with its left one.
    rows = []
    for top in tile_starts(x.shape[3], size, stride):
        row = []
        for left in tile_starts(x.shape[4], size, stride):
            tile = fn(x[:, :, :, top : top + size, left : left + size])
            if rows:
                tile = _blend(rows[-1][len(row)], tile, overlap, dim=3)
            if row:
                tile = _blend(row[-1], tile, overlap, dim=4)
            row.append(tile)
        rows.append(row)
    keep = out_size - overlap
    return _joined([_joined(row, keep, 4) for row in rows], keep, 3)


def _joined(tiles: list[Tensor], keep: int, dim: int) -> Tensor:
    """Join the tiles side by side along dim: `keep` entries of each, all of the last."""
    return torch.cat([t.narrow(dim, 0, keep) for t in tiles[:-1]] + tiles[-1:], dim=dim)


def _blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """Return after, its first `overlap` entries along dim faded in from the last ones of before (rounded as upstream)."""
    shape = [1] * after.ndim
    shape[dim] = overlap
    weight = (torch.arange(overlap, device=after.device, dtype=after.dtype) / overlap).view(shape)
    old = before.narrow(dim, before.shape[dim] - overlap, overlap)
    head = torch.lerp(old, after.narrow(dim, 0, overlap), weight)
    return torch.cat([head, after.narrow(dim, overlap, after.shape[dim] - overlap)], dim=dim)
