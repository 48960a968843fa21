"""What `--plan` prints: memory, arithmetic, traffic and time of a program on a card, and what would make it fit."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.plan.cards import Card, find_card, seconds
from pipelines.plan.cost import GIB, INT32
from pipelines.plan.programs import Simulation

CONTEXT_GIB = 1.5  # of the CUDA context and the libraries' workspaces
GAPS = 1.03  # of the allocator
METHOD = (
    "Modelled, not measured: the program's own steps on a pretended GPU. Against one H200 (docs/results/gpu) the peaks\n"
    "were within 6 % (most within 1 %) and the times within 26 %. A slower host makes short steps slower."
)


def needed_gib(simulation: Simulation) -> float:
    """Memory that the card must offer: the peak of what torch allocates, gaps and the context."""
    return GAPS * simulation.peak / GIB + CONTEXT_GIB


def plan_text(program: str, simulate: Callable[[Any], Simulation], config: Any, card_name: str) -> str:
    """Describe what a program with these settings needs on a card.

    simulate: from `pipelines.plan.programs`. Raises ValueError for a card that is not in the table.
    """
    # The work on the card, a line for each kind.
    card = find_card(card_name)
    simulation = simulate(config)
    tf32 = getattr(getattr(config, "precision", None), "value", "") == "tf32"
    lines = [f"{program} on one {card.name} ({card.gib:g} GiB)", METHOD, ""]
    lines.append(f"{'work':44s} {'peak GiB':>9s} {'TFLOP':>9s} {'GB moved':>9s} {'kernels':>8s} {'ms':>9s}")
    for task in simulation.tasks:
        cost, took = task.cost, seconds(task.cost, card, tf32)
        lines.append(
            f"{task.name:44s} {cost.peak / GIB:9.2f} {cost.flops / 1e12:9.1f} {cost.bytes / 1e9:9.1f} "
            f"{cost.kernels:8d} {1000 * took:9.1f}"
        )
    # What stays in memory, and what fills it at the peak.
    lines.append("")
    held = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in simulation.resident.items())
    largest = max(simulation.tasks, key=lambda task: task.cost.peak)
    lines.append(f"always there: {held}; largest at the peak: {_kinds(largest.cost)}")
    # Time of one unit and of the whole run; tensors that some kernels cannot count; does it fit?
    total = simulation.seconds(card, tf32)
    if simulation.unit:
        lines.append(f"mean: {total:.3g} s a {simulation.unit}, {1 / total:.3g} {simulation.unit}s a second")
    lines += _whole_run(program, config, total)
    biggest = max(task.cost.largest for task in simulation.tasks)
    if biggest >= INT32:
        lines.append(
            f"largest tensor: {biggest / INT32:.2f} x 2^31 elements; not every kernel counts that far"
        )
    lines += _verdict(program, simulate, config, simulation, card)
    return "\n".join(lines)


def _kinds(cost: Any) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in cost.at_peak[:4])


def _whole_run(program: str, config: Any, total: float) -> list[str]:
    if program in ("train_vae", "train_latte"):
        return [
            f"{config.steps:,} steps of {config.global_batch} clips: {config.steps * total / 3600:.3g} h on one card"
        ]
    if program == "sample":
        return [
            f"{config.num_videos:,} videos: {config.num_videos * total / 3600:.3g} h, without writing them"
        ]
    if program == "cache_latents":
        return [f"100,000 clips: {1e5 * total / 3600:.3g} h, without reading them"]
    return []


def _verdict(
    program: str, simulate: Callable[[Any], Simulation], config: Any, simulation: Simulation, card: Card
) -> list[str]:
    need = needed_gib(simulation)
    known = f"needs about {need:.1f} GiB with context and gaps"
    if need <= card.gib:
        return [f"fits: {known}"]
    # It does not: try what needs less, until something fits.
    lines = [f"DOES NOT FIT: {known}, the card has {card.gib:g}"]
    for words, smaller in _smaller(program, config):
        need = needed_gib(simulate(smaller))
        fits = "fits" if need <= card.gib else "does not fit either"
        lines.append(f"  {words}: about {need:.1f} GiB, {fits}")
        if need <= card.gib:
            break
    return lines


def _smaller(program: str, config: Any) -> Iterator[tuple[str, Any]]:
    """Settings that need less memory, one change after another, the cheapest in time first."""
    # (words, key, value) of what the program has and has not chosen yet
    trains = program in ("train_vae", "train_latte")
    changes: list[tuple[str, str, Any]] = []
    if (trains or program == "sample") and config.precision.value != "bf16":
        changes.append(("precision=bf16", "precision", type(config.precision).bf16))
    if trains and not config.gradient_checkpointing:
        changes.append(("gradient_checkpointing=true", "gradient_checkpointing", True))
    if trains and config.micro_batch > 1:
        changes.append(("micro_batch=1", "micro_batch", 1))
    if program == "sample" and config.batch > 1:
        changes.append(("batch=1", "batch", 1))
    if program == "cache_latents" and config.cache.batch > 1:
        changes.append(("cache.batch=1", "cache", dataclasses.replace(config.cache, batch=1)))
    # Each together with those before it
    words: list[str] = []
    for word, key, value in changes:
        words.append(word)
        config = dataclasses.replace(config, **{key: value})
        yield " ".join(words), config
