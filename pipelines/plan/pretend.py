"""A CUDA device that is not there: torch's CUDA dispatch and autocast rules on tensors that have no data.

Tensors are torch's FakeTensors: they have a device, a shape, a dtype and strides, and every operation checks them as the
real one would. A program's own classes run on them unchanged, in full size, on any machine, in seconds.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.plan.backward import python_backward
from pipelines.plan.cost import is_composite

DEVICE = torch.device("cuda", 0)
# Older ones ask the driver for the current device, crash, or let tensors of two devices mix.
LOWEST_TORCH = "2.11"
SMALL_COPY = 64 * 2**10  # bytes: the driver takes such a copy from ordinary memory without waiting
aten = torch.ops.aten


class Syncs(TorchDispatchMode):
    """Notes each point where the host waits for the device: values read from it, copies that block.

    found: one line each, what happened and where. A value that is read is 1: a finite, true one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        # A value that is read from the device: the host would wait; here it is 1.
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self.note("a value is read from the device")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        # A copy between host and device waits, unless it is asked not to and its memory is page-locked.
        out = func(*args, **kwargs)
        if func is aten._to_copy.default:
            self._check_copy(args[0], out, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._check_copy(args[1], args[0], non_blocking)
        return out

    def _check_copy(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        ends = {source.device.type, target.device.type}
        if ends != {"cpu", "cuda"}:
            return
        if not non_blocking:
            self.note(f"a blocking copy of {tuple(source.shape)} from {source.device} to {target.device}")
        elif source.device.type == "cpu" and not is_pinned(source) and source.nbytes > SMALL_COPY:
            self.note(f"a copy of {tuple(source.shape)} from memory that is not pinned")

    def note(self, what: str) -> None:
        self.found.append(f"{what} at {_caller()}")


def _caller() -> str:
    """file:line of the innermost frame of this project outside this package."""
    import traceback

    for frame in reversed(traceback.extract_stack()):
        file = frame.filename
        ours = re.search(r"/(vae|denoiser|eval|data|pipelines)/", file) and "site-packages" not in file
        if ours and "/pipelines/plan/" not in file:
            return f"{'/'.join(file.rsplit('/', 2)[-2:])}:{frame.lineno}"
    return "?"


_PINNED = "_pretended_pinned"


def is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, _PINNED, False)


def pinned(tensor: Tensor) -> Tensor:
    setattr(tensor, _PINNED, True)
    return tensor


def _attention(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """scaled_dot_product_attention that picks its kernel as CUDA does: flash for half precision, else memory-efficient."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        # Masks are not pretended; autocast casts first, as CUDA's rules say.
        if q.device.type != "cuda" or attn_mask is not None:
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **more)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        three = q.ndim == 3
        if three:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        # The kernel that CUDA would choose, with its memory.
        if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:
            flash = aten._scaled_dot_product_flash_attention
            out, *_ = flash(q, k, v, dropout_p, is_causal, False, scale=scale)
        else:
            efficient, keep = aten._scaled_dot_product_efficient_attention, q.requires_grad
            keep = keep and torch.is_grad_enabled()
            out, *_ = efficient(q, k, v, None, keep, dropout_p, is_causal, scale=scale)
        return out.squeeze(0) if three else out

    return attention


def _convolution_layout(real: Callable[..., torch.memory_format]) -> Callable[..., torch.memory_format]:
    """cuDNN's rule for half precision, which torch looks up only where there is a GPU: channels-last if x or weight is."""

    def layout(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
        if x.dtype not in (torch.bfloat16, torch.float16) or x.ndim not in (4, 5):
            return real(x, weight, backend)
        last = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        found = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
        return last if found else torch.contiguous_format

    return layout


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply for tensors without data: parameters keep their identity, as real ones do."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    # A parameter takes the new tensor in place, with its gradient: optimizers refer to it.
    for name, param in module._parameters.items():
        if param is None:
            continue
        with torch.no_grad():
            new = fn(param.detach())
            if isinstance(param, FakeTensor):
                param.data = new
                param.fake_device, param.constant = new.fake_device, None
                if param.grad is not None:
                    param.grad = fn(param.grad)
            else:  # made by torch.Tensor(...), which gives real ones even here
                module._parameters[name] = nn.Parameter(new, requires_grad=param.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


@dataclass
class Pretended:
    """What `pretended_gpu` yields. syncs: see `Syncs`."""

    syncs: Syncs


def too_old() -> bool:
    """Whether this torch cannot pretend a GPU."""
    return Version(torch.__version__) < Version(LOWEST_TORCH)


@contextmanager
def pretended_gpu() -> Iterator[Pretended]:
    """Inside, device "cuda" exists, tensors have no data, and CUDA's rules hold.

    Models are built and moved as always (`.to("cuda")`), autocast follows CUDA's lists, attention takes the kernels of a
    GPU, and an operation on tensors of two devices raises. Everything is put back at the end.
    Raises ValueError for a torch before LOWEST_TORCH.
    """
    from torch.optim import optimizer as optim

    if too_old():
        raise ValueError(
            f"the pretended GPU (--plan, python -m pipelines.plan) needs torch >= {LOWEST_TORCH}, here is "
            f"{torch.__version__}; everything else works with it"
        )
    mode, syncs = FakeTensorMode(allow_non_fake_inputs=True), Syncs()

    def tolist(self: FakeTensor) -> Any:
        if self.device.type == "cuda":
            syncs.note("values are read from the device")
        return _filled(self.shape, 1.0 if self.dtype.is_floating_point else 0)

    with ExitStack() as stack:
        # What torch asks the driver for is answered as an H100 would.
        patch = lambda name, value: stack.enter_context(mock.patch(name, value))  # noqa: E731
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True)
        patch("torch.cuda.get_device_capability", lambda *_, **__: (9, 0))
        # Kernels that torch chooses by the device
        patch("torch.nn.functional.scaled_dot_product_attention", _attention(F.scaled_dot_product_attention))
        name = "torch._C._conv_determine_backend_memory_format"
        patch(name, _convolution_layout(torch._C._conv_determine_backend_memory_format))
        # Tensors without data: moving them, reading them, page-locking them
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(mock.patch.object(FakeTensor, "pin_memory", pinned))
        stack.enter_context(mock.patch.object(FakeTensor, "is_pinned", is_pinned))
        # optimizers choose their grouped kernels by the type of the parameters
        types = optim._foreach_supported_types
        types.append(FakeTensor)
        stack.callback(types.remove, FakeTensor)
        # The device itself: backward passes, tensors without data, and who waits for it
        stack.enter_context(python_backward())
        stack.enter_context(mode)
        stack.enter_context(syncs)
        yield Pretended(syncs)


def _filled(shape: Any, value: float) -> Any:
    return value if not shape else [_filled(shape[1:], value) for _ in range(shape[0])]
