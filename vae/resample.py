"""Up- and downsampling in space and time, on whole clips."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.layers import CausalConv3d, FrameConv2d, fold_time, unfold_time


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

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


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

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(enlarge(x, "nearest"))


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

    def forward(self, x: Tensor) -> Tensor:
        x = double_frames(x, self.temporal)
        return self.conv(enlarge(x, self.spatial))


def double_frames(x: Tensor, mode: str) -> Tensor:
    """1 + n frames -> 1 + 2n: the first kept, the others repeated ("nearest") or interpolated ("linear").

    Linear: frame 0 takes no part in the others, and the last is clamped (as Open-Sora-Plan).
    """
    if x.shape[2] == 1:
        return x
    first, rest = x[:, :, :1], x[:, :, 1:]
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

    def forward(self, x: Tensor) -> Tensor:
        return halve_frames(x)


class TimeUpsample(nn.Module):
    """Double T after the first frame, linearly (Open-Sora-Plan v1.0)."""

    def forward(self, x: Tensor) -> Tensor:
        return double_frames(x, "linear")


class TimeDownsampleRes(nn.Module):
    """a * averaged + (1 - a) * convolved, a = sigmoid(mix_factor) (Open-Sora-Plan v1.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.mix_factor)
        padded = torch.cat((x[:, :, :1].expand(-1, -1, 2, -1, -1), x), dim=2)
        return a * halve_frames(x) + (1 - a) * self.conv(padded)


class TimeUpsampleRes(nn.Module):
    """u = linear x2 in time; a * u + (1 - a) * causal convolution of u (Open-Sora-Plan v1.1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = CausalConv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.mix_factor)
        x = double_frames(x, "linear")
        return a * x + (1 - a) * self.conv(x)


TIME_DOWN = {"pool": lambda channels: TimeDownsample(), "res": TimeDownsampleRes}
TIME_UP = {"pool": lambda channels: TimeUpsample(), "res": TimeUpsampleRes}
