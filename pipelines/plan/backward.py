"""Backward passes over tensors that claim to be on a GPU, in plain Python.

Torch's own engine asks the CUDA driver for its streams and fails where there is none, and it frees each saved tensor as
soon as its node has run, which a count of live memory must see. This engine does the same walk: nodes in the reverse
order of their making, gradients summed, reduced to the shape and dtype of what they belong to, saved tensors freed.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    """A tensor that the graph keeps for its backward pass, until a node that used it has run."""

    used: "list[_Saved]" = []  # noqa: RUF012 (by the node that runs now)

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()

    def unpack(self) -> Tensor:
        if self.tensor is None:
            raise RuntimeError("a second backward pass through a graph that was not retained")
        _Saved.used.append(self)
        return self.tensor


def _gradient_accumulator(leaf: Tensor) -> Any:
    return leaf.view_as(leaf).grad_fn.next_functions[0][0]


def _fit(grad: Tensor, metadata: Any) -> Tensor:
    """A gradient in the shape and dtype of the value that it belongs to, as torch's engine leaves it."""
    if tuple(grad.shape) != tuple(metadata.shape):
        grad = grad.sum_to_size(tuple(metadata.shape))
    return grad if grad.dtype == metadata.dtype else grad.to(metadata.dtype)


_passes = itertools.count()


def _walk(
    roots: Sequence[Tensor], grads: Sequence[Tensor | None], retain: bool, wanted: dict[Any, int]
) -> dict[int, Tensor]:
    """One backward pass. Checkpointing asks for its number, to make a block's activations again once in each."""
    number = next(_passes)
    with torch.no_grad(), mock.patch("torch._C._current_graph_task_id", return_value=number):
        return _run_graph(roots, grads, retain, wanted)


def _run_graph(
    roots: Sequence[Tensor], grads: Sequence[Tensor | None], retain: bool, wanted: dict[Any, int]
) -> dict[int, Tensor]:
    """Run the graph below the roots. wanted: {accumulator node: index}; empty: add to every leaf's .grad."""
    # What is wanted of the graph, what waits for its node, and which node comes next
    needed = _leads_to(roots, wanted) if wanted else None
    waiting: dict[Any, list[Tensor | None]] = {}
    heap: list[tuple[int, int, Any]] = []
    found: dict[int, Tensor] = {}

    # Gradients wait at their node until all that use its value have given theirs; leaves come last.
    def give(node: Any, index: int, grad: Tensor | None) -> None:
        if node is None or grad is None or (needed is not None and node not in needed):
            return
        if node not in waiting:
            waiting[node] = [None] * len(node._input_metadata)
            is_leaf = hasattr(node, "variable")
            heapq.heappush(heap, (-(2**62) if is_leaf else -node._sequence_nr(), id(node), node))
        old, grad = waiting[node][index], _fit(grad, node._input_metadata[index])  # users may broadcast apart
        waiting[node][index] = grad if old is None else old + grad

    # Begin at the roots.
    for root, grad in zip(roots, grads, strict=True):
        give(root.grad_fn, root.output_nr, torch.ones_like(root) if grad is None else grad)
    del root, grad
    # The newest node first: by then all that follow from it have run.
    while heap:
        node = heapq.heappop(heap)[2]
        incoming = waiting.pop(node)
        # A value that was asked for, or a leaf of the graph, ends the walk there.
        if node in wanted:
            found[wanted[node]] = incoming[0]
            continue
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = incoming[0] if leaf.grad is None else leaf.grad.add_(incoming[0])
            continue
        # Run the node, and free what only its backward needed.
        _Saved.used = []
        outgoing = _run(node, incoming)
        if not retain:
            for saved in _Saved.used:
                saved.tensor = None
        del incoming
        # Its results go to those before it.
        outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
        edges = node.next_functions
        for (follower, index), grad in zip(edges, outgoing, strict=False):
            give(follower, index, grad)
        del outgoing, grad
    return found


def _run(node: Any, incoming: list[Tensor | None]) -> Any:
    if not isinstance(node, BackwardCFunction):
        return node(*incoming)
    # A function written in Python gets zeros where nothing came.
    full = []
    for grad, made in zip(incoming, node._input_metadata, strict=True):
        zeros = torch.zeros(tuple(made.shape), dtype=made.dtype, device=made.device) if grad is None else None
        full.append(grad if zeros is None else zeros)
    return node.apply(*full)


def _leads_to(roots: Sequence[Tensor], wanted: dict[Any, int]) -> set:
    """The nodes below the roots from which one of the wanted ones can be reached."""
    reaches, seen = set(), set()
    stack = [(root.grad_fn, False) for root in roots]
    # Depth first: a node is decided once all that it leads to are.
    while stack:
        node, done = stack.pop()
        followers = [n for n, _ in node.next_functions if n is not None]
        if done:
            if node in wanted or not reaches.isdisjoint(followers):
                reaches.add(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((follower, False) for follower in followers)
    return reaches


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **_: Any,
) -> None:
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    grads = [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors or [None] * len(roots))
    _walk(roots, grads, bool(retain_graph or create_graph), {})


def _grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: bool | None = None, **_: Any
) -> tuple[Tensor | None, ...]:
    roots = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs or [None] * len(roots))
    wanted = {_gradient_accumulator(leaf): i for i, leaf in enumerate(leaves)}
    found = _walk(roots, grads, bool(retain_graph), wanted)
    return tuple(map(found.get, range(len(leaves))))


@contextmanager
def python_backward() -> Iterator[None]:
    """Inside, Tensor.backward, torch.autograd.backward and torch.autograd.grad (of leaves) use this engine."""
    hooks = saved_tensors_hooks(_Saved, _Saved.unpack)
    with hooks, mock.patch("torch.autograd.backward", _backward), mock.patch("torch.autograd.grad", _grad):
        yield
