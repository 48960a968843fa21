"""What a step has left in its folder: finished or not, its numbers, and whether it was made with the settings asked for.

Every program leaves a record of its own kind; here is one reader a program. Nothing is changed.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.tables.protocol import config_of, differences, wanted
from pipelines.tables.spec import Step


@dataclass
class Found:
    """state: none, partly, done or other (made with other settings: `note` says which).

    again: running the command adds what is missing; of state other it would not, the folder belongs to another run.
    values: what a column's key can name. protocol: the settings that decide the number. label: e.g. "random-feature".
    """

    state: str = "none"
    note: str = ""
    again: bool = True
    record: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    git: str = ""
    label: str = ""


def find(step: Step) -> Found:
    """Read a step's folder. Records that cannot be read count as unfinished work, with the reason as note."""
    reader = _READERS.get(step.program, _given)
    try:
        return reader(step)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Found("partly", f"its record cannot be read ({' '.join(str(error).split())[:200]})")


def _json(file: Path) -> Any:
    return json.loads(file.read_text())


def _rows(file: Path) -> list[dict[str, Any]]:
    """Complete lines of a JSONL file; [] when there is none."""
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the half-written last line of a killed program
            continue
    return rows


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _given(step: Step) -> Found:
    """Weights or videos that the user gives, or a stand-in: a folder with something in it."""
    if step.program:
        done = (step.folder / "stand_in.json").is_file()
        return Found("done" if done else "none", record=step.folder / "stand_in.json")
    full = step.folder.is_dir() and any(step.folder.iterdir())
    return Found("done" if full else "none", record=step.folder)


def _training(step: Step) -> Found:
    """A run folder of train_vae or train_latte: its settings, log, speeds, and the export that it ends with."""
    from pipelines.training.config import read_yaml
    from pipelines.training.log import read_metrics

    saved = step.folder / "config.yaml"
    if not saved.is_file():
        return Found()
    config = config_of(step)
    recorded = _flat(read_yaml(saved))
    asked = wanted(step)
    metrics = read_metrics(step.folder)
    reached = max((r["step"] for r in metrics), default=0)
    found = Found("partly", f"step {reached:,} of {config.steps:,}", record=step.folder)
    found.protocol = {k: recorded[k] for k in asked if k in recorded} | {"steps": reached}
    found.git = _json(step.folder / "env.json")["versions"].get("git", "")
    difference = differences(asked, recorded)
    if reached > config.steps:
        difference = difference or f"steps is {reached}, asked {config.steps}"
    if difference:
        found.state, found.note, found.again = "other", difference, False
        return found
    export = "model_index.json" if step.program.endswith("latte") else "config.json"
    if reached < config.steps or not (step.output / export).is_file():
        return found
    for record in metrics:  # the last value of each name
        found.values |= {k: v for k, v in record.items() if v is not None}
    speed = step.folder / "efficiency.json"
    found.values |= {k: v for k, v in _flat(_json(speed)).items() if v is not None} if speed.is_file() else {}
    found.state, found.note = "done", ""
    return found


def _cache(step: Step) -> Found:
    index = step.folder / "index.json"
    if not index.is_file():
        return Found()
    made = len(list(step.folder.glob("latents-*.json")))
    done = _json(index).get("complete", False)
    return Found("done" if done else "partly", "" if done else f"{made} shards", record=index)


def _sample(step: Step) -> Found:
    file = step.folder / "manifest.json"
    if not file.is_file():
        return Found()
    content, config = _json(file), config_of(step)
    difference = differences(wanted(step), _flat(content["settings"]))
    made = len(list(step.folder.glob("*.mkv")))
    found = Found(
        "partly", f"{made} of {config.num_videos} videos", record=file, protocol=content["settings"]
    )
    found.git = content["versions"].get("git", "")
    if difference:
        found.state, found.note, found.again = "other", difference, False
    elif content["complete"] and made >= config.num_videos:
        found.state, found.note = "done", ""
    return found


def _reconstruct(step: Step) -> Found:
    from pipelines.reconstruct import lpips_of

    file = step.folder / "summary.json"
    if not file.is_file():
        return Found("partly" if step.folder.is_dir() else "none")
    content = _json(file)
    asked, recorded = wanted(step), _flat(content["settings"])
    if "tiling_frames" in recorded:  # its name in older records
        recorded["vae.tiling_frames"] = recorded.pop("tiling_frames")
    protocol = {k: recorded[k] for k in asked if k in recorded}
    name, lpips = lpips_of(content)
    values = _flat(content) | ({} if lpips is None else {"lpips": lpips})
    found = Found("done", record=file, values=values, protocol=protocol)
    found.git = content["versions"].get("git", "")
    found.label = "random-feature LPIPS" if name != "LPIPS" else ""
    if difference := differences(asked, recorded):
        found.state, found.note, found.again = "other", difference, False
    return found


def _benchmark(step: Step) -> Found:
    file, config = step.folder / "rows.jsonl", config_of(step)
    asked = {"frames": config.num_frames, "height": config.size, "width": config.size, "batch": config.batch}
    asked["dtype"] = "bfloat16" if config.precision.value == "bf16" else "float32"
    asked["precision"] = config.precision.value  # rows of before it have a dtype only
    note = ""
    for row in reversed(_rows(file)):
        encode = row["encode"]
        made_with = encode | {k: row[k] for k in ("variant", "precision") if k in row}
        note = differences(asked | {"variant": config.variants[0]}, made_with)
        if not note:
            shape = {k: made_with.get(k) for k in (*asked, "device")}
            made = row["versions"].get("git", "")
            return Found("done", record=file, values=_flat(row), protocol=shape, git=made)
    return Found("other" if note else "none", note, record=file)


def _judge(step: Step) -> Found:
    """The newest records of fvd or inception_score that were made by the protocol of the command line."""
    module = import_module(step.program)
    args = module.parse(list(step.arguments))
    if step.program == "eval.fvd":
        protocol, metrics = module.protocol_of(args), ("FVD", "KVD")
    else:
        protocol, metrics = module.protocols_of(args)[0], ("IS",)
    asked = {k: v for k, v in dataclasses.asdict(protocol).items() if v is not None}
    random = str(args.weights or "").startswith("random:")
    file = step.folder / "scores.jsonl"
    found, other = Found(record=file), ""
    for row in _rows(file):
        name = next((m for m in metrics if m in row["metric"].split()), "")
        differing = differences(asked, row["protocol"])
        if random != row["metric"].startswith("random-feature"):
            differing = differing or f"its weights are {'real' if random else 'random'}"
        if differing or not name:
            other = differing
            continue
        found.values |= {name: row["value"], f"{name} interval": row.get("interval")}
        found.protocol = row["protocol"]
        found.git, found.label = row.get("git") or "", row["metric"] if random else ""
    if all(m in found.values for m in metrics):
        found.state = "done"
        if random:
            found.label = "random-feature score"
    elif found.values:
        found.state, found.note = "partly", f"only {', '.join(found.values)}"
    elif other:
        found.state, found.note = "other", other
    return found


_READERS: dict[str, Callable[[Step], Found]] = {
    "pipelines.train_vae": _training,
    "pipelines.train_latte": _training,
    "pipelines.cache_latents": _cache,
    "pipelines.sample": _sample,
    "pipelines.reconstruct": _reconstruct,
    "pipelines.benchmark": _benchmark,
    "eval.fvd": _judge,
    "eval.inception_score": _judge,
}
