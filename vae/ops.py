"""Operations of fast inference (vae/fast.py): sizes of steps, and passes fused on a GPU.

Nothing here records gradients, and a graph (torch.compile, torch.export, torch.jit.trace) holds none of it.
"""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.core import convolution


def empty_channels_last(x: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    """A (B, C, T, H, W) buffer on x's device with a pixel's channels side by side."""
    B, C, T, H, W = shape
    return x.new_empty((B, T, H, W, C), dtype=dtype).permute(0, 4, 1, 2, 3)


def pad_right_bottom(x: Tensor) -> Tensor:
    """One row and column of zeros at the right and the bottom of each frame."""
    if convolution.making_a_graph():
        return F.pad(x, (0, 1, 0, 1))
    B, C, T, H, W = x.shape
    out = empty_channels_last(x, (B, C, T, H + 1, W + 1), convolution.compute_dtype(x))
    out[..., H, :], out[..., W] = 0, 0
    out[..., :H, :W] = x
    return out


# Five latents of 256 x 256 in bf16: a step fills a card and needs about 4 GiB.
STEP_BYTES = 5 * 4 * 256 * 256 * 2


def latents_per_step(x: Tensor, pixels: int) -> int:
    """How many latent frames an inference step takes: more on a GPU, whose small kernels cost as much as large ones.

    pixels: of one video frame. One latent frame on a CPU, so that memory stays lowest. It depends on nothing but
    shape, dtype and device: whole clips and streams take the same steps and agree bit for bit.
    """
    if not x.is_cuda:
        return 1
    return max(1, STEP_BYTES // (4 * x.shape[0] * pixels * convolution.compute_dtype(x).itemsize))


# ---- passes fused on a GPU -------------------------------------------------------------------------------


def _power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


def _group_norm(
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
    kernels = _triton()
    if kernels is not None and _power_of_2(x.shape[1]) and _power_of_2(groups):
        with torch.cuda.device(x.device):
            kernels.group_norm(x, shift, weight, bias, groups, eps, by_frame, silu, out)
    else:
        plain_group_norm(x, shift, weight, bias, groups, eps, by_frame, silu, out)


def plain_group_norm(
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
    """Write GroupNorm of (x + shift), and SiLU of that if asked, into out; statistics in float32.

    x, out: (B, C, T, H, W), a pixel's channels side by side; shift: (C,), the bias of the convolution before, or
    None. by_frame: statistics of each frame, else of the whole clip.
    """
    B, C, T, H, W = x.shape
    y = x.float()
    if shift is not None:
        y = y + shift.float().view(1, C, 1, 1, 1)
    sets = B * T if by_frame else B
    rows = y.permute(0, 2, 3, 4, 1).reshape(sets, -1, groups, C // groups)
    var, mean = torch.var_mean(rows, dim=(1, 3), correction=0, keepdim=True)
    y = (rows - mean).mul_((var + eps).rsqrt_())
    y = y.view(B, T, H, W, C).mul_(weight.float()).add_(bias.float())
    out.copy_((F.silu(y, inplace=True) if silu else y).permute(0, 4, 1, 2, 3))


def _add_residual(x: Tensor, residual: Tensor, shift: Tensor) -> None:
    kernels = _triton()
    last = all(t.is_contiguous(memory_format=torch.channels_last_3d) for t in (x, residual))
    if kernels is not None and last and x.dtype == residual.dtype:
        with torch.cuda.device(x.device):
            kernels.add_residual(x, residual, shift)
    else:
        x.add_(residual).add_(shift.to(x.dtype).view(1, -1, 1, 1, 1))


# A copy of this module beside exported weights may have been first.
if not hasattr(torch.ops.omnilatte, "group_norm"):
    _LIBRARY = torch.library.Library("omnilatte", "FRAGMENT")
    _LIBRARY.define(
        "group_norm(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, bool by_frame, bool silu,"
        " Tensor(a!) out) -> ()"
    )
    _LIBRARY.define("add_residual(Tensor(a!) x, Tensor residual, Tensor shift) -> ()")
    for _name, _function in (("group_norm", _group_norm), ("add_residual", _add_residual)):
        _LIBRARY.impl(_name, _function, "CUDA")
        torch.library.register_fake(f"omnilatte::{_name}", lambda *args: None, lib=_LIBRARY)


@functools.cache
def _triton() -> Any:
    """vae/kernels.py if it works on the GPU (Triton needs a C compiler too), else None and one warning."""
    try:
        from vae import kernels

        kernels.check("cuda")
        return kernels
    except Exception as error:  # whatever it is, torch's own operations give the same numbers
        warnings.warn(f"Triton does not work here, inference on the GPU is slower: {error!r}", stacklevel=2)
        return None


def fused(x: Tensor) -> bool:
    """Whether the fused passes take x: on a GPU, in float32 or half precision, not while a graph is made."""
    return x.is_cuda and x.dtype != torch.float64 and not convolution.making_a_graph()


def group_norm(
    norm: nn.GroupNorm, x: Tensor, shift: Tensor | None, by_frame: bool, silu: bool, out: Tensor
) -> None:
    """out = GroupNorm of (x + shift), then SiLU if asked; see `plain_group_norm`."""
    torch.ops.omnilatte.group_norm(
        convolution.channels_last(x),
        shift,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        by_frame,
        silu,
        out,
    )


def add_residual(x: Tensor, residual: Tensor, shift: Tensor) -> Tensor:
    """x += residual + shift, shift (C,)."""
    torch.ops.omnilatte.add_residual(x, residual, shift)
    return x
