"""Model what the commands of the paper's tables cost, for `python -m pipelines.plan --hours`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from data.core.files import write_atomic
from pipelines.plan import programs
from pipelines.plan.cards import CARDS
from pipelines.plan.tasks import simulate
from pipelines.results.markdown import markdown_table
from pipelines.results.records import Command, config_of, judges_of, wanted
from pipelines.results.tables import CARD, HOURS, ROOT, Places, load_table, names
from pipelines.training.config import flatten
from pipelines.training.open import imagined_vae

PAGE = ROOT / "docs" / "reproduce.md"
BEGIN, END = "<!-- python -m pipelines.plan --hours -->\n", "<!-- end -->\n"
PLACES = Places("/DATA", "/WEIGHTS", "/OUT")

HEAD = f"""# Written by `python -m pipelines.plan --hours`: GPU hours and GB of disk of each command, by its folder below RUNS.
# Modelled on one {CARD}, not measured; docs/hardware.md has the method and its error. Commands of minutes (judging,
# timing, random weights) are not listed.
"""
VIDEOS = {
    "ucf101": 13_320,
    "webvid": 5_000,
    "panda70m": 2_000,
    "sky_timelapse": 2_000,
}  # the last two: assumed
# Settings that do not change what a step costs
FREE = ("seed", "model.init", "clip_start", "source.", "cache.")


def write_hours() -> None:
    """Simulate every command of the paper's sizes, each kind of work once; write the hours, and the page that shows them.

    Takes minutes on one core.
    """
    # Each command once: tables share work.
    costs: dict[str, dict[str, float]] = {}
    simulated: dict[str, Any] = {}
    for name in names():
        table = load_table(name, "paper", PLACES)
        for command in table.commands.values():
            before = [table.commands[earlier] for earlier in command.after]
            if command.name not in costs and (cost := cost_of(command, before, simulated)):
                costs[command.name] = cost
    # The figures for the tables, and the page that shows them
    lines = [f"{name}: {{hours: {c['hours']:.3g}, disk_gb: {c['disk_gb']:.2g}}}" for name, c in costs.items()]
    write_atomic(HOURS, HEAD + "\n".join(lines) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    write_atomic(PAGE, before + BEGIN + page_table() + END + rest.split(END)[1])


def page_table() -> str:
    """What each table needs, as Markdown: made from the tables' commands and the hours file."""
    costs, rows = yaml.safe_load(HOURS.read_text()), []
    for name in names():
        datasets = ("ucf101", "sky_timelapse") if name == "table2" else ("",)
        for dataset in datasets:
            commands = load_table(name, "paper", PLACES, dataset=dataset).commands.values()
            # What the user brings, and what all commands together cost
            needs, hours, disk = {"weights": set(), "data": set()}, 0.0, 0.0
            for command in commands:
                needs["weights"].update(judges_of(command))
                for what, _ in command.needs:
                    kind, _, part = what.partition(": ")
                    needs[kind].add(part)
                cost = costs.get(command.name, {"hours": 0.0, "disk_gb": 0.0})
                hours, disk = hours + cost["hours"], disk + cost["disk_gb"]
            # The row
            cells = [f"`{name}{' --dataset ' + dataset if dataset else ''}`"]
            for parts in needs.values():
                cells.append(" ".join(f"`{part}`" for part in sorted(parts)) or "none")
            rows.append([*cells, f"{hours:,.0f}" if hours >= 1 else "minutes", f"{disk:,.0f} GB"])
    header = ["`python -m pipelines.table ...`", "weights", "data", f"GPU hours ({CARD})", "disk"]
    return markdown_table(header, rows)


def _imagined(config: Any) -> Any:
    """The same settings with SD-VAE in place of SVD-VAE: same encoder, same latents, but no mix factors.

    Those are made from a number, which torch's fake tensors do not survive.
    """
    if config.vae.name != "svd":
        return config
    return replace(config, vae=replace(config.vae, name="sd2_1"))


def cost_of(
    command: Command, before: Sequence[Command], simulated: dict[str, Any]
) -> dict[str, float] | None:
    """{"hours", "disk_gb"} of a command, None for one of minutes. before: the commands whose folders it reads."""
    program = command.program.split(".")[-1]
    if program not in ("train_vae", "train_latte", "cache_latents", "sample", "reconstruct"):
        return None
    config = config_of(command.program, command.arguments)
    if program.startswith("train") and config.steps < 1000:
        return None

    # One simulation per kind of work
    trained = next((c for c in before if c.program == "pipelines.train_latte"), None)
    trained = trained and _imagined(config_of(trained.program, trained.arguments))
    if program in ("cache_latents", "train_latte"):
        config = _imagined(config)
    decides = {k: v for k, v in flatten(config).items() if k in wanted(command) and not k.startswith(FREE)}
    key = f"{program} {decides} {trained.vae.name if trained else ''}"
    if key not in simulated:
        if program == "sample":
            simulated[key] = programs.sample(config, trained)
        else:
            simulated[key] = simulate(program, config)
    simulation = simulated[key]
    tf32 = config.precision.value == "tf32" if program != "reconstruct" else False
    unit_s = simulation.seconds(CARDS[CARD], tf32)

    # How many units, and what stays on the disk
    if program.startswith("train"):
        state = sum(simulation.resident.values())
        return {"hours": config.steps * unit_s / 3600, "disk_gb": (config.keep_checkpoints + 1) * state / 1e9}
    if program == "cache_latents":
        videos = min(config.cache.num_videos or 10**9, VIDEOS[config.source.name])
        clips = videos * config.cache.crops * (2 if config.cache.flips else 1)
        vae, side = imagined_vae(config.vae), config.clip.size
        channels, s = vae.latent_channels, vae.spatial_compression_ratio
        numbers = 2 * channels * vae.latent_frames(config.clip.num_frames) * (side // s) ** 2
        width = 4 if config.cache.dtype == "float32" else 2
        return {"hours": clips * unit_s / 3600, "disk_gb": clips * numbers * width / 1e9}
    if program == "sample":
        clip = trained.clip
        pixels = clip.num_frames * clip.size**2 * 3  # FFV1 halves them, about
        hours = config.num_videos * unit_s / 3600
        return {"hours": hours, "disk_gb": config.num_videos * pixels / 2 / 1e9}
    return {"hours": VIDEOS[config.source.name] * unit_s / 3600, "disk_gb": 0.1}
