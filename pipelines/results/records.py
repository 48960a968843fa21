"""Read what a command has left in its folder: finished or not, its numbers, and whether its settings are those asked for.

PROGRAMS knows for each program the settings of a command line, the folder of its records, and how to read them.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from eval import fvd, inception_score
from pipelines import benchmark, cache_latents, reconstruct, sample, stand_in, train_latte, train_vae
from pipelines.training.config import flatten, free_keys, read_yaml
from pipelines.training.log import read_metrics

# Settings that say where things lie: no result depends on them
PLACES = {"root", "init_from", "path", "out", "pipeline", "transformer", "dir", "run_dir", "index_dir"}
PLACES |= {"lpips_weights", "i3d_weights"}
# What settings were before they existed: older records do not have them
BEFORE = {"vae.tiling_frames": 0, "tiling_frames": 0, "held_out": False, "rfvd": False, "real_fps": None}
SHOWN = 3  # differences named in one message


@dataclass(frozen=True)
class Command:
    """A command line. name: its folder below RUNS. after: names of commands whose folders it reads.

    needs: (what, folder) that the user must bring.
    """

    name: str
    program: str  # e.g. pipelines.train_vae
    arguments: tuple[str, ...]
    folder: Path
    after: tuple[str, ...] = ()
    needs: tuple[tuple[str, Path], ...] = ()

    def text(self) -> str:
        """As typed into a shell in the root of the repository."""
        return shlex.join(["python", "-m", self.program, *self.arguments])


@dataclass
class Record:
    """What a program has left, or its absence.

    state: none, partly, done, or other (made with other settings); note: of all but done, what is missing or differs.
    settings: flat, all that are known. values: what a column's key can name. label: e.g. "random-feature LPIPS".
    shared: records of other settings may lie in the same folder, so that the command can still be run.
    """

    file: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    git: str = ""
    label: str = ""
    state: str = "done"
    note: str = ""
    shared: bool = False


def find(command: Command) -> Record:
    """Read a command's folder: the newest record with the settings asked for counts.

    A record that cannot be read is unfinished work, with the reason as its note.
    """
    # The newest record with the settings asked for, and the newest with others
    program, newest, other = PROGRAMS[command.program], None, None
    try:
        config = config_of(command.program, command.arguments)
        for record in program.records(command.folder, config):
            asked = program.wanted(config) if record.settings else {}
            difference = differences(asked, record.settings)
            if difference or record.state == "other":
                other = replace(record, state="other", note=difference or record.note)
            else:
                # FVD and KVD are two records: together they are the numbers of the command.
                record.values = (newest.values if newest else {}) | record.values
                newest = record
    except (OSError, ValueError, KeyError, TypeError) as error:
        note = f"its record cannot be read ({' '.join(str(error).split())[:200]})"
        return Record(state="partly", note=note)

    # Whether that is all that the command should leave
    found = newest or other or Record(state="none")
    missing = [name for name in program.numbers if name not in found.values]
    if found.state == "done" and missing:
        found.state, found.note = "partly", f"no {', '.join(missing)} yet"
    if found.state == "none" and command.folder.is_dir() and any(command.folder.iterdir()):
        found.state = "partly"
    return found


@lru_cache(4096)
def config_of(program: str, arguments: tuple[str, ...]) -> Any:
    """The settings that a command line makes. Raises ValueError for a program that no table can use."""
    if program not in PROGRAMS:
        raise ValueError(f"configs/tables: program {program}: one of {', '.join(PROGRAMS)}")
    return PROGRAMS[program].config(list(arguments))


def folder_of(program: str, arguments: Sequence[str]) -> Path:
    """Where a command line puts its records."""
    return PROGRAMS[program].folder(config_of(program, tuple(arguments)))


def wanted(command: Command) -> dict[str, Any]:
    """The settings of a command that decide its result, flat."""
    return PROGRAMS[command.program].wanted(config_of(command.program, command.arguments))


def judges_of(command: Command) -> list[str]:
    """The judging networks whose weights a command reads, keys of eval.weight_files.WEIGHT_FILES."""
    return PROGRAMS[command.program].judges(config_of(command.program, command.arguments))


def comparable(flat: dict[str, Any]) -> dict[str, Any]:
    """Flat settings without those that only say where things lie; of a list file its name counts."""
    kept = {}
    for key, value in flat.items():
        if key.rsplit(".", 1)[-1] not in PLACES:
            kept[key] = Path(value).name if key.endswith("list_file") and value else value
    return kept


def differences(asked: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Name the settings that differ, "" if none does. A setting that only one of them has was at its default there."""

    def plain(value: Any) -> Any:
        return json.loads(json.dumps(value, default=str))

    recorded, found = BEFORE | comparable(recorded), []
    for key, value in asked.items():
        if key in recorded and plain(value) != plain(recorded[key]):
            found.append(f"{key} is {recorded[key]!r}, asked {value!r}")
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def flat_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_tree(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Complete lines of a JSONL file."""
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:  # the half-written last line of a killed program
            continue


# ---- the programs ----------------------------------------------------------------------------------------


class Program:
    """A program and its records. config: makes the settings of a command line. file: its record, a JSON object."""

    file = ""
    numbers: tuple[str, ...] = ()  # that a complete folder has

    def __init__(self, main: Callable[[list[str]], int | None], config: Callable[[list[str]], Any]):
        self.main, self.config = main, config

    def folder(self, config: Any) -> Path:
        """Where its records go."""
        return Path(config.out)

    def wanted(self, config: Any) -> dict[str, Any]:
        """The settings that decide the result, flat: without places and speed settings."""
        flat = flatten(config)
        for key in free_keys(config):
            flat.pop(key, None)
        return comparable(flat)

    def judges(self, config: Any) -> list[str]:
        """The judging networks whose weights it reads."""
        return []

    def records(self, folder: Path, config: Any) -> Iterator[Record]:
        """What is in a folder, oldest first."""
        if (folder / self.file).is_file():
            yield self.record(folder, config, json.loads((folder / self.file).read_text()))

    def record(self, folder: Path, config: Any, content: dict[str, Any]) -> Record:
        """The record of a JSON object with `settings` and `versions`."""
        settings, git = flat_tree(content["settings"]), content["versions"].get("git", "")
        return Record(folder / self.file, settings, flat_tree(content), git)


class Training(Program):
    """A run folder: its settings, log, speeds, and the export that it ends with."""

    def folder(self, config: Any) -> Path:
        return Path(config.run_dir)

    def judges(self, config: Any) -> list[str]:
        if not hasattr(config, "val_lpips"):
            return []
        teacher = "vgg16" if config.loss.perceptual_net.value == "vgg" else "alexnet"
        return [teacher] * bool(config.loss.perceptual_weight) + ["alexnet"] * config.val_lpips

    def records(self, folder: Path, config: Any) -> Iterator[Record]:
        if not (folder / "config.yaml").is_file():
            return
        # What the run says of itself
        metrics, speed = read_metrics(folder), folder / "efficiency.json"
        reached = max((line["step"] for line in metrics), default=0)
        settings = flat_tree(read_yaml(folder / "config.yaml")) | {"steps": reached}
        git = json.loads((folder / "env.json").read_text())["versions"].get("git", "")
        record = Record(folder, settings, git=git)
        # The last value of each name
        for line in [*metrics, flat_tree(json.loads(speed.read_text()) if speed.is_file() else {})]:
            record.values |= {k: v for k, v in line.items() if v is not None}
        # Finished: at the step asked for, and with its export
        exports = (folder / "vae" / "config.json", folder / "pipeline" / "model_index.json")
        if reached > config.steps:
            record.state, record.note = "other", f"steps is {reached}, asked {config.steps}"
        elif reached < config.steps or not any(file.is_file() for file in exports):
            record.state, record.note = "partly", f"step {reached:,} of {config.steps:,}"
        yield record


class Cache(Program):
    """Latents; that they are of these settings is checked by cache_latents, with a fingerprint."""

    file = "index.json"

    def folder(self, config: Any) -> Path:
        return Path(config.cache.dir)

    def record(self, folder: Path, config: Any, content: dict[str, Any]) -> Record:
        shards = f"{len(list(folder.glob('latents-*.json')))} shards"
        done = content.get("complete", False)
        return Record(folder / self.file, state="done" if done else "partly", note="" if done else shards)


class Sample(Program):
    """Generated videos."""

    file = "manifest.json"

    def folder(self, config: Any) -> Path:
        return config.folder

    def record(self, folder: Path, config: Any, content: dict[str, Any]) -> Record:
        record, made = super().record(folder, config, content), len(list(folder.glob("*.mkv")))
        if not content["complete"] or made < config.num_videos:
            record.state, record.note = "partly", f"{made} of {config.num_videos} videos"
        return record


class Reconstruct(Program):
    """PSNR, SSIM and LPIPS of a VAE."""

    file = "summary.json"

    def judges(self, config: Any) -> list[str]:
        found = ["alexnet"] if config.lpips and not config.lpips_weights else []
        return found + (["i3d"] if config.rfvd and not config.i3d_weights else [])

    def record(self, folder: Path, config: Any, content: dict[str, Any]) -> Record:
        record = super().record(folder, config, content)
        if "tiling_frames" in record.settings:  # its name in older records
            record.settings["vae.tiling_frames"] = record.settings.pop("tiling_frames")
        # Scores under their plain keys; a network without published weights makes the record's label.
        for metric, (name, value) in reconstruct.scores_of(content).items():
            if value is not None:
                record.values[metric.key] = value
            if metric.network and name != metric.name:
                record.label = f"random-feature {metric.name}"
        return record


class Benchmark(Program):
    """Speeds of a VAE, one line per measurement."""

    def folder(self, config: Any) -> Path:
        return Path(config.out).parent

    def wanted(self, config: Any) -> dict[str, Any]:
        shape = {"frames": config.num_frames, "height": config.size, "width": config.size}
        dtype = "bfloat16" if config.precision.value == "bf16" else "float32"
        how = {"batch": config.batch, "dtype": dtype, "precision": config.precision.value}
        return shape | how | {"variant": config.variants[0]}

    def records(self, folder: Path, config: Any) -> Iterator[Record]:
        for row in _lines(folder / "rows.jsonl"):
            kept = {k: row[k] for k in ("variant", "precision") if k in row}  # older rows have a dtype only
            git = row["versions"].get("git", "")
            yield Record(folder / "rows.jsonl", row["encode"] | kept, flat_tree(row), git, shared=True)


class StandIn(Program):
    """Weights or videos in place of those that are not there."""

    file = "stand_in.json"

    def wanted(self, config: Any) -> dict[str, Any]:
        return {}

    def record(self, folder: Path, config: Any, content: dict[str, Any]) -> Record:
        return Record(folder / self.file)


class Judge(Program):
    """A judge of eval/ with one line per score. protocol_of: of its parsed command line."""

    def __init__(self, module: Any, protocol_of: Callable, numbers: tuple[str, ...], *networks: str):
        super().__init__(module.main, module.parse)
        self.protocol_of, self.numbers, self.networks = protocol_of, numbers, networks

    def folder(self, config: Any) -> Path:
        return Path(config.out).parent

    def judges(self, config: Any) -> list[str]:
        return [] if config.weights else list(self.networks)

    def wanted(self, config: Any) -> dict[str, Any]:
        asked = dataclasses.asdict(self.protocol_of(config))
        if asked.get("size") is None:  # then it is that of the generated videos
            asked.pop("size", None)
        return asked | {"random weights": str(config.weights or "").startswith("random:")}

    def records(self, folder: Path, config: Any) -> Iterator[Record]:
        for row in _lines(folder / "scores.jsonl"):
            random = row["metric"].startswith("random-feature")
            settings, git = row["protocol"] | {"random weights": random}, row.get("git") or ""
            label = "random-feature score" if random else ""
            for name in set(self.numbers) & set(row["metric"].split()):
                values = {name: row["value"]}
                yield Record(folder / "scores.jsonl", settings, values, git, label, shared=True)


def _settings(module: Any) -> Callable[[list[str]], Any]:
    return lambda argv: module.config_from(argv)[0]


def _tgan(args: Any) -> Any:
    return inception_score.protocols_of(args)[0]


PROGRAMS: dict[str, Program] = {
    "pipelines.train_vae": Training(train_vae.main, _settings(train_vae)),
    "pipelines.train_latte": Training(train_latte.main, _settings(train_latte)),
    "pipelines.cache_latents": Cache(cache_latents.main, _settings(cache_latents)),
    "pipelines.sample": Sample(sample.main, _settings(sample)),
    "pipelines.reconstruct": Reconstruct(reconstruct.main, _settings(reconstruct)),
    "pipelines.benchmark": Benchmark(benchmark.main, _settings(benchmark)),
    "pipelines.stand_in": StandIn(stand_in.main, stand_in.config_from),
    "eval.fvd": Judge(fvd, fvd.protocol_of, ("FVD", "KVD"), "i3d"),
    "eval.inception_score": Judge(inception_score, _tgan, ("IS",), "c3d", "c3d_mean"),
}
