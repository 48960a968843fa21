"""Layers of OD-VAE: causal 3D and per-frame convolutions, residual blocks, attention.

Every layer takes (B, C, T, H, W). With `state=None` it sees a whole clip and is plain autograd code: the
training path. With a `StreamState` it sees the next few frames of a stream, the first one alone, and what it
must remember is in that object, never in the module: several streams can share one model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.fast import (
    ONEDNN,
    add_residual,
    compute_dtype,
    convolve,
    eager,
    empty_channels_last,
    fused,
    group_norm,
    prepared,
)
from vae.stream import StreamState


def fold_time(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W); a view when x is channels_last_3d or T = 1."""
    B, C, T, H, W = x.shape
    return x.transpose(1, 2).reshape(B * T, C, H, W)


def unfold_time(x: Tensor, B: int) -> Tensor:
    """(B T, C, H, W) -> (B, C, T, H, W); always a view."""
    BT, C, H, W = x.shape
    return x.view(B, BT // B, C, H, W).transpose(1, 2)


def silu(x: Tensor) -> Tensor:
    """SiLU; in place when no gradient is recorded (x is always a fresh output of a norm here)."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _in_im2col(x: Tensor, weight: Tensor) -> bool:
    """Whether F.conv3d would take, on CPU, an im2col several times slower than oneDNN: one clip with C T H <= 20480.

    Not for pointwise kernels: there im2col is a plain product.
    """
    small = x.shape[0] == 1 and x.shape[1] * x.shape[2] * x.shape[3] <= 20480 and weight.shape[-1] > 1
    return small and ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


class FrameConv2d(nn.Conv2d):
    """A 2D convolution on every frame. x: (B, C, T, H, W); `norm`, if given, and SiLU come first.

    biased=False leaves the bias to whoever takes the output, at inference on a GPU; shift is such a bias, for norm.
    """

    def forward(
        self,
        x: Tensor,
        state: StreamState | None = None,
        norm: "VideoGroupNorm | None" = None,
        shift: Tensor | None = None,
        biased: bool = True,
    ) -> Tensor:
        x = x if norm is None else norm.silu(x, shift)
        frames = fold_time(x)
        if eager() and (state is not None or fused(x)):
            kernel = prepared(self, x, "", stride=self.stride, padding=self.padding)
            y = convolve(frames, kernel, self.bias if biased else None, self.stride, self.padding)
        else:
            y = super().forward(frames)
        return unfold_time(y, x.shape[0])


class CausalConv3d(nn.Module):
    """3D convolution that sees no later frame: kernel - 1 copies of the first frame stand in front (paper 3.1).

    kernel: (kt, kh, kw); stride: (st, sh, sw); padding: zeros at each side of H and W.
    Output frames: (T - 1) // st + 1. In a stream it keeps its last kt - st input frames, and every step after
    the first must bring a multiple of st frames. `norm`, if given, and SiLU come first; shift, biased: as above.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel, stride=1, padding: int = 0):
        super().__init__()
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=(0, padding, padding))

    def forward(
        self,
        x: Tensor,
        state: StreamState | None = None,
        norm: "VideoGroupNorm | None" = None,
        shift: Tensor | None = None,
        biased: bool = True,
    ) -> Tensor:
        kt, st = self.conv.kernel_size[0], self.conv.stride[0]
        if kt > 1 and state is not None and not state.first:
            past = state.frames[self]
            if past.shape[2] < kt - st:  # the first frame, kept once
                past = past.expand(-1, -1, kt - st, -1, -1)
            window = self._window(x, past, kt - st, norm, shift)
            state.frames[self] = window[:, :, window.shape[2] - (kt - st) :].clone()
            return self._convolve(window, state, biased)
        one = x.shape[2] == 1 or state is not None
        if kt > 1 and not one:
            return self._convolve(self._window(x, None, kt - 1, norm, shift), state, biased)
        x = x if norm is None else norm.silu(x, shift)
        if kt == 1:
            return self._convolve(x, state, biased)
        if state is not None:
            state.frames[self] = x
        return self._one_frame(x, biased)

    def _window(
        self, x: Tensor, past: Tensor | None, keep: int, norm: "VideoGroupNorm | None", shift: Tensor | None
    ) -> Tensor:
        """The last `keep` frames before x, or copies of its first, then x, after the norm, in one buffer."""
        if torch.is_grad_enabled() or (past is None and not fused(x)):
            x = x if norm is None else norm.silu(x, shift)
            past = x[:, :, :1].expand(-1, -1, keep, -1, -1) if past is None else past
            return torch.cat((past, x), dim=2)
        B, C, T, H, W = x.shape
        dtype = x.dtype if past is None else past.dtype
        window = empty_channels_last(x, (B, C, T + keep, H, W), compute_dtype(x) if fused(x) else dtype)
        now = window[:, :, keep:]
        if norm is None:
            now.copy_(x)
        else:
            norm.write_silu(x, now, shift)
        window[:, :, :keep] = now[:, :, :1] if past is None else past
        return window

    def _convolve(self, x: Tensor, state: StreamState | None, biased: bool) -> Tensor:
        conv, bias = self.conv, self.conv.bias if biased else None
        if eager() and (state is not None or fused(x) or _in_im2col(x, conv.weight)):
            kernel = prepared(conv, x, "", stride=conv.stride, padding=conv.padding)
            return convolve(x, kernel, bias, conv.stride, conv.padding)
        return F.conv3d(x, conv.weight, bias, conv.stride, conv.padding)

    def _one_frame(self, x: Tensor, biased: bool) -> Tensor:
        """The first frame stands at every tap: one 2D convolution with the taps summed, a third of the work."""
        conv, bias = self.conv, self.conv.bias if biased else None
        stride, padding = conv.stride[1:], conv.padding[1:]
        kernel = prepared(conv, x, "first", lambda w: w.sum(2), stride, padding)
        return convolve(x[:, :, 0], kernel, bias, stride, padding).unsqueeze(2)


class VideoGroupNorm(nn.GroupNorm):
    """GroupNorm with statistics of each frame (scope "frame") or of the whole clip ("clip").

    Only "frame" is causal and can be streamed; the released Open-Sora-Plan models use "clip" in 3D blocks.
    """

    def __init__(self, groups: int, channels: int, scope: str):
        super().__init__(groups, channels, eps=1e-6)
        self.scope = scope

    def forward(self, x: Tensor) -> Tensor:
        if fused(x):
            return self._fused(x, None, silu=False)
        if self._native(x):
            if self.scope == "clip":
                return super().forward(x.contiguous())
            return unfold_time(super().forward(fold_time(x).contiguous()), x.shape[0])
        scale, shift = self._scale_shift(x)
        return torch.addcmul(shift, x, scale)

    def silu(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """SiLU of the normed x. shift: (C,), added to x first, where the passes are fused."""
        return self._fused(x, shift, silu=True) if fused(x) else silu(self(x))

    def write_silu(self, x: Tensor, out: Tensor, shift: Tensor | None = None) -> None:
        """`silu` straight into `out`, channels-last, without gradients."""
        if fused(x):
            group_norm(self, x, shift, self.scope == "frame", True, out)
        elif self._native(x):
            y = self(x)
            if y.dtype == out.dtype:
                torch.ops.aten.silu.out(y, out=out)
            else:  # CUDA's autocast gives float32 norms among bf16 convolutions, and silu.out takes one dtype
                out.copy_(F.silu(y, inplace=True))
        else:
            scale, offset = self._scale_shift(x)
            F.silu(torch.addcmul(offset, x, scale, out=out), inplace=True)

    def _fused(self, x: Tensor, shift: Tensor | None, silu: bool) -> Tensor:
        out = empty_channels_last(x, x.shape, compute_dtype(x))
        group_norm(self, x, shift, self.scope == "frame", silu, out)
        return out

    def _native(self, x: Tensor) -> bool:
        """Whether torch's kernel is used. On CPU its channels-last form sums squares plainly in float32: measured
        3e-3 off where the mean is 10 standard deviations (the contiguous form: 2e-6), so that one is avoided."""
        wide = x.dtype in (torch.float32, torch.float64)
        channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
        return torch.is_grad_enabled() or x.device.type != "cpu" or not (wide and channels_last)

    def _scale_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T or 1, 1, 1) twice: normed x = x * scale + shift. Two passes: the mean, then squares around it."""
        B, C, T, _, _ = x.shape
        sets = B if self.scope == "clip" else B * T
        rows = x.permute(0, 2, 3, 4, 1).reshape(sets, -1, C)  # a view: x is channels_last_3d
        grouped = (sets, self.num_groups, C // self.num_groups)
        mean = rows.mean(1).view(grouped).mean(2, keepdim=True)
        center = mean.expand(grouped).reshape(sets, 1, C)
        squares = torch.zeros_like(center)
        for part in rows.split(max(1, 2**18 // (sets * C)), dim=1):  # small enough to stay in cache
            squares += (part - center).square_().sum(1, keepdim=True)
        var = squares.view(grouped).mean(2, keepdim=True) / rows.shape[1]
        scale = (var + self.eps).rsqrt() * self.weight.view(1, *grouped[1:])
        shift = self.bias.view(1, *grouped[1:]) - mean * scale
        shape = (B, sets // B, 1, 1, C)
        return tuple(v.reshape(shape).permute(0, 4, 1, 2, 3) for v in (scale, shift))


def conv3x3(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """A 3x3 convolution per frame ("2d") or a causal 3x3x3 one ("3d"), size kept."""
    if kind == "2d":
        return FrameConv2d(in_channels, out_channels, 3, padding=1)
    return CausalConv3d(in_channels, out_channels, 3, padding=1)


def _bias(layer: nn.Module) -> Tensor:
    return (layer if isinstance(layer, FrameConv2d) else layer.conv).bias


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

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        if fused(x):  # biases go with the next pass over their tensor
            h = self.conv1(x, state, self.norm1, biased=False)
            h = self.conv2(h, state, self.norm2, _bias(self.conv1), biased=False)
            skip = x if self.nin_shortcut is None else self.nin_shortcut(x, state)
            return add_residual(h, skip, _bias(self.conv2))
        h = self.conv1(x, state, self.norm1)
        h = self.conv2(h, state, self.norm2)
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x, state)
        return h + skip if torch.is_grad_enabled() else h.add_(skip)


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

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        B, C, t, h, w = x.shape
        y = self.norm(x)
        q, k, v = (self._tokens(layer(y)) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B t, h w, C), scale C^-0.5
        if self.scrambled:
            y = y.transpose(1, 2).reshape(B, C, t, h, w)
        else:
            y = y.transpose(1, 2).unflatten(2, (h, w)).unflatten(0, (B, t)).transpose(1, 2)
        return x + self.proj_out(y)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, t, h, w) -> (B t, 1, h w, C): one head; torch's fused kernels take four dimensions only."""
        B, C, t, h, w = x.shape
        frames = x.reshape(B * t, C, h, w) if self.scrambled else fold_time(x)
        return frames.flatten(2).transpose(1, 2).unsqueeze(1)
