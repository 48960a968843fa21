"""One self-contained page about a training run, or several side by side: curves, videos, samples, settings, versions.

    python -m pipelines.run_report runs/odvae                         # writes runs/odvae/report.html
    python -m pipelines.run_report runs/a runs/b --out compare.html   # with what differs between their settings

Reads the folder only, so a run in progress can be looked at. --samples shows videos by class, --records the scores.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data.core.cli import run
from pipelines.read_run import Run, is_number, read_run

TITLES = {
    "val/psnr": "PSNR on held-out clips, dB (EMA weights)",
    "val/ssim": "SSIM on held-out clips (EMA weights)",
    "val/lpips": "LPIPS on held-out clips (EMA weights)",
    "loss/rec": "mean absolute error of the reconstruction",
    "loss/mse": "mean squared error of the predicted noise",
    "gan/weight": "adaptive weight of the adversarial term",
    "eff/tspeed": "TSpeed, steps a second",
    "eff/device_mib": "TMem, memory in use on the device, MiB",
    "skipped": "updates left out: loss or gradient not finite",
}
TOGETHER = {"loss_at_t/": "error by timestep", "gan/logits_": "logits of the discriminator"}  # one chart each
FIRST = ("val/", "loss", "gan/")
SHOWN = 4  # videos of a kind: the newest, the first, and some between
NAMES = ("config.yaml", "env.json", "metrics.jsonl", "speed.jsonl", "efficiency.json", "media", "samples")


class Room:
    """What fits into the page: counts bytes, and names what was left out."""

    def __init__(self, limit: float):
        self.limit, self.used = limit, 0
        self.left_out: list[str] = []

    def take(self, figure: Any, name: str) -> bool:
        """Whether the figure still fits; if so it is counted, else it is named."""
        size = len(figure.source)
        if self.used + size > self.limit:
            self.left_out.append(f"{name} ({size / 1e6:.1f} MB)")
            return False
        self.used += size
        return True

    def note(self) -> str:
        if not self.left_out:
            return ""
        shown, more = self.left_out[:12], len(self.left_out) - 12
        rest = f" and {more} more" if more > 0 else ""
        return f"Left out, for the page is limited to {self.limit / 1e6:g} MB (--max-mb): {', '.join(shown)}{rest}."


def labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run: its folder's name, or the whole path where two share one."""
    names = [r.folder.resolve().name for r in runs]
    return [n if names.count(n) == 1 else str(r.folder) for n, r in zip(names, runs, strict=True)]


def number(value: Any, form: str = ".4g") -> str:
    return format(value, form) if is_number(value) else "not measured"


def facts(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, note) of a run: how far, how good, how fast."""
    state = "finished" if run.finished else "in progress, or stopped"
    seen = run.step * int(run.settings.get("global_batch", 0))
    found = [("step", f"{run.step:,} of {run.steps:,}", f"{state}; {seen:,} clips seen")]
    for name, title, form in (
        ("val/psnr", "PSNR, held out", ".2f"),
        ("val/ssim", "SSIM, held out", ".4f"),
        ("loss", "loss", ".4g"),
        ("loss/rec", "loss, reconstruction", ".4g"),
        ("loss/mse", "loss, mean squared error", ".4g"),
    ):
        last = run.last(name)
        if last and len(found) < 4:
            unit = " dB" if name == "val/psnr" else ""
            found.append((title, format(last[1], form) + unit, f"at step {last[0]:,}"))
    speed = run.efficiency.get("tspeed")
    if not is_number(speed):  # a run in progress has no efficiency.json yet
        speed = next((r["eff/tspeed"] for r in reversed(run.speed) if is_number(r.get("eff/tspeed"))), None)
    size = f"global batch {run.settings.get('global_batch')}, mode {run.efficiency.get('mode', 'unknown')}"
    memory = run.efficiency.get("tmem", {}).get("device_mib")
    found.append(("TSpeed", f"{speed:.3f} it/s" if speed else "not measured", size))
    found.append(("TMem", f"{memory:,.0f} MiB" if is_number(memory) else "not measured", "memory of the GPU"))
    return found


def overview(runs: Sequence[Run]) -> Any:
    from pipelines.report import Section

    if len(runs) == 1:
        return Section("Overview", tiles=facts(runs[0]))
    tables = [{name: (value, note) for name, value, note in facts(r)} for r in runs]
    rows = [
        (name, *(f"{t[name][0]} ({t[name][1]})" if name in t else "" for t in tables))
        for name in dict.fromkeys(n for t in tables for n in t)
    ]
    return Section("Overview", header=("", *labels(runs)), rows=rows, dim_from=99)


def curves(runs: Sequence[Run]) -> Any:
    """A chart for each logged quantity, a line for each run."""
    from pipelines.report import Section, curve_figure, series_of

    records = [[*r.metrics, *r.speed] for r in runs]
    names = dict.fromkeys(k for rows in records for row in rows for k in row if k != "step")
    charts: dict[str, list[str]] = {}
    for name in names:
        group = next((g for g in TOGETHER if name.startswith(g)), name)
        charts.setdefault(group, []).append(name)
    order = sorted(
        charts, key=lambda c: next((i for i, p in enumerate(FIRST) if c.startswith(p)), len(FIRST))
    )
    figures = []
    for chart in order:
        lines = {}
        for label, rows in zip(labels(runs), records, strict=True):
            found = series_of(rows, *charts[chart])
            for name in sorted(charts[chart]):
                words = [label if len(runs) > 1 else "", name.removeprefix(chart)]
                lines[" ".join(filter(None, words)) or name] = found.get(name, ((), ()))
        title = TOGETHER.get(chart) or TITLES.get(chart)
        if any(len(steps) for steps, _ in lines.values()):
            caption = f"{chart.rstrip('/_')}: {title}" if title else chart
            figures.append(curve_figure(lines, caption, log_y=chart.startswith(("loss", "grad_norm"))))
    text = " ".join(filter(None, (gaps(label, r) for label, r in zip(labels(runs), runs, strict=True))))
    return Section("Curves", text or ("" if figures else "Nothing is logged yet."), figures=figures)


def gaps(label: str, run: Run) -> str:
    """Which values of the log are not finite; "" when all are."""
    found: dict[str, list[int]] = {}
    for record in run.metrics:
        for name, value in record.items():
            if not is_number(value):
                found.setdefault(name, []).append(int(record["step"]))
    parts = [f"{name} {len(at):,} times, first at step {at[0]:,}" for name, at in found.items()]
    return f"Not finite in {label}, and left out of the curves: {'; '.join(parts)}." if parts else ""


def media(run: Run, label: str, room: Room) -> Any:
    """The run's own previews: of each kind the newest, the first and some between."""
    from pipelines.report import Section, video_figure

    kinds: dict[str, list[Path]] = {}
    for path in sorted((run.folder / "media").glob("*.mp4")):
        kinds.setdefault(re.sub(r"_\d+$", "", path.stem), []).append(path)
    words = {"val": "original | reconstruction | error x 4, held-out clips", "samples": "generated"}
    figures, notes = [], []
    for kind, paths in kinds.items():
        count = min(SHOWN, len(paths))
        at = {round(i * (len(paths) - 1) / max(1, count - 1)) for i in range(count)} | {len(paths) - 1}
        for path in [paths[i] for i in sorted(at, reverse=True)]:
            step = re.search(r"_(\d+)$", path.stem)
            when = f"step {int(step[1]):,}: " if step else ""
            try:
                figure = video_figure(path, f"{when}{words.get(kind, kind)}")
            except ValueError as error:
                notes.append(f"{path.name} cannot be read ({error}).")
                continue
            if room.take(figure, path.name):
                figures.append(figure)
        if len(paths) > count:
            notes.append(f"{count} of {len(paths)} {kind} videos are shown; all are in media/.")
    text = " ".join(notes) if kinds else "The run has written no videos yet."
    return Section(f"Videos of {label}", text, figures=figures)


def settings(runs: Sequence[Run]) -> Any:
    """All settings of one run, or what differs between several."""
    from pipelines.report import Section

    keys = dict.fromkeys(k for r in runs for k in r.settings)
    rows = [(k, *(str(r.settings[k]) if k in r.settings else "no such key" for r in runs)) for k in keys]
    if len(runs) == 1:
        return Section("Settings", header=("key", "value"), rows=rows, folded=f"all {len(rows)} settings")
    rows = [row for row in rows if len(set(row[1:])) > 1]
    text = "" if rows else "All settings are equal."
    return Section("Settings that differ", text, header=("key", *labels(runs)), rows=rows, dim_from=99)


def origin(runs: Sequence[Run]) -> Any:
    """Versions, commit, starts, and the digests of the newest checkpoint."""
    from pipelines.report import Section

    def column(run: Run) -> dict[str, str]:
        starts = [s.get("time", "") for s in run.starts]
        found = (
            {"program": run.program, "starts": f"{len(starts)}, first {starts[0]}, last {starts[-1]}"}
            if starts
            else {}
        )
        found |= {f"data: {k}": str(v) for k, v in run.checkpoint.get("data", {}).items()}
        found |= {"newest checkpoint": f"step {run.checkpoint['step']:,}"} if "step" in run.checkpoint else {}
        files = run.checkpoint.get("files", {})
        found |= {f"sha256 of {k}": v[:16] for k, v in files.items() if k.endswith(".safetensors")}
        return run.versions | found

    columns = [column(r) for r in runs]
    rows = [(k, *(c.get(k, "") for c in columns)) for k in dict.fromkeys(k for c in columns for k in c)]
    return Section(
        "Where it comes from",
        header=("", *labels(runs)),
        rows=rows,
        dim_from=99,
        folded="versions, starts, digests",
    )


def files(runs: Sequence[Run], records: Sequence[Path], out: Path) -> Any:
    """Links to what the page was made from, relative to the page."""
    from pipelines.report import Link, Section

    def link(path: Path, text: str) -> Link:
        return Link(text, quote(Path(os.path.relpath(path.resolve(), out.resolve().parent)).as_posix()))

    rows = []
    for label, r in zip(labels(runs), runs, strict=True):
        rows += [(label, link(r.folder / n, n)) for n in NAMES if (r.folder / n).exists()]
    rows += [("records", link(path, path.name)) for path in records]
    return Section("Files", header=("of", "file"), rows=rows, dim_from=99)


def scores(paths: Sequence[Path]) -> Any:
    """The judges' records, each with its protocol and the paper's number where one belongs to it."""
    from eval.report import COLUMNS, read_records, row_of
    from pipelines.report import Section

    rows = [row_of(record) for record in read_records(list(paths))]
    kept = [c for c in COLUMNS if any(row[c] for row in rows)]
    return Section("Scores", header=kept, rows=[[row[c] for c in kept] for row in rows])


def check_out(path: Path) -> None:
    """Refuses a folder, and a file that is no page of ours."""
    from pipelines.report import MARK

    if path.is_dir():
        raise ValueError(f"--out {path}: a folder; give the name of a file, e.g. {path / 'report.html'}")
    if path.is_file() and MARK.encode() not in path.read_bytes()[:1000]:
        raise ValueError(f"--out {path}: exists and is no report of this program; choose another name")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a training run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    parser.add_argument(
        "--samples", type=Path, metavar="DIR", help="folder of pipelines.sample (default: RUN_DIR/samples)"
    )
    parser.add_argument(
        "--records", nargs="+", type=Path, default=[], metavar="JSONL", help="the judges' --out"
    )
    parser.add_argument("--max-mb", type=float, default=24, help="largest page, in MB of videos (default 24)")
    args = parser.parse_args(argv)
    if args.out is None and len(args.runs) > 1:
        raise ValueError(f"{len(args.runs)} runs: say with --out FILE where the page goes")
    runs = [read_run(folder) for folder in args.runs]
    out = args.out or args.runs[0] / "report.html"
    check_out(out)
    write(out, runs, args)
    print(f"open {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def write(out: Path, runs: Sequence[Run], args: argparse.Namespace) -> None:
    from pipelines.gallery import gallery
    from pipelines.report import write_report

    room = Room(args.max_mb * 1e6)
    parts = [overview(runs)]
    parts += [scores(args.records)] if args.records else []
    parts += [media(r, label, room) for r, label in zip(runs, labels(runs), strict=True)]
    folders = [args.samples] if args.samples else [r.folder / "samples" for r in runs]
    parts += [gallery(f, room) for f in folders if args.samples or (f / "manifest.json").is_file()]
    parts += [curves(runs), settings(runs), origin(runs), files(runs, args.records, out)]
    subtitle = f"Made from {', '.join(str(r.folder) for r in runs)}. {room.note()}"
    write_report(out, ", ".join(labels(runs)), subtitle, parts)


if __name__ == "__main__":
    run(main)
