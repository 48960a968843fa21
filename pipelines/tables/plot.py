"""The panels of a table: curves of its trainings with the spread over seeds, or one column against another."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.tables.cells import cells_of, why_not
from pipelines.tables.run import Desk
from pipelines.tables.spec import Curve, Table

_COLORS = ("#3b82d6", "#e2711d", "#2f9e62", "#b35cc9", "#c29a1f", "#d9495b")


@dataclass(frozen=True)
class Panel:
    """picture: SVG text. note: what the lines are and what is missing."""

    title: str
    file: str
    picture: str
    note: str


def panels_of(desk: Desk, table: Table) -> list[Panel]:
    """A panel for each curve of the table of which something is measured or not: an empty one says why."""
    made = []
    for number, curve in enumerate(table.curves, 1):
        drawn = _scatter(desk, table, curve) if curve.x else _lines(desk, table, curve)
        made.append(Panel(curve.title, f"{table.name}-{number}.svg", *drawn))
    return made


def mean_and_spread(runs: list[list[tuple[int, float]]]) -> np.ndarray:
    """(4, n): step, mean, mean - s, mean + s, at the steps that all runs have; s: standard deviation, 0 for one run."""
    tables = [dict(run) for run in runs]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    values = np.array([[t[s] for s in steps] for t in tables], dtype=np.float64)
    mean = values.mean(axis=0)
    spread = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(mean)
    return np.array([steps, mean, mean - spread, mean + spread])


def _lines(desk: Desk, table: Table, curve: Curve) -> tuple[str, str]:
    from pipelines.training.log import read_metrics

    canvas, axes = _canvas()
    notes = []
    for n, row in enumerate(r for r in table.rows if r.name in curve.rows):
        runs = []
        for name in table.curve_steps.get((row.name, curve.title), ()):
            step = table.steps[name]
            state = desk.state(step)
            points = [
                (r["step"], r[curve.key]) for r in read_metrics(step.folder) if r.get(curve.key) is not None
            ]
            if state.word == "done" and points:
                runs.append(points)
            else:
                notes.append(
                    f"{name}: {f'{curve.key} is not logged' if points == [] and state.word == 'done' else why_not(desk, table, step)[0]}"
                )
        if runs:
            steps, mean, low, high = mean_and_spread(runs)
            label = f"{row.name} (n = {len(runs)})" if len(table.seeds) > 1 else row.name
            axes.plot(steps, mean, label=label, color=_COLORS[n % len(_COLORS)], marker="o", markersize=3)
            axes.fill_between(steps, low, high, color=_COLORS[n % len(_COLORS)], alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    band = "line: mean, band: standard deviation over seeds" if len(table.seeds) > 1 else "one seed"
    return _drawn(canvas, axes), "; ".join([band, *notes])


def _scatter(desk: Desk, table: Table, curve: Curve) -> tuple[str, str]:
    canvas, axes = _canvas()
    cells, notes = cells_of(desk, table), []
    for n, row in enumerate(table.rows):
        x, y = cells[row.name, curve.x], cells[row.name, curve.y]
        if x.mean is None or y.mean is None:
            notes.append(f"{row.name}: {x.text if x.mean is None else y.text}")
            continue
        error = {"xerr": np.std(x.values, ddof=1)} if len(x.values) > 1 else {}
        error |= {"yerr": np.std(y.values, ddof=1)} if len(y.values) > 1 else {}
        axes.errorbar(x.mean, y.mean, label=row.name, color=_COLORS[n % len(_COLORS)], marker="o", **error)
    axes.set_xlabel(curve.x)
    axes.set_ylabel(curve.y)
    return _drawn(canvas, axes), "; ".join(["bars: standard deviation over seeds", *notes])


def _canvas() -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 3.2), layout="constrained")
    return canvas, canvas.subplots()


def _drawn(canvas: Any, axes: Any) -> str:
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    else:
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", transform=axes.transAxes)
    picture = io.StringIO()
    canvas.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    return picture.getvalue()
