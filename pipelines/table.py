"""Make the paper's tables and figure: what is done, what is missing, run it, and a page next to the paper's numbers.

    python -m pipelines.table --list-vaes
    python -m pipelines.table table2 --dataset ucf101 --data DIR --weights-dir DIR          # the state of each row
    python -m pipelines.table table2 --dataset ucf101 --data DIR --weights-dir DIR --run    # run what is missing
    python -m pipelines.table all --preset tiny --run                                       # every command, in minutes
    python -m pipelines.table vaes --data DIR name=FOLDER ...                               # VAEs of your choice; --help

Each command is a process of its own with a log in OUT/steps; run the same command again to resume. Every call writes
OUT/NAME/NAME.md, .html, .csv and .tex with what there is. docs/reproduce.md has what each table needs.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.core.cli import run
from data.core.lazy import lazy

if TYPE_CHECKING:
    from pipelines.results.run_table import Desk
    from pipelines.results.tables import Table

pandas = lazy("pandas")
weights = lazy("eval.weights")
rendering = lazy("pipelines.results.render")
running = lazy("pipelines.results.run_table")
tables = lazy("pipelines.results.tables")
vae = lazy("vae")
vaes = lazy("pipelines.results.vaes")


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.table", description=__doc__, formatter_class=formatter
    )
    add = parser.add_argument
    known = "table1 to table4, figure4, norm_scope, variant_speed; or all"
    sizes = ("paper", "small", "scenes", "tiny")
    default = "$OMNILATTE_WEIGHTS, else weights/ of the repository"
    add("names", nargs="*", metavar="NAME", help=known)
    add("--list-vaes", action="store_true", help="the seven VAEs of Table 1")
    add("--run", action="store_true", help="run what is missing, then render")
    add("--dry-run", action="store_true", help="print the commands that are missing, run nothing")
    add("--rows", default="", help="only these rows: NAME[;NAME...]")
    add("--dataset", default="", help="only the columns of this data set, e.g. ucf101")
    add("--preset", default="paper", choices=sizes, help="sizes (default paper)")
    add("--data", default="data-sets", help="folder with one sub-folder per data set (default data-sets)")
    add("--weights-dir", help=f"folder of VAEs and judges (default {default})")
    add("--out", help="folder of runs, logs and tables (default runs/tables-PRESET)")
    add("--launch", default="", help='for several GPUs: "accelerate launch --config_file FILE"')
    args = parser.parse_args(argv)
    if not args.list_vaes and not args.names:
        parser.error("name a table, or --list-vaes")
    return args


def list_vaes() -> None:
    """Print the VAEs at the paper's size. Of TATS the paper counts the whole training module."""
    rows = []
    for one in vae.describe_vaes():
        frames = "/".join(str(one["latent_frames"][T]) for T in (25, 33, 81))
        counts = f"{one['params']:,}", f"{one['params_paper_counts']:,}"
        ratios = str(one["vcpr_nominal"]), f"{one['vcpr_effective_81']:.1f}"
        rows.append((one["name"], one["paper_name"], *counts, *ratios, frames, one["licence"]))
    head = ["name", "paper's name", "params", "in the paper", "VCPR", "at 81", "latent frames of 25/33/81"]
    print(pandas.DataFrame(rows, columns=[*head, "licence"]).to_string(index=False))


def show(desk: "Desk", table: "Table") -> None:
    """Print the rows with their state, and what the user must bring."""
    print(f"{table.title}\n  preset {table.preset}, {desk.places.out}")
    width = max(len(row.name) for row in table.rows)
    for row in table.rows:
        word, reason = running.row_state(desk, table, row)
        print(f"  {row.name:{width}}  {word:8} {reason}".rstrip())
        left = [command for command in table.commands_of(row) if desk.state(command).word != "done"]
        if left and table.preset == "paper":
            print(f"  {'':{width}}  left: {tables.modelled(left)}")
    for reason in running.to_get(desk, table):
        print(f"  to get: {reason}")


def _absolute(folder: str | Path) -> str:
    return str(Path(folder).expanduser().absolute())


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["vaes"]:
        return vaes.main(words[1:])
    args = parse(words)
    if args.list_vaes:
        list_vaes()
        return 0
    # The tables that were asked for, all read before the first is run: a wrong name shows at once.
    weights_dir, out = args.weights_dir or weights.weights_folder(), args.out or f"runs/tables-{args.preset}"
    places = tables.Places(_absolute(args.data), _absolute(weights_dir), _absolute(out))
    chosen = [name for name in args.rows.split(";") if name]
    wanted = tables.names(args.preset) if args.names == ["all"] else args.names
    loaded = [tables.load_table(name, args.preset, places, chosen, args.dataset) for name in wanted]
    # Run what is missing, show the rows, write the files.
    desk, failed = running.Desk(places), 0
    for table in loaded:
        if args.dry_run:
            for command in table.commands.values():
                if desk.state(command).word != "done":
                    print(command.text())
            continue
        if args.run:
            failed += running.run_table(desk, table, args.launch)
        show(desk, table)
        print(f"  {rendering.render(desk, table) / (table.name + '.html')}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
