"""Operations of fast inference (vae/fast.py): prepared kernels, sizes of steps, and passes fused on a GPU.

Nothing here records gradients, and a graph (torch.compile, torch.export, torch.jit.trace) holds none of it.
"""

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()


def making_a_graph() -> bool:
    """Whether torch records the operations for a graph that shall run elsewhere."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of x computes in: autocast's dtype where it is on; it leaves float64 alone."""
    kind = x.device.type
    on = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if on else x.dtype


def channels_last(x: Tensor) -> Tensor:
    """x, or a copy, with a pixel's channels side by side."""
    return x.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)


def empty_channels_last(x: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    """A (B, C, T, H, W) buffer on x's device with a pixel's channels side by side."""
    B, C, T, H, W = shape
    return x.new_empty((B, T, H, W, C), dtype=dtype).permute(0, 4, 1, 2, 3)


def pad_right_bottom(x: Tensor) -> Tensor:
    """One row and column of zeros at the right and the bottom of each frame."""
    if making_a_graph():
        return F.pad(x, (0, 1, 0, 1))
    B, C, T, H, W = x.shape
    out = empty_channels_last(x, (B, C, T, H + 1, W + 1), compute_dtype(x))
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
    return max(1, STEP_BYTES // (4 * x.shape[0] * pixels * compute_dtype(x).itemsize))


# ---- prepared kernels ------------------------------------------------------------------------------------

_PREPARED: "weakref.WeakKeyDictionary[nn.Module, dict[tuple, tuple]]" = weakref.WeakKeyDictionary()


def prepared(
    layer: nn.Module,
    x: Tensor,
    what: str = "",
    derive: Callable[[Tensor], Any] = lambda weight: weight,
    stride: Any = 1,
    padding: Any = 0,
    groups: int = 1,
    size: tuple[int, ...] | None = None,
) -> Any:
    """derive(layer.weight), a kernel or a tuple of them, ready for `convolve` with x: cast and in the device's order.

    size: of what the kernel meets, if not x. oneDNN's order depends on it, and a kernel in the order of another size
    would be put into order in every call, up to 40 times slower (measured on AVX2). The last two of a name are kept: of
    the first frame and of a later step, of one size and another, or direct and with groups (vae/winograd.py).

    Kept beside the module (never in its state, copies or files) until the weight is another one or was changed in
    place. A fused optimizer may change a weight without raising its version: `forget` drops all kernels when gradients are recorded.
    """
    weight, dtype = layer.weight, compute_dtype(x)
    if making_a_graph():
        return derive(weight)
    size = None if x.is_cuda else tuple(size or x.shape)
    if weight.is_inference():  # such a tensor does not count its changes
        return _ready(derive(weight), x, dtype, stride, padding, groups, size)
    kept, storage = _PREPARED.setdefault(layer, {}), weight.untyped_storage()
    found, form = kept.get((what, dtype), ()), (weight._version, groups, size)
    for source, made_of, kernels in found:
        if source() is storage and made_of == form:
            return kernels
    kernels = _ready(derive(weight.detach()), x, dtype, stride, padding, groups, size)
    last = [one for one in found[-1:] if one[0]() is storage and one[1][0] == weight._version]
    kept[what, dtype] = (*last, (weakref.ref(storage), form, kernels))
    return kernels


def forget(model: nn.Module) -> None:
    """Drop all that was prepared for a model: its weights are about to change."""
    if making_a_graph():
        return
    for module in model.modules() if _PREPARED else ():
        _PREPARED.pop(module, None)


def _ready(
    kernel: Any, x: Tensor, dtype: torch.dtype, stride: Any, padding: Any, groups: int, size: Any
) -> Any:
    if isinstance(kernel, tuple):
        return tuple(_ready(one, x, dtype, stride, padding, groups, size) for one in kernel)
    if x.is_cuda:
        return channels_last(kernel.to(dtype))
    if not ONEDNN or x.device.type != "cpu" or kernel.dtype != torch.float32 or dtype != torch.float32:
        return kernel
    dims = kernel.ndim - 2  # oneDNN's own order, which it would otherwise make again in every call
    stride, padding = ([v] * dims if isinstance(v, int) else v[-dims:] for v in (stride, padding))
    reorder = (
        torch._C._nn.mkldnn_reorder_conv3d_weight if dims == 3 else torch._C._nn.mkldnn_reorder_conv2d_weight
    )
    return reorder(kernel.to_mkldnn(), padding, stride, [1] * dims, groups, size)


def convolve(
    x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Any = 1, padding: Any = 0, groups: int = 1
) -> Tensor:
    """F.conv2d or F.conv3d, by the dimensions of the kernel, which may be a prepared one."""
    dims = x.ndim - 2
    if not kernel.is_mkldnn:
        return (F.conv2d if dims == 2 else F.conv3d)(x, kernel, bias, stride, padding, 1, groups)
    stride, padding = ([v] * dims if isinstance(v, int) else v[-dims:] for v in (stride, padding))
    return torch.ops.mkldnn._convolution_pointwise(
        channels_last(x), kernel, bias, padding, stride, [1] * dims, groups, "none", [], ""
    )


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
    return x.is_cuda and x.dtype != torch.float64 and not making_a_graph()


def group_norm(
    norm: nn.GroupNorm, x: Tensor, shift: Tensor | None, by_frame: bool, silu: bool, out: Tensor
) -> None:
    """out = GroupNorm of (x + shift), then SiLU if asked; see `plain_group_norm`."""
    torch.ops.omnilatte.group_norm(
        channels_last(x), shift, norm.weight, norm.bias, norm.num_groups, norm.eps, by_frame, silu, out
    )


def add_residual(x: Tensor, residual: Tensor, shift: Tensor) -> Tensor:
    """x += residual + shift, shift (C,)."""
    torch.ops.omnilatte.add_residual(x, residual, shift)
    return x
