"""The cells of a table: our values with their records, or why there are none; the paper's numbers; best and second."""

import json
import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.tables.run import Desk, State
from pipelines.tables.spec import Column, Row, Step, Table

BEST, SECOND = "best", "second"


@dataclass(frozen=True)
class Source:
    """One number of ours and where it comes from: `record`, seen from the table's folder. value None: `reason` says why."""

    step: str
    value: float | None
    reason: str = ""
    detail: str = ""
    record: str = ""
    git: str = ""
    protocol: str = ""
    label: str = ""


@dataclass
class Cell:
    """One row and column. mark, paper_mark: "best", "second" or ""."""

    row: Row
    column: Column
    sources: list[Source] = field(default_factory=list)
    blank: str = ""
    mark: str = ""
    paper_mark: str = ""

    @property
    def values(self) -> list[float]:
        """Ours, one a seed that is done."""
        return [s.value for s in self.sources if s.value is not None]

    @property
    def mean(self) -> float | None:
        """Over seeds; None when nothing is measured."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def label(self) -> str:
        """e.g. "random-feature score": then the number is no score of that name."""
        return next((s.label for s in self.sources if s.label and s.value is not None), "")

    @property
    def paper(self) -> str:
        """The paper's number as it prints it; "" when it has none."""
        number = self.row.paper.get(self.column.title)
        return "" if number is None else f"{number:.{self.column.digits}f}"

    @property
    def text(self) -> str:
        """The value, with its spread over seeds where there are several, else the reason."""
        if self.mean is None:
            return self.blank or self.sources[0].reason
        text = f"{self.mean:.{self.column.digits}f}"
        if len(self.values) > 1:
            spread = statistics.stdev(self.values)
            text += f" ± {spread:.{self.column.digits}f}"
        if len(self.sources) > 1:
            text += f" (n = {len(self.values)})"
        return text


def cells_of(desk: Desk, table: Table) -> dict[tuple[str, str], Cell]:
    """Every cell of the table by (row name, column title)."""
    made = {}
    for row in table.rows:
        for column in table.columns:
            cell = Cell(row, column, blank=row.blank.get(column.title, ""))
            for name in table.cells.get((row.name, column.title), ()):
                cell.sources.append(_source(desk, table, table.steps[name], column))
            made[row.name, column.title] = cell
    for column in table.columns:
        here = [made[r.name, column.title] for r in table.rows if r.marked]
        for cell, mark in _ranked([c for c in here if c.mean is not None and not c.label], column):
            cell.mark = mark
        for cell, mark in _ranked([c for c in here if c.paper], column, of_paper=True):
            cell.paper_mark = mark
    return made


def _source(desk: Desk, table: Table, step: Step, column: Column) -> Source:
    state = desk.state(step)
    if state.word != "done":
        short, detail = why_not(desk, table, step)
        return Source(step.name, None, short, detail)
    found = state.found
    value = found.values.get(column.key)
    known = isinstance(value, int | float) and math.isfinite(value)
    # a label belongs to the number that random weights made, not to its neighbours in the record
    label = found.label if found.label.split(" ")[-1] in ("score", column.key.upper()) else ""
    return Source(
        step.name,
        value * column.scale if known else None,
        "" if known else "not measured",
        "" if known else f"{found.record} has no {column.key}",
        os.path.relpath(found.record, Path(desk.places.out) / table.name) if found.record else "",
        found.git,
        protocol_text(column, found.protocol),
        label,
    )


def protocol_text(column: Column, protocol: dict[str, Any]) -> str:
    """The settings behind a number on one line."""
    text = "; ".join(f"{k}={json.dumps(v, default=str)}" for k, v in sorted(protocol.items()))
    return "; ".join(filter(None, [column.protocol, text]))


def why_not(desk: Desk, table: Table, step: Step) -> tuple[str, str]:
    """(in a few words, in full): what keeps a step from being done, looked for in it and all before it."""
    hit: State | None = None
    for name in _chain(table, step):
        state = desk.state(table.steps[name])
        if state.word in ("missing", "failed", "other", "running"):
            hit, at = state, name
            break
    if hit is None:
        state = desk.state(step)
        return state.word, state.reason or "run it with --run"
    short = {"missing": hit.short, "failed": f"failed: {at}", "other": "other protocol"}.get(
        hit.word, hit.word
    )
    return short, f"{at}: {hit.reason}"


def _chain(table: Table, step: Step) -> list[str]:
    """Names of the steps before it and its own, earliest first."""
    names = [n for earlier in step.after for n in _chain(table, table.steps[earlier])]
    return [*dict.fromkeys(names), step.name]


def _ranked(cells: list[Cell], column: Column, of_paper: bool = False) -> list[tuple[Cell, str]]:
    """Best and second of at least two; equal numbers as printed share their mark."""
    if column.better == "none" or len(cells) < 2:
        return []
    number = {id(c): round(c.row.paper[column.title] if of_paper else c.mean, column.digits) for c in cells}
    order = sorted(set(number.values()), reverse=column.better == "up")
    marks = dict(zip(order, (BEST, SECOND), strict=False))
    return [(c, marks[number[id(c)]]) for c in cells if number[id(c)] in marks]
