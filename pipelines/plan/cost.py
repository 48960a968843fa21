"""What operations cost: live and peak memory, floating-point operations, bytes moved, kernels.

`Costs` watches every operation that torch dispatches, on a pretended GPU (pipelines/plan/pretend.py) or on a real CPU.
Memory is what torch allocates: storages while anything refers to them, saved tensors of the graph included. Not counted:
the CUDA context, workspaces of libraries and gaps in the allocator, together 2 to 5 GiB on a large card.
"""

import functools
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GIB = 2**30
INT32 = 2**31  # kernels that count in 32 bits are wrong, or refuse, from this number of elements on
aten = torch.ops.aten

VIEWS = frozenset(
    "view _unsafe_view transpose permute expand unsqueeze squeeze slice select t split split_with_sizes chunk unbind "
    "detach alias as_strided unflatten narrow diagonal view_as lift_fresh expand_as _reshape_alias unfold movedim".split()
)
_NO_WORK = frozenset(
    "empty empty_like new_empty empty_strided new_empty_strided empty_permuted resize_ set_ _local_scalar_dense".split()
)


@functools.cache
def is_composite(func: Any) -> bool:
    """Whether an operation is made of others. In inference mode torch dispatches such ones whole."""
    name, has = func.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    return (
        not name.startswith("prim")
        and has(name, "CompositeImplicitAutograd")
        and not (has(name, "CPU") or has(name, "CUDA"))
    )


@dataclass(frozen=True)
class Work:
    """One operation. unit: what computes it, "half" (fp16, bf16), "conv32" or "matmul32" (TF32 where allowed), "fp32"."""

    name: str
    unit: str
    flops: int
    bytes: int
    kernels: int


@dataclass
class Cost:
    """Totals of a stretch of work. works: how often each kind of operation ran."""

    peak: int = 0  # bytes
    at_peak: list[tuple[str, int]] = field(default_factory=list)  # largest kinds of live tensors at the peak
    largest: int = 0  # elements of the largest tensor
    layout_copies: int = 0
    operations: int = 0  # that the host dispatched, views too
    works: Counter = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        return self._total("flops")

    @property
    def bytes(self) -> int:
        return self._total("bytes")

    @property
    def kernels(self) -> int:
        return self._total("kernels")

    def _total(self, name: str) -> int:
        return sum(getattr(work, name) * n for work, n in self.works.items())


class Costs(TorchDispatchMode):
    """Counts operations on `device` and follows its live memory. `cost` is the current stretch, `start()` begins one."""

    def __init__(self, device: str = "cuda", round_to: int = 512):
        super().__init__()
        self.device, self.round_to = device, round_to
        self.live = 0  # bytes
        self.muted = 0  # above 0: nothing is counted
        self._storages: dict[int, tuple[int, str]] = {}
        self.cost = Cost()

    def start(self) -> None:
        """Forget what was counted; what is allocated stays."""
        self.cost = Cost(peak=self.live)

    # ---- memory

    def track(self, tensor: Tensor, name: str) -> None:
        if tensor.device.type != self.device or tensor.layout is not torch.strided:
            return
        # A storage counts once, however many tensors share it, until nothing refers to it.
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        key = storage._cdata
        if key in self._storages:
            if self._storages[key][0] == size:
                return
            self._free(key)  # resized
        else:
            weakref.finalize(storage, self._free, key)
        self._storages[key] = (size, name)
        self.live += size
        # The kinds at the peak are listed only when it has grown by 2 %: that list costs time.
        if self.live > self.cost.peak:
            if self.live > 1.02 * max(self.cost.peak, 1) or not self.cost.at_peak:
                self.cost.at_peak = self._largest_kinds()
            self.cost.peak = self.live

    def _free(self, key: int) -> None:
        self.live -= self._storages.pop(key, (0, ""))[0]

    def _largest_kinds(self, most: int = 8) -> list[tuple[str, int]]:
        kinds: Counter = Counter()
        for size, name in self._storages.values():
            kinds[name] += size
        return kinds.most_common(most)

    # ---- work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        # An operation that is made of others is counted by its parts.
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.cost.operations += 1
        space, _, name = func._schema.name.partition("::")
        if space == "prim":
            return out
        # Memory: what it has made lives from now on.
        outs = [tensor for tensor in tensors_of(out) if tensor.device.type == self.device]
        for tensor in outs:
            self.track(tensor, f"{name} {str(tensor.dtype).removeprefix('torch.')}")
            self.cost.largest = max(self.cost.largest, tensor.numel())
        # Work, unless it only looks at memory in another way.
        plain = name.rstrip("_")
        if plain not in VIEWS and name not in _NO_WORK:
            work = self.work(func, name, args, kwargs, out, outs)
            if work is not None:
                self.cost.works[work] += 1
        return out

    def work(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, outs: list[Tensor]) -> Work | None:
        """What one operation costs; None if it is not the device's."""
        space = func.namespace
        # Bytes: each tensor that it reads or writes, once. Operations: torch's own formulas.
        inputs = tensors_of((args, kwargs))
        touched = {id(t): t for t in [*inputs, *outs] if t.device.type == self.device}
        if not touched:
            return None
        moved, kernels, flops = sum(map(touched_bytes, touched.values())), 1, 0
        counter = flop_registry.get(func._overloadpacket)
        if counter is not None:
            flops = counter(*args, **kwargs, out_val=out)
        # What a library does beside the operation itself: copies of layout, second passes, more kernels.
        dtype = outs[0].dtype if outs else torch.float32
        if name == "convolution":
            more, extra, copies = _convolution_copies(args[0], args[1], args[2], outs[0])
            moved, kernels = moved + more, kernels + extra
            self.cost.layout_copies += copies
        elif name == "convolution_backward":
            more, extra = _convolution_backward_copies(args[0], args[1], args[2])
            moved, kernels = moved + more, kernels + extra
        elif name in ("native_group_norm", "native_group_norm_backward", "native_batch_norm"):
            moved += touched_bytes(args[0])  # statistics first
            kernels += 2
        elif space == "omnilatte" and name == "group_norm":  # two kernels, vae/kernels.py
            moved, kernels = moved + touched_bytes(args[0]), 2
        elif "attention_backward" in name:
            kernels += 2
        elif name.startswith(("_foreach", "_fused")):
            kernels = max(1, len(inputs) // 60)
        elif name in ("copy_", "clone", "_to_copy") and flops == 0 and _is_layout_copy(name, args, outs):
            self.cost.layout_copies += 1
        return Work(name, _unit(name, dtype, flops), int(flops), int(moved), kernels)


def _unit(name: str, dtype: torch.dtype, flops: int) -> str:
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    if flops and "conv" in name:
        return "conv32"
    return "matmul32" if flops else "fp32"


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a value, however deep in lists and tuples."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def touched_bytes(t: Tensor) -> int:
    """Bytes of the elements that exist: a dimension of stride 0 counts once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if stride != 0 or size == 0:
            count *= size
    return count * t.element_size()


def _is_channels_last(t: Tensor) -> bool:
    layout = torch.channels_last_3d if t.ndim == 5 else torch.channels_last
    return t.ndim in (4, 5) and t.is_contiguous(memory_format=layout) and not t.is_contiguous()


def _is_layout_copy(name: str, args: Any, outs: list[Tensor]) -> bool:
    """Whether a copy only changes the order in memory of a whole video tensor."""
    source = args[1] if name == "copy_" else args[0]
    if not isinstance(source, Tensor) or not outs or source.ndim not in (4, 5):
        return False
    if source.dtype != outs[0].dtype or source.shape != outs[0].shape or source.shape[1] < 8:
        return False
    return (source.stride(1) == 1) != (outs[0].stride(1) == 1)


def _convolution_copies(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[int, int, int]:
    """(bytes, kernels, layout copies) beside the convolution itself.

    cuDNN's half-precision kernels work channels-last: a contiguous input is transposed before and its output after.
    An operand that is in neither order is copied, and a bias is a pass of its own.
    """
    # The layout in which cuDNN will work.
    last = _is_channels_last(out)
    layout = torch.contiguous_format
    if last:
        layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    # Operands in another order are copied first; a bias is added afterwards.
    moved = kernels = copies = 0
    for operand in (x, weight):
        if not operand.is_contiguous(memory_format=layout):
            moved, kernels = moved + 2 * operand.nbytes, kernels + 1
            copies += operand is x
    if bias is not None:
        moved, kernels = moved + 2 * out.nbytes, kernels + 1
    # Half precision without channels-last: transposed on the way in and out.
    half = out.dtype in (torch.bfloat16, torch.float16)
    if half and not last and weight.shape[-1] > 1:
        moved, kernels, copies = moved + 2 * (x.nbytes + out.nbytes), kernels + 2, copies + 2
    return moved, kernels, copies


def _convolution_backward_copies(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[int, int]:
    """(bytes, kernels) beside one pass over each operand: the gradients of input, weight and bias are kernels apiece."""
    last = _is_channels_last(x) or _is_channels_last(weight)
    layout = torch.contiguous_format
    if last:
        layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    moved, kernels = 2 * grad.nbytes, 2
    for operand in (grad, x, weight):
        if not operand.is_contiguous(memory_format=layout):
            moved, kernels = moved + 2 * operand.nbytes, kernels + 1
    if grad.dtype in (torch.bfloat16, torch.float16) and not last and weight.shape[-1] > 1:
        moved, kernels = moved + 4 * (grad.nbytes + x.nbytes), kernels + 4
    return moved, kernels
