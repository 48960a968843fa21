"""Layers of OD-VAE: causal 3D and per-frame convolutions, norms, residual blocks, attention.

Every layer takes a whole clip (B, C, T, H, W) and is plain autograd code: this is the definition of the network, and
what runs wherever gradients are recorded. Inference computes the same faster, in steps (vae/fast.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fold_time(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W); a view when x is channels_last_3d or T = 1."""
    B, C, T, H, W = x.shape
    return x.transpose(1, 2).reshape(B * T, C, H, W)


def unfold_time(x: Tensor, B: int) -> Tensor:
    """(B T, C, H, W) -> (B, C, T, H, W); always a view."""
    BT, C, H, W = x.shape
    return x.view(B, BT // B, C, H, W).transpose(1, 2)


class FrameConv2d(nn.Conv2d):
    """A 2D convolution on every frame. x: (B, C, T, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return unfold_time(super().forward(fold_time(x)), x.shape[0])


class FirstFrameConv3d(nn.Conv3d):
    """3D convolution. A single frame would fill every tap in time: it gets one 2D convolution with the taps summed."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size[0] == 1 or x.shape[2] > 1:
            return super().forward(x)
        kernel = self.weight.sum(2)  # a third of the work
        return F.conv2d(x[:, :, 0], kernel, self.bias, self.stride[1:], self.padding[1:]).unsqueeze(2)


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame: kernel - 1 copies of the first frame stand in front (paper 3.1).

    kernel: (kt, kh, kw); stride: (st, sh, sw); padding: zeros at each side of H and W.
    (B, I, T, H, W) -> (B, O, (T - 1) // st + 1, ...).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel, stride=1, padding: int = 0):
        super().__init__()
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = (0, padding, padding)
        self.conv = FirstFrameConv3d(in_channels, out_channels, kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        copies = self.conv.kernel_size[0] - 1 if x.shape[2] > 1 else 0
        if copies:  # one by one: an expanded tensor would lose the order of the channels in memory
            x = torch.cat((*[x[:, :, :1]] * copies, x), dim=2)
        return self.conv(x)


class VideoGroupNorm(nn.GroupNorm):
    """GroupNorm with statistics of each frame (scope "frame") or of the whole clip ("clip").

    Only "frame" is causal and can be streamed; the released Open-Sora-Plan models use "clip" in 3D blocks.
    """

    def __init__(self, groups: int, channels: int, scope: str):
        super().__init__(groups, channels, eps=1e-6)
        self.scope = scope

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type != "cpu":
            return self.channels_last(x)
        y = x if self.scope == "clip" else fold_time(x)
        # On a CPU torch's channels-last kernel loses digits if the mean is far from 0 (vae/fast.py)
        if x.device.type == "cpu":
            y = y.contiguous()
        y = super().forward(y)
        return y if self.scope == "clip" else unfold_time(y, x.shape[0])

    def channels_last(self, x: Tensor) -> Tensor:
        """The same of elementary operations, for a compiler to fuse, in the order of memory that convolutions take."""
        B, C, T, H, W = x.shape
        G, dims = self.num_groups, (2, 4, 5) if self.scope == "frame" else (2, 3, 4, 5)
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        y = x if x.dtype is torch.float64 else x.float()
        y = y.contiguous(memory_format=torch.channels_last_3d).view(B, G, C // G, T, H, W)
        var, mean = torch.var_mean(y, dims, correction=0, keepdim=True)
        y = ((y - mean) * (var + self.eps).rsqrt()).view_as(x)
        return (y * self.weight.view(C, 1, 1, 1) + self.bias.view(C, 1, 1, 1)).to(dtype)


def conv3x3(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """A 3x3 convolution per frame ("2d") or a causal 3x3x3 one ("3d"), size kept."""
    if kind == "2d":
        return FrameConv2d(in_channels, out_channels, 3, padding=1)
    return CausalConv3d(in_channels, out_channels, 3, padding=1)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input. kind: "2d", "3d" or "23d" (second conv per frame)."""

    def __init__(self, kind: str, in_channels: int, out_channels: int, groups: int, scope: str):
        super().__init__()
        first, second, scope = {
            "2d": ("2d", "2d", "frame"),
            "3d": ("3d", "3d", scope),
            "23d": ("3d", "2d", scope),
        }[kind]
        self.norm1 = VideoGroupNorm(groups, in_channels, scope)
        self.conv1 = conv3x3(first, in_channels, out_channels)
        self.norm2 = VideoGroupNorm(groups, out_channels, scope)
        self.conv2 = conv3x3(second, out_channels, out_channels)
        if in_channels != out_channels:
            pointwise = FrameConv2d if kind == "2d" else CausalConv3d
            self.nin_shortcut = pointwise(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class FrameAttention(nn.Module):
    """Single-head self-attention over the h * w positions of each frame, with a residual.

    `scrambled=True` repeats the reshape of Open-Sora-Plan v1.0, which takes (B, C, t) rows for (B t, C) ones: right
    for one frame, wrong for clips. It serves only to read the weights that were trained with it.
    """

    def __init__(self, channels: int, groups: int, scope: str, scrambled: bool = False):
        super().__init__()
        self.scrambled = scrambled
        self.norm = VideoGroupNorm(groups, channels, scope)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.attend(self.q(y), self.k(y), self.v(y))
        return x + self.proj_out(y)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(C)) v within each frame; all (B, C, t, h, w)."""
        B, C, t, h, w = q.shape
        q, k, v = (self._tokens(x) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B t, h w, C)
        if self.scrambled:
            return y.transpose(1, 2).reshape(B, C, t, h, w)
        return y.transpose(1, 2).unflatten(2, (h, w)).unflatten(0, (B, t)).transpose(1, 2)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, t, h, w) -> (B t, 1, h w, C): one head; torch's fused kernels take four dimensions only."""
        B, C, t, h, w = x.shape
        frames = x.reshape(B * t, C, h, w) if self.scrambled else fold_time(x)
        return frames.flatten(2).transpose(1, 2).unsqueeze(1)
