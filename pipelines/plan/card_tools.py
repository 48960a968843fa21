"""What the checks of pipelines/gpu_check.py have in common: the session, their register, networks, clips, and measuring."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines.plan.cards import CARDS, seconds
from pipelines.plan.tasks import find_row, simulate
from vae import ODVAE

GIB = 2**30
Result = dict[str, Any]


@dataclass
class Session:
    """What all checks share. predicted: {row of pipelines/plan/tasks.py: result of `predict`}, on its way."""

    tiny: bool
    out: Path
    device: Any
    predicted: dict[str, "Future[Result]"] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full


CHECKS: dict[str, tuple[float, Callable[[Session], Result]]] = {}  # name -> (seconds on an H100, the check)


def check(seconds: float) -> Callable[[Callable[[Session], Result]], Callable[[Session], Result]]:
    """Register a check. seconds: what it takes on an H100."""

    def register(function: Callable[[Session], Result]) -> Callable[[Session], Result]:
        CHECKS[function.__name__] = seconds, function
        return function

    return register


def measure(s: Session, work: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> Result:
    """{"s": median seconds of a run, "peak_gib", "reserved_gib"}; memory is None on a CPU."""

    def wait() -> None:
        if s.cuda:
            torch.cuda.synchronize()

    # The first calls choose kernels; their memory does not count.
    for _ in range(warmup):
        work()
    wait()
    if s.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    found: Result = {"s": max(1e-7, round(sorted(times)[len(times) // 2], 7))}
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2) if s.cuda else None
    found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2) if s.cuda else None
    return found


def relative(found: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference, in float64; NaN stays NaN."""
    found, reference = found.double().cpu(), reference.double().cpu()
    return float((found - reference).norm() / reference.norm())


def require(ok: bool, what: str) -> None:
    if not ok:
        raise AssertionError(what)


def odvae(s: Session, preset: str = "odvae", where: Any = None, **settings: Any) -> Any:
    """An OD-VAE with random weights, made on the device itself: a CPU needs seconds for it."""
    torch.manual_seed(0)
    if s.tiny:
        settings = {"block_out_channels": (32, 32, 32, 32), **settings}
    with torch.device(where or s.device):
        return ODVAE.preset(preset, **settings).eval().requires_grad_(False)


def clip(s: Session, frames: int, size: int, dtype: Any = None) -> Any:
    return torch.rand(1, 3, frames, size, size, device=s.device).mul_(2).sub_(1).to(dtype or torch.float32)


def streamed(vae: Any, x: Any, z: Any, frames: int) -> tuple[Any, Any]:
    """(posterior means of the clip x, video of the latents z) by streams of so few frames, and of one latent frame."""
    means = [posterior.mode() for posterior in vae.stream_encode(x.split(frames, dim=2))]
    return torch.cat(means, dim=2), torch.cat(list(vae.stream_decode(z.split(1, dim=2))), dim=2)


def half(s: Session, on: bool = True) -> Any:
    """bf16 autocast on a GPU; nothing on a CPU, where such convolutions take minutes."""
    return torch.autocast(s.device.type, torch.bfloat16, enabled=on and s.cuda)


def predict(row: str) -> Result:
    """{"task": {"peak_gib", "s" by card}} of a row of pipelines/plan/tasks.py, in a process that sees no GPU."""
    torch.set_num_threads(1)
    found = find_row(row)
    predicted: Result = {}
    for task in simulate(found.program, found.config()).tasks:
        took = {name: round(seconds(task.cost, card, found.tf32), 4) for name, card in CARDS.items()}
        peak = round(task.cost.peak / GIB, 2)
        predicted[task.name] = {"peak_gib": peak, "kernels": task.cost.kernels, "s": took}
    return predicted


@contextlib.contextmanager
def cleared(s: Session) -> Iterator[None]:
    try:
        yield
    finally:
        gc.collect()
        if s.cuda:
            torch.cuda.empty_cache()
