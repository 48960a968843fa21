"""Check on a real GPU that everything runs there, is right, and takes the memory and time that `--plan` says.

    python -m pipelines.gpu_check                      # about 6 minutes on an H100; writes docs/results/gpu/<card>-<date>.md
    python -m pipelines.gpu_check --tiny               # the same calls at small sizes, on a CPU too, in a minute
    python -m pipelines.gpu_check --only stage_one,stage_two --out DIR

Networks have random weights, clips are random; no data, no downloads. Each check prints one JSON line as soon as it is
done, so a kill loses only the check that it meets. Exit code 1 when a check fails.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from data.core.cli import run
from data.core.lazy import lazy
from eval.records import git_commit

torch = lazy("torch")
cards = lazy("pipelines.plan.cards")
checks = lazy("pipelines.plan.card_checks")
tools = lazy("pipelines.plan.card_tools")
tasks = lazy("pipelines.plan.tasks")

if TYPE_CHECKING:
    from pipelines.plan.card_tools import Session


def hide_gpus() -> None:
    """Of a process that predicts: before torch looks for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def versions(s: "Session") -> dict:
    card = torch.cuda.get_device_name() if s.cuda else "cpu"
    found = {"card": card, "torch": torch.__version__, "python": sys.version.split()[0], "git": git_commit()}
    if s.cuda:
        found |= {
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / tools.GIB, 1),
        }
    return found | {"command": " ".join(["python -m pipelines.gpu_check", *sys.argv[1:]])}


def page(s: "Session", about: dict, rows: list[dict], predictions: dict[str, dict]) -> str:
    """The results as Markdown: predicted beside measured, then every check's figures."""
    # Where and with what
    lines = [f"# GPU check: {about['card']}, {time.strftime('%Y-%m-%d')}", ""]
    made_with = about.copy()
    del made_with["card"], made_with["command"]
    lines += [", ".join(f"{name} {value}" for name, value in made_with.items()) + ".", ""]
    lines += [f"Command: `{about['command']}`. Random weights and clips; medians; one card, one process.", ""]
    # The measurement that belongs to each prediction: of its own name, or of the check that makes the same calls
    by_check = {row["check"]: row for row in rows}
    encode = by_check.get("vae_sizes", {}).get("encode, bf16 weights")
    measured: dict[str, dict] = {}
    for name in predictions:
        if name.startswith("sampling"):
            measured[name] = by_check.get("sampling", {})
        elif name.startswith("caching"):
            measured[name] = {"encode": encode}
        for row in rows:
            if isinstance(row.get(name), dict):
                measured[name] = row[name]
    # Predicted beside measured
    if predictions:
        card = cards.find_card("").name
        lines += [
            f"Predicted by the planner for {card} (modelled) beside measured:",
            "",
            "| task | part | GiB predicted | GiB measured | ms predicted | ms measured |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, parts in predictions.items():
            for part, value in parts.items():
                got = (measured.get(name) or {}).get(part) or {}
                shown = [value["peak_gib"], got.get("peak_gib", "not run"), round(1000 * value["s"][card], 1)]
                shown.append(round(1000 * got["s"], 1) if "s" in got else "not run")
                lines.append(f"| {name} | {part} | " + " | ".join(map(str, shown)) + " |")
        lines.append("")
    # All figures of each check
    for row in rows:
        state = "passed" if row["ok"] else ("left out" if row["ok"] is None else "FAILED")
        lines += [f"## {row['check']}: {state}, {row['seconds']} s", "", "```json"]
        body = row.copy()
        del body["check"], body["ok"], body["seconds"]
        lines += [json.dumps(body, indent=1), "```", ""]
    return "\n".join(lines)


def run_checks(s: "Session", chosen: list[str], limit: float) -> list[dict]:
    """Run the checks in turn, a JSON line each; none begins that would end after `limit` seconds."""
    began, rows = time.time(), []
    with open(s.out / "gpu_check.jsonl", "w") as file:
        for name in dict.fromkeys(chosen):
            expected, function = checks.CHECKS[name]
            start, row = time.time(), {"check": name}
            # Run it, if the time is there; an error is its result.
            if not s.tiny and start - began + 0.7 * expected > limit:
                row |= {"ok": None, "note": f"{start - began:.0f} of {limit:.0f} s are spent"}
            else:
                try:
                    with tools.cleared(s):
                        result = function(s)
                    row |= {"ok": not result.get("failed"), **result}
                except Exception as error:  # the next check runs all the same
                    where = traceback.format_exc(limit=-3)[-900:]
                    row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500], "where": where}
            # Printed and flushed at once: what was measured stays, whatever comes next.
            row["seconds"] = round(time.time() - start, 1)
            line = json.dumps(row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipelines.gpu_check", description=about)
    add, folder = parser.add_argument, "folder of the results; default: docs/results/gpu, --tiny: a new one"
    add("--tiny", action="store_true", help="small sizes, on a CPU too: a rehearsal")
    add("--only", default="", help="checks, separated by commas, in this order; default: all")
    add("--out", default="", help=folder)
    add("--seconds", type=float, default=540, help="no check begins that would end later")
    add("--no-predictions", action="store_true", help="do not run the planner beside the checks")
    args = parser.parse_args(argv)
    # Which checks, and whether they can run here.
    chosen = args.only.split(",") if args.only else list(checks.CHECKS)
    if unknown := set(chosen) - set(checks.CHECKS):
        raise ValueError(f"--only {','.join(sorted(unknown))}: the checks are {', '.join(checks.CHECKS)}")
    if not (args.tiny or torch.cuda.is_available()):
        raise ValueError("no CUDA device is here; --tiny rehearses the checks on a CPU")
    # Programs are started from the root, results are written to a folder.
    root = Path(__file__).resolve().parent.parent
    os.chdir(root)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    default = Path(tempfile.mkdtemp(prefix="gpu_check-")) if args.tiny else root / "docs/results/gpu"
    out = Path(args.out).resolve() if args.out else default
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    session = tools.Session(args.tiny, out, device)
    about = versions(session)
    print(json.dumps(about), flush=True)
    # The planner predicts in other processes while the card is measured.
    with contextlib.ExitStack() as stack:
        if not (args.tiny or args.no_predictions):
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(4, mp_context=spawn, initializer=hide_gpus))
            session.predicted = {row.name: pool.submit(tools.predict, row.name) for row in tasks.ROWS}
        rows = run_checks(session, chosen, args.seconds)
        # A prediction that failed, or is not ready, costs its row of the page only.
        predictions = {}
        for name, future in session.predicted.items():
            try:
                predictions[name] = future.result(timeout=60)
            except Exception as error:
                print(
                    json.dumps({"prediction": name, "error": f"{type(error).__name__}: {error}"[:300]}),
                    flush=True,
                )
    with open(out / "gpu_check.jsonl", "a") as file:
        file.write(json.dumps({"about": about, "predictions": predictions}) + "\n")
    # The records and the page, named by card and day.
    short = re.sub("[^a-z0-9]", "-", about["card"].lower().removeprefix("nvidia "))
    name = f"{short}-{time.strftime('%Y-%m-%d')}"
    os.replace(out / "gpu_check.jsonl", out / f"{name}.jsonl")
    (out / f"{name}.md").write_text(page(session, about, rows, predictions))
    failed = [row["check"] for row in rows if row["ok"] is False]
    print(
        f"{len(rows)} checks, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}; {out}/{name}.md"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
