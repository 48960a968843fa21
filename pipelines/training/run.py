"""One start of a training in its run folder: resume, hand out batches, log, save, stop on a signal.

A program shows its loop and asks for the rest here:

    with TrainingRun(trainer, clips, "train_vae", "online", info) as run:
        for _ in run.steps():
            trainer.train_step(run.batches)
            run.end_step()
            if run.due(config.log_every):
                run.log()
            if run.due(config.save_every) or run.stopping:
                run.save()
        run.export("vae", trainer.ema.module.save_pretrained)
"""

import contextlib
import errno
import logging
import math
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.core.files import write_json
from data.loader import StepBatches, make_loader
from data.progress import Progress
from eval.records import git_commit
from pipelines.efficiency import Meter
from pipelines.training.checkpoints import Checkpoints, export_folder, recover
from pipelines.training.config import flatten
from pipelines.training.distributed import Later, any_process, largest_of, matrix_products, same_everywhere
from pipelines.training.folder import Stopped, check_run, open_run, stop_on_signal
from pipelines.training.log import MetricLog, speed_line, step_line
from pipelines.training.quarantine import Quarantine
from pipelines.training.trackers import plain_settings, start_trackers

log = logging.getLogger(__name__)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without flock say
SPIKE = 100.0  # a loss this many times the recent one is reported


class TrainingRun:
    """A context manager: enters the run folder and resumes from the newest undamaged checkpoint.

    One process group at a time trains in a run folder. Attributes: `batches`, the endless batches of this process;
    `metrics`, a MetricLog; `stopping`, whether a signal asked for a stop.

    trainer: a Trainer. stream: endless samples, as make_loader takes them. mode: "online" or "cached", for the speed record. info:
    goes into the manifest of each checkpoint. weights: of the evaluation networks in use, for `open_run`.
    Raises ValueError if another process trains in the folder, if the settings are not those of the run, or if too many
    updates or videos fail; OSError if a checkpoint cannot be written; Stopped, after a signal, at the end of `with`.
    """

    def __init__(
        self,
        trainer: Any,
        stream: Any,
        program: str,
        mode: str,
        info: dict[str, Any],
        weights: dict[str, dict] | None = None,
    ):
        self.trainer, self.stream, self.mode, self.weights = trainer, stream, mode, weights
        self.config, self.accelerator = trainer.config, trainer.accelerator
        self.main = self.accelerator.is_main_process
        self.folder = Path(self.config.run_dir)
        self.details = {"program": program, "git": git_commit(), "config": flatten(self.config), **info}
        self.checkpoints = Checkpoints(self.folder, self.config.keep_checkpoints)
        self.stopping = False
        self.good: int | None = None  # the newest checkpoint that was followed by a finite step
        self.untried: int | None = None  # a newer checkpoint, not followed by a step yet
        self.recent_loss: float | None = None
        self._stop_votes: Later | None = None

    # ---- start and end -----------------------------------------------------------------------------------

    def __enter__(self) -> "TrainingRun":
        with contextlib.ExitStack() as stack:
            # The folder is ours, and the trainer stands where its newest checkpoint was.
            self._lock(stack)
            self.inode = self._inode()
            self.untried = self._resume()
            # Records after the checkpoint belong to steps that are made again; without a checkpoint that is all of them.
            last = self.trainer.step if self.untried is not None else -1
            # Logs, trackers and speed
            with_tb = "tensorboard" in self.config.log_with
            trackers = start_trackers(self.accelerator, self.config, self.folder)
            settings = plain_settings(self.config)
            self.metrics = MetricLog(self.folder, last, self.main, with_tb, trackers, settings)
            stack.callback(self.metrics.close)
            self.meter = Meter(self.accelerator.device, self.mode, self.config.global_batch)
            # Data from the sample after the last one that counted
            self.lost = Quarantine(
                self.folder, self.stream, self.config.source.max_failed_share, self.accelerator
            )
            self.batches = self._batches()
            stack.callback(self.batches.close)
            steps, done = self.config.steps, self.trainer.step
            if done >= steps:
                log.info(
                    "finished before: step %d of %d; steps=%d makes the run longer", done, steps, 2 * done
                )
            # Around the loop: progress, exact matrix products if asked for, signals
            self.bar = Progress(steps, self.details["program"], "step", self.main, done, once=True)
            stack.callback(self.bar.close)
            stack.enter_context(matrix_products(self.config))
            self.received_signal = stack.enter_context(stop_on_signal())
            self.started, self.began_at = time.monotonic(), done
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        # What was opened is closed, then a stop on a signal becomes an exit code.
        with self._stack:
            number = 0
            if kind is None and self.stopping and self.trainer.step < self.config.steps:
                number = largest_of(self.accelerator, self.received_signal())
        if number:
            name = signal.Signals(number).name
            log.info("stopped by %s after step %d; the same command resumes", name, self.trainer.step)
            self.accelerator.wait_for_everyone()
            raise Stopped(number)

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Take the run folder for this process group and write its settings there."""
        if not self.main:
            return
        # Other settings are refused before anything is written.
        check_run(self.folder, self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            # Where the system has no flock, the lock is a file with its owner's name, and outlives him.
            stale = (
                f"; if its machine was lost, remove {lock.lock_file}"
                if Path(lock.lock_file).read_bytes()
                else ""
            )
            raise ValueError(
                f"run_dir={self.folder}: another process is training here; wait for it or stop it{stale}"
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            raise OSError(
                f"run_dir={self.folder}: its file system has no locks ({error}), so a second training could overwrite this one; "
                "mount it with locks (Lustre: -o flock; NFS: with lockd), or choose another"
            ) from error
        stack.callback(lock.release)
        # A run whose settings change on purpose goes back to before its skipped updates. The new settings are written after
        # that: a start that is killed in between begins the same again.
        if check_run(self.folder, self.config):
            healthy = self.checkpoints.latest(healthy=True)
            self.checkpoints.set_aside_after(-1 if healthy is None else healthy)
        # The settings of this start, and what a killed one left half done.
        open_run(self.folder, self.config, self.details["program"], self.weights)
        recover(self.folder)

    def _resume(self) -> int | None:
        """Load the newest undamaged checkpoint and return its step; None if there is none."""
        # The main process chooses, so that all load the same one.
        if self.main:
            self.checkpoints.clean()
        newest = self.checkpoints.latest() if self.main else None
        step = same_everywhere(self.accelerator, newest)
        if step is None:
            return None
        # The checkpoint must be of this data, these parts and this beginning.
        before, now, folder = self.checkpoints.manifest(step), self.details, self.checkpoints.path(step)
        if before.get("data") != now.get("data"):
            log.warning(
                "the data set has changed since the checkpoint: %s, now %s",
                before.get("data"),
                now.get("data"),
            )
        for key in self.trainer.must_not_change:
            if before.get(key) != now[key]:
                raise ValueError(
                    f"run_dir={self.folder} was trained with {key}={before.get(key)}, now {now[key]}"
                )
        began, begins = before.get("start_sha256"), now["start_sha256"]
        if None not in (began, begins) and began != begins:
            raise ValueError(
                f"run_dir={self.folder} began with other weights (sha256 {began[:12]}; those of init_from are "
                f"{begins[:12]} now); remove the run to start from these, or restore the old ones"
            )
        # Weights, optimizers, EMA and counters.
        try:
            self.trainer.load(folder)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint {folder} holds more than tensors and numbers and was not loaded: {error}"
            ) from error
        log.info("resuming %s at step %d", self.folder, step)
        return step

    # ---- the steps ---------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the number of each step that is left, until config.steps or a signal; then write the speed record."""
        while self.trainer.step < self.config.steps and not self.stopping:
            yield self.trainer.step
        self._write_speed()

    def _batches(self) -> Iterator[Any]:
        # A loader that begins at the sample after the last one that counted
        config, accelerator = self.config, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        numbers = StepBatches(self.trainer.step, config.global_batch, config.micro_batch, rank, world)
        # Its batches; the time that they take is known, and so are the videos that others stand in for.
        with contextlib.closing(make_loader(self.stream, numbers, config.workers)) as loader:
            while True:
                with self.meter.data_wait():
                    batch = next(loader)
                if "failed" in batch:
                    self.trainer.add_to_log({"data/substituted": (batch["failed"] > 0).double()})
                    self.lost.record(batch)
                yield batch

    def end_step(self) -> None:
        """Count the step, ask for signals, and end a training that has diverged.

        Raises ValueError after config.max_skipped updates in a row that were not finite.
        """
        # Progress, and whether to stop: each process may have got the signal.
        self.meter.step()
        self.bar.update()
        received = bool(self.received_signal())
        if self.accelerator.num_processes == 1:
            self.stopping = received
        else:
            # The votes of the step before have arrived by now: nobody waits for the device.
            self.stopping = self._stop_votes is not None and self._stop_votes.read() > 0
            self._stop_votes = any_process(self.accelerator, received)
        # Verdicts on the steps before: a checkpoint is good once a finite step has followed it.
        config, trainer = self.config, self.trainer
        read_now = self.due(config.log_every) or self.due(config.save_every) or self.stopping
        trainer.count_skipped(read_now)
        if self.untried is not None and trainer.last_finite >= self.untried:
            self.good, self.untried = self.untried, None
        if trainer.skipped_in_row >= config.max_skipped:
            self._give_up(f"{config.max_skipped} steps in a row had a non-finite loss or gradient")

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: never), and after the last one, happens now."""
        step = self.trainer.step
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def log(self) -> None:
        """Write the means since the last call, the learning rate, and speed and memory."""
        # Exact values, and what differs from run to run in a file of its own.
        step, values = self.trainer.step, self.trainer.flush_window()
        self._warn_of_a_spike(values)
        values |= {"learning_rate": self.trainer.last_learning_rate}
        self.metrics.scalars(step, values)
        timing = self.meter.scalars() | {"speed/wall_s": time.monotonic() - self.started}
        self.metrics.scalars(step, timing, timing=True)
        # For people: a line, or the progress bar.
        if self.main and self.bar.disable:
            passed, left = step - self.began_at, self.config.steps - step
            left_s = timing["speed/wall_s"] / passed * left if passed else None
            log.info("%s", step_line(step, self.config.steps, values, timing, left_s))
        shown = {name: f"{values[name]:.4g}" for name in ("loss", "loss/rec", "skipped") if name in values}
        self.bar.set_postfix(shown)
        self.lost.check()

    def _warn_of_a_spike(self, values: dict[str, float]) -> None:
        """A loss that is orders of magnitude above the recent one often comes before the first NaN."""
        loss, recent = values.get("loss/rec", values.get("loss")), self.recent_loss
        if loss is None or not math.isfinite(loss):
            return
        if recent is not None and loss > SPIKE * recent > 0:
            log.warning(
                "step %d: the loss %.3g is %.0f times the recent one; does the training diverge?",
                self.trainer.step,
                loss,
                loss / recent,
            )
        # The recent loss falls at once and rises slowly.
        self.recent_loss = loss if recent is None else min(loss, 0.9 * recent + 0.1 * loss)

    # ---- what stays --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint. Raises ValueError if the weights are not finite, OSError if it cannot be written."""
        # Logs first: a checkpoint counts on them.
        self.meter.pause()
        self.metrics.sync()
        step, trainer = self.trainer.step, self.trainer
        # Refused: weights that are not numbers, and a folder that was moved away.
        if any_process(self.accelerator, not trainer.is_finite()).read() > 0:
            self._give_up(f"step {step}: the weights are not finite; they are not saved")
        # of the main process, which writes: others may start before it has made the folder
        if any_process(self.accelerator, self.main and self._inode() != self.inode).read() > 0:
            raise OSError(
                f"run_dir={self.folder}: moved or replaced since the start; nothing was written there"
            )
        # Written with what the manifest says of it; it counts as good once a finite step has followed.
        details = trainer.progress() | {"skipped_in_row": trainer.skipped_in_row} | self.details
        good = self.good if self.good is not None else self.untried
        self.checkpoints.save(step, trainer.save, details, self.accelerator, good)
        if not trainer.skipped_in_row:
            self.untried = step

    def export(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write(folder)` fill run_dir / name with the EMA model while the run folder is still locked."""
        info = self.trainer.progress() | {"steps": self.config.steps}
        # An export of this very step is an old one if this start trained the step again.
        trained = self.trainer.step > self.began_at
        if self.main and export_folder(self.folder / name, write, info, trained):
            log.info("EMA weights: %s", self.folder / name)
        self.accelerator.wait_for_everyone()

    def _give_up(self, reason: str) -> None:
        step = self.good if self.good is not None else self.untried
        good = self.checkpoints.path(step) if step is not None else "none yet"
        raise ValueError(
            f"{reason}; last good checkpoint: {good}; resume from there with a lower rate, e.g. "
            f"resume.change=learning_rate learning_rate={self.config.learning_rate / 10:g} (grad_clip, warmup_steps and "
            "precision=fp32 may be changed the same way)"
        )

    def _inode(self) -> tuple[int, int]:
        """Identify the folder behind run_dir: a training stays in the one in which it began."""
        try:
            status = self.folder.stat()
        except OSError:
            return 0, 0
        return status.st_dev, status.st_ino

    def _write_speed(self) -> None:
        """Write efficiency.json; a finished run that is started again keeps the figures that it measured."""
        speed, file = self.meter.summary(), self.folder / "efficiency.json"
        if not self.main or not (speed["timed_steps"] or not file.is_file()):
            return
        record = {"program": self.details["program"], "global_batch": self.config.global_batch}
        record |= {"precision": self.config.precision.value, **speed}
        try:
            write_json(file, record)
        except OSError as error:
            log.warning("%s; the training itself is complete", error)
        log.info("%s", speed_line(speed, self.mode))
