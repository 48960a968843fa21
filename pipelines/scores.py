"""Show the judges' records as a table, with the paper's numbers in a column of their own: md, csv or html.

    python -m pipelines.scores scores.jsonl [runs/reconstruct/summary.json] [--format md] [--out scores.html]

The paper's number is shown only where a record's tag names a row of its tables, e.g. ucf101/OD-VAE or webvid-10m/OD-VAE,
and where the network is the real one: a score of random weights has another name.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from data.core.cli import run
from data.core.files import claim_file, read_json, write_atomic
from data.core.lazy import lazy
from pipelines.results.markdown import markdown_table, plain

pandas = lazy("pandas")
reconstruct = lazy("pipelines.reconstruct")
tables = lazy("pipelines.results.tables")

FORMATS = ("md", "csv", "html")
REQUIRED = ("metric", "value", "protocol")
PAPER = {  # first part of a tag -> table and columns of configs/paper.yaml
    "webvid-10m": ("table1", "WebVid-10M 25f"),
    "panda-70m": ("table1", "Panda-70M 25f"),
    "ucf101": ("table2", "UCF101"),
    "sky_timelapse": ("table2", "SkyTimelapse"),
}


def paper_value(tag: str, metric: str) -> float | None:
    """The paper's number for a tag DATASET/METHOD, None if it has none."""
    dataset, _, method = tag.partition("/")
    if dataset.lower() not in PAPER:
        return None
    table, section = PAPER[dataset.lower()]
    return tables.paper_numbers()[table].get(method, {}).get(f"{section} {metric}")


def read_records(paths: Sequence[Path]) -> list[dict]:
    """All records of JSONL files, and of summary.json files of pipelines.reconstruct.

    Raises ValueError naming file and line for what is not a record.
    """
    records = []
    for path in paths:
        if path.suffix == ".json":
            records += summary_records(path)
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); was the file cut short?") from error
            if not isinstance(record, dict) or set(REQUIRED) - record.keys():
                raise ValueError(f"{path}:{number}: not a record of a judge: needs {', '.join(REQUIRED)}")
            records.append(record)
    if not records:
        raise ValueError(f"{', '.join(map(str, paths))}: no records; the judges write them with --out FILE")
    return records


def summary_records(path: Path) -> list[dict]:
    """The scores in a summary.json as records of a judge. Raises ValueError if it is something else."""
    way_out = "give the judges' JSONL or reconstruct's summary.json"
    summary = read_json(path, "weights_sha256", "settings", "psnr", "ssim", way_out=way_out)
    try:
        clip, source = summary["settings"]["clip"], summary["settings"]["source"]["name"]
        protocol = {"num_videos": summary["videos"], "num_frames": clip["num_frames"], "size": clip["size"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no summary of pipelines.reconstruct ({error}); {way_out}") from error
    shared = {
        "protocol": {"name": "reconstruct", **protocol},
        "tag": f"{source}/{summary.get('vae', '')}",
        "git": (summary.get("versions") or {}).get("git"),
    }
    records = []
    for name, value in reconstruct.scores_of(summary).values():
        if value is not None:
            records.append({"metric": name, "value": value, **shared})
    return records


def row_of(record: dict) -> dict[str, str]:
    """One record as text; what was not measured is empty."""
    # Which protocol, and what was changed of it
    protocol, interval, floor = record["protocol"], record.get("interval"), record.get("floor")
    spread = f" ± {record['std']:.4f}" if record.get("std") is not None else ""
    changed = ", ".join(f"{k}={v}" for k, v in protocol.get("overrides", {}).items())
    name = " ".join(filter(None, [protocol.get("name", ""), record.get("label", ""), changed]))
    plain = f"{protocol.get('num_frames') or 'all'} frames, size {protocol.get('size') or 'as stored'}"
    paper = paper_value(record.get("tag", ""), record["metric"])
    floor_at = f" (N = {floor['num_videos']})" if floor and not floor["same_num_videos"] else ""

    # How the pixels of both sides were stored, and which network judged
    storage = []
    for side, kinds in record.get("storage", {}).items():
        storage.append(f"{side} {'/'.join(kinds)}")
    for side in ("real", "fake") if not storage else ():
        if side in record:
            storage.append(f"{side} {record[side]['storage']}")
    weights, judge = record.get("weights"), "none needed"
    if weights and weights["seed"] is not None:
        judge = f"random, seed {weights['seed']}"
    elif weights:
        known = "known" if weights["known"] else "UNKNOWN"
        judge = f"{weights['file']} {weights['sha256'][:8]} {known}"
    git = record.get("git") or ""
    return {
        "metric": record["metric"],
        "tag": record.get("tag", ""),
        "ours": ("" if record["value"] is None else f"{record['value']:.4f}") + spread,
        "95 % interval": f"[{interval['low']:.4f}, {interval['high']:.4f}]" if interval else "",
        "floor": f"{floor['value']:.4f}{floor_at}" if floor else "",
        "paper": "" if paper is None else f"{paper:.4f}",
        "protocol": name or plain,
        "N": str(protocol.get("num_videos", "")),
        "videos": ", ".join(storage),
        "weights": judge,
        "device": record.get("device", ""),
        "time": record.get("time", ""),
        "commit": git[:8] + ("+" if "+" in git else ""),
    }


def render(records: Sequence[dict], form: str) -> str:
    """The records as Markdown, CSV or a page of HTML."""
    table = pandas.DataFrame(map(row_of, records))
    if form == "md":
        return markdown_table(table.columns, table.map(plain).values)
    if form == "csv":
        return table.to_csv(index=False, lineterminator="\n")
    head = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Scores</title>\n'
    return f"{head}{table.to_html(index=False)}\n</html>\n"


def main(argv: list[str] | None = None) -> int | None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.scores", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="JSONL", help="files of the judges' --out")
    parser.add_argument("--format", choices=FORMATS, help="default: the suffix of --out, else md")
    parser.add_argument("--out", type=Path, help="file to write; default: print")
    args = parser.parse_args(argv)
    suffix = args.out.suffix.lstrip(".") if args.out else "md"
    form = args.format or suffix
    if form not in FORMATS:
        raise ValueError(f"--out {args.out}: the suffix is none of {', '.join(FORMATS)}; give --format")
    text = render(read_records(args.records), form)
    if args.out:
        claim_file(args.out, lambda first: first == text.split("\n", 1)[0].rstrip("\r"))
        write_atomic(args.out, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run(main)
