"""Fast inference of OD-VAE: what Encoder and Decoder compute (vae/odvae.py), without gradients, in other steps.

A causal network works in steps: frame 0 alone, then a few latent frames at a time. What a layer needs of earlier
frames is in a StreamState, never in the module: several streams can share one model, whole clips and streams take the
same steps and agree bit for bit, and memory does not grow with the clip's length. With state=None a step is a whole clip.

What makes it fast: kernels prepared once per model, the norm and SiLU written straight into the next convolution's
window, the first frame's taps summed, upsampling as small convolutions on the small grid ("phases"), on a
CPU convolutions with fewer products (data/core/winograd.py), and on a GPU fused passes over the tensors (vae/ops.py).
tests/unit/vae hold it equal to the plain network.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.core import convolution, winograd
from vae import ops
from vae.layers import (
    FrameAttention,
    FrameConv2d,
    ResBlock,
    VideoGroupNorm,
    fold_time,
    unfold_time,
)
from vae.resample import (
    Downsample,
    SpaceTimeUpsample,
    SpatialUpsample,
    TimeUpsample,
    TimeUpsampleRes,
    double_frames,
    enlarge,
)
from vae.stream import StreamState

# ---- the networks ----------------------------------------------------------------------------------------


@torch.no_grad()
def encoder(net: nn.Module, x: Tensor, state: StreamState | None) -> Tensor:
    """`Encoder.forward` of a step: (B, 3, T, H, W) -> (B, 2C, t, h, w)."""
    x = conv(net.conv_in, x, state)
    for level in net.down:
        for block in level.block:
            x = res_block(block, x, state)
        x = resample(level.downsample, x, state)
        x = resample(level.time_downsample, x, state)
    return conv(net.conv_out, middle(net.mid, x, state), state, net.norm_out)


@torch.no_grad()
def decoder(net: nn.Module, z: Tensor, state: StreamState | None) -> Tensor:
    """`Decoder.forward` of a step: (B, C, t, h, w) -> (B, 3, T, H, W)."""
    x = middle(net.mid, conv(net.conv_in, z, state), state)
    for level in reversed(net.up):
        for block in level.block:
            x = res_block(block, x, state)
        x = resample(level.upsample, x, state)
        x = resample(level.time_upsample, x, state)
    return conv(net.conv_out, x, state, net.norm_out)


def middle(mid: nn.Module, x: Tensor, state: StreamState | None) -> Tensor:
    x = res_block(mid.block_1, x, state)
    x = attention(mid.attn_1, x, state)
    return res_block(mid.block_2, x, state)


# ---- blocks ----------------------------------------------------------------------------------------------


def res_block(block: ResBlock, x: Tensor, state: StreamState | None) -> Tensor:
    skip = x if block.nin_shortcut is None else conv(block.nin_shortcut, x, state)
    if ops.fused(x):  # a convolution's bias goes with the next pass over its output
        h = conv(block.conv1, x, state, block.norm1, biased=False)
        h = conv(block.conv2, h, state, block.norm2, shift=_inner(block.conv1).bias, biased=False)
        return ops.add_residual(h, skip, _inner(block.conv2).bias)
    h = conv(block.conv1, x, state, block.norm1)
    return conv(block.conv2, h, state, block.norm2).add_(skip)


def attention(layer: FrameAttention, x: Tensor, state: StreamState | None) -> Tensor:
    y = norm(layer.norm, x)
    y = layer.attend(*(conv(projection, y, state) for projection in (layer.q, layer.k, layer.v)))
    return x + conv(layer.proj_out, y, state)


def _inner(layer: nn.Module) -> nn.Module:
    """The torch convolution of a layer."""
    return layer if isinstance(layer, FrameConv2d) else layer.conv


# ---- convolutions, with the norm and SiLU before them ----------------------------------------------------


def conv(
    layer: nn.Module,
    x: Tensor,
    state: StreamState | None,
    before: VideoGroupNorm | None = None,
    shift: Tensor | None = None,
    biased: bool = True,
) -> Tensor:
    """A FrameConv2d or CausalConv3d of SiLU(before(x)), or of x itself when there is no norm before it.

    In a stream a CausalConv3d keeps its last kt - st input frames, and every step after the first must bring a
    multiple of st frames. shift: (C,), a bias that x still lacks. biased=False leaves the bias to the next pass.
    """
    # Each frame by itself: no state, no window.
    if isinstance(layer, FrameConv2d):
        x = norm_silu(before, x, shift)
        kept = state is not None or ops.fused(x)
        y = _convolve(layer, fold_time(x), kept, biased)
        return unfold_time(y, x.shape[0])
    kt, st = layer.conv.kernel_size[0], layer.conv.stride[0]
    kept = state is not None or ops.fused(x)
    if kt == 1:
        return _convolve(layer.conv, norm_silu(before, x, shift), kept, biased)
    # A later step of a stream: the frames kept, then those that are new, in one window.
    if state is not None and not state.first:
        past = state.frames[layer]
        if past.shape[2] < kt - st:  # the first frame, stored once
            past = past.expand(-1, -1, kt - st, -1, -1)
        window = _window(x, past, kt - st, before, shift)
        state.frames[layer] = window[:, :, window.shape[2] - (kt - st) :].clone()
        return _convolve(layer.conv, window, kept, biased)
    # A whole clip: copies of its first frame stand before it.
    if state is None and x.shape[2] > 1:
        return _convolve(layer.conv, _window(x, None, kt - 1, before, shift), kept, biased)
    # The first frame stands at every tap: one 2D convolution with the taps summed, a third of the work.
    x = norm_silu(before, x, shift)
    if state is not None:
        state.frames[layer] = x
    return _convolve(layer.conv, x[:, :, 0], True, biased, "first").unsqueeze(2)


def _convolve(layer: nn.Module, x: Tensor, kept: bool, biased: bool, what: str = "") -> Tensor:
    """The convolution of a torch layer. kept: by a kernel that is prepared once and kept for the next step.

    what: "", or "first" for a single frame x (B, I, H, W) that stands at every tap in time.
    """
    weight, bias = layer.weight, layer.bias if biased else None
    derive = (lambda w: w.sum(2)) if what == "first" else (lambda w: w)
    kt = 1 if x.ndim == 4 else weight.shape[2]
    if winograd.suits(layer, x, kt):
        return winograd.convolve_3x3(layer, x, what, derive, kt)
    stride, padding = layer.stride[2 - x.ndim :], layer.padding[2 - x.ndim :]
    if what or kept or _is_slow_im2col(x, weight):
        weight = convolution.prepared(layer, x, what, derive, stride, padding)
    return convolution.convolve(x, weight, bias, stride, padding)


def _is_slow_im2col(x: Tensor, weight: Tensor) -> bool:
    """Whether F.conv3d would take an im2col several times slower than oneDNN: on CPU, one clip, C T H <= 20480."""
    if x.ndim != 5 or weight.shape[-1] == 1:  # pointwise, it is a plain product
        return False
    small = x.shape[0] == 1 and x.shape[1] * x.shape[2] * x.shape[3] <= 20480
    return small and convolution.ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32


def _window(
    x: Tensor, past: Tensor | None, keep: int, before: VideoGroupNorm | None, shift: Tensor | None
) -> Tensor:
    """The last `keep` frames before x, or copies of its first, then x, after the norm and SiLU, in one buffer."""
    # On a CPU a whole clip is normed first; joining is cheap there.
    if past is None and not ops.fused(x):
        x = norm_silu(before, x, shift)
        return torch.cat((x[:, :, :1].expand(-1, -1, keep, -1, -1), x), dim=2)
    # Else the norm writes straight to its place behind the earlier frames.
    B, C, T, H, W = x.shape
    dtype = x.dtype if past is None else past.dtype
    dtype = convolution.compute_dtype(x) if ops.fused(x) else dtype
    window = ops.empty_channels_last(x, (B, C, T + keep, H, W), dtype)
    now = window[:, :, keep:]
    if before is None:
        now.copy_(x)
    else:
        write_norm_silu(before, x, now, shift)
    window[:, :, :keep] = now[:, :, :1] if past is None else past
    return window


# ---- norms -----------------------------------------------------------------------------------------------


def norm(layer: VideoGroupNorm, x: Tensor) -> Tensor:
    """GroupNorm of x (B, C, T, H, W)."""
    if ops.fused(x):
        return _fused_norm(layer, x, None, silu=False)
    if _scales_by_hand(x):
        scale, shift = _scale_shift(layer, x)
        return torch.addcmul(shift, x, scale)
    return layer(x)


def norm_silu(layer: VideoGroupNorm | None, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU of the normed x + shift; x itself without a norm. shift: (C,), only where passes are fused."""
    if layer is None:
        return x
    if ops.fused(x):
        return _fused_norm(layer, x, shift, silu=True)
    return F.silu(norm(layer, x), inplace=True)


def write_norm_silu(layer: VideoGroupNorm, x: Tensor, out: Tensor, shift: Tensor | None = None) -> None:
    """`norm_silu` straight into `out`, channels-last."""
    if ops.fused(x):
        ops.group_norm(layer, x, shift, layer.scope == "frame", True, out)
    elif _scales_by_hand(x):
        scale, offset = _scale_shift(layer, x)
        F.silu(torch.addcmul(offset, x, scale, out=out), inplace=True)
    else:
        out.copy_(F.silu(layer(x), inplace=True))


def _fused_norm(layer: VideoGroupNorm, x: Tensor, shift: Tensor | None, silu: bool) -> Tensor:
    out = ops.empty_channels_last(x, x.shape, convolution.compute_dtype(x))
    ops.group_norm(layer, x, shift, layer.scope == "frame", silu, out)
    return out


def _scales_by_hand(x: Tensor) -> bool:
    """Whether torch's GroupNorm is avoided. On CPU its channels-last form sums squares plainly in float32: measured
    3e-3 off where the mean is 10 standard deviations (the contiguous form: 2e-6)."""
    wide = x.dtype in (torch.float32, torch.float64)
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return x.device.type == "cpu" and wide and channels_last


def _scale_shift(layer: VideoGroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, T or 1, 1, 1) twice: normed x = x * scale + shift. Two passes: the mean, then squares around it."""
    B, C, T, _, _ = x.shape
    # Each set of numbers with a mean of its own: a clip, or a frame.
    sets = B if layer.scope == "clip" else B * T
    rows = x.permute(0, 2, 3, 4, 1).reshape(sets, -1, C)  # a view: x is channels_last_3d
    grouped = (sets, layer.num_groups, C // layer.num_groups)
    mean = rows.mean(1).view(grouped).mean(2, keepdim=True)
    center = mean.expand(grouped).reshape(sets, 1, C)
    # Squares around the mean, which float32 can sum.
    squares = torch.zeros_like(center)
    for part in rows.split(max(1, 2**18 // (sets * C)), dim=1):  # small enough to stay in cache
        squares += (part - center).square_().sum(1, keepdim=True)
    var = squares.view(grouped).mean(2, keepdim=True) / rows.shape[1]
    # One scale and one shift a channel stand for the whole norm.
    scale = (var + layer.eps).rsqrt() * layer.weight.view(1, *grouped[1:])
    shift = layer.bias.view(1, *grouped[1:]) - mean * scale
    shape = (B, sets // B, 1, 1, C)
    return tuple(v.reshape(shape).permute(0, 4, 1, 2, 3) for v in (scale, shift))


# ---- resampling ------------------------------------------------------------------------------------------


def resample(layer: nn.Module | None, x: Tensor, state: StreamState | None) -> Tensor:
    """A resampling layer of a level; None leaves x as it is."""
    if layer is None:
        return x
    if isinstance(layer, Downsample):
        return conv(layer.conv, ops.pad_right_bottom(x), state)
    # Up in space: the phases of the convolution on the small grid.
    if isinstance(layer, SpatialUpsample):
        return _enlarge(_inner(layer.conv), x, "phases", lambda w: w if w.ndim == 5 else w.unsqueeze(2))
    if isinstance(layer, SpaceTimeUpsample):
        return _upsample_space_time(layer, x, state)
    # Up in time alone, only in the older layouts.
    if isinstance(layer, (TimeUpsample, TimeUpsampleRes)):
        doubled = _double_linearly(x)
        if isinstance(layer, TimeUpsample):
            return doubled
        a = torch.sigmoid(layer.mix_factor)
        return a * doubled + (1 - a) * conv(layer.conv, doubled, state)
    return layer(x)


def _upsample_space_time(layer: SpaceTimeUpsample, x: Tensor, state: StreamState | None) -> Tensor:
    inner = layer.conv.conv
    # A whole clip is enlarged as the plain network does.
    if state is None:
        linear = layer.temporal == "linear"
        doubled = _double_linearly(x) if linear else double_frames(x, layer.temporal)
        return conv(layer.conv, enlarge(doubled, layer.spatial), state)
    # Streams: linear enlarging has no phases; frame 0 stays one frame, the others become two.
    if layer.spatial != "nearest":
        x = x if state.first else x.repeat_interleave(2, dim=2)
        return conv(layer.conv, enlarge(x, layer.spatial), state)
    # Nearest: frame 0 stands at every tap; later ones meet the frame before them.
    if state.first:
        state.frames[layer] = x
        return _enlarge(inner, x, "first phases", lambda w: w.sum(2, keepdim=True))
    window = torch.cat((state.frames[layer], x), dim=2)
    state.frames[layer] = x[:, :, -1:].clone()
    return _enlarge(inner, window, "phases", temporal_phases, kt=2, frames=2)


def _double_linearly(x: Tensor) -> Tensor:
    """`double_frames(x, "linear")`, on a GPU straight into one channels-last buffer."""
    if x.shape[2] == 1 or not ops.fused(x):
        return double_frames(x, "linear")
    B, C, T, H, W = x.shape
    rest = x[:, :, 1:]
    out = ops.empty_channels_last(x, (B, C, 2 * T - 1, H, W), x.dtype)
    out[:, :, 0], out[:, :, 1] = x[:, :, 0], x[:, :, 1]
    out[:, :, -1] = x[:, :, -1]
    torch.lerp(rest[:, :, 1:], rest[:, :, :-1], 0.25, out=out[:, :, 3::2])
    torch.lerp(rest[:, :, :-1], rest[:, :, 1:], 0.25, out=out[:, :, 2:-1:2])
    return out


# ---- upsampling as phases: nearest x2 and a 3x3 convolution, computed on the small grid ------------------
#
# Each output phase (even or odd row, column, frame) sees every input value once or twice: taps that fall on the same
# input are summed. It costs 4/9 of the work in space, 8/27 in space and time, and the upsampled tensor never exists (it
# passes 2^31 elements beyond 125 frames of 256 x 256).

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def phase_rows(weight: Tensor, dim: int, phase: int) -> Tensor:
    """Three taps over an upsampled axis -> the two taps over the small axis that give output phase 0 or 1."""
    a, b, c = weight.unbind(dim)
    return torch.stack((a, b + c) if phase == 0 else (a + b, c), dim)


def spatial_phases(weight: Tensor) -> tuple[Tensor, ...]:
    """(O, I, ..., 3, 3) -> four kernels (O, I, ..., 2, 2), one per output phase (row, column)."""
    return tuple(phase_rows(phase_rows(weight, -2, a), -1, b).contiguous() for a, b in PHASES)


def temporal_phases(weight: Tensor) -> Tensor:
    """(O, I, 3, kh, kw) -> (2 O, I, 2, kh, kw): first the odd, then the even output frame of a repeated frame.

    After frame 0 every frame stands twice. At its first copy the taps see (before, before, now), at its second
    (before, now, now).
    """
    return torch.cat((phase_rows(weight, 2, 1), phase_rows(weight, 2, 0)))


def _enlarge(
    layer: nn.Module, x: Tensor, what: str, derive: Callable[[Tensor], Tensor], kt: int = 1, frames: int = 1
) -> Tensor:
    """Nearest x2 in H and W, then the convolution of a torch layer with the kernel derive(weight), of kt taps in time.

    frames: outputs of a frame, whose kernels stand one after the other.
    """
    if winograd.suits(layer, x, kt, enlarge=True):
        return winograd.convolve_3x3(layer, x, what, derive, kt, frames, positions=3)
    met = (*x.shape[:3], x.shape[3] + 1, x.shape[4] + 1)
    kernels = convolution.prepared(layer, x, what, lambda w: _phases_for(x, derive(w)), size=met)
    return interleave(x, kernels, layer.bias, frames)


def _phases_for(x: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
    """`spatial_phases`, joined to one kernel on a GPU."""
    kernels = spatial_phases(weight)
    return torch.cat(kernels) if ops.fused(x) else kernels


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
    out = ops.empty_channels_last(x, (B, O, n * (T - kt + 1), 2 * h, 2 * w), convolution.compute_dtype(x))
    if one:
        phases = convolution.convolve(x, kernels, None, 1, (0, 1, 1)).chunk(
            4, dim=1
        )  # (h + 1, w + 1), one phase takes (h, w)
        shift = bias.to(out.dtype).view(1, O, 1, 1, 1)
    else:
        x, repeated = F.pad(x, (1, 1, 1, 1)), bias.repeat(n)
    for k, (a, b) in enumerate(PHASES):
        if one:
            y = phases[k][..., a : a + h, b : b + w]
        else:
            y = convolution.convolve(x[..., a : a + h + 1, b : b + w + 1], kernels[k], repeated)
        for i, part in enumerate(y.split(O, dim=1)):
            place = out[:, :, i::n, a::2, b::2]
            torch.add(part, shift, out=place) if one else place.copy_(part)
    return out
