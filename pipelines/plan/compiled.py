"""What torch.compile makes of a block, without a GPU: torch's own graphs of its two passes, and what fuses in them.

The graphs, with what the forward pass keeps for the backward one, are those of AOTAutograd and its partitioner. What the
code generator would do is modelled: products, convolutions and attention are kernels of their own, and what lies between
two of them, or beside a large sum, is one kernel that reads its inputs and writes its results once.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils.flop_counter import flop_registry

from pipelines.plan.cost import VIEWS, Cost, Costs, Work, tensors_of, touched_bytes

CALL = 10  # operations' worth of the host's time: to check that a block's graph is the right one, and to enter it
LARGE_SUM = 4096  # values: a larger sum ends before the next kernel begins


@dataclass
class Plan:
    """One run of a graph: its kernels, and the nodes whose tensors are written to memory."""

    works: Counter
    layout_copies: int
    written: set[fx.Node]


@contextmanager
def compiled_blocks(costs: Costs) -> Iterator[None]:
    """Inside, `module.compile()` makes graphs whose runs cost what the compiled ones would."""
    known: dict[tuple, Callable] = {}

    def compile_module(module: nn.Module, **_: Any) -> None:
        module._compiled_call_impl = lambda *args: _call(module, args, known, costs)

    with mock.patch.object(nn.Module, "compile", compile_module):
        yield


def _call(module: nn.Module, args: tuple, known: dict[tuple, Callable], costs: Costs) -> Any:
    # One graph per block and per size of its inputs, as torch.compile keeps them.
    names, values = zip(*module.named_parameters(), strict=True)
    shapes = [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in (*values, *args)]
    key = (str(module), str(shapes), torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"))
    # Trace forward and backward with what lies between them; both run on the interpreter below.
    if key not in known:

        def plain(*tensors: Tensor) -> Any:
            given = dict(zip(names, tensors[: len(names)], strict=True))
            return torch.func.functional_call(module, given, tensors[len(names) :])

        def compiler(graph: fx.GraphModule, _: Any) -> Callable:
            return make_boxed_func(_Run(graph, costs).run)

        partition, table = min_cut_rematerialization_partition, select_decomp_table()
        known[key] = aot_function(plain, compiler, compiler, partition, decompositions=table)
    costs.muted += 1  # _Run counts; a trace costs nothing
    try:
        with (
            mock.patch.object(module, "_compiled_call_impl", None),
            mock.patch("torch.compiler.is_compiling", return_value=True),
        ):
            return known[key](*values, *args)
    finally:
        costs.muted -= 1


class _Run(fx.Interpreter):
    """Runs a graph on tensors without data and adds what its kernels cost."""

    def __init__(self, graph: fx.GraphModule, costs: Costs):
        super().__init__(graph)
        self.costs, self.plan = costs, plan_of(graph.graph, costs)

    def run(self, *args: Any, **more: Any) -> Any:
        # What the kernels of this graph cost; the tensors below are only tracked.
        cost = self.costs.cost
        cost.works += self.plan.works
        cost.layout_copies += self.plan.layout_copies
        cost.operations += CALL + sum(work.kernels * n for work, n in self.plan.works.items())
        self.costs.muted += 1
        try:
            return super().run(*args, **more)
        finally:
            self.env.clear()  # it would keep what it was given and what it returned
            self.args_iter = iter(())
            self.costs.muted -= 1

    def run_node(self, node: fx.Node) -> Any:
        out = super().run_node(node)
        if node in self.plan.written:
            for tensor in tensors_of(out):
                self.costs.track(tensor, f"compiled {str(tensor.dtype).removeprefix('torch.')}")
        return out


# ---- which nodes become one kernel -----------------------------------------------------------------------


def _name(node: fx.Node) -> str:
    return node.target._schema.name.partition("::")[2] if hasattr(node.target, "_schema") else ""


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or _name(node) in VIEWS


def _is_extern(node: fx.Node) -> bool:
    packet = getattr(node.target, "_overloadpacket", None)
    return packet in flop_registry or "attention" in _name(node)


def _elements(value: Any) -> int:
    return max((t.numel() for t in tensors_of(value)), default=0)


def _ends_a_kernel(node: fx.Node) -> bool:
    """Whether what uses the node's value has to wait for all of it."""
    if node.op != "call_function" or _is_extern(node):
        return node.op == "call_function"
    read = max((_elements(n.meta["val"]) for n in node.all_input_nodes), default=0)
    return read > LARGE_SUM * _elements(node.meta["val"])


def plan_of(graph: fx.Graph, costs: Costs) -> Plan:
    """The kernels of a graph: each node at the latest level at which its value is wanted, what hangs together there is one."""
    # Views write nothing: their readers read what lies behind them.
    base: dict[fx.Node, fx.Node] = {}  # of a view: the node that wrote its memory
    users: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        base[node] = base[node.all_input_nodes[0]] if _is_view(node) else node
        if not _is_view(node):
            for source in node.all_input_nodes:
                users[base[source]].add(node)
    calls = [n for n in graph.nodes if n.op == "call_function" and not _is_view(n)]
    fusable = [n for n in calls if not _is_extern(n)]

    # Levels: earliest by what a node reads, then as late as all its readers allow.
    level = dict.fromkeys(graph.nodes, 0)
    for node in calls:
        sources = {base[s] for s in node.all_input_nodes}
        level[node] = max((level[s] + _ends_a_kernel(s) for s in sources), default=0)
    for node in reversed(fusable):
        if users[node] and not _ends_a_kernel(node) and not any(u.op == "output" for u in users[node]):
            level[node] = min(level[u] for u in users[node])

    # Kernels: nodes of a level that read one another or the same tensor.
    leader: dict[Any, Any] = {}

    def find(key: Any) -> Any:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for node in fusable:
        for source in {base[s] for s in node.all_input_nodes}:
            same = source in fusable and level[source] == level[node]
            leader[find(node)] = find(source if same else (level[node], source))
    kernels: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in fusable:
        kernels[find(node)].append(node)

    # Costs.
    works, written = Counter(), {n for n in calls if _is_extern(n)}
    # What a kernel moves: the largest that it reads of each tensor, and what it leaves for others.
    for nodes in kernels.values():
        read: dict[fx.Node, int] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                if base[source] not in nodes:
                    size = sum(map(touched_bytes, tensors_of(source.meta["val"])))
                    read[base[source]] = max(size, read.get(base[source], 0))
        results = [n for n in nodes if users[n] - set(nodes)]
        written.update(results)
        moved = sum(read.values())
        for node in results:
            moved += sum(tensor.nbytes for tensor in tensors_of(node.meta["val"]))
        sums = any(_ends_a_kernel(n) for n in nodes)
        works[Work("compiled", "fp32", 0, moved, 1 + sums)] += 1
    # Products, convolutions and attention: kernels of their own, at the cost that they have uncompiled.
    before, costs.cost = costs.cost, Cost()
    for node in calls:
        if _is_extern(node):
            args, more = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            out = node.meta["val"]
            work = costs.work(node.target, _name(node), args, more, out, tensors_of(out))
            works[work] += 1
    copies, costs.cost = costs.cost.layout_copies, before
    return Plan(works, copies, written)
