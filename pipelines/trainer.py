"""What the trainers of both stages keep between steps: the counter, the means to log, updates that must be finite."""

import logging
import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Trainer:
    """Base of both trainers: step counter, means to log, updates that leave out non-finite gradients.

    A subclass has `trained`, the module whose weights count, and `ema`, and defines `train_step(batches)`, which ends with `finish_step`, and `save(folder)` / `load(folder)`.
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

    def whole_window(self) -> dict[str, list[Any]]:
        """The window of all processes together; every process calls it."""
        tables = [{n: [float(total), count] for n, (total, count) in self.window.items()}]
        if self.accelerator.num_processes > 1:
            tables = gather_object(tables)
        merged: dict[str, list[Any]] = {}
        for table in tables:
            for name, (total, count) in table.items():
                old = merged.get(name, [0.0, 0])
                merged[name] = [old[0] + total, old[1] + count]
        return merged

    def flush_window(self) -> dict[str, float]:
        """Means since the last call, over all processes."""
        merged, self.window = self.whole_window(), {}
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
            if norm is not None and self.accelerator.is_main_process:  # the same on all: counted once
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

    def is_finite(self) -> bool:
        """Whether the weights, as far as this process holds them, and their averages are numbers."""
        tensors = [*self.trained.parameters(), *self.ema.module.parameters()]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def progress(self) -> dict[str, int]:
        """How far the training is: stored with checkpoints and exports."""
        return {"step": self.step, "samples_seen": self.step * self.config.global_batch}

    def counters(self) -> dict[str, Any]:
        """What `save` stores of this class; every process calls it."""
        return {"step": self.step, "skipped_in_row": self.skipped_in_row, "window": self.whole_window()}

    def load_counters(self, state: dict[str, Any]) -> None:
        self.step, self.skipped_in_row = state["step"], state["skipped_in_row"]
        # the main process takes what all had gathered, on however many
        window = state["window"] if self.accelerator.is_main_process else {}
        self.window = {n: [torch.tensor(t, dtype=torch.float64), c] for n, (t, c) in window.items()}
