"""The table of docs/hardware.md: what each task needs, and how long it takes, on each card. Modelled.

python -m pipelines.plan --out docs/hardware.md      # minutes on one core; no GPU, no data, no weights
python -m pipelines.plan --hours                     # writes the hours of the paper's tables
"""

import argparse
from pathlib import Path

from data.core.cli import run
from data.core.files import write_atomic
from pipelines.plan.cards import CARDS, seconds
from pipelines.plan.hours import write_hours
from pipelines.plan.report import METHOD, needed_gib
from pipelines.plan.tasks import CLIPS, FINETUNED, ROWS, Row, finetune, simulate

INTRODUCTION = """# Hardware

What each task needs and takes on one card, from a simulation: the program's own steps on a pretended GPU
(`pipelines/plan/`). Nothing here was measured; [results/gpu](results/gpu) has what was. Write this page again with
`python -m pipelines.plan --out docs/hardware.md`; the same for settings of your own: `--plan card=NAME` on
train_vae, train_latte, cache_latents, sample and benchmark.

"""
FINETUNING = """
Fine-tuning a video VAE of diffusers (configs/stage1/finetune.yaml: bf16, gradient checkpointing, LPIPS), one clip a step,
modelled, without the adversarial term; [finetune.md](finetune.md) has the commands.
"""


def rows() -> list[str]:
    """One line per task: the memory that it needs, and its time on each card that has so much."""
    heads = " | ".join(f"{card.name} ({card.gib:.0f} GiB)" for card in CARDS.values())
    lines = [f"| task | GiB needed | {heads} |", "| --- | --- |" + " --- |" * len(CARDS)]
    return [*lines, *map(_line, ROWS)]


def finetune_rows() -> list[str]:
    """Fine-tuning VAEs of diffusers: memory and time of a step of one clip on cards of 24, 48 and 80 GB."""
    cards = [CARDS[name] for name in ("rtx4090", "l40s", "h100")]
    names = " | ".join(f"{card.name} ({card.gib:.0f} GiB), s a step" for card in cards)
    lines = [f"| VAE, clip | trained | GiB needed | {names} |", "| --- | --- | --- |" + " --- |" * len(cards)]
    # Each VAE, at two sizes, with the encoder frozen and not
    for name in FINETUNED:
        for least, sides in CLIPS:
            for train in ("decoder", "all"):
                frames, simulation = finetune(name, least, sides, train)
                need, cost = needed_gib(simulation), simulation.tasks[0].cost
                cells = [f"{seconds(cost, c):.3g}" if need <= c.gib else "does not fit" for c in cards]
                clip = f"{name}, {frames} x {sides[0]} x {sides[1]}"
                lines.append(f"| {clip} | {train} | {need:.1f} | {' | '.join(cells)} |")
    return lines


def _line(row: Row) -> str:
    simulation = simulate(row.program, row.config())
    need, cells = needed_gib(simulation), []
    for card in CARDS.values():
        took = simulation.seconds(card, row.tf32)
        cells.append(f"{took:.3g} s a {simulation.unit}" if need <= card.gib else "does not fit")
    return f"| {row.name} | {need:.1f} | " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="", help="Markdown file; default: print")
    parser.add_argument("--hours", action="store_true", help="write the hours of the paper's tables instead")
    args = parser.parse_args(argv)
    if args.hours:
        write_hours()
        return 0
    # The page: tasks, fine-tuning, how it was modelled, and the figures of the cards
    card_lines = ""
    for c in CARDS.values():
        rates = f"{c.half / 1e12:g} TFLOP/s bf16, {c.tf32 / 1e12:g} TF32, {c.bandwidth / 1e12:g} TB/s"
        card_lines += f"- {c.name}: {c.gib:g} GiB, {rates}\n"
    text = INTRODUCTION + "\n".join([*rows(), FINETUNING, *finetune_rows()])
    method = METHOD.replace("\n", " ")
    text += f"\n\n{method}\n\nCards, by their makers:\n\n{card_lines}"
    if args.out:
        write_atomic(Path(args.out), text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    run(main)
