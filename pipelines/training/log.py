"""Where numbers and pictures of a run go: metrics.jsonl (exact), TensorBoard and other trackers (to look at), console lines.

Logging never stops a training: what cannot be written is reported once, counted and left out.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.core.files import append_line, fsync
from data.core.lazy import lazy
from data.encode import encode_webp
from data.progress import duration
from pipelines.training.config import flatten
from pipelines.training.settings import Init

protocol = lazy("tensorboard.compat.proto.summary_pb2")
tb = lazy("torch.utils.tensorboard")
vae_registry = lazy("vae.registry")

__all__ = [
    "MetricLog",
    "box",
    "command",
    "end_of_stage_one",
    "end_of_stage_two",
    "read_metrics",
    "speed_line",
    "step_line",
]
log = logging.getLogger(__name__)


class MetricLog:
    """Append-only metrics of the main process. Opening it at `step` drops what a later, lost step had written.

    So the file after a resume equals that of a run which was never interrupted. A record that cannot be written is
    counted; the first one of each file is reported at once, the counts at the end.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        enabled: bool = True,
        tensorboard: bool = True,
        trackers: Sequence[Any] = (),
        settings: dict[str, Any] | None = None,
    ):
        """step: the last one whose records stay; -1: none do. trackers: of accelerate, begun. settings: flat, for TensorBoard."""
        self.enabled, self.trackers = enabled, trackers
        self.lost: dict[str, int] = {}  # records, by file
        self.file, self.speed_file = run_dir / "metrics.jsonl", run_dir / "speed.jsonl"
        self.writer: Any = None
        if not enabled:
            return
        for file in (self.file, self.speed_file):
            _cut(file, step)
        if not tensorboard:
            return
        with self._guard("tb"):
            self.writer = tb.SummaryWriter(str(run_dir / "tb"), purge_step=step + 1 if step > 0 else None)
        if settings:
            self._tensorboard(lambda writer: _write_settings(writer, settings))

    def scalars(self, step: int, values: dict[str, float | None], timing: bool = False) -> None:
        """Values at a step; None is written as null and left out of TensorBoard.

        timing: speeds and memory, which no two runs share, go to speed.jsonl; metrics.jsonl is reproducible.
        """
        if not self.enabled:
            return
        # The exact record: what is not a finite number is null.
        record: dict[str, Any] = {"step": step}
        for name, value in values.items():
            record[name] = float(value) if value is not None and math.isfinite(value) else None
        file = self.speed_file if timing else self.file
        with self._guard(file.name):
            append_line(file, json.dumps(record))
        # The same to look at, in trackers and TensorBoard
        shown = {name: value for name, value in values.items() if value is not None}
        self._track(lambda tracker: tracker.log(shown, step=step))

        def add(writer: Any) -> None:
            for name, value in shown.items():
                writer.add_scalar(name, value, step)

        self._tensorboard(add)

    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 8) -> None:
        """frames (T, H, W, 3) uint8: an animated WebP among the images of TensorBoard; three frames side by side for trackers."""
        if not self.enabled:
            return
        # To trackers: a picture, as they take no video in common.
        strip = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]], axis=1)
        for tracker in self.trackers:
            if hasattr(tracker, "log_images"):  # accelerate's: some take a list, others one picture
                value = strip if tracker.name in ("aim", "clearml") else [strip]
                with self._guard(tracker.name, Exception):
                    tracker.log_images({name: value}, step=step)
        # To TensorBoard: an animated picture.
        image = protocol.Summary.Image(
            height=frames.shape[1],
            width=frames.shape[2],
            colorspace=3,
            encoded_image_string=encode_webp(frames, fps),
        )
        summary = protocol.Summary(value=[protocol.Summary.Value(tag=name, image=image)])
        self._tensorboard(lambda writer: writer._get_file_writer().add_summary(summary, step))

    def sync(self) -> None:
        """Bring the records to the disk, before a checkpoint that counts on them."""
        for file in (self.file, self.speed_file):
            if self.enabled and file.is_file():
                with self._guard(file.name):
                    fsync(file)

    def close(self) -> None:
        """Says what was lost, if anything was."""
        if self.writer is not None:
            self._tensorboard(lambda writer: writer.close())
        if self.enabled:
            self._track(lambda tracker: tracker.finish())
        if self.lost:
            counts = ", ".join(f"{count} of {name}" for name, count in sorted(self.lost.items()))
            log.warning("records lost because they could not be written: %s", counts)

    def _tensorboard(self, write: Callable[[Any], None]) -> None:
        """Call write(writer). The writer's thread does not survive an error: from then on records are counted only."""
        if self.writer is None:
            if "tb" in self.lost:
                self.lost["tb"] += 1
            return
        before = self.lost.get("tb", 0)
        with self._guard("tb"):
            write(self.writer)
        if self.lost.get("tb", 0) > before:
            self.writer = None

    def _track(self, write: Callable[[Any], None]) -> None:
        """Call write(tracker) for each: whatever goes wrong at such a service costs its records only."""
        for tracker in self.trackers:
            with self._guard(tracker.name, Exception):
                write(tracker)

    @contextlib.contextmanager
    def _guard(self, name: str, kind: type[Exception] = OSError) -> Iterator[None]:
        """An OSError inside (a full disk) is reported once a file and counted; it does not end the training."""
        try:
            yield
        except kind as error:
            if name not in self.lost:
                place = self.file.with_name(name)
                log.warning("cannot write to %s (%s); training continues without it", place, error)
            self.lost[name] = self.lost.get(name, 0) + 1


def _write_settings(writer: Any, settings: dict[str, Any]) -> None:
    """The settings as a text, and as hyperparameters beside the numbers that a run is judged by."""
    writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in settings.items()))
    for summary in tb.summary.hparams(settings, dict.fromkeys(("loss", "val/psnr"), 0.0)):
        writer._get_file_writer().add_summary(summary)


def step_line(
    step: int, steps: int, values: dict[str, float], speed: dict[str, float], left_s: float | None
) -> str:
    """A log entry for people: `step 500/200000, loss 0.2134, lr 1e-04, 1.8 it/s, data wait 2 %, 12.3 GiB, about 30 h left`."""
    # How far, and how well
    parts = [f"step {step}/{steps}"]
    for name in ("loss", "loss/rec", "skipped"):
        if name in values:
            parts.append(f"{name.rpartition('/')[2]} {values[name]:.4g}")
    parts.append(f"lr {values['learning_rate']:.3g}")
    # How fast, with how much memory, and how long it will take
    if rate := speed.get("eff/tspeed"):
        parts.append(f"{rate:.3g} it/s" if rate >= 0.1 else f"{1 / rate:.3g} s/it")
    if "eff/data_wait_share" in speed:
        parts.append(f"data wait {speed['eff/data_wait_share']:.0%}".replace("%", " %"))
    parts.append(f"{speed.get('eff/reserved_mib', process_mib()) / 1024:.2f} GiB")
    if left_s:
        parts.append(f"about {duration(left_s)} left")
    return ", ".join(parts)


def process_mib() -> float:
    """The most memory that this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1 << 20)


def speed_line(summary: dict[str, Any], mode: str) -> str:
    """TSpeed and TMem of a run (pipelines.efficiency) for people."""
    if not summary["tspeed"]:
        return f"TSpeed ({mode}): not measured, the run had too few steps"
    text = f"TSpeed ({mode}): {summary['tspeed']:.3g} it/s, the median of {summary['timed_steps']} steps, data wait "
    text += f"{100 * summary['data_wait_share']:.0f} %"
    for kind, mib in summary["tmem"].items():
        text += "" if mib is None else f", {kind.removesuffix('_mib')} {mib / 1024:.2f} GiB"
    return text


def box(title: str, rows: dict[str, str]) -> None:
    """Log where things are and what comes next, at the end of a program."""
    width = max(map(len, rows))
    log.info("%s%s", title, "".join(f"\n    {name:<{width}}  {text}" for name, text in rows.items()))


def command(program: str, *settings: str, config: Any = None, keys: Sequence[str] = ()) -> str:
    """A command line to go on with: the settings, and those of `config` below `keys` that are not the defaults."""
    words = list(settings)
    if config is not None:
        usual = flatten(type(config)())
        for key, value in flatten(config).items():
            if key.startswith(tuple(keys)) and value != usual.get(key):
                words.append(f"{key}={_word(value)}")
    return f"python -m pipelines.{program} {shlex.join(words)}"


def end_of_stage_one(config: Any, vae: Path) -> None:
    """Say where the weights of a TrainVAEConfig's run are, and how to go on with them."""
    # How the next program finds the weights: a VAE of diffusers also needs its name.
    run = config.run_dir
    where = [f"vae.path={vae}"]
    if config.model.init is Init.weights and (adapted := vae_registry.adapted_class(config.model.init_from)):
        where.insert(0, f"vae.name={vae_registry.name_of(adapted.__name__)}")
    # The same videos: measured are those that the training held out, where it did; cached are all of them.
    share = config.source.val_fraction
    held_out = [f"source.val_fraction={share:g}", "held_out=true"] if share > 0 else []
    source = dataclasses.replace(config.source, val_fraction=type(config)().source.val_fraction)
    same = {"config": dataclasses.replace(config, source=source), "keys": ("source.", "clip.")}
    # A cache stores mirrored clips instead of drawing them.
    still = dataclasses.replace(same["config"], clip=dataclasses.replace(config.clip, flip=False))
    flips = ["cache.flips=true"] * config.clip.flip
    rows = {
        "EMA weights": str(vae),
        "curves": f"tensorboard --logdir {shlex.quote(run)}",
        "page": command("run_report", run),
        "measure": command("reconstruct", *where, *held_out, f"out={run}/reconstruct-{config.steps}", **same),
        "next": command("cache_latents", *where, *flips, **same | {"config": still}),
    }
    box(f"finished: {config.steps} steps", rows)


def end_of_stage_two(config: Any, pipeline: Path) -> None:
    """The same of a TrainLatteConfig's run."""
    rows = {
        "pipeline (EMA)": str(pipeline),
        "curves": f"tensorboard --logdir {shlex.quote(config.run_dir)}",
        "page": command("run_report", config.run_dir),
        "next": command("sample", f"pipeline={pipeline}"),
    }
    box(f"finished: {config.steps} steps", rows)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cut(file: Path, step: int) -> None:
    """Shorten a file to its records up to `step`. Needs no space: records stand in the order of their steps."""
    if not file.is_file():
        return
    kept = end = 0
    with open(file, "rb") as lines:
        for line in lines:
            end += len(line)
            if line.endswith(b"\n") and _step_of(line) <= step:
                kept = end  # a line before it that is no record stays; readers pass over it
    os.truncate(file, kept)


def _step_of(line: str | bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    # E.g. the half-written last line of a killed run
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


def read_metrics(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """All complete records of a run's metrics.jsonl or speed.jsonl; [] when there are none."""
    file = run_dir / name
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]
