"""Show a table: ours next to the paper's, as Markdown, html, csv and LaTeX; each number of ours with its record."""

import json
import math
import os
import re
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from markupsafe import Markup, escape

from data.core.files import claim_folder, write_atomic
from pipelines.results.markdown import markdown_table, plain
from pipelines.results.page import Figure, Section, Series, curve_svg, svg_figure, write_page
from pipelines.results.records import Command, wanted
from pipelines.results.run_table import Desk
from pipelines.results.tables import Column, Curve, Row, Table, chain
from pipelines.training.log import read_metrics

CSV = ["table", "preset", "row", "column", "value", "paper", "reason", "label", "step", "record", "commit"]
CSV += ["protocol"]
TEX_SIGNS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
TEX_SIGNS |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


@dataclass(frozen=True)
class Format:
    """How a format writes the best, the second and an ordinary number, escapes text, and points to the better."""

    best: str
    second: str
    escape: Callable[[str], str]
    up: str = " ↑"
    down: str = " ↓"

    def marked(self, text: str, mark: str) -> str:
        return {"best": self.best, "second": self.second, "": "{}"}[mark].format(self.escape(text))


def tex(text: str) -> str:
    """Text escaped for LaTeX."""
    return re.sub("[" + re.escape("".join(TEX_SIGNS)) + "]", lambda match: TEX_SIGNS[match[0]], text)


MARKDOWN = Format("**{}**", "<u>{}</u>", plain)
HTML = Format("<b>{}</b>", "<u>{}</u>", lambda text: str(escape(text)))
TEX = Format(r"\textbf{{{}}}", r"\underline{{{}}}", tex, r" $\uparrow$", r" $\downarrow$")


# ---- cells -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One number of ours and its record, seen from the table's folder; value None: `reason` says why, `detail` in full."""

    step: str  # name of its command
    value: float | None
    reason: str = ""
    detail: str = ""
    record: str = ""
    git: str = ""
    protocol: str = ""
    label: str = ""


@dataclass
class Cell:
    """A row's value of a column, one source per seed. mark, paper_mark: "best", "second" or ""."""

    row: Row
    column: Column
    sources: list[Source] = field(default_factory=list)
    mark: str = ""
    paper_mark: str = ""

    @property
    def blank(self) -> str:
        """Why the table has no command for it."""
        return self.row.blank.get(self.column.title, "")

    @property
    def values(self) -> list[float]:
        """What is measured, one value per seed."""
        return [source.value for source in self.sources if source.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None when nothing is measured."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def label(self) -> str:
        """E.g. "random-feature score": then the number is not a score of the column's name."""
        return next((source.label for source in self.sources if source.label), "")

    @property
    def paper(self) -> str:
        """The paper's number as it prints it; "" when it has none."""
        number = self.row.paper.get(self.column.title)
        return "" if number is None else f"{number:.{self.column.digits}f}"

    @property
    def text(self) -> str:
        """The value with its standard deviation over seeds, or the reason why there is none."""
        if self.mean is None:
            return self.blank or self.sources[0].reason
        text, digits = f"{self.mean:.{self.column.digits}f}", self.column.digits
        if len(self.values) > 1:
            text += f" ± {statistics.stdev(self.values):.{digits}f}"
        return text + (f" (n = {len(self.values)})" if len(self.sources) > 1 else "")

    def shown(self, form: Format) -> str:
        """Ours, and the paper's in brackets."""
        text = form.marked(self.text, self.mark)
        text += f" [{form.escape(self.label)}]" if self.label else ""
        return text + (f" (paper {form.marked(self.paper, self.paper_mark)})" if self.paper else "")


Cells = dict[tuple[str, str], Cell]


def cells_of(desk: Desk, table: Table) -> Cells:
    """Every cell of the table by (row name, column title), with its marks."""
    # What each command has measured
    cells: Cells = {}
    for row in table.rows:
        for column in table.columns:
            cell = cells[row.name, column.title] = Cell(row, column)
            if not cell.blank:
                for name in table.sources[row.name, column.source]:
                    cell.sources.append(_source(desk, table, table.commands[name], column))
    # The best and second of each column: ours among ours, the paper's among the paper's
    for column in table.columns:
        ours, papers = [], []
        for row in table.rows:
            cell = cells[row.name, column.title]
            if row.marked and cell.mean is not None and not cell.label:
                ours.append((cell, round(cell.mean, column.digits)))
            if row.marked and cell.paper:
                papers.append((cell, float(cell.paper)))
        for cell, mark in _ranked(ours, column):
            cell.mark = mark
        for cell, mark in _ranked(papers, column):
            cell.paper_mark = mark
    return cells


def _source(desk: Desk, table: Table, command: Command, column: Column) -> Source:
    """What a command has measured for a column."""
    found = desk.state(command).found
    if desk.state(command).word != "done":
        return Source(command.name, None, *why_not(desk, table, command))
    value = found.values.get(column.key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Source(command.name, None, "not measured", f"{found.file} has no {column.key}")
    # How it was measured: the settings that decide it
    record = os.path.relpath(found.file, Path(desk.places.out) / table.name)
    shown = wanted(command).keys() | {"steps", "size", "device"}
    protocol = [column.protocol] if column.protocol else []
    for key, setting in sorted(found.settings.items()):
        if key in shown:
            protocol.append(f"{key}={json.dumps(setting, default=str)}")
    # A label belongs to the number that random weights made, not to its neighbours in the record.
    labelled = found.label.split(" ")[-1] in ("score", column.key.upper())
    label = found.label if labelled else ""
    return Source(command.name, value * column.scale, "", "", record, found.git, "; ".join(protocol), label)


def why_not(desk: Desk, table: Table, command: Command) -> tuple[str, str]:
    """(in a few words, in full): what keeps a command from being done, looked for in it and all that it waits for."""
    for name in chain(table.commands, command.name):
        state = desk.state(table.commands[name])
        if state.word in ("missing", "failed", "other", "running"):
            short = {"failed": f"failed: {name}", "other": "other protocol"}.get(state.word, state.word)
            return next(iter(state.lacking), short), f"{name}: {state.reason}"
    state = desk.state(command)
    return state.word, state.reason or "run it with --run"


def _ranked(numbers: list[tuple[Cell, float]], column: Column) -> Iterator[tuple[Cell, str]]:
    """Best and second of at least two printed numbers; equal ones share their mark."""
    order = sorted({number for _, number in numbers}, reverse=column.better == "up")[:2]
    if column.better == "none" or len(numbers) < 2:
        return
    for cell, number in numbers:
        if number in order:
            yield cell, ("best", "second")[order.index(number)]


# ---- panels ----------------------------------------------------------------------------------------------


def panels_of(desk: Desk, table: Table, cells: Cells) -> list[tuple[Figure, str]]:
    """(figure, SVG) of each curve of the table; what is missing is in the caption."""
    panels = []
    for curve in table.curves:
        series, notes = _scatter(table, cells, curve) if curve.x else _lines(desk, table, curve)
        svg = curve_svg(series, curve.x or "step", curve.y)
        panels.append((svg_figure(svg, f"{curve.title}. {'; '.join(notes)}", curve.title), svg))
    return panels


def mean_and_spread(runs: list[list[tuple[int, float]]]) -> np.ndarray:
    """(4, n): step, mean, mean - s, mean + s at the steps that all runs have; s: standard deviation, 0 for one run."""
    values = pd.concat([pd.Series(dict(run), dtype=np.float64) for run in runs], axis=1, join="inner")
    values = values.sort_index()
    mean, spread = values.mean(axis=1), values.std(axis=1).fillna(0.0)
    return np.array([values.index, mean, mean - spread, mean + spread])


def _lines(desk: Desk, table: Table, curve: Curve) -> tuple[Series, list[str]]:
    series: Series = {}
    rows = [row for row in table.rows if row.name in curve.rows]
    seeds = max(len(table.sources[row.name, curve.source]) for row in rows)
    notes = ["line: mean, band: standard deviation over seeds" if seeds > 1 else "one seed"]
    for row in rows:
        # One run per seed; what is missing is told
        runs = []
        for name in table.sources[row.name, curve.source]:
            command = table.commands[name]
            points = []
            for record in read_metrics(command.folder):
                if record.get(curve.key) is not None:
                    points.append((record["step"], record[curve.key]))
            if desk.state(command).word != "done":
                notes.append(f"{command.name}: {why_not(desk, table, command)[0]}")
            elif not points:
                notes.append(f"{command.name}: {curve.key} is not logged")
            else:
                runs.append(points)
        if runs:
            label = f"{row.name} (n = {len(runs)})" if seeds > 1 else row.name
            series[label] = tuple(mean_and_spread(runs))
    return series, notes


def _scatter(table: Table, cells: Cells, curve: Curve) -> tuple[Series, list[str]]:
    series: Series = {}
    notes = ["bar: standard deviation over seeds"]
    for row in table.rows:
        x, y = cells[row.name, curve.x], cells[row.name, curve.y]
        if x.mean is None or y.mean is None:
            notes.append(f"{row.name}: {x.text if x.mean is None else y.text}")
            continue
        spread = statistics.stdev(y.values) if len(y.values) > 1 else 0.0
        series[row.name] = ([x.mean], [y.mean], [y.mean - spread], [y.mean + spread])
    return series, notes


# ---- files -----------------------------------------------------------------------------------------------


def render(desk: Desk, table: Table) -> Path:
    """Write <out>/<table>/<table>.{md,html,csv,tex} and one picture per panel; returns the folder."""
    folder = Path(desk.places.out) / table.name
    claim_folder(folder, "table", lambda folder: (folder / f"{table.name}.tex").is_file())
    cells = cells_of(desk, table)
    # The panels, as pictures of their own
    figures = []
    for number, (figure, svg) in enumerate(panels_of(desk, table, cells), 1):
        write_atomic(folder / f"{table.name}-{number}.svg", svg)
        figures.append(figure)
    # The table in each format
    write_atomic(folder / f"{table.name}.md", markdown(table, cells, figures))
    write_atomic(folder / f"{table.name}.csv", comma_separated(table, cells))
    write_atomic(folder / f"{table.name}.tex", latex(table, cells))
    write_html(folder / f"{table.name}.html", table, cells, figures)
    return folder


def frame(table: Table, cells: Cells, form: Format) -> pd.DataFrame:
    """The table as text of a format."""
    arrows = {"up": form.up, "down": form.down, "none": ""}
    columns = {}
    for column in table.columns:
        title = form.escape(column.title) + arrows[column.better]
        columns[title] = [cells[row.name, column.title].shown(form) for row in table.rows]
    return pd.DataFrame(columns, index=[form.escape(row.name) for row in table.rows])


def numbers(table: Table, cells: Cells) -> pd.DataFrame:
    """One line per number of ours, or the reason why there is none: a cell has one per seed."""
    lines = []
    for (row, column), cell in cells.items():
        for source in cell.sources or [Source("", None, cell.blank)]:
            lines.append({"row": row, "column": column, "paper": cell.paper, **vars(source)})
    return pd.DataFrame(lines).rename(columns={"git": "commit"}).assign(table=table.name, preset=table.preset)


def differences(table: Table, cells: Cells) -> pd.DataFrame:
    """Each row against the first, paired by seed: mean difference, its 95 % interval (paired t) and whether it excludes 0.

    Empty when no two seeds are measured. The intervals are of single comparisons, not corrected for their number.
    """
    lines = []
    for column in table.columns:
        first = cells[table.rows[0].name, column.title]
        for row in table.rows[1:]:
            cell = cells[row.name, column.title]
            # Seeds that both rows have; a number that no seed changes stands alone and has no pair
            both = zip(cell.sources, first.sources, strict=False)
            pairs = [(ours.value, base.value) for ours, base in both if None not in (ours.value, base.value)]
            if len(pairs) < 2 or cell.label or first.label:
                continue
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # equal in every seed
                test = scipy.stats.ttest_rel(*np.transpose(pairs))
            low, high = test.confidence_interval(0.95)
            by = float(np.mean([a - b for a, b in pairs]))
            told = "differs" if low > 0 or high < 0 else "no difference shown"
            mean, *ends = (f"{value:+.{column.digits}f}" for value in (by, low, high))
            names = f"{row.name} against {first.row.name}"
            lines.append((column.title, names, mean, f"{ends[0]} to {ends[1]}", len(pairs), told))
    return pd.DataFrame(lines, columns=["column", "rows", "difference", "95 % interval", "seeds", "result"])


def remarks(table: Table, cells: Cells) -> list[str]:
    """The rows' notes, then each reason why a cell is empty, once, with the columns that it concerns."""
    notes = [f"{row.name}: {row.note}" for row in table.rows if row.note]
    lines = numbers(table, cells)
    empty = lines[lines.value.isna()]
    for (row, reason, detail), where in empty.groupby(["row", "reason", "detail"], sort=False):
        text = f"{row}: {reason}. {detail}" if detail else f"{row}: {reason}"
        notes.append(f"{text} [{', '.join(where.column.unique())}]")
    return notes


def traces(table: Table, cells: Cells) -> pd.DataFrame:
    """Row, column, value, record, commit and protocol of each number of ours, as text."""
    lines = numbers(table, cells)
    made = lines[lines.value.notna()][["row", "column", "value", "record", "commit", "protocol"]]
    return made.assign(value=made.value.map("{:.6g}".format), commit=made.commit.replace("", "unknown"))


def markdown(table: Table, cells: Cells, figures: list[Figure]) -> str:
    """The table, its panels, notes, and the record of each number."""
    # Title, what it is, and the table itself.
    about = f"{table.source}. Preset {table.preset}: {table.about}."
    parts = [f"# {table.title}", about, table.text]
    shown = frame(table, cells, MARKDOWN)
    parts.append(markdown_table(["", *shown.columns], shown.reset_index().values))
    for number, figure in enumerate(figures, 1):
        parts += [f"![{figure.alt}]({table.name}-{number}.svg)", plain(figure.caption)]
    # Which rows differ by more than their seeds do.
    if len(found := differences(table, cells)):
        shown = markdown_table(found.columns, found.map(str).map(plain).values)
        parts += ["## Differences, paired by seed", shown]
    # What is needed to read the table, and to check it.
    if notes := remarks(table, cells):
        parts += ["## Notes", "\n".join(f"- {plain(text)}" for text in notes)]
    made = traces(table, cells).drop(columns="protocol").map(plain)
    parts += ["## Where each number comes from", markdown_table(made.columns, made.values)]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def comma_separated(table: Table, cells: Cells) -> str:
    """One line per number or its absence: a cell has one per seed."""
    lines = numbers(table, cells)
    lines.reason += lines.detail.map(lambda detail: f" ({detail})" if detail else "")
    return lines[CSV].to_csv(index=False, lineterminator="\n")


def latex(table: Table, cells: Cells) -> str:
    """A tabular with booktabs' rules, notes below it."""
    layout = "l" + "r" * len(table.columns)
    text = frame(table, cells, TEX).to_latex(escape=False, column_format=layout, caption=tex(table.title))
    head = f"% {table.source}; preset {table.preset}: {table.about}; needs booktabs\n"
    return head + text + "".join(f"% {' '.join(note.split())}\n" for note in remarks(table, cells))


def write_html(path: Path, table: Table, cells: Cells, figures: list[Figure]) -> None:
    """The same as a page."""
    shown, made = frame(table, cells, HTML), traces(table, cells)
    heads = ["", *map(Markup, shown.columns)]
    rows = [(row.name, *map(Markup, line)) for row, line in zip(table.rows, shown.values, strict=True)]
    notes = [(text,) for text in remarks(table, cells)] or [("none",)]
    found = differences(table, cells)
    paired = Section(
        "Differences, paired by seed", "", list(found.columns), found.values.tolist(), dim_from=4
    )
    sections = [
        Section("Ours, and the paper's in brackets", table.text, heads, rows, dim_from=len(heads)),
        *([Section("Curves", figures=figures)] if figures else []),
        *([paired] if len(found) else []),
        Section("Notes", header=["bold: best, underlined: second"], rows=notes, dim_from=1),
        Section("Where each number comes from", "", list(made.columns), made.values.tolist(), dim_from=3),
    ]
    write_page(path, table.title, f"{table.source}. Preset {table.preset}: {table.about}.", sections)
