"""Tables as data: configs/tables/NAME.yaml has rows and columns, configs/tables/steps.yaml the commands behind cells.

A cell names a step. A step is a command with a folder of its own, and the steps that must be done before it. The
folder is the key: two cells that need the same folder share the work, also across tables.
"""

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.training.folder import ROOT

FOLDER = ROOT / "configs" / "tables"


@dataclass(frozen=True)
class Places:
    """Where things are: real data, weights (both given by the user), and what the table makes."""

    data: str
    weights_dir: str
    out: str

    @property
    def runs(self) -> Path:
        """Folder of all steps' folders."""
        return Path(self.out) / "runs"


@dataclass(frozen=True)
class Step:
    """One command. program "": nothing to run, the user gives the folder (weights, a data set).

    name: unique, the folder below `runs`. output: what later steps read. after: names of steps that come first.
    judges: weight files of the judges that it reads. cost: {"hours", "disk_gb", "from"} as estimated in steps.yaml.
    """

    name: str
    folder: Path
    output: Path
    program: str = ""
    arguments: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    parallel: bool = False
    what: str = ""
    cost: dict[str, Any] = field(default_factory=dict)

    def command(self) -> str:
        """As typed into a shell in the root of the repository."""
        return shlex.join(["python", "-m", self.program, *self.arguments]) if self.program else ""


@dataclass(frozen=True)
class Column:
    """key: of the step's values. better: up or down. scale: factor from the record to the table. section: its header."""

    name: str
    step: str
    key: str
    better: str = "up"
    digits: int = 2
    scale: float = 1.0
    section: str = ""
    protocol: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Unique in its table."""
        return f"{self.section} {self.name}".strip()


@dataclass(frozen=True)
class Row:
    """marked: takes part in best and second. paper: column title -> number. blank: column title -> why there is none."""

    name: str
    values: dict[str, Any]
    paper: dict[str, float] = field(default_factory=dict)
    blank: dict[str, str] = field(default_factory=dict)
    marked: bool = True
    note: str = ""
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A panel: `key` of a training's log against steps, one line a row; or, with `x`, one column against another."""

    title: str
    step: str = ""
    key: str = ""
    rows: tuple[str, ...] = ()
    x: str = ""
    y: str = ""


@dataclass
class Table:
    """A table in one preset, with every step that its cells need; `cells[row, column]` is one step name a seed."""

    name: str
    preset: str
    about: str
    title: str
    source: str
    text: str
    rows: list[Row]
    columns: list[Column]
    curves: list[Curve]
    seeds: list[int]
    in_process: bool
    steps: dict[str, Step] = field(default_factory=dict)
    cells: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    curve_steps: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def steps_of(self, row: Row) -> list[Step]:
        """Steps behind a row in an order in which they can run."""
        wanted = [n for c in self.columns for n in self.cells.get((row.name, c.title), ())]
        wanted += [n for (r, _), names in self.curve_steps.items() if r == row.name for n in names]
        ordered: dict[str, Step] = {}
        for name in wanted:
            for step in self._with_earlier(name):
                ordered.setdefault(step.name, step)
        return list(ordered.values())

    def _with_earlier(self, name: str) -> Iterator[Step]:
        for earlier in self.steps[name].after:
            yield from self._with_earlier(earlier)
        yield self.steps[name]


def names() -> list[str]:
    """The shipped tables."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "steps")


def presets() -> list[str]:
    """The sizes that steps.yaml knows."""
    return list(read("steps")["presets"])


@functools.cache
def read(name: str) -> dict[str, Any]:
    """A file of configs/tables, not to be changed. Raises ValueError for an unknown name."""
    from omegaconf import OmegaConf

    file = FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(f"table {name!r}: one of {', '.join(names())}")
    return OmegaConf.to_container(OmegaConf.load(file))


def fill(text: str, values: dict[str, Any]) -> str:
    """Replace each {name}; ValueError for a name that has no value."""

    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise ValueError(f"configs/tables: {{{match[1]}}} in {text!r} has no value here")
        return str(values[match[1]])

    return re.sub(r"\{(\w+)\}", value, text)
