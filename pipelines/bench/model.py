"""`--model`: what the same work costs on a named card, by the pretended GPU (pipelines/plan)."""

from collections.abc import Iterator
from typing import Any

from data.core.lazy import lazy
from pipelines.plan.cards import Card, seconds
from pipelines.plan.programs import Simulation, encode_and_decode

tasks = lazy("pipelines.plan.tasks")
torch = lazy("torch")
vaes = lazy("vae")

# The programs whose tasks are the model of a kind
KINDS = {"vae": (), "train": ("train_vae", "train_latte"), "cache": ("cache_latents",), "sample": ("sample",)}


def simulations(kind: str) -> Iterator[tuple[str, Simulation]]:
    """(title, simulation) at full size in bf16."""

    if kind == "vae":
        for preset in ("odvae", "osp_v1_2"):
            found = encode_and_decode(
                lambda preset=preset: vaes.ODVAE.preset(preset).eval(), 81, 256, dtype=torch.bfloat16
            )
            yield f"{preset}, 81 x 256 x 256", found
    for row in tasks.ROWS:
        if row.program in KINDS[kind] and not row.name.startswith("the same"):
            yield row.name, tasks.simulate(row.program, row.config())


def rows(kind: str, card: Card) -> Iterator[dict[str, Any]]:
    """One JSON-ready row for each piece of work."""
    for title, simulation in simulations(kind):
        for task in simulation.tasks:
            cost = task.cost
            yield {
                "case": f"{title}: {task.name}",
                "card": card.name,
                "ms": 1000 * seconds(cost, card),
                "bytes": cost.bytes,
                "kernels": cost.kernels,
                "layout_copies": cost.layout_copies,
                "peak_bytes": cost.peak,
            }
