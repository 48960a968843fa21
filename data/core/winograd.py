"""3 x 3 convolutions with 4/9 of the multiplications, on a CPU in float32: Winograd's F(2x2, 3x3).

After Lavin and Gray, arXiv 1509.09308. Along an axis two outputs of three taps (a, b, c) need six products; Winograd
needs four, of sums of the inputs d0 to d3 with sums of the taps:

    m0 = (d0 - d2) a        m1 = (d1 + d2) (a + b + c) / 2        m2 = (d2 - d1) (a - b + c) / 2        m3 = (d1 - d3) c
    y0 = m0 + m1 + m2       y1 = m1 - m2 - m3

In both axes that is 16 products of channels for 2 x 2 outputs, instead of 36. After nearest upsampling d1 = d2: m2 is
0 and 9 products are left. Taps in time stay sums within a product. Errors are smaller than those of oneDNN's direct
convolution. The sums are bound by memory, so a band of a few rows stays in the cache from its inputs to its outputs.
"""

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.core import convolution

X86 = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere nothing was measured
TAPS = {4: ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)), 3: ((1, 0, 0), (1, 1, 1), (0, 0, 1))}
WORTH = 60  # products for each value that is summed, from which it is faster (measured, as the next)
PIXELS = 64  # at least
LEAST = 2**25  # products of a tap in space, where there is one tap in time
TILES = 32  # of a row or more: fewer make the products slow
BAND_BYTES = 3 * 2**19  # of a band's transformed inputs, for each thread
FRAMES = 6  # most outputs of a band; a step of a stream has no more


def suits(layer: nn.Module, x: Tensor, kt: int, enlarge: bool = False) -> bool:
    """Whether to compute the convolution of a torch layer here, on x (B, I, [T + kt - 1,] H, W), with kt taps in time.

    By shape (of 4D x the samples too), dtype and device alone, so that streams and clips agree. enlarge: x is enlarged
    before.
    """
    weight = layer.weight
    if x.device.type != "cpu" or not (convolution.ONEDNN and X86) or convolution.making_a_graph():
        return False
    if weight.is_inference():  # its kernels cannot be kept
        return False
    dtypes = {x.dtype, weight.dtype, convolution.compute_dtype(x)}
    if dtypes != {torch.float32} or weight.shape[-2:] != (3, 3):
        return False
    T, (H, W), (O, I) = x.shape[2] - kt + 1 if x.ndim == 5 else x.shape[0], x.shape[-2:], weight.shape[:2]  # noqa: E741
    if not enlarge and (H % 2 or W % 2 or layer.stride[-1] != 1 or layer.padding[-1] != 1):
        return False
    pixels, products = T * H * W, kt * I * O
    enough = kt > 1 or enlarge or pixels * products >= LEAST
    # Sums are small, and threads meet after each; measured up to two threads.
    worth = WORTH * max(1, torch.get_num_threads() / 2)
    return enough and pixels >= PIXELS and products >= worth * (I + O)


def transform(weight: Tensor, positions: int) -> Tensor:
    """(O, I, [kt,] 3, 3) -> (P P O, I, kt, 1), the kernels of the P x P products."""
    taps = weight.new_tensor(TAPS[positions])
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    return torch.einsum("qj,pi,octij->qpoct", taps, taps, weight).flatten(0, 2).unsqueeze(3)


def convolve_3x3(
    layer: nn.Module,
    x: Tensor,
    what: str,
    derive: Callable[[Tensor], Tensor],
    kt: int,
    frames: int = 1,
    positions: int = 4,
) -> Tensor:
    """The convolution of a torch layer with the kernel derive(weight), one zero around each frame and none in time.

    x: (B, I, H, W), or (B, I, T + kt - 1, H, W). what: the name of the kernel for `prepared`. kt: its taps in time.
    frames: outputs of a frame, whose kernels stand one after the other. positions: P along an axis, 4, or 3 to enlarge
    H and W x2 (nearest) before -> (B, O, frames T, H or 2 H, W or 2 W), channels-last.
    """
    if x.ndim == 4:  # its samples are frames
        return convolve_3x3(layer, x.unsqueeze(0).transpose(1, 2), what, derive, kt)[0].transpose(0, 1)
    x, P, O = convolution.channels_last(x), positions, len(layer.bias)  # noqa: E741
    (B, C, T, H, W), step = x.shape, P - 2
    T, h, w = T - kt + 1, H // step, W // step
    out = x.new_empty(B, T, frames, h, 2, w, 2, O)
    # All bands have one size, for which the kernel is in order; the last overlaps the one before
    n = _even(T, FRAMES)
    size = 4 * P * P * C * (n + kt - 1) * w
    threads = torch.get_num_threads()  # each with a cache of its own
    rows = _even(h, max(1, threads * TILES // w, threads * BAND_BYTES // size))
    inputs = x.new_empty(n + kt - 1, rows, w, P, P, C)
    sums = x.new_zeros(n + kt - 1, rows, W + 2, P, C)  # with a zero at either end of a row
    met = inputs.view(1, n + kt - 1, rows * w, P * P * C).permute(0, 3, 1, 2)
    kernel = convolution.prepared(
        layer, x, what, lambda weight: transform(derive(weight), P), 1, 0, P * P, met.shape
    )
    bands = [(min(t, T - n), min(a, h - rows)) for t in range(0, T, n) for a in range(0, h, rows)]
    for sample, result in zip(x.permute(0, 2, 3, 4, 1), out, strict=True):
        for t, a in bands:
            edges = int(a == 0), int(a + rows == h)
            band = sample[t : t + n + kt - 1, step * a - 1 + edges[0] : step * (a + rows) + 1]
            band = F.pad(band, (0, 0, 0, 0, *edges)) if any(edges) else band
            _differences(band, 1, sums[:, :, 1:-1].unbind(3))
            _differences(sums, 2, inputs.unbind(3))
            m = convolution.convolve(met, kernel, None, groups=P * P).permute(0, 2, 3, 1)
            m = m.view(n, rows, w, P, P, frames, O)
            m[:, :, :, 1, 1] += layer.bias  # it stands once in every output
            columns = m.unbind(3)
            _outputs(columns, columns)
            # (2, 2, n, rows, w, frames, O)
            places = result[t : t + n, :, a : a + rows].permute(5, 3, 0, 2, 4, 1, 6)
            for half, place in zip(columns[:2], places, strict=True):
                _outputs(half.unbind(3), place)
    return out.view(B, frames * T, 2 * h, 2 * w, O).permute(0, 4, 1, 2, 3)


def _even(count: int, most: int) -> int:
    """The size of parts of `count`, at most `most` and as even as can be."""
    return -(-count // -(-count // most))


def _differences(x: Tensor, axis: int, out: tuple[Tensor, ...]) -> None:
    """The inputs of the products of an axis (1 or 2) of x, padded, into out, one tensor for each product."""
    step = len(out) - 2
    last = x.shape[axis] - step - 1
    d = [x[:, k : k + last : step] if axis == 1 else x[:, :, k : k + last : step] for k in range(len(out))]
    torch.sub(d[0], d[-2], out=out[0])
    torch.sub(d[1], d[-1], out=out[-1])
    if step == 2:
        torch.add(d[1], d[2], out=out[1])
        torch.sub(d[2], d[1], out=out[2])
    else:
        out[1].copy_(d[1])


def _outputs(m: tuple[Tensor, ...], out: tuple[Tensor, ...] | Tensor) -> None:
    """The two outputs of the products of an axis, into out[0] and out[1]; m is overwritten."""
    if len(m) == 4:
        m[0].add_(m[1])
        torch.add(m[0], m[2], out=out[0])
        m[1].sub_(m[2])
        torch.sub(m[1], m[3], out=out[1])
    else:
        torch.add(m[0], m[1], out=out[0])
        torch.sub(m[1], m[2], out=out[1])
