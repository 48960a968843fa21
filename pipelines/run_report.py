"""One self-contained page about a training run, or several side by side: curves, videos, samples, settings, versions.

    python -m pipelines.run_report runs/odvae                         # writes runs/odvae/report.html
    python -m pipelines.run_report runs/a runs/b --out compare.html   # with what differs between their settings

Reads the folder only, so a run in progress can be looked at. --samples shows videos by class, --records the scores.
"""

import argparse
from pathlib import Path

from data.core.cli import run
from data.core.lazy import lazy

pages = lazy("pipelines.results.page")
run_page = lazy("pipelines.results.run_page")
runs_of = lazy("pipelines.results.runs")


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.run_report", description=__doc__, formatter_class=formatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a training run")
    add("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    add("--samples", type=Path, metavar="DIR", help="folder of pipelines.sample (default: RUN_DIR/samples)")
    add(
        "--records",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="the judges' --out, reconstruct's summary.json",
    )
    add("--max-mb", type=float, default=24, help="largest page, in MB of videos (default 24)")
    args = parser.parse_args(argv)
    if args.out is None and len(args.runs) > 1:
        raise ValueError(f"{len(args.runs)} runs: say with --out FILE where the page goes")
    runs, out = list(map(runs_of.read_run, args.runs)), args.out or args.runs[0] / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out}: a folder; give the name of a file, e.g. {out / 'report.html'}")
    if out.is_file() and pages.MARK.encode() not in out.read_bytes()[:1000]:
        raise ValueError(f"--out {out}: exists and is not a report of this program; choose another name")
    run_page.write_run_page(out, runs, args.samples, args.records, args.max_mb * 1e6)
    print(f"open {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run(main)
