"""Ways to do the same thing, timed in turns in one process, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.efficiency import quantile

Runs = dict[str, Callable[[], Any]]


@dataclass
class Case:
    """runs: ways to do the same thing; the first is what the others are compared with.

    flops, bytes: the least that the work needs, for the floor. same: {run: its largest difference from the first}.
    """

    name: str
    runs: Runs
    flops: float = 0.0
    bytes: float = 0.0
    same: Callable[[], dict[str, float]] = dict


class Clock:
    """Seconds of the GPU where there is one, else CPU seconds of this process, which other processes hardly change."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.unit = "GPU seconds" if self.cuda else "CPU seconds"

    def time(self, run: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.process_time()
            run()
            return time.process_time() - start
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def take_turns(runs: Runs, rounds: int, warmup: int, clock: Clock) -> dict[str, list[float]]:
    """{run: seconds of each round}; every other round in the opposite order."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            seconds[name].append(clock.time(runs[name]))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "p10": quantile(values, 0.1),
        "p90": quantile(values, 0.9),
        "min": min(values),
    }


def peaks(clock: Clock, device: torch.device) -> dict[str, float]:
    """What this machine reaches: "conv" and "matmul" in FLOP/s (float32 on a CPU, bf16 on a GPU), "copy" in bytes/s."""
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    n, side = (8192, 256) if clock.cuda else (1024, 64)
    conv = torch.nn.Conv3d(128, 128, 3, padding=(0, 1, 1)).to(device, dtype)
    conv = conv.to(memory_format=torch.channels_last_3d)
    x = torch.randn(1, 128, 6, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    a, source = torch.randn(n, n, device=device, dtype=dtype), torch.zeros(2**28 // 4, device=device)
    target = torch.empty_like(source)
    runs = {"conv": lambda: conv(x), "matmul": lambda: a @ a, "copy": lambda: target.copy_(source)}
    with torch.no_grad():
        seconds = {name: min(times) for name, times in take_turns(runs, 3, 1, clock).items()}
    work = {"conv": 2 * 27 * 128**2 * 4 * side**2, "matmul": 2 * n**3, "copy": 2 * source.nbytes}
    return {name: work[name] / seconds[name] for name in work}


def record(case: Case, rounds: int, warmup: int, clock: Clock, best: dict[str, float]) -> dict[str, Any]:
    """Measure a case. "ratio": how many times faster than the first, each round's own; "of_floor": floor / median."""
    difference = case.same()
    seconds = take_turns(case.runs, rounds, warmup, clock)
    first = next(iter(seconds))
    floor = max(case.flops / max(best["conv"], best["matmul"]), case.bytes / best["copy"])
    rows = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], times, strict=True)]
        rows[name] = {"seconds": spread(times), "ratio": spread(ratios)}
        rows[name] |= {"of_floor": floor / statistics.median(times)} if floor else {}
        rows[name] |= {"difference": difference[name]} if name in difference else {}
    return {"case": case.name, "against": first, "rounds": rounds, "floor_s": floor or None, "runs": rows}


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A case as text."""
    yield row["case"]
    for name, run in row["runs"].items():
        seconds, ratio = run["seconds"], run["ratio"]
        text = f"  {name:28s} {seconds['median']:9.4f} s ({seconds['p10']:.4f} to {seconds['p90']:.4f})"
        if name != row["against"]:
            text += f"  {ratio['median']:5.2f} times ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
        text += f"  {run['of_floor']:4.0%} of the floor" if "of_floor" in run else ""
        yield text + (f"  differs by {run['difference']:.1e}" if "difference" in run else "")
