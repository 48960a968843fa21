"""The one training loop of both stages: resume, step, log, look, save, stop."""

import contextlib
import logging
import math
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.files import write_json
from data.loader import StepBatches, make_loader
from data.progress import Progress
from eval.efficiency import Meter
from eval.records import git_commit
from pipelines.checkpoints import Checkpoints, export_folder, recover
from pipelines.config import flatten
from pipelines.engine import Later, any_process, largest_of, matrix_products, same_everywhere
from pipelines.log import MetricLog
from pipelines.quarantine import Quarantine
from pipelines.run import Stopped, check_run, open_run, stop_on_signal

log = logging.getLogger(__name__)
_SPIKE = 100.0  # times the loss of before


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
    export_name: str,
    export: Callable[[Path], None],
    look_at_start: bool = False,
    weights: dict[str, dict] | None = None,
) -> int:
    """Resume from the newest good checkpoint, then train to config.steps; returns the number of steps made.

    One process (group) at a time trains in a run folder: a second one gets a ValueError.

    stream: endless samples, `stream[n]`. mode: "online" or "cached", for the speed records. info: goes into each
    checkpoint's manifest. look(metrics): validation or samples, every look_every steps (0: never) and at the end.
    weights: for `open_run`. export(folder): writes the EMA model, for run_dir / export_name, while the run's folder is still ours.
    Raises ValueError when updates or videos fail too often, OSError when a checkpoint cannot be written, Stopped after a
    signal when the checkpoint and the export are there.
    """
    lock = FileLock(run_dir / ".lock")
    if trainer.accelerator.is_main_process:
        check_run(run_dir, trainer.config)
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"run_dir={run_dir}: another process is training here; wait for it or stop it"
            ) from None
    try:
        if trainer.accelerator.is_main_process:
            open_run(run_dir, trainer.config, program, weights)
            recover(run_dir)
        details = {"program": program, "git": git_commit(), "config": flatten(trainer.config), **info}
        loop = _Loop(trainer, run_dir, details, look, look_every)
        began = trainer.step
        with matrix_products(trainer.config):
            stopped = loop.run(stream, mode, look_at_start)
        main = trainer.accelerator.is_main_process
        if main and export_folder(run_dir / export_name, export, trainer.progress()):
            log.info("EMA weights: %s", run_dir / export_name)
        if stopped:
            trainer.accelerator.wait_for_everyone()
            raise Stopped(stopped)
        return trainer.step - began
    finally:
        lock.release()


class _Loop:
    """One call of `fit`."""

    def __init__(
        self,
        trainer: Any,
        run_dir: Path,
        details: dict[str, Any],
        look: Callable[[MetricLog], None],
        look_every: int,
    ):
        self.trainer, self.run_dir, self.details = trainer, run_dir, details
        self.look, self.look_every = look, look_every
        self.config, self.accelerator = trainer.config, trainer.accelerator
        self.main = self.accelerator.is_main_process
        self.checkpoints = Checkpoints(run_dir, self.config.keep_checkpoints)
        self.folder = self._folder()
        self.good: int | None = None  # the newest checkpoint after which a step went well
        self.untried: int | None = None  # a newer one, before the next step
        self.usual: float | None = None  # a loss of late
        self.saved = self.untried = self._resume()
        # Before the first checkpoint nothing counts that an earlier, killed start has logged, not even step 0.
        self.metrics = MetricLog(run_dir, trainer.step if self.saved is not None else -1, self.main)

    def _resume(self) -> int | None:
        """Load the newest undamaged checkpoint; its step, None when there is none."""
        if self.main:
            self.checkpoints.clean()
        changing = bool(self.config.resume.names)
        saved = same_everywhere(self.accelerator, self.checkpoints.latest(changing) if self.main else None)
        if saved is None:
            return None
        before, now, folder = self.checkpoints.manifest(saved), self.details, self.checkpoints.path(saved)
        if before.get("data") != now.get("data"):
            log.warning(
                "the data are not those of the checkpoint: %s, now %s", before.get("data"), now.get("data")
            )
        for key in self.trainer.must_not_change:
            if before.get(key) != now[key]:
                raise ValueError(
                    f"run_dir={self.run_dir} was trained with {key}={before.get(key)}, now {now[key]}"
                )
        if (
            None not in (before.get("start_sha256"), now["start_sha256"])
            and before["start_sha256"] != now["start_sha256"]
        ):
            raise ValueError(
                f"run_dir={self.run_dir} began with other weights (sha256 {before['start_sha256'][:12]}, those of init_from are "
                f"{now['start_sha256'][:12]} now); remove the run to begin with these, or give back the old ones"
            )
        try:
            self.trainer.load(folder)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint {folder} holds more than tensors and numbers and was not loaded: {error}"
            ) from error
        log.info("resuming %s at step %d", self.run_dir, saved)
        return saved

    def run(self, stream: Any, mode: str, look_at_start: bool) -> int:
        """Train to config.steps or until a signal; write the speed record. Returns the signal's number, 0 at the end."""
        trainer, config = self.trainer, self.config
        lost = Quarantine(self.run_dir, stream, config.source.max_failed_share, self.accelerator)
        meter = Meter(self.accelerator.device, mode, config.global_batch)
        incoming = self._batches(stream, lost, meter)
        stop, number = False, 0
        bar = Progress(config.steps, self.details["program"], "step", self.main, trainer.step)
        try:
            with stop_on_signal() as stopping:
                if look_at_start and trainer.step == 0:
                    self.look(self.metrics)
                asked: Later | None = None  # whether a process was asked to stop in the step before
                while trainer.step < config.steps and not stop:
                    trainer.train_step(incoming)
                    meter.step()
                    bar.update()
                    stop = asked is not None and asked.read() > 0
                    if self.accelerator.num_processes == 1:
                        stop = bool(stopping())
                    else:
                        asked = any_process(self.accelerator, bool(stopping()))
                    trainer.settle(self._records() or self._saves(stop))
                    self._stop_if_hopeless()
                    self._record(lost, meter, bar)
                    self._save_if_due(meter, stop)
                number = (
                    largest_of(self.accelerator, stopping()) if stop and trainer.step < config.steps else 0
                )
                if number:
                    name = signal.Signals(number).name
                    log.info("stopped by %s after step %d; the same command goes on", name, trainer.step)
        finally:
            bar.close()
            incoming.close()
            self.metrics.close()
        self._write_speed(meter, mode)
        return number

    def _batches(self, stream: Any, lost: Quarantine, meter: Meter) -> Iterator[Any]:
        config, accelerator = self.config, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        numbers = StepBatches(self.trainer.step, config.global_batch, config.micro_batch, rank, world)
        with contextlib.closing(make_loader(stream, numbers, config.workers)) as loader:
            while True:
                with meter.data_wait():
                    batch = next(loader)
                if "failed" in batch:
                    self.trainer.note({"data/substituted": (batch["failed"] > 0).double()})
                    lost.note(batch)
                yield batch

    def _stop_if_hopeless(self) -> None:
        """Ends a training that has diverged; a checkpoint after which a step went well is better than a newer one."""
        if not self.trainer.skipped_in_row and self.untried is not None:
            self.good, self.untried = self.untried, None
        if self.trainer.skipped_in_row >= self.config.max_skipped:
            self._give_up(f"{self.config.max_skipped} steps in a row had a non-finite loss or gradient")

    def _give_up(self, what: str) -> None:
        step = self.good if self.good is not None else self.untried
        good = self.checkpoints.path(step) if step is not None else "none yet"
        raise ValueError(
            f"{what}; last good checkpoint: {good}; go on from there with a lower rate, e.g. "
            f"resume.change=learning_rate learning_rate={self.config.learning_rate / 10:g} (grad_clip, warmup_steps and "
            "precision=fp32 may be changed so too)"
        )

    def _records(self) -> bool:
        return self.trainer.step % self.config.log_every == 0 or self.trainer.step == self.config.steps

    def _saves(self, stop: bool) -> bool:
        return (
            self.trainer.step % self.config.save_every == 0 or self.trainer.step == self.config.steps or stop
        )

    def _record(self, lost: Quarantine, meter: Meter, bar: Progress) -> None:
        """Numbers every log_every steps, a look every look_every, both at the end."""
        step, last = self.trainer.step, self.trainer.step == self.config.steps
        if self._records():
            values = self.trainer.flush_window()
            self._warn_of_a_spike(values)
            self.metrics.scalars(step, values)
            self.metrics.scalars(step, meter.scalars(), timing=True)
            shown = {n: f"{v:.4g}" for n, v in values.items() if n in ("loss", "loss/rec", "skipped")}
            bar.set_postfix(shown)
            lost.check()
        if self.look_every and (step % self.look_every == 0 or last):
            meter.pause()
            self.look(self.metrics)

    def _warn_of_a_spike(self, values: dict[str, float]) -> None:
        """A loss that is orders of magnitude above what it was often goes before the first NaN."""
        loss = values.get("loss/rec", values.get("loss"))
        if loss is None or not math.isfinite(loss):
            return
        if self.usual is not None and loss > _SPIKE * self.usual > 0:
            log.warning(
                "step %d: the loss %.3g is %.0f times what it was; does the training diverge?",
                self.trainer.step,
                loss,
                loss / self.usual,
            )
        self.usual = loss if self.usual is None else min(loss, 0.9 * self.usual + 0.1 * loss)

    def _save_if_due(self, meter: Meter, stop: bool) -> None:
        step, healthy = self.trainer.step, not self.trainer.skipped_in_row
        if self._saves(stop):
            meter.pause()
            self.metrics.sync()
            if any_process(self.accelerator, not self.trainer.is_finite()).read() > 0:
                self._give_up(f"step {step}: the weights are not finite; they are not saved")
            if self._folder() != self.folder:
                raise OSError(
                    f"run_dir={self.run_dir}: moved or replaced since the start; nothing was written there"
                )
            details = {
                **self.trainer.progress(),
                "skipped_in_row": self.trainer.skipped_in_row,
                **self.details,
            }
            good = self.good if self.good is not None else self.untried
            self.checkpoints.save(step, self.trainer.save, details, self.accelerator, good)
            self.saved, self.untried = step, step if healthy else self.untried

    def _folder(self) -> tuple[int, int]:
        """Which folder run_dir is: a training goes on in the one that it began in."""
        try:
            status = os.stat(self.run_dir)
        except OSError:
            return 0, 0
        return status.st_dev, status.st_ino

    def _write_speed(self, meter: Meter, mode: str) -> None:
        """A finished run called again keeps the figures that it measured."""
        speed, file = meter.summary(), self.run_dir / "efficiency.json"
        if not self.main or not (speed["timed_steps"] or not file.is_file()):
            return
        record = {"program": self.details["program"], "global_batch": self.config.global_batch}
        record |= {"precision": self.config.precision.value, **speed}
        try:
            write_json(file, record)
        except OSError as error:
            log.warning("%s; the training itself is complete", error)
        log.info("TSpeed (%s): %s it/s; TMem: %s", mode, speed["tspeed"], speed["tmem"])
