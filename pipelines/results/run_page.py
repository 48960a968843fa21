"""The sections of a page about runs: how far, curves, videos that play, samples by class, settings, versions."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from data.video import probe, read_frames
from eval.fidelity import METRICS
from pipelines.results.page import (
    COLORS,
    LINES,
    Figure,
    Key,
    Link,
    Section,
    Series,
    Styles,
    clip_figure,
    curve_figure,
    has_points,
    is_number,
    series_of,
    video_figure,
    write_page,
)
from pipelines.results.runs import Run, read_manifest
from pipelines.scores import read_records, row_of

TITLES = {
    "val/loss": "loss on held-out clips (EMA, and raw: the weights that are trained)",
    "loss/rec": "mean absolute error of the reconstruction",
    "loss/mse": "mean squared error of the predicted noise",
    "gan/weight": "adaptive weight of the adversarial term",
    "eff/tspeed": "TSpeed, steps per second",
    "eff/device_mib": "TMem, memory in use on the device, MiB",
    "skipped": "updates skipped: loss or gradient not finite",
    "loss_at_t/": "error by timestep",
    "gan/logits_": "logits of the discriminator",
}
TOGETHER = ["loss_at_t/", "gan/logits_", "val/loss"]  # one chart each
WORDS = {
    "val": "original | reconstruction | error x 4, held-out clips",
    "real": "real clips",
    "samples": "generated",
}
MADE_WITH = ("videos", "weights", "device", "time", "commit")  # of a score, in one column
FIRST = ("val/", "loss", "gan/")
TILES = [  # metric, title, format; the first three that a run has
    ("val/psnr", "PSNR, held out", "{:.2f} dB"),
    ("val/ssim", "SSIM, held out", "{:.4f}"),
    ("val/loss", "loss, held out", "{:.4g}"),
    ("loss", "loss", "{:.4g}"),
    ("loss/rec", "loss, reconstruction", "{:.4g}"),
    ("loss/mse", "loss, mean squared error", "{:.4g}"),
]
for _metric in METRICS:
    TITLES[f"val/{_metric.key}"] = (
        f"{_metric.label}, on held-out clips (EMA, and raw: the weights that are trained)"
    )
    TOGETHER.append(f"val/{_metric.key}")
FILES = ("config.yaml", "env.json", "metrics.jsonl", "speed.jsonl", "efficiency.json", "media", "samples")
PREVIEWS = 4  # shown of a kind: the newest, the first, and some between
SAMPLES = 64  # generated videos read at most, or one per class
FRAMES = 17  # of a generated video, from its beginning
PIXELS = 128  # of its longer side; larger videos are made smaller


class Budget:
    """Counts the bytes of videos on the page, and names what was left out."""

    def __init__(self, limit: float):
        self.limit, self.used = limit, 0
        self.left_out: list[str] = []

    def figure(self, show: Callable[..., Figure], path: Path, *words: Any, notes: list[str]) -> Figure | None:
        """show(path, *words) if the video can be read and still fits; otherwise None, and it is named."""
        try:
            figure = show(path, *words)
        except ValueError as error:
            notes.append(f"{path.name} cannot be read ({error}).")
            return None
        size = len(figure.source)
        if self.used + size > self.limit:
            self.left_out.append(f"{path.name} ({size / 1e6:.1f} MB)")
            return None
        self.used += size
        return figure

    def note(self) -> str:
        """What was left out, in words."""
        if not self.left_out:
            return ""
        more = f" and {len(self.left_out) - 12} more" if len(self.left_out) > 12 else ""
        names = ", ".join(self.left_out[:12])
        return f"Left out, because the page is limited to {self.limit / 1e6:g} MB (--max-mb): {names}{more}."


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its folder's name, or the whole path where two share one."""
    names = [r.folder.resolve().name for r in runs]
    return [n if names.count(n) == 1 else str(r.folder) for n, r in zip(names, runs, strict=True)]


def keys(runs: Sequence[Run]) -> list[str | Key]:
    """The headings of a table with a column for each run, in the colour that it has in all charts."""
    return ["", *(Key(label, COLORS[n % len(COLORS)]) for n, label in enumerate(labels(runs)))]


def side_by_side(columns: Sequence[dict[str, Any]], missing: str = "") -> list[tuple[Any, ...]]:
    """Rows (key, value in each column) of several runs."""
    every = dict.fromkeys(itertools.chain(*columns))
    return [(key, *[column.get(key, missing) for column in columns]) for key in every]


# ---- how far, how good ------------------------------------------------------------------------------------


def facts(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, note) of a run: how far, how good, how fast."""
    state = "finished" if run.finished else "in progress, or stopped"
    batch = run.settings.get("global_batch", 0)
    found = [("step", f"{run.step:,} of {run.steps:,}", f"{state}; {run.step * int(batch):,} clips seen")]
    # The three most telling metrics that it has
    for name, title, form in TILES:
        last = run.last(name)
        if last and len(found) < 4:
            found.append((title, form.format(last[1]), f"at step {last[0]:,}"))
    # Speed and memory; a run in progress has no efficiency.json yet, its last log line counts
    speed, logged = run.speed_text("it/s"), run.last("eff/tspeed")
    if speed is None and logged:
        speed = f"{logged[1]:.3f} it/s"
    how = f"global batch {batch}, mode {run.efficiency.get('mode', 'unknown')}"
    found.append(("TSpeed", speed or "not measured", how))
    return [*found, ("TMem", run.memory_text(), "memory of the GPU")]


def overview(runs: Sequence[Run]) -> Section:
    """Tiles of one run; of several what differs between their settings, and their tiles as a table."""
    if len(runs) == 1:
        return Section("Overview", tiles=facts(runs[0]))
    rows, columns = [], []
    for key, *values in side_by_side([run.settings for run in runs], "no such key"):
        if key != "run_dir" and len(set(map(str, values))) > 1:
            rows.append((key, *map(str, values)))
    for run in runs:
        columns.append({name: f"{value} ({note})" for name, value, note in facts(run)})
    text = "" if rows else "All settings are equal."
    return Section("Overview", text, header=keys(runs), rows=[*rows, *side_by_side(columns)], dim_from=99)


def scores(paths: Sequence[Path]) -> Section:
    """The judges' records, each with its protocol and the paper's number where one belongs to it."""
    table = pd.DataFrame(map(row_of, read_records(paths)))
    # What only a doubter reads goes into one column, and a column without any text goes.
    made = table[list(MADE_WITH)].apply(lambda row: ", ".join(filter(None, row)), axis=1)
    table = table.drop(columns=list(MADE_WITH)).assign(**{"made with": made})
    table = table.loc[:, (table != "").any()]
    return Section("Scores", header=list(table.columns), rows=table.values.tolist())


# ---- curves ----------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> Section:
    """A chart for each logged quantity, a line for each run."""
    # Which charts there are: names that belong together share one
    records = [[*run.metrics, *run.speed] for run in runs]
    logged: dict[str, Any] = {}
    for record in itertools.chain(*records):
        logged |= record
    charts: dict[str, list[str]] = {}
    logged.pop("step", None)
    for name in logged:
        group = next((group for group in TOGETHER if name.startswith(group)), name)
        charts.setdefault(group, []).append(name)

    def place(chart: str) -> int:
        return next((n for n, start in enumerate(FIRST) if chart.startswith(start)), len(FIRST))

    # Each with its lines
    figures = []
    for chart in sorted(charts, key=place):
        lines, styles = lines_of(chart, sorted(charts[chart]), records, labels(runs))
        if has_points(lines):
            title = TITLES.get(chart)
            caption = f"{chart.rstrip('/_')}: {title}" if title else chart
            log_y = chart.startswith(("loss", "grad_norm"))
            figures.append(curve_figure(lines, caption, log_y, styles))

    # What the curves leave out
    texts = []
    for label, run in zip(labels(runs), runs, strict=True):
        if gaps := not_finite(run):
            texts.append(f"Not finite in {label}, and left out of the curves: {gaps}.")
    text = " ".join(texts) or ("" if figures else "Nothing is logged yet.")
    return Section("Curves", text, figures=figures)


def lines_of(
    chart: str, names: list[str], records: Sequence[list[dict]], runs: list[str]
) -> tuple[Series, Styles]:
    """The lines of a chart and their looks: one per run and name; a run has one colour in all charts."""
    lines: Series = {}
    styles: Styles = {}
    for n, (run, rows) in enumerate(zip(runs, records, strict=True)):
        found = series_of(rows, *names)
        for m, name in enumerate(names):
            # The name of a line is what tells it from the others
            part = name.removeprefix(chart)
            if chart.startswith("val/") and len(names) > 1:
                part = part.removeprefix("_") or "EMA"
            line = " ".join(filter(None, [run if len(runs) > 1 else "", part])) or name
            lines[line] = found.get(name, ((), ()))
            color, kind = (n, m) if len(runs) > 1 else (m, 0)
            styles[line] = COLORS[color % len(COLORS)], list(LINES)[kind % len(LINES)]
    return lines, styles


def not_finite(run: Run) -> str:
    """The logged values of a run that are no numbers: how often and since when; "" when there are none."""
    gaps: dict[str, list[int]] = {}
    for record in run.metrics:
        for name, value in record.items():
            if not is_number(value):
                gaps.setdefault(name, []).append(int(record["step"]))
    return "; ".join(f"{name} {len(at):,} times, first at step {at[0]:,}" for name, at in gaps.items())


# ---- videos ----------------------------------------------------------------------------------------------


def previews(run: Run) -> dict[str, dict[int, Path]]:
    """The previews in a run's folder: kind -> step -> file; -1 is the step of a file without one."""
    kinds: dict[str, dict[int, Path]] = {}
    for path in sorted((run.folder / "media").glob("*.mp4")):
        kind, _, step = path.stem.rpartition("_")
        known = step.isdecimal() and bool(kind)
        kinds.setdefault(kind if known else path.stem, {})[int(step) if known else -1] = path
    return kinds


def spread(steps: Sequence[int]) -> list[int]:
    """At most PREVIEWS of the steps, newest first: the newest, the first and some between."""
    count = min(PREVIEWS, len(steps))
    chosen = {round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)} | {len(steps) - 1}
    return [steps[i] for i in sorted(chosen, reverse=True)]


def media(run: Run, label: str, budget: Budget) -> Section:
    """The run's own previews: of each kind the newest, the first and some between."""
    kinds, figures, notes = previews(run), [], []
    for kind, paths in kinds.items():
        words = WORDS.get(kind, kind) + tiles_in_words(run, kind)
        for step in spread(sorted(paths)):
            when = f"step {step:,}: " if step >= 0 else ""
            figures.append(budget.figure(video_figure, paths[step], when + words, notes=notes))
        if len(paths) > PREVIEWS:
            notes.append(f"{PREVIEWS} of {len(paths)} {kind} videos are shown; all are in media/.")
    text = " ".join(notes) if kinds else "The run has written no videos yet."
    return Section(f"Videos of {label}", text, figures=list(filter(None, figures)))


def tiles_in_words(run: Run, kind: str) -> str:
    """The classes of the tiles of a training's grid, and of real clips the videos, row by row; "" where neither is known."""
    count = min(int(run.settings.get("samples.num_videos", 0)), 36)
    names, videos = run.checkpoint.get("class_names") or [], run.real_clips if kind == "real" else []
    if kind not in ("real", "samples") or not (count and (names or videos)):
        return ""
    # A tile's class, its video, or both
    tiles = [str(names[i % len(names)]) if names else "" for i in range(count)]
    for i, video in enumerate(videos[:count]):
        tiles[i] = f"{tiles[i]} ({video})" if names else video
    # The grid is as square as it can be
    columns = int(np.ceil(np.sqrt(count)))
    rows = [", ".join(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    return f"; row by row: {' | '.join(rows)}"


def compared(runs: Sequence[Run], budget: Budget) -> list[Section]:
    """A table step x run for each kind of preview: what lies in one row is of one step, and the same clips."""
    found, sections = [previews(run) for run in runs], []
    real = [kinds.pop("real", {}).get(-1) for kinds in found]
    for kind in dict.fromkeys(itertools.chain(*found)):
        # The rows: steps that all runs have, or, without any, those that one of them has
        files = [kinds.get(kind, {}) for kinds in found]
        shared = set.intersection(*map(set, files)) or set.union(*map(set, files))
        rows: dict[str, list[Path | None]] = {"real": real} if kind == "samples" and any(real) else {}
        for step in spread(sorted(shared)):
            rows[f"step {step:,}" if step >= 0 else kind] = [steps.get(step) for steps in files]
        # Their cells: a video, or why there is none
        grid, notes = [], []
        for name, paths in rows.items():
            cells: list[Figure | str] = []
            for path in paths:
                words = f"{name}: {path.parent.parent.name}" if path else ""
                shown = budget.figure(video_figure, path, words, notes=notes) if path else "none"
                cells.append(shown or "left out")
            grid.append((name, cells))
        words = WORDS.get(kind, kind) + tiles_in_words(runs[0], kind)
        text = " ".join([f"{words[0].upper()}{words[1:]}.", *notes])
        sections.append(Section(f"Videos: {kind}", text, header=keys(runs), grid=grid))
    return sections


def gallery(folder: Path, budget: Budget) -> Section:
    """Generated videos of a folder of pipelines.sample, by class. Raises ValueError without a readable manifest.json."""
    names, classes, settings = read_manifest(folder)
    found, notes = [], []
    for index in chosen(len(names), len(classes)):
        path = folder / Path(names[index]).name  # a manifest does not lead out of its folder
        caption = f"{classes[index % len(classes)]}, {path.name}" if classes else path.name
        found.append(budget.figure(example, path, caption, settings["fps"], notes=notes))
    figures = list(filter(None, found))
    kind = f"{len(classes)} classes" if classes else "no classes"
    how = f"{settings.get('sampler')}, {settings.get('num_steps')} steps, guidance {settings.get('guidance_scale')}"
    text = f"{len(figures)} of {len(names)} generated videos, {kind}; {how}. At most their first {FRAMES} frames."
    return Section("Samples", " ".join([text, *notes[:3]]), figures=figures)


def chosen(videos: int, classes: int) -> list[int]:
    """Numbers of the videos to show, class by class."""
    if not classes:
        return list(range(min(videos, SAMPLES // 4)))
    each, numbers = max(1, min(4, SAMPLES // classes)), []
    for label in range(classes):
        numbers += range(label, videos, classes)[:each]
    return numbers


def example(path: Path, caption: str, fps: float) -> Figure:
    """One video as a tile. Raises ValueError when it cannot be read."""
    frames = np.asarray(read_frames(path, range(min(FRAMES, probe(path).num_frames))))
    return clip_figure(thinned(frames), caption, fps, PIXELS, "example")


def thinned(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, 3) made smaller by a whole factor, the mean of each block, until no side is above PIXELS."""
    T, H, W, _ = frames.shape
    n = min(-(-max(H, W) // PIXELS), H, W)
    blocks = frames[:, : H // n * n, : W // n * n].reshape(T, H // n, n, W // n, n, 3)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


# ---- where it comes from ----------------------------------------------------------------------------------


def settings(run: Run) -> Section:
    """All settings of a run."""
    rows = [(key, str(value)) for key, value in run.settings.items()]
    return Section("Settings", header=("key", "value"), rows=rows, folded=f"all {len(rows)} settings")


def origin(runs: Sequence[Run]) -> Section:
    """Versions, commit, starts, and the digests of the newest checkpoint."""
    columns = []
    for run in runs:
        found = dict(run.versions)
        if run.starts:
            first, last = run.starts[0].get("time", ""), run.starts[-1].get("time", "")
            found["program"] = run.program
            found["starts"] = f"{len(run.starts)}, first {first}, last {last}"
        for name, value in run.checkpoint.get("data", {}).items():
            found[f"data: {name}"] = str(value)
        if "step" in run.checkpoint:
            found["newest checkpoint"] = f"step {run.checkpoint['step']:,}"
        for name, digest in run.checkpoint.get("files", {}).items():
            if name.endswith(".safetensors"):
                found[f"sha256 of {name}"] = digest[:16]
        columns.append(found)
    folded = "versions, starts, digests"
    return Section(
        "Where it comes from", header=keys(runs), rows=side_by_side(columns), dim_from=99, folded=folded
    )


def files(runs: Sequence[Run], records: Sequence[Path], out: Path) -> Section:
    """Links to what the page was made from, relative to the page."""
    paths = []
    for label, run in zip(labels(runs), runs, strict=True):
        paths += [(label, run.folder / name) for name in FILES]
    paths += [("records", path) for path in records]
    rows = []
    for label, path in paths:
        if path.exists():
            relative = Path(os.path.relpath(path.resolve(), out.resolve().parent))
            rows.append((label, Link(path.name, quote(relative.as_posix()))))
    return Section("Files", header=("of", "file"), rows=rows, dim_from=99)


def write_run_page(
    out: Path, runs: Sequence[Run], samples: Path | None, records: Sequence[Path], limit: float
) -> None:
    """Write the page of one run or several. samples: a folder of pipelines.sample; limit: bytes of videos."""
    budget = Budget(limit)
    # What a reader wants to see first: how far, the scores, the curves
    parts = [overview(runs)]
    parts += [scores(records)] if records else []
    parts += [curves(runs)]
    # Videos: the previews of the training, then what was generated after it
    parts += compared(runs, budget) if len(runs) > 1 else [media(runs[0], labels(runs)[0], budget)]
    for folder in [samples] if samples else [run.folder / "samples" for run in runs]:
        if samples or (folder / "manifest.json").is_file():
            parts.append(gallery(folder, budget))
    # For those who want to know how it was made
    parts += [settings(runs[0])] if len(runs) == 1 else []
    parts += [origin(runs), files(runs, records, out)]
    subtitle = f"Made from {', '.join(str(run.folder) for run in runs)}. {budget.note()}"
    write_page(out, ", ".join(labels(runs)), subtitle, parts)
