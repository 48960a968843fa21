"""Up- and downsampling in space and time.

Nearest upsampling followed by a convolution is computed, at inference, as small convolutions on the small
grid, one per output phase (each sums the taps that fall on the same input): 4/9 of the work in space, 8/27 in
space and time, and the upsampled tensor never exists (it passes 2^31 elements beyond 125 frames of 256 x 256).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.fast import compute_dtype, convolve, empty_channels_last, fused, pad_right_bottom, prepared
from vae.layers import CausalConv3d, FrameConv2d, fold_time, unfold_time
from vae.stream import StreamState


class Downsample(nn.Module):
    """Halve H and W with a stride-2 3x3 convolution, zeros added at the right and the bottom only.

    kind: "2d" per frame; "1x3x3" the same with a 3D kernel; "st" a causal 3x3x3 kernel that halves T too,
    1 + 2n frames to 1 + n.
    """

    def __init__(self, kind: str, channels: int):
        super().__init__()
        if kind == "2d":
            self.conv = FrameConv2d(channels, channels, 3, stride=2)
        elif kind == "1x3x3":
            self.conv = CausalConv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2))
        else:
            self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return self.conv(pad_right_bottom(x), state)


def phase_rows(weight: Tensor, dim: int, phase: int) -> Tensor:
    """Three taps over an upsampled axis -> the two taps over the small axis that give output phase 0 or 1."""
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c) if phase == 0 else (a + b, c), dim)


def phases_for(x: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
    """`spatial_phases`, joined to one kernel where a GPU infers."""
    kernels = spatial_phases(weight)
    return torch.cat(kernels) if fused(x) else kernels


PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def spatial_phases(weight: Tensor) -> tuple[Tensor, ...]:
    """(O, I, ..., 3, 3) -> four kernels (O, I, ..., 2, 2), one per output phase (row, column)."""
    return tuple(phase_rows(phase_rows(weight, -2, a), -1, b).contiguous() for a, b in PHASES)


def temporal_phases(weight: Tensor) -> Tensor:
    """(O, I, 3, kh, kw) -> (2 O, I, 2, kh, kw): first the odd, then the even output frame of a repeated frame.

    After frame 0 every frame stands twice. At its first copy the taps see (before, before, now), at its second
    (before, now, now).
    """
    return torch.cat((phase_rows(weight, 2, 1), phase_rows(weight, 2, 0)))


def interleave(
    x: Tensor, kernels: Tensor | tuple[Tensor, ...], bias: Tensor, frames_per_input: int = 1
) -> Tensor:
    """Run the four phase convolutions over x and interleave their outputs.

    x: (B, I, T, h, w) with kernels (n O, I, kt, 2, 2) for n = frames_per_input -> (B, O, n (T - kt + 1), 2h, 2w).
    On a GPU the four kernels are one, (4 n O, I, kt, 2, 2), that reads x once.
    """
    B, _, T, h, w = x.shape
    n, O = frames_per_input, len(bias)  # noqa: E741
    one = isinstance(kernels, Tensor)
    kt = kernels.shape[2] if one else kernels[0].shape[2]
    out = empty_channels_last(x, (B, O, n * (T - kt + 1), 2 * h, 2 * w), compute_dtype(x))
    if one:
        phases = convolve(x, kernels, None, 1, (0, 1, 1)).chunk(
            4, dim=1
        )  # (h + 1, w + 1), of which one takes (h, w)
        shift = bias.to(out.dtype).view(1, O, 1, 1, 1)
    else:
        x, repeated = F.pad(x, (1, 1, 1, 1)), bias.repeat(n)
    for k, (a, b) in enumerate(PHASES):
        if one:
            y = phases[k][..., a : a + h, b : b + w]
        else:
            y = convolve(x[..., a : a + h + 1, b : b + w + 1], kernels[k], repeated)
        for i, part in enumerate(y.split(O, dim=1)):
            place = out[:, :, i::n, a::2, b::2]
            torch.add(part, shift, out=place) if one else place.copy_(part)
    return out


MOST = 2**31 - 1  # elements of a tensor that torch's interpolation on a GPU makes at once


def enlarge(x: Tensor, mode: str) -> Tensor:
    """x2 in H and W, frame by frame. x: (B, C, T, H, W); mode: "nearest" or "trilinear" (bilinear within a frame).

    In parts of at most MOST elements; a clip of 129 frames of 256 x 256 pixels would have more.
    """

    def part(x: Tensor) -> Tensor:
        if mode == "nearest":
            return F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
        frames = F.interpolate(fold_time(x), scale_factor=2, mode="bilinear", align_corners=False)
        return unfold_time(frames, x.shape[0])

    most = max(1, MOST // (4 * x[:, :, 0].numel()))
    if x.shape[2] <= most:
        return part(x)
    return torch.cat([part(frames) for frames in x.split(most, dim=2)], dim=2)


class SpatialUpsample(nn.Module):
    """Nearest x2 in H and W, then a 3x3 convolution. kind: "2d" per frame or "1x3x3" the same as a 3D kernel."""

    def __init__(self, kind: str, channels: int):
        super().__init__()
        if kind == "2d":
            self.conv = FrameConv2d(channels, channels, 3, padding=1)
        else:
            self.conv = CausalConv3d(channels, channels, (1, 3, 3), padding=1)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        if state is None and torch.is_grad_enabled():
            return self.conv(enlarge(x, "nearest"))
        conv = self.conv if isinstance(self.conv, FrameConv2d) else self.conv.conv
        kernels = prepared(conv, x, "phases", lambda w: phases_for(x, w.unsqueeze(2) if w.ndim == 4 else w))
        return interleave(x, kernels, conv.bias)


class SpaceTimeUpsample(nn.Module):
    """x2 in H, W and, after the first frame, in T; then a causal 3x3x3 convolution: 1 + n frames to 1 + 2n.

    spatial: "nearest" or "trilinear" (bilinear within a frame); temporal: "nearest" (repeat) or "linear". Only
    nearest in space keeps an image what SD-VAE makes of it (Eq. 4), and only nearest in time is causal; the
    released Open-Sora-Plan v1.2 is trilinear in both.
    """

    def __init__(self, channels: int, spatial: str, temporal: str):
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.conv = CausalConv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        if state is None:
            return self.conv(enlarge(double_frames(x, self.temporal), self.spatial))
        if self.spatial != "nearest":
            if not state.first:
                x = x.repeat_interleave(2, dim=2)
            return self.conv(enlarge(x, self.spatial), state)
        return self._phases(x, state)

    def _phases(self, x: Tensor, state: StreamState) -> Tensor:
        conv = self.conv.conv
        if state.first:
            state.frames[self] = x
            kernels = prepared(conv, x, "first phases", lambda w: phases_for(x, w.sum(2, keepdim=True)))
            return interleave(x, kernels, conv.bias)
        kernels = prepared(conv, x, "phases", lambda w: phases_for(x, temporal_phases(w)))
        window = torch.cat((state.frames[self], x), dim=2)
        state.frames[self] = x[:, :, -1:].clone()
        return interleave(window, kernels, conv.bias, frames_per_input=2)


def double_frames(x: Tensor, mode: str) -> Tensor:
    """1 + n frames -> 1 + 2n: the first kept, the others repeated ("nearest") or interpolated ("linear").

    Linear: frame 0 takes no part in the others, and the last is clamped (as Open-Sora-Plan).
    """
    if x.shape[2] == 1:
        return x
    first, rest = x[:, :, :1], x[:, :, 1:]
    if mode == "linear" and fused(x):
        B, C, T, H, W = x.shape
        out = empty_channels_last(x, (B, C, 2 * T - 1, H, W), x.dtype)
        out[:, :, 0], out[:, :, 1] = x[:, :, 0], x[:, :, 1]
        out[:, :, -1] = x[:, :, -1]
        torch.lerp(rest[:, :, 1:], rest[:, :, :-1], 0.25, out=out[:, :, 3::2])
        torch.lerp(rest[:, :, :-1], rest[:, :, 1:], 0.25, out=out[:, :, 2:-1:2])
        return out
    if mode == "nearest":
        return torch.cat((first, rest.repeat_interleave(2, dim=2)), dim=2)
    before = torch.cat((rest[:, :, :1], rest[:, :, :-1]), dim=2)
    after = torch.cat((rest[:, :, 1:], rest[:, :, -1:]), dim=2)
    pairs = torch.stack((0.25 * before + 0.75 * rest, 0.75 * rest + 0.25 * after), dim=3)
    return torch.cat((first, pairs.flatten(2, 3)), dim=2)


def halve_frames(x: Tensor) -> Tensor:
    """1 + 2n frames -> 1 + n: means over three frames at stride 2, two copies of the first in front."""
    x = torch.cat((x[:, :, :1].expand(-1, -1, 2, -1, -1), x), dim=2)
    return F.avg_pool3d(x, (3, 1, 1), stride=(2, 1, 1))


class TimeDownsample(nn.Module):
    """Halve T by averaging (Open-Sora-Plan v1.0)."""

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return halve_frames(x)


class TimeUpsample(nn.Module):
    """Double T after the first frame, linearly (Open-Sora-Plan v1.0)."""

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        return double_frames(x, "linear")


class TimeDownsampleRes(nn.Module):
    """a * averaged + (1 - a) * convolved, a = sigmoid(mix_factor) (Open-Sora-Plan v1.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        a = torch.sigmoid(self.mix_factor)
        padded = torch.cat((x[:, :, :1].expand(-1, -1, 2, -1, -1), x), dim=2)
        return a * halve_frames(x) + (1 - a) * self.conv(padded)


class TimeUpsampleRes(nn.Module):
    """u = linear x2 in time; a * u + (1 - a) * causal convolution of u (Open-Sora-Plan v1.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = CausalConv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        a = torch.sigmoid(self.mix_factor)
        x = double_frames(x, "linear")
        return a * x + (1 - a) * self.conv(x)


TIME_DOWN = {"pool": lambda channels: TimeDownsample(), "res": TimeDownsampleRes}
TIME_UP = {"pool": lambda channels: TimeUpsample(), "res": TimeUpsampleRes}
