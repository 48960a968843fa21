"""Convolutions of inference: kernels that are made ready once for the sizes that they meet, and kept beside their layer.

Nothing here records gradients, and a graph (torch.compile, torch.export, torch.jit.trace) holds none of it.
"""

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
    the first frame and of a later step, of one size and another, or direct and with groups (winograd.py).

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
    for key in [key for key, entries in kept.items() if entries[-1][0]() is not storage]:
        del kept[key]  # of weights that are gone: moved, or in another dtype
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
