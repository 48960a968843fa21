"""Triton kernels for channels-last videos: GroupNorm with SiLU in two passes, and a residual sum with a bias.

Imported only where a GPU needs them (vae/ops.py), or with TRITON_INTERPRET=1 in a test on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements a program holds at a time
PARTS = 32  # programs of the first pass for each set of statistics: one would leave most of a card idle
TILES = 8  # of a program in the second pass
# Numbers that differ between levels and steps: no kernel is compiled again for them.
_SIZES = "rows share frames shifted x_sample x_frame out_sample out_frame".split()


@triton.jit
def _start(x, shift, shifted, channel, C: tl.constexpr, G: tl.constexpr):
    """Load a value near each channel's group mean, from the set's first pixel: squares around it do not cancel."""
    first = channel // (C // G) * (C // G)
    return tl.load(x + first).to(tl.float32) + shifted * tl.load(shift + first).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES[:6])
def _sums(
    x,
    shift,
    sums,
    rows,
    share,
    frames,
    shifted,
    x_sample,
    x_frame,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum one part of one set (a frame, or a clip): values and squares of each group, shifted by `_start`."""
    one, part = tl.program_id(0), tl.program_id(1)
    x += ((one // frames).to(tl.int64) * x_sample + (one % frames).to(tl.int64) * x_frame) * C
    channel = tl.arange(0, C)
    offset = shifted * tl.load(shift + channel).to(tl.float32) - _start(x, shift, shifted, channel, C, G)
    # Sums and sums of squares per channel over this program's share of the pixels.
    total = tl.zeros((ROWS, C), tl.float32)
    squares = tl.zeros((ROWS, C), tl.float32)
    begin = part.to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    for at in range(0, share, ROWS):
        row = begin + at + tl.arange(0, ROWS)
        mask = (row < end)[:, None]
        v = tl.load(x + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, v + offset[None, :], 0.0)
        total += v
        squares += v * v
    # Per group, in this part's place of sums (sets, PARTS, 2, G).
    group = tl.arange(0, G)
    sums += (one.to(tl.int64) * PARTS + part) * 2 * G
    tl.store(sums + group, tl.sum(tl.reshape(tl.sum(total, 0), (G, C // G)), 1))
    tl.store(sums + G + group, tl.sum(tl.reshape(tl.sum(squares, 0), (G, C // G)), 1))


@triton.jit(do_not_specialize=_SIZES)
def _apply(
    x,
    shift,
    sums,
    weight,
    bias,
    out,
    rows,
    share,
    frames,
    shifted,
    x_sample,
    x_frame,
    out_sample,
    out_frame,
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalise one part of one set by the sums of all its parts, scale it, and apply SiLU if asked."""
    part, one = tl.program_id(0), tl.program_id(1)  # the first axis of a grid alone may be long
    x += ((one // frames).to(tl.int64) * x_sample + (one % frames).to(tl.int64) * x_frame) * C
    out += ((one // frames).to(tl.int64) * out_sample + (one % frames).to(tl.int64) * out_frame) * C
    channel = tl.arange(0, C)
    # Mean and variance of each group: the parts' sums, added in the same order by every program.
    at = tl.arange(0, PARTS)[:, None] * 2 * G + tl.arange(0, G)[None, :]
    sums += one.to(tl.int64) * PARTS * 2 * G
    count = rows.to(tl.float32) * (C // G)
    mean = tl.sum(tl.load(sums + at), 0) / count
    var = tl.maximum(tl.sum(tl.load(sums + G + at), 0) / count - mean * mean, 0.0)
    rstd = 1.0 / tl.sqrt(var + EPS)
    mean = tl.reshape(tl.broadcast_to(mean[:, None], (G, C // G)), (C,))
    rstd = tl.reshape(tl.broadcast_to(rstd[:, None], (G, C // G)), (C,))
    mean += _start(x, shift, shifted, channel, C, G) - shifted * tl.load(shift + channel).to(tl.float32)
    scale = rstd * tl.load(weight + channel).to(tl.float32)
    add = tl.load(bias + channel).to(tl.float32)
    # Normalise this program's share of the pixels.
    begin = part.to(tl.int64) * share
    for at_row in range(0, share, ROWS):
        row = begin + at_row + tl.arange(0, ROWS)
        mask = (row < rows)[:, None]
        place = row[:, None] * C + channel[None, :]
        y = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        y = (y - mean[None, :]) * scale[None, :] + add[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def _add(x, residual, shift, pixels, C: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pixels.to(tl.int64) * C
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(shift + at % C, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


def group_norm(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    by_frame: bool,
    silu: bool,
    out: Tensor,
) -> None:
    """Compute `plain_group_norm` of vae/ops.py, for channels and groups that are powers of two.

    Sums are taken in parts that fill the card; each program of the second pass adds them in the same order, so that
    a clip gives the same bits every time.
    """
    B, C, T, H, W = x.shape
    # A set of statistics per frame, or per clip: `rows` pixels each.
    frames = T if by_frame else 1
    rows = H * W * (1 if by_frame else T)
    tile = max(1, TILE // C)
    sums = torch.empty((B * frames, PARTS, 2, groups), dtype=torch.float32, device=x.device)
    first = (x, weight if shift is None else shift, sums)  # without a shift, that operand is multiplied by 0
    sizes = (frames, int(shift is not None), x.stride(0) // C, x.stride(2) // C)
    fixed = {"PARTS": PARTS, "C": C, "G": groups, "ROWS": tile, "num_warps": 8}
    # First pass: sums of PARTS shares of each set. Second pass: normalise, in smaller shares.
    share = triton.cdiv(triton.cdiv(rows, PARTS), tile) * tile
    _sums[B * frames, PARTS](*first, rows, share, *sizes, **fixed)
    share = TILES * tile
    places = (out.stride(0) // C, out.stride(2) // C)
    _apply[triton.cdiv(rows, share), B * frames](
        *first, weight, bias, out, rows, share, *sizes, *places, EPS=eps, SILU=silu, **fixed
    )


def add_residual(x: Tensor, residual: Tensor, shift: Tensor) -> None:
    """Add in place: x += residual + shift, both (B, C, T, H, W) channels-last; shift (C,)."""
    block = 2048
    _add[(triton.cdiv(x.numel(), block),)](
        x, residual, shift, x.numel() // x.shape[1], C=x.shape[1], BLOCK=block, num_warps=8
    )


def check(device: str) -> None:
    """Compare the kernels with torch's operations on a small clip; raises what went wrong."""
    from vae.ops import plain_group_norm

    x = torch.linspace(-3, 3, 2 * 8 * 3 * 5 * 7, device=device).view(2, 3, 5, 7, 8).permute(0, 4, 1, 2, 3)
    weight, bias = torch.linspace(0.5, 2, 8, device=device), torch.linspace(-1, 1, 8, device=device)
    for by_frame in (True, False):
        ours, plain = torch.empty_like(x), torch.empty_like(x)
        for function, out in ((group_norm, ours), (plain_group_norm, plain)):
            function(x, bias, weight, bias, 4, 1e-6, by_frame, True, out)
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    total = x.clone()
    add_residual(total, x, bias)
    torch.testing.assert_close(total, 2 * x + bias.view(1, 8, 1, 1, 1))
