"""The base of both trainers: step counter, means to log, updates that must be finite, EMA.

A step never waits for the device: whether its gradient was finite is decided there, and read later.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from data.core.lazy import lazy

torch = lazy("torch")
accelerate = lazy("accelerate.utils")
distributed = lazy("pipelines.training.distributed")

if TYPE_CHECKING:
    from torch import Tensor, nn


log = logging.getLogger(__name__)
REHEARSED = ("cuda",)  # devices whose memory ends before the host's does


class Trainer:
    """Base of both trainers: step counter, means to log, updates that leave out non-finite gradients.

    A subclass has `ema` and defines `train_step(batches)`, which ends with `finish_step`, and `save(folder)` / `load(folder)`.
    `skipped_in_row` counts the steps whose verdict `count_skipped` has read; `last_finite` is the newest of them (its number
    from 0) that was finite, -1 before there is one.
    """

    must_not_change: tuple[str, ...] = ()  # entries of a checkpoint's manifest that a resumed run must share

    def __init__(self, config: Any, accelerator: Any):
        self.config, self.accelerator = config, accelerator
        self.step = 0
        self.last_learning_rate = 0.0
        self.skipped_in_row, self.last_finite = 0, -1
        self.window: dict[str, list[Any]] = {}
        self._unread: list[tuple[int, Any]] = []  # (step, verdict) not read yet

    def add_to_log(self, values: dict[str, Any]) -> None:
        """Add tensors to the means of the current log window; nothing is copied from the GPU yet.

        Of a pair (values, where) the elements count at which `where`, a bool tensor of that shape, holds.
        """
        # Sums stay on the device, in float64 where it has that.
        for name, value in values.items():
            if not isinstance(value, tuple):
                value = value, torch.ones_like(value, dtype=torch.bool)
            value, where = value
            total, count = self.window.get(name, [0.0, 0])
            value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
            self.window[name] = [total + torch.where(where, value, 0.0).sum(), count + where.sum()]

    def whole_window(self) -> dict[str, list[Any]]:
        """The window of all processes together; every process calls it."""
        # Here the host waits for the device: for all values of the window at once.
        own = {name: [float(total), int(count)] for name, (total, count) in self.window.items()}
        tables = accelerate.gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        merged: dict[str, list[Any]] = {}
        for table in tables:
            for name, (total, count) in table.items():
                old = merged.get(name, [0.0, 0])
                merged[name] = [old[0] + total, old[1] + count]
        return {name: entry for name, entry in merged.items() if entry[1]}

    def flush_window(self) -> dict[str, float]:
        """Means since the last call, over all processes."""
        merged, self.window = self.whole_window(), {}
        return {name: total / count for name, (total, count) in sorted(merged.items())}

    def set_learning_rate(self, *optimizers: Any) -> None:
        """Set the rate of this step: constant, after a linear warm-up."""
        rate = self.config.learning_rate * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        self.last_learning_rate = rate
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def update(self, module: "nn.Module", optimizer: Any, largest: float, name: str) -> "Tensor":
        """Clip the gradient to norm `largest` (0: no clipping) and make the optimizer step. Returns whether the norm is finite.

        The result is a bool tensor on the device. If it is False, the fused optimizer has skipped the step there
        (found_inf), and the host has not waited. Under DeepSpeed the step has already happened, inside backward.
        """
        # The norm of the whole gradient: measured while clipping, or alone.
        if distributed.uses_deepspeed(self.accelerator):
            norm = distributed.deepspeed_grad_norm(self.accelerator)
        elif largest:
            norm = self.accelerator.clip_grad_norm_(module.parameters(), largest)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        # A step whose norm is not finite is left out, on the device (DeepSpeed has left it out itself).
        norm = torch.as_tensor(0.0 if norm is None else norm, device=self.accelerator.device)
        finite = norm.isfinite()
        optimizer.optimizer.found_inf = (~finite).float()
        optimizer.step()
        if self.accelerator.is_main_process:
            self.add_to_log({name: (norm, finite)})
        optimizer.zero_grad()
        return finite

    def trained(self) -> list["nn.Module"]:
        """The prepared modules with optimizers."""
        raise NotImplementedError

    def try_step(self) -> None:
        """Forward and backward of a dummy micro-batch, in every phase that there will be."""
        raise NotImplementedError

    def rehearse(self, look: Callable[[], Any] | None = None) -> None:
        """On a GPU: the heaviest step there will be, without an update, then `look`, what runs between steps.

        So a lack of memory, or of a kernel, shows now and not hours later, also when a run continues with another micro_batch
        or on another card. Weights, optimizers, D's statistics and random states are afterwards what they were; no process
        talks to another. Not under DeepSpeed, whose backward is part of its step.
        Raises ValueError, with what makes a step smaller, when the device's memory does not suffice.
        """
        device = self.accelerator.device
        if device.type not in REHEARSED or distributed.uses_deepspeed(self.accelerator):
            return
        # What the rehearsal may change, to put it back
        models, now = self.trained(), self.step
        together = torch.nn.ModuleList(models)
        buffers = list(together.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            # What Adam will hold from the first update on
            moments = []
            for parameter in together.parameters():
                if parameter.requires_grad:
                    moments += [torch.empty_like(parameter), torch.empty_like(parameter)]
            # The step itself, without talking to other processes.
            with contextlib.ExitStack() as alone:
                for model in models:
                    alone.enter_context(self.accelerator.no_sync(model))
                self.try_step()
            for model in models:
                model.zero_grad()
            # What runs between steps, then everything as it was.
            if look is not None:
                look()
            del moments
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            raise ValueError(
                f"a step does not fit on {device} ({str(error).split('. ')[0]}): "
                "gradient_checkpointing=true, precision=bf16 or a smaller micro_batch, clip.num_frames or clip.size need less"
            ) from error
        finally:
            self.step = now
            for model in models:
                model.zero_grad()
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def update_ema(self, model: "nn.Module", where: "Tensor") -> None:
        """Move the averaged weights towards the model's, if `where`, a bool tensor on the device, holds.

        ema_warmup: with the decay min(ema_decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage.
        """
        mine, theirs = list(self.ema.module.parameters()), list(model.parameters())
        decay = self.ema.decay
        if self.config.ema_warmup:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(mine, theirs, [where * (1.0 - decay)] * len(mine))

    def finish_step(self, finite: "Tensor") -> None:
        """Count the step. "skipped" is logged as 1 in a window with a skipped update, and not at all otherwise."""
        self.add_to_log({"skipped": (torch.ones_like(finite), ~finite)})
        self._unread.append((self.step, finite))
        self.step += 1

    def is_finite(self) -> bool:
        """Whether the weights, as far as this process holds them, and their averages are numbers."""
        for module in [*self.trained(), self.ema.module]:
            for tensor in module.parameters():
                if not torch.isfinite(tensor).all():
                    return False
        return True

    def count_skipped(self, everything: bool = True) -> None:
        """Count and name the steps left out, but for the newest one unless `everything`: so nobody waits for the device."""
        # Every verdict is on its way to the host; those of earlier calls have arrived.
        for place, (step, verdict) in enumerate(self._unread):
            if not isinstance(verdict, distributed.Later):
                self._unread[place] = (step, distributed.Later(verdict))
        ready = len(self._unread) if everything else len(self._unread) - 1
        for step, finite in self._unread[: max(0, ready)]:
            if finite.read():
                self.skipped_in_row, self.last_finite = 0, step
            else:
                self.skipped_in_row += 1
                log.warning("step %d: loss or gradient is not finite, update skipped", step)
        del self._unread[: max(0, ready)]

    def progress(self) -> dict[str, int]:
        """How far the training is: stored with checkpoints and exports."""
        return {"step": self.step, "samples_seen": self.step * self.config.global_batch}

    def counters(self) -> dict[str, Any]:
        """What `save` stores of this class; every process calls it."""
        self.count_skipped()
        return {"step": self.step, "skipped_in_row": self.skipped_in_row, "window": self.whole_window()}

    def load_counters(self, state: dict[str, Any]) -> None:
        self.step, self.skipped_in_row = state["step"], state["skipped_in_row"]
        # the main process takes what all had gathered, on however many
        window = state["window"] if self.accelerator.is_main_process else {}
        self.window = {n: list(entry) for n, entry in window.items()}


def lacks_memory(error: RuntimeError) -> bool:
    """torch's own error, or cuDNN and cuBLAS, which say it in other words."""
    words = ("out of memory", "alloc_failed", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)
