"""The paper's tables and figure, one command each: what is done, what is missing, run it, and a page beside the paper.

    python -m pipelines.table --list-vaes
    python -m pipelines.table table2 --dataset ucf101 --data DIR --weights-dir DIR          # the state of each row
    python -m pipelines.table table2 --dataset ucf101 --data DIR --weights-dir DIR --run    # run what is missing
    python -m pipelines.table all --preset tiny --run                                       # every command, in minutes

Each command is a process of its own with a log below OUT/steps; the same command again goes on where it stopped.
Every call writes OUT/NAME/NAME.md, .html, .csv and .tex with what there is. docs/reproduce.md has what each table needs.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from data.core.cli import run

if TYPE_CHECKING:
    from pipelines.tables.run import Desk
    from pipelines.tables.spec import Table


def vae_rows() -> list[tuple[str, ...]]:
    """Name, parameters, those that the paper counts, VCPR nominal and effective at 81 frames, latent frames, licence.

    Of TATS the paper counts the whole training module, with two discriminators and LPIPS.
    """
    from vae import describe_vaes

    head = "name", "paper's name", "params", "in the paper", "VCPR", "at 81", "latent frames of 25/33/81"
    rows = [(*head, "licence")]
    for vae in describe_vaes():
        counts = f"{vae['params']:,}", f"{vae['params_paper_counts']:,}"
        ratios = str(vae["vcpr_nominal"]), f"{vae['vcpr_effective_81']:.1f}"
        frames = "/".join(str(vae["latent_frames"][T]) for T in (25, 33, 81))
        rows.append((vae["name"], vae["paper_name"], *counts, *ratios, frames, vae["licence"]))
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    from pipelines.tables.spec import names, presets

    parser = argparse.ArgumentParser(
        prog="python -m pipelines.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names())}, or all")
    parser.add_argument("--list-vaes", action="store_true", help="the seven VAEs of Table 1")
    parser.add_argument("--run", action="store_true", help="run what is missing, then render")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands that are missing, run nothing"
    )
    parser.add_argument("--rows", default="", help="only these rows: NAME[;NAME...]")
    parser.add_argument("--dataset", default="", help="only the columns of this data set, e.g. ucf101")
    parser.add_argument("--preset", default="paper", choices=presets(), help="sizes (default paper)")
    parser.add_argument(
        "--data", default="data-sets", help="folder with one sub-folder a data set (data-sets)"
    )
    parser.add_argument(
        "--weights-dir",
        help="folder of VAEs and judges (default $OMNILATTE_WEIGHTS, else weights/ of the repository)",
    )
    parser.add_argument("--out", help="folder of runs, logs and tables (default runs/tables-PRESET)")
    parser.add_argument(
        "--launch", default="", help='for several GPUs: "accelerate launch --config_file FILE"'
    )
    args = parser.parse_args(argv)
    if not args.list_vaes and not args.names:
        parser.error("name a table, or --list-vaes")
    args.names = names() if args.names == ["all"] else args.names
    return args


def show(desk: "Desk", table: "Table") -> None:
    """The rows with their state."""
    from pipelines.tables.run import row_state, to_get

    print(f"{table.title}\n  preset {table.preset}, {desk.places.out}")
    width = max(len(row.name) for row in table.rows)
    for row in table.rows:
        word, reason = row_state(desk, table, row)
        print(f"  {row.name:{width}}  {word:8} {reason}".rstrip())
        left = [s for s in table.steps_of(row) if s.cost and desk.state(s).word != "done"]
        if left and table.preset == "paper":
            hours, disk = (sum(float(s.cost[k]) for s in left) for k in ("hours", "disk_gb"))
            print(f"  {'':{width}}  left: about {hours:,.4g} GPU hours, {disk:,.4g} GB of disk (estimated)")
    for reason in to_get(desk, table):
        print(f"  to get: {reason}")


def show_commands(desk: "Desk", table: "Table") -> None:
    """What --run would run, in order."""
    printed = set()
    for row in table.rows:
        for step in table.steps_of(row):
            if step.name not in printed and step.program and desk.state(step).word != "done":
                print(step.command())
            printed.add(step.name)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list_vaes:
        rows = vae_rows()
        widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return 0
    from eval.weights import weights_folder
    from pipelines.tables.plan import load_table
    from pipelines.tables.render import render
    from pipelines.tables.run import Desk, run_table
    from pipelines.tables.spec import Places
    from pipelines.training.log import console

    console()
    weights = args.weights_dir or weights_folder()
    out = args.out or f"runs/tables-{args.preset}"
    places = Places(*(str(Path(p).expanduser().absolute()) for p in (args.data, weights, out)))
    chosen = [name for name in args.rows.split(";") if name]
    tables = [load_table(name, args.preset, places, chosen, args.dataset) for name in args.names]
    desk, failed = Desk(places), 0
    for table in tables:
        if args.dry_run:
            show_commands(desk, table)
            continue
        if args.run:
            failed += run_table(desk, table, args.launch)
        show(desk, table)
        print(f"  {render(desk, table) / (table.name + '.html')}")
    return 1 if failed else 0


if __name__ == "__main__":
    # Under its own name, for in-process steps import the programs' modules by theirs.
    from pipelines.table import main as program

    run(program)
