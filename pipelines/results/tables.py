"""The paper's tables as data: configs/tables/NAME.yaml has columns, and rows with their commands written out.

In a command DATA, WEIGHTS and RUNS stand for folders and SEED for a number; nothing else is filled in. A preset
(configs/tables/presets) may add words to every command of a program: so `tiny` tries the paper's own commands.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.results.records import Command, folder_of

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "configs" / "tables"
HOURS = TABLES / "presets" / "hours.yaml"  # written by python -m pipelines.plan --hours
CARD = "a100"  # that these hours are of, the paper's
PLACE = re.compile(r"\b(DATA|WEIGHTS|RUNS)\b")
GIVEN = re.compile(r"\b(DATA|WEIGHTS)(/[\w-]+)?")  # what the user brings


@dataclass(frozen=True)
class Places:
    """Where things are: real data and weights, both given by the user, and what the table makes."""

    data: str
    weights_dir: str
    out: str

    @property
    def runs(self) -> Path:
        """Folder that RUNS stands for."""
        return Path(self.out) / "runs"


@dataclass(frozen=True)
class Column:
    """A number of the command called `source` in a row. key: of its record. scale: from the record to the table."""

    name: str
    source: str
    key: str
    section: str = ""
    better: str = "up"  # up, down or none
    digits: int = 2
    scale: float = 1.0
    protocol: str = ""
    dataset: str = ""

    @property
    def title(self) -> str:
        """Unique in its table."""
        return f"{self.section} {self.name}".strip()


@dataclass(frozen=True)
class Row:
    """marked: takes part in best and second. blank: column title -> why there is no number."""

    name: str
    commands: dict[str, str]
    marked: bool = True
    note: str = ""
    blank: dict[str, str] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A panel: `key` of the logs of `source` against steps, a line per row; or, with `x`, one column against another."""

    title: str
    source: str = ""
    key: str = ""
    rows: tuple[str, ...] = ()
    x: str = ""
    y: str = ""


@dataclass
class Table:
    """A table in one preset. commands: by name, in the order in which they can run.

    of_row: names of a row's commands. sources[row, source]: one command per seed.
    """

    name: str
    preset: str
    about: str
    title: str
    source: str
    text: str
    rows: list[Row] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    warm: bool = False
    commands: dict[str, Command] = field(default_factory=dict)
    of_row: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def commands_of(self, row: Row) -> list[Command]:
        """The commands behind a row, each after those that it reads from."""
        return [self.commands[name] for name in self.of_row[row.name]]


def presets() -> list[str]:
    """The sizes at which the tables can be made."""
    return ["paper", "small", "scenes", "tiny"]


def names(preset: str = "paper") -> list[str]:
    """The shipped tables of a preset."""
    return sorted(file.stem for file in _folder(preset).glob("*.yaml"))


def _folder(preset: str) -> Path:
    own = TABLES / preset
    return own if own.is_dir() and preset != "presets" else TABLES


def read(name: str, preset: str = "paper") -> dict[str, Any]:
    """The file of a table. Raises ValueError for an unknown name."""
    if name not in names(preset):
        raise ValueError(f"table {name!r}: preset {preset} has {', '.join(names(preset))}")
    return yaml.safe_load((_folder(preset) / f"{name}.yaml").read_text())


def paper_numbers() -> dict[str, dict[str, dict[str, float]]]:
    """What the paper prints: table -> row -> column title -> number."""
    return yaml.safe_load((ROOT / "configs" / "paper.yaml").read_text())


def modelled(commands: Sequence[Command]) -> str:
    """What commands cost, in words; those of minutes are not counted."""
    costs, hours, disk = yaml.safe_load(HOURS.read_text()), 0.0, 0.0
    for command in commands:
        cost = costs.get(command.name, {"hours": 0.0, "disk_gb": 0.0})
        hours, disk = hours + cost["hours"], disk + cost["disk_gb"]
    return f"about {hours:,.0f} GPU hours, {disk:,.0f} GB of disk (modelled, one {CARD})"


def load_table(name: str, preset: str, places: Places, rows: Sequence[str] = (), dataset: str = "") -> Table:
    """A table with all commands that its cells need. rows: names to keep, empty for all. dataset: keep only its columns.

    Raises ValueError for unknown names, and when nothing is left.
    """
    content = read(name, preset)
    setting = yaml.safe_load((TABLES / "presets" / f"{preset}.yaml").read_text())
    paper = paper_numbers().get(name, {})

    # Rows and columns that were asked for
    names_of_rows = [row["name"] for row in content["rows"]]
    if unknown := set(rows) - set(names_of_rows):
        raise ValueError(f"rows {sorted(unknown)}: {name} has {', '.join(names_of_rows)}")
    words = {key: content.get(key, "") for key in ("title", "source", "text")}
    table = Table(name, preset, setting["about"], **words, warm=setting.get("warm", False))
    for row in content["rows"]:
        if not rows or row["name"] in rows:
            table.rows.append(Row(**row, paper=paper.get(row["name"], {})))
    for column in content["columns"]:
        if not dataset or column.get("dataset", "") in ("", dataset):
            table.columns.append(Column(source=column.pop("from"), **column))
    if not table.columns:
        raise ValueError(f"table {name!r} has no columns of dataset {dataset!r}")
    for curve in content.get("curves", ()):
        table.curves.append(Curve(source=curve.pop("from", ""), **curve))

    # Their commands, in the order of the file
    makes = _Commands(places, setting)
    for row in table.rows:
        sources = {column.source: None for column in table.columns if column.title not in row.blank}
        sources |= {curve.source: None for curve in table.curves if row.name in curve.rows}
        wanted: set[str] = set()
        for seed in setting.get("seeds", [0]):
            made = {key: makes.command(text, seed) for key, text in row.commands.items()}
            for source in sources:
                if source not in made:
                    raise ValueError(f"{name}, row {row.name!r}: no command called {source!r}")
                found = table.sources.setdefault((row.name, source), [])
                if made[source] not in found:
                    found.append(made[source])
                wanted.update(chain(makes.all, made[source]))
        table.of_row[row.name] = [each for each in makes.all if each in wanted]
    # Those that no row needs are left out.
    used = set().union(*table.of_row.values())
    table.commands = {each: command for each, command in makes.all.items() if each in used}
    return table


def chain(commands: dict[str, Command], name: str) -> list[str]:
    """Names of the commands that must come first, each once, and of this one."""
    before: dict[str, None] = {}
    for earlier in commands[name].after:
        before |= dict.fromkeys(chain(commands, earlier))
    return [*before, name]


class _Commands:
    """Makes the commands of one table in one preset, each folder once."""

    def __init__(self, places: Places, setting: dict[str, Any]):
        # Where things are, in this preset
        self.runs, self.words = places.runs, setting.get("words", {})
        self.places = {"DATA": places.data, "WEIGHTS": places.weights_dir, "RUNS": str(places.runs)}
        for place, where in setting.get("places", {}).items():
            self.places[place] = where.replace("RUNS", self.places["RUNS"])
        self.all: dict[str, Command] = {}
        for text in setting.get("prepare", ()):
            self.command(text, 0, more=False)

    def command(self, text: str, seed: int, more: bool = True) -> str:
        """Name of a command that is written in a table; it is added to `all`. more: with the preset's words."""
        # Its words, its folder, and the name that the folder gives it
        words = shlex.split(text)
        if words[:2] != ["python", "-m"]:
            raise ValueError(f"configs/tables: {text[:60]!r}...: a command begins with python -m")
        if more:
            words += shlex.split(self.words.get(words[2], ""))
        program, *arguments = [self._filled(word, seed) for word in words[2:]]
        folder = folder_of(program, arguments)
        name = str(folder.relative_to(self.runs) if folder.is_relative_to(self.runs) else folder)

        # Whose folders it reads
        earlier, after = {str(folder)}, []
        for other in self.all.values():
            if other.name != name:
                earlier.add(str(other.folder))
                if any(_below(str(other.folder), argument) for argument in arguments):
                    after.append(other.name)
        # What the user brings, weights first
        needs = set()
        for match in GIVEN.finditer(" ".join(words[3:])):
            path = self._filled(match[0], seed)
            if path not in earlier:
                kind = "data" if match[1] == "DATA" else "weights"
                needs.add((f"{kind}: {(match[2] or '/clips')[1:]}", Path(path)))
        brought = tuple(sorted(needs, reverse=True))
        command = Command(name, program, tuple(arguments), folder, tuple(after), brought)
        if self.all.setdefault(name, command) != command:
            raise ValueError(f"configs/tables: two different commands write to {name}")
        return name

    def _filled(self, word: str, seed: int) -> str:
        word = PLACE.sub(lambda match: self.places[match[1]], word.replace("SEED", str(seed)))
        return str(ROOT / word) if word.startswith("configs/") else word


def _below(path: str, argument: str) -> bool:
    """Whether an argument names the path or something below it."""
    value = argument.partition("=")[2] if "=" in argument else argument
    return value == path or value.startswith(path + "/")
