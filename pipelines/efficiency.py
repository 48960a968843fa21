"""Memory and speed as the paper's Table 3 names them: TMem, TSpeed, CSpeed. For trainers and benchmarks.

TMem    peak memory of training in MiB: allocated and reserved by torch, and used on the device (as nvidia-smi
        shows, other processes included). The paper's values are even MiB: device or reserved. null on a CPU.
TSpeed  optimizer steps per second, from the median step, with the share of time spent waiting for data.
        mode "online" encodes the batch with the VAE in each step (the paper's), "cached" reads latents.
CSpeed  clips per second of the VAE's encoder (posterior mean) on one fixed batch.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

MIB = 2**20
MODES = ("online", "cached")


def reset_peaks(device: torch.device) -> None:
    """Forget the peaks so far; torch keeps its whole-run peak nowhere else, so read `memory_peaks` first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_peaks(device: torch.device) -> dict[str, float | None]:
    """{"allocated_mib", "reserved_mib"}: peaks since the last reset; None on a CPU, never 0."""
    if device.type != "cuda":
        return {"allocated_mib": None, "reserved_mib": None}
    return {
        "allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
    }


def device_used_mib(device: torch.device) -> float | None:
    """Memory in use on the whole device now, in MiB, all processes together; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / MIB


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics, q in [0, 1]."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class _Clock:
    """Marks in time: on a GPU events in the stream, read later without a stop; on a CPU the wall clock."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start, end) -> float:
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000.0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Meter:
    """TMem and TSpeed of a training loop.

        meter = Meter(device, mode="cached", clips_per_step=global_batch)
        for step in ...:
            with meter.data_wait():
                batch = next(batches)
            ...                      # forward, backward, optimizer
            meter.step()             # once per optimizer step, after it
        meter.summary()

    device: of the training. mode: "online" or "cached". clips_per_step: the global batch. warmup: steps that
    are not timed (compilation, optimizer state); the peaks start again after them, and the whole run's peaks
    are kept beside. window: the last N steps are kept, so a meter's memory does not grow.
    Raises ValueError for a wrong mode or counts below 1.
    """

    def __init__(
        self, device: torch.device | str, mode: str, clips_per_step: int, warmup: int = 20, window: int = 1000
    ):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: one of {', '.join(MODES)}")
        if clips_per_step < 1 or warmup < 1 or window < 1:
            raise ValueError(f"clips_per_step={clips_per_step}, warmup={warmup}, window={window}: at least 1")
        self.device, self.mode, self.clips_per_step = torch.device(device), mode, clips_per_step
        self.warmup, self.num_steps = warmup, 0
        self._clock = _Clock(self.device)
        self._steps: deque[tuple] = deque(maxlen=window)  # (start mark, end mark, seconds of waiting)
        self._last, self._wait, self._pauses = None, 0.0, False
        self._device_peak: float | None = None
        self._run_peaks: dict[str, float | None] = {}
        reset_peaks(self.device)

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Time inside counts as waiting for data: the fetch of a batch, on the host."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait += time.perf_counter() - start

    def pause(self) -> None:
        """Call before validation, sampling or saving: the step they fall into is not timed."""
        self._look_at_device()
        self._pauses = True

    def step(self) -> None:
        """Mark the end of an optimizer step."""
        self.num_steps += 1
        # The end of the warm-up: the whole run's peaks are kept, and those of the steady state begin.
        if self.num_steps == self.warmup:
            self._clock.synchronize()
            self._update_run_peaks()
            reset_peaks(self.device)
            self._device_peak = None
            self._look_at_device()
        if self.num_steps < self.warmup:
            self._wait, self._pauses = 0.0, False
            return
        # A step that was not interrupted counts: from mark to mark, with its wait for data.
        mark = self._clock.mark()
        if self._last is not None and not self._pauses:
            self._steps.append((self._last, mark, self._wait))
        self._last, self._wait, self._pauses = mark, 0.0, False

    def _look_at_device(self) -> None:
        """Not in every step: the question stops the host, and what torch has reserved it keeps."""
        used = device_used_mib(self.device)
        if used is not None:
            self._device_peak = max(self._device_peak or 0.0, used)

    def _update_run_peaks(self) -> None:
        self._look_at_device()
        now = {**memory_peaks(self.device), "device_mib": self._device_peak}
        for name, value in now.items():
            old = self._run_peaks.get(name)
            self._run_peaks[name] = value if old is None else max(old, value or 0.0)

    def _local(self) -> dict:
        """This process: speed and memory, None where nothing is known yet."""
        self._update_run_peaks()
        seconds, waits = [], []
        for start, end, wait in self._steps:
            seconds.append(self._clock.seconds(start, end))
            waits.append(wait)
        steady = {**memory_peaks(self.device), "device_mib": self._device_peak}
        return {
            "step_s": statistics.median(seconds) if seconds else None,
            "mean_s": statistics.fmean(seconds) if seconds else None,
            "p10_s": quantile(seconds, 0.1) if seconds else None,
            "p90_s": quantile(seconds, 0.9) if seconds else None,
            "data_wait_share": min(sum(waits) / sum(seconds), 1.0) if seconds else None,
            "tmem": steady if self.num_steps >= self.warmup else dict.fromkeys(steady),
            "tmem_run": dict(self._run_peaks),
        }

    def summary(self) -> dict:
        """TSpeed (of the slowest rank) and TMem (of the fullest), JSON-ready; collective when distributed.

        {"mode", "timed_steps", "tspeed" it/s, "clips_per_s", "step_s", "mean_s", "p10_s", "p90_s",
        "data_wait_share", "tmem": {"allocated_mib", "reserved_mib", "device_mib"}, "tmem_run": the same with
        the warm-up, "ranks": one entry each when there are several}. None before two steps after the warm-up.
        """
        local, ranks = self._local(), None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, local)
        # The speed is the slowest rank's: all wait for it in every step.
        slowest = max(ranks or [local], key=lambda rank: rank["step_s"] or 0.0)
        result = dict(slowest)
        # Of each kind of memory the fullest rank counts.
        for group in ("tmem", "tmem_run"):
            result[group] = dict(slowest[group])
            for name in slowest[group]:
                known = [rank[group][name] for rank in ranks or [local] if rank[group][name] is not None]
                result[group][name] = max(known, default=None)
        step_s = slowest["step_s"]
        result |= {
            "mode": self.mode,
            "timed_steps": len(self._steps),
            "tspeed": 1.0 / step_s if step_s else None,
            "clips_per_s": self.clips_per_step / step_s if step_s else None,
        }
        return result if not ranks or len(ranks) == 1 else {**result, "ranks": ranks}

    def scalars(self) -> dict[str, float]:
        """The known numbers of this process for TensorBoard, named eff/..."""
        local = self._local()
        values = {"tspeed": 1.0 / local["step_s"] if local["step_s"] else None}
        values |= {"data_wait_share": local["data_wait_share"], **local["tmem"]}
        known = {}
        for name, value in values.items():
            if value is not None:
                known[f"eff/{name}"] = value
        return known


@torch.inference_mode()
def encoder_speed(
    encode: Callable[[torch.Tensor], object], clip: torch.Tensor, warmup: int = 5, repeats: int = 30
) -> dict:
    """CSpeed: clips per second of `encode` on one fixed batch that already lies on its device.

    encode: the VAE's encoder up to the posterior mean, in eval mode. clip: (B, 3, T, H, W) in [-1, 1].
    Returns {"cspeed" clips/s or None, "batches_per_s", "median_s", "p10_s", "p90_s", "batch", "frames",
    "height", "width", "dtype", "device", "out_of_memory" ("OOM at b=B" or ""), memory peaks}.
    """
    if clip.ndim != 5 or clip.shape[1] != 3:
        raise ValueError(f"clip has shape {tuple(clip.shape)}: need (B, 3, T, H, W)")
    if warmup < 0 or repeats < 1:
        raise ValueError(f"warmup={warmup}, repeats={repeats}: at least 0 and 1")
    # Warm up, then time each call alone; a device that is too small is a result too.
    B, _, T, H, W = clip.shape
    clock, seconds, out_of_memory = _Clock(clip.device), [], ""
    try:
        for _ in range(warmup):
            encode(clip)
        clock.synchronize()
        reset_peaks(clip.device)
        for _ in range(repeats):
            start = clock.mark()
            encode(clip)
            seconds.append(clock.seconds(start, clock.mark()))
    except torch.cuda.OutOfMemoryError:
        seconds, out_of_memory = [], f"OOM at b={B}"
        torch.cuda.empty_cache()
    median = statistics.median(seconds) if seconds else None
    return {
        "cspeed": B / median if median else None,
        "batches_per_s": 1.0 / median if median else None,
        "median_s": median,
        "p10_s": quantile(seconds, 0.1) if seconds else None,
        "p90_s": quantile(seconds, 0.9) if seconds else None,
        "batch": B,
        "frames": T,
        "height": H,
        "width": W,
        "dtype": str(clip.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(clip.device) if clip.device.type == "cuda" else clip.device.type,
        "out_of_memory": out_of_memory,
        **memory_peaks(clip.device),
    }
