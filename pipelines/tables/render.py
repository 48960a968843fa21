"""A table as Markdown, html, csv and LaTeX: ours beside the paper's, each number of ours with its record."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from data.core.files import claim_folder, write_atomic
from pipelines.tables.cells import BEST, SECOND, Cell, cells_of
from pipelines.tables.plot import Panel, panels_of
from pipelines.tables.run import Desk
from pipelines.tables.spec import Table

_MD = {BEST: "**{}**", SECOND: "<u>{}</u>", "": "{}"}
_TEX = {BEST: r"\textbf{{{}}}", SECOND: r"\underline{{{}}}", "": "{}"}
_TEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}
_CSV = (
    *("table", "preset", "row", "column", "value", "paper", "reason", "label", "step", "record", "commit"),
    "protocol",
)
_ARROWS = {"up": " ↑", "down": " ↓", "none": ""}


def render(desk: Desk, table: Table) -> Path:
    """Write <out>/<table>/<table>.{md,html,csv,tex} and a picture a panel; returns the folder."""
    folder = Path(desk.places.out) / table.name
    claim_folder(folder, "table", lambda folder: (folder / f"{table.name}.tex").is_file())
    cells, panels = cells_of(desk, table), panels_of(desk, table)
    for panel in panels:
        write_atomic(folder / panel.file, panel.picture)
    write_atomic(folder / f"{table.name}.md", markdown(table, cells, panels))
    write_atomic(folder / f"{table.name}.csv", comma_separated(table, cells))
    write_atomic(folder / f"{table.name}.tex", latex(table, cells))
    _html(folder / f"{table.name}.html", table, cells, panels)
    return folder


def headers(table: Table) -> list[str]:
    """Column titles with an arrow towards the better."""
    return [f"{c.title}{_ARROWS[c.better]}" for c in table.columns]


def shown(cell: Cell, ways: dict[str, str], escape: Any) -> str:
    """Ours, and the paper's in brackets, marked and escaped for a format."""
    ours = ways[cell.mark].format(escape(cell.text))
    label = f" [{escape(cell.label)}]" if cell.label else ""
    paper = f" ({escape('paper')} {ways[cell.paper_mark].format(escape(cell.paper))})" if cell.paper else ""
    return f"{ours}{label}{paper}"


def remarks(table: Table, cells: dict[tuple[str, str], Cell]) -> list[str]:
    """Notes of the rows, then each reason why a cell is empty, once, with the columns it is about."""
    notes = [f"{row.name}: {row.note}" for row in table.rows if row.note]
    reasons: dict[str, list[str]] = {}
    for (row, column), cell in cells.items():
        for source in cell.sources:
            if source.value is None:
                reasons.setdefault(f"{row}: {source.reason}. {source.detail}", []).append(column)
        if cell.blank:
            reasons.setdefault(f"{row}: {cell.blank}", []).append(column)
    return notes + [f"{text} [{', '.join(dict.fromkeys(where))}]" for text, where in reasons.items()]


def traces(cells: dict[tuple[str, str], Cell]) -> list[tuple[str, ...]]:
    """(row, column, value, record, commit, protocol) of each number of ours."""
    return [
        (row, column, f"{s.value:.6g}", s.record, s.git or "unknown", s.protocol)
        for (row, column), cell in cells.items()
        for s in cell.sources
        if s.value is not None
    ]


def markdown(table: Table, cells: dict[tuple[str, str], Cell], panels: list[Panel]) -> str:
    """The table, its panels, notes, and the record of each number."""

    def escape(text: str) -> str:
        return text.replace("|", r"\|").replace("<", "&lt;")

    def line(values: Any) -> str:
        return f"| {' | '.join(values)} |"

    lines = [
        f"# {table.title}",
        "",
        f"{table.source}. Preset {table.preset}: {table.about}.",
        "",
        table.text,
        "",
    ]
    lines += [line(["", *map(escape, headers(table))]), line(["---"] * (len(table.columns) + 1))]
    for row in table.rows:
        found = [shown(cells[row.name, c.title], _MD, escape) for c in table.columns]
        lines.append(line([escape(row.name), *found]))
    for panel in panels:
        lines += ["", f"![{panel.title}]({panel.file})", "", escape(f"{panel.title}. {panel.note}")]
    if notes := remarks(table, cells):
        lines += ["", "## Notes", "", *(f"- {escape(text)}" for text in notes)]
    lines += ["", "## Where each number comes from", ""]
    lines += [line(["row", "column", "value", "record", "commit"]), line(["---"] * 5)]
    lines += [line(map(escape, trace[:5])) for trace in traces(cells)]
    return "\n".join(lines) + "\n"


def comma_separated(table: Table, cells: dict[tuple[str, str], Cell]) -> str:
    """One line a number or its absence: a cell has as many as seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for (row, column), cell in cells.items():
        head = [table.name, table.preset, row, column]
        if cell.blank:
            writer.writerow([*head, "", cell.paper, cell.blank, "", "", "", "", ""])
        for s in cell.sources:
            value = "" if s.value is None else repr(s.value)
            reason = " ".join(filter(None, [s.reason, s.detail and f"({s.detail})"]))
            writer.writerow([*head, value, cell.paper, reason, s.label, s.step, s.record, s.git, s.protocol])
    return text.getvalue()


def tex(text: str) -> str:
    """Escaped for LaTeX."""
    return re.sub("[" + re.escape("".join(_TEX_SIGNS)) + "]", lambda m: _TEX_SIGNS[m[0]], text)


def latex(table: Table, cells: dict[tuple[str, str], Cell]) -> str:
    """A tabular with booktabs' rules, notes below it."""
    arrows = {"up": r" $\uparrow$", "down": r" $\downarrow$", "none": ""}
    heads = [tex(c.title) + arrows[c.better] for c in table.columns]
    lines = [
        f"% {table.source}; preset {table.preset}: {table.about}; needs booktabs",
        r"\begin{table}",
        r"\centering",
    ]
    lines += [rf"\caption{{{tex(table.title)}}}", rf"\begin{{tabular}}{{l{'r' * len(heads)}}}", r"\toprule"]
    lines += [" & ".join(["", *heads]) + r" \\", r"\midrule"]
    for row in table.rows:
        found = [shown(cells[row.name, c.title], _TEX, tex) for c in table.columns]
        lines.append(" & ".join([tex(row.name), *found]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*lines, *(f"% {text}" for text in remarks(table, cells))]) + "\n"


def _html(path: Path, table: Table, cells: dict[tuple[str, str], Cell], panels: list[Panel]) -> None:
    from markupsafe import Markup, escape

    from pipelines.report import Figure, Section, data_uri, write_report

    ways = {BEST: "<b>{}</b>", SECOND: "<u>{}</u>", "": "{}"}
    rows = []
    for row in table.rows:
        found = [
            Markup(shown(cells[row.name, c.title], ways, lambda t: str(escape(t)))) for c in table.columns
        ]
        rows.append((row.name, *found))
    every = len(table.columns) + 1
    sections = [
        Section("Ours, and the paper's in brackets", table.text, ["", *headers(table)], rows, dim_from=every)
    ]
    figures = [
        Figure(f"{p.title}. {p.note}", data_uri("image/svg+xml", p.picture.encode()), alt=p.title)
        for p in panels
    ]
    if figures:
        sections.append(Section("Curves", figures=figures))
    notes = [(text,) for text in remarks(table, cells)]
    sections.append(
        Section("Notes", header=["bold: best, underlined: second"], rows=notes or [("none",)], dim_from=1)
    )
    header = ["row", "column", "value", "record", "commit", "protocol"]
    sections.append(Section("Where each number comes from", "", header, traces(cells), dim_from=3))
    write_report(path, table.title, f"{table.source}. Preset {table.preset}: {table.about}.", sections)
