"""From the files of configs/tables to the steps that a table needs in one preset."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.tables.spec import Column, Curve, Places, Row, Step, Table, fill, presets, read
from pipelines.training.folder import ROOT

_FIELDS = {"folder", "place", "output", "program", "arguments", "after", "judges", "parallel", "what", "cost"}


def load_table(name: str, preset: str, places: Places, rows: Sequence[str] = (), dataset: str = "") -> Table:
    """The table with all its steps. rows: names to keep, all if empty. dataset: keep only its columns.

    Raises ValueError for unknown names and when the table has nothing in that preset.
    """
    library, content = read("steps"), read(name)
    if preset not in library["presets"]:
        raise ValueError(f"preset={preset!r}: one of {', '.join(library['presets'])}")
    setting = library["presets"][preset]
    here = [_made(Row, r) for r in content["rows"]]
    here = [r for r in here if preset in (r.only or content.get("presets", presets()))]
    columns = [_made(Column, c) for c in content["columns"]]
    columns = [c for c in columns if preset in (c.only or content.get("presets", presets()))]
    if unknown := set(rows) - {r.name for r in here}:
        raise ValueError(
            f"rows {sorted(unknown)}: {name} has in preset {preset} {', '.join(r.name for r in here)}"
        )
    here = [r for r in here if not rows or r.name in rows]
    columns = [c for c in columns if not dataset or c.values.get("dataset", dataset) == dataset]
    if not here or not columns:
        raise ValueError(f"table {name!r} has no rows or columns for preset {preset}, dataset {dataset!r}")
    curves = [_made(Curve, c) for c in content.get("curves", ())]
    head = (name, preset, setting["about"], content["title"], content["source"], content.get("text", ""))
    table = Table(*head, here, columns, curves, setting["seeds"], setting["in_process"])
    maker = _Maker(library, setting, places, preset, table.steps)
    for row in here:
        for column in columns:
            if column.title not in row.blank:
                found = [maker.step(column.step, _scope(maker, row, column.values, s)) for s in table.seeds]
                table.cells[row.name, column.title] = list(dict.fromkeys(found))
        for curve in curves:
            if curve.step and row.name in curve.rows:
                found = [maker.step(curve.step, _scope(maker, row, {}, s)) for s in table.seeds]
                table.curve_steps[row.name, curve.title] = list(dict.fromkeys(found))
    return table


def _made(kind: type, content: dict[str, Any]) -> Any:
    known = kind.__dataclass_fields__
    if unknown := set(content) - set(known):
        raise ValueError(f"configs/tables: {kind.__name__} {content.get('name')!r} has no {sorted(unknown)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})


def _scope(maker: "_Maker", row: Row, column: dict[str, Any], seed: int) -> dict[str, Any]:
    """Values that a step's text may name: the preset's, the column's, the row's (these may name the others), the seed."""
    scope = {**maker.values, **column, "seed": seed}
    for key, value in row.values.items():
        scope[key] = fill(value, scope) if isinstance(value, str) else value
    return scope


class _Maker:
    """Makes the steps of one table in one preset, each folder once."""

    def __init__(self, library: dict, setting: dict, places: Places, preset: str, steps: dict[str, Step]):
        self.rules, self.preset, self.steps, self.places = library["steps"], preset, steps, places
        self.lists, self.values = setting["lists"], setting.get("values", {})
        out = Path(places.out)
        self.paths = {"root": ROOT, "data": places.data, "weights_dir": places.weights_dir}
        self.paths |= {"index": out / "index", "features": out / "features"}

    def step(self, rule_name: str, scope: dict[str, Any]) -> str:
        """Name of the step that a rule gives in this scope; it and those before it are added to `steps`."""
        if rule_name not in self.rules:
            raise ValueError(f"configs/tables/steps.yaml: no step {rule_name!r}")
        rule = dict(self.rules[rule_name])
        rule |= rule.pop("in", {}).get(self.preset, {})
        if unknown := set(rule) - _FIELDS:
            raise ValueError(f"configs/tables/steps.yaml: step {rule_name} has no {sorted(unknown)}")
        inputs, after = {}, []
        for variable, earlier in rule.get("after", {}).items():
            after.append(self.step(fill(earlier, scope), scope))
            inputs[variable] = self.steps[after[-1]].output
        name = fill(rule["folder"], scope)
        folder = (
            Path(fill(rule["place"], scope | self.paths)) if rule.get("place") else self.places.runs / name
        )
        known = scope | self.paths | inputs | {"folder": folder}
        step = Step(
            name,
            folder,
            folder / rule.get("output", ""),
            rule.get("program") or "",
            tuple(self._arguments(rule.get("arguments", ()), known)),
            tuple(after),
            tuple(rule.get("judges", ())),
            rule.get("parallel", False),
            fill(rule.get("what", ""), known),
            {k: fill(str(v), known) for k, v in rule.get("cost", {}).items()},
        )
        if self.steps.setdefault(name, step) != step:
            raise ValueError(
                f"configs/tables: two different commands write to {name}; give one another folder"
            )
        return name

    def _arguments(self, items: Sequence[str], known: dict[str, Any]) -> Iterator[str]:
        """`@name` stands for a list of the preset."""
        for item in items:
            if item.startswith("@"):
                name = fill(item[1:], known)
                if name not in self.lists:
                    raise ValueError(f"configs/tables/steps.yaml: preset {self.preset} has no list {name!r}")
                yield from self._arguments(self.lists[name], known)
            else:
                yield fill(item, known)
