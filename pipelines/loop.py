"""The one training loop of both stages: step, log, look, save, stop; and what every trainer keeps between steps."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from data.files import write_json
from data.loader import StepBatches, make_loader
from eval.efficiency import Meter
from pipelines.engine import any_process, same_everywhere
from pipelines.log import MetricLog
from pipelines.run import Checkpoints, stop_on_signal

log = logging.getLogger(__name__)


class Trainer:
    """Base of both trainers: step counter, means to log, updates that leave out non-finite gradients.

    A subclass defines `train_step(batches)`, which ends with `finish_step`, and `save(folder)` / `load(folder)`.
    """

    must_not_change: tuple[str, ...] = ()  # entries of a checkpoint's manifest that a resumed run must share

    def __init__(self, config: Any, accelerator: Any):
        self.config, self.accelerator = config, accelerator
        self.step = 0
        self.skipped_in_row = 0
        self.window: dict[str, list[Any]] = {}

    def note(self, values: dict[str, Tensor]) -> None:
        """Add tensors to the means of the current log window; nothing is copied from the GPU yet."""
        for name, value in values.items():
            total, count = self.window.get(name, [0.0, 0])
            value = value.detach().double()
            self.window[name] = [total + value.sum(), count + value.numel()]

    def flush_window(self) -> dict[str, float]:
        """Means since the last call, over all processes."""
        tables = [{n: [float(total), count] for n, (total, count) in self.window.items()}]
        if self.accelerator.num_processes > 1:
            tables = gather_object(tables)
        self.window, merged = {}, {}
        for table in tables:
            for name, (total, count) in table.items():
                old = merged.get(name, (0.0, 0))
                merged[name] = (old[0] + total, old[1] + count)
        return {name: total / count for name, (total, count) in sorted(merged.items())}

    def set_learning_rate(self, *optimizers: Any) -> None:
        """Constant, after a linear warm-up."""
        rate = self.config.learning_rate * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def update(self, module: nn.Module, optimizer: Any, largest: float, name: str) -> bool:
        """Clip the gradient to norm `largest` (0: no limit) and step; False if it is not finite: then no step."""
        norm = self.accelerator.clip_grad_norm_(module.parameters(), largest or math.inf)
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
        if finite:
            optimizer.step()
            if norm is not None:
                self.note({name: torch.as_tensor(norm)})
        optimizer.zero_grad()
        return finite

    def finish_step(self, finite: bool) -> None:
        if finite:
            self.skipped_in_row = 0
        else:
            self.skipped_in_row += 1
            self.note({"skipped": torch.ones(())})
            log.warning("step %d: loss or gradient is not finite, update left out", self.step)
        self.step += 1

    def counters(self) -> dict[str, Any]:
        """What `save` stores of this class."""
        window = {n: [float(total), count] for n, (total, count) in self.window.items()}
        return {"step": self.step, "skipped_in_row": self.skipped_in_row, "window": window}

    def load_counters(self, state: dict[str, Any]) -> None:
        self.step, self.skipped_in_row = state["step"], state["skipped_in_row"]
        self.window = {n: [torch.tensor(t, dtype=torch.float64), c] for n, (t, c) in state["window"].items()}


def fit(
    trainer: Any,
    stream: Any,
    run_dir: Path,
    *,
    program: str,
    mode: str,
    info: dict[str, Any],
    look: Callable[[MetricLog], None],
    look_every: int,
    look_at_start: bool = False,
) -> int:
    """Resume from the newest good checkpoint, then train to config.steps; returns the number of steps made.

    One process (group) at a time trains in a run folder: a second one gets a ValueError.

    stream: endless samples, `stream[n]`. mode: "online" or "cached", for the speed records. info: goes into each
    checkpoint's manifest. look(metrics): validation or samples, every look_every steps (0: never) and at the end.
    """
    lock = FileLock(run_dir / ".lock")
    if trainer.accelerator.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"run_dir={run_dir}: another process is training here; wait for it or stop it"
            ) from None
    try:
        return _fit(trainer, stream, run_dir, program, mode, info, look, look_every, look_at_start)
    finally:
        lock.release()


def _fit(
    trainer: Any,
    stream: Any,
    run_dir: Path,
    program: str,
    mode: str,
    info: dict[str, Any],
    look: Callable[[MetricLog], None],
    look_every: int,
    look_at_start: bool,
) -> int:
    config, accelerator = trainer.config, trainer.accelerator
    main = accelerator.is_main_process
    checkpoints = Checkpoints(run_dir, config.keep_checkpoints)
    saved = same_everywhere(accelerator, checkpoints.latest() if main else None)
    if saved is not None:
        before = json.loads((checkpoints.path(saved) / "manifest.json").read_text())
        if before.get("data") != info.get("data"):
            log.warning(
                "the data are not those of the checkpoint: %s, now %s", before.get("data"), info.get("data")
            )
        for key in trainer.must_not_change:
            if before.get(key) != info[key]:
                raise ValueError(
                    f"run_dir={run_dir} was trained with {key}={before.get(key)}, now {info[key]}"
                )
        trainer.load(checkpoints.path(saved))
        log.info("resuming %s at step %d", run_dir, saved)
    began = trainer.step
    metrics = MetricLog(run_dir, trainer.step, main)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = StepBatches(trainer.step, config.global_batch, config.micro_batch, rank, world)
    loader = iter(make_loader(stream, batches, config.workers))
    meter = Meter(accelerator.device, mode, config.global_batch)

    def next_batches() -> Iterator[Any]:
        while True:
            with meter.data_wait():
                batch = next(loader)
            yield batch

    incoming = next_batches()
    if look_at_start and trainer.step == 0:
        look(metrics)
    bar = tqdm(total=config.steps, initial=trainer.step, desc=program, disable=not main or None)
    with stop_on_signal() as stopping:
        while trainer.step < config.steps:
            trainer.train_step(incoming)
            meter.step()
            bar.update()
            step, last = trainer.step, trainer.step == config.steps
            if trainer.skipped_in_row >= config.max_skipped:
                good = checkpoints.path(saved) if saved is not None else "none yet"
                raise ValueError(
                    f"{config.max_skipped} steps in a row had a non-finite loss or gradient; last good checkpoint: {good}; "
                    "lower learning_rate or use precision=fp32"
                )
            if step % config.log_every == 0 or last:
                values = trainer.flush_window()
                metrics.scalars(step, values)
                metrics.scalars(step, meter.scalars(), timing=True)
                bar.set_postfix(
                    {n: f"{v:.4g}" for n, v in values.items() if n in ("loss", "loss/rec", "skipped")}
                )
            if look_every and (step % look_every == 0 or last):
                meter.pause()
                look(metrics)
            stop = any_process(accelerator, bool(stopping()))
            if step % config.save_every == 0 or last or stop:
                meter.pause()
                details = {"program": program, "samples": step * config.global_batch, **info}
                checkpoints.save(step, trainer.save, details, accelerator)
                saved = step
            if stop:
                log.info(
                    "stopped by %s after step %d; the same command goes on",
                    stopping() or "another process",
                    step,
                )
                break
    bar.close()
    metrics.close()
    speed = meter.summary()
    # a finished run called again keeps the figures that it measured
    if main and (speed["timed_steps"] or not (run_dir / "efficiency.json").is_file()):
        write_json(
            run_dir / "efficiency.json", {"program": program, "global_batch": config.global_batch, **speed}
        )
        log.info("TSpeed (%s): %s it/s; TMem: %s", mode, speed["tspeed"], speed["tmem"])
    return trainer.step - began
