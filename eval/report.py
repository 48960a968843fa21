"""Records of the judges as a table, with the paper's numbers in a column of their own. md, csv or html.

    python eval/report.py scores.jsonl [more.jsonl] [--format md] [--out report.md]

The paper's number stands beside ours only where a record's tag names a row of its tables, e.g. ucf101/OD-VAE or
webvid-10m/OD-VAE, and where the network is the real one: a score of random weights has another name.
"""

import argparse
import csv
import html
import io
import json
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.core.cli import run
from data.core.files import claim_file, write_atomic

FORMATS = ("md", "csv", "html")
COLUMNS = (
    "metric",
    "tag",
    "ours",
    "95 % interval",
    "floor",
    "paper",
    "protocol",
    "N",
    "videos",
    "weights",
    "device",
    "time",
    "commit",
)

METHODS = ("SD-VAE", "SVD-VAE", "CV-VAE", "OPS-VAE", "OD-VAE")
# Tables 1 and 2, a value for each of METHODS
PAPER = {
    ("webvid-10m", "PSNR"): (30.19, 31.15, 30.76, 31.12, 31.16),
    ("webvid-10m", "SSIM"): (0.8379, 0.8686, 0.8566, 0.8569, 0.8694),
    ("webvid-10m", "LPIPS"): (0.0568, 0.0547, 0.0803, 0.1003, 0.0586),
    ("panda-70m", "PSNR"): (30.40, 31.00, 29.57, 31.06, 30.49),
    ("panda-70m", "SSIM"): (0.8894, 0.9058, 0.8795, 0.8969, 0.8970),
    ("panda-70m", "LPIPS"): (0.0396, 0.0379, 0.0673, 0.0666, 0.0454),
    ("ucf101", "FVD"): (1685.29, 1663.98, 1380.43, 1502.64, 1315.13),
    ("ucf101", "KVD"): (116.10, 108.27, 129.29, 142.4, 110.88),
    ("ucf101", "IS"): (33.00, 31.41, 61.11, 53.13, 58.98),
    ("sky_timelapse", "FVD"): (325.00, 285.23, 326.86, 312.22, 294.31),
    ("sky_timelapse", "KVD"): (26.28, 25.10, 23.57, 24.47, 20.76),
}
REQUIRED = ("metric", "value", "protocol")


def paper_value(tag: str, metric: str) -> float | None:
    """The paper's number for a tag DATASET/METHOD, None if it has none."""
    dataset, _, method = tag.partition("/")
    row = PAPER.get((dataset.lower(), metric))
    return dict(zip(METHODS, row, strict=True)).get(method) if row else None


def read_records(paths: list[Path]) -> list[dict]:
    """All records of JSONL files. Raises ValueError naming file and line for one that is none."""
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); was the file cut short?") from error
            if not isinstance(record, dict) or any(key not in record for key in REQUIRED):
                raise ValueError(f"{path}:{number}: no record of a judge, it needs {', '.join(REQUIRED)}")
            records.append(record)
    if not records:
        raise ValueError(f"{', '.join(map(str, paths))}: no records; the judges write them with --out FILE")
    return records


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _storage(record: dict) -> str:
    """How the pixels of both sides were stored."""
    if "storage" in record:
        return ", ".join(f"{side} {'/'.join(kinds)}" for side, kinds in record["storage"].items())
    return ", ".join(f"{side} {record[side]['storage']}" for side in ("real", "fake") if side in record)


def _weights(record: dict) -> str:
    weights = record.get("weights")
    if not weights:
        return "none needed"
    if weights["seed"] is not None:
        return f"random, seed {weights['seed']}"
    return f"{weights['file']} {weights['sha256'][:8]} {'known' if weights['known'] else 'UNKNOWN'}"


def row_of(record: dict) -> dict[str, str]:
    """One record as text, a value for each of COLUMNS; what was not measured is empty."""
    protocol, interval, floor = record["protocol"], record.get("interval"), record.get("floor")
    spread = f" ± {record['std']:.4f}" if record.get("std") is not None else ""
    changed = ", ".join(f"{k}={v}" for k, v in protocol.get("overrides", {}).items())
    name = " ".join(filter(None, [protocol.get("name", ""), record.get("label", ""), changed]))
    at = "" if not floor or floor["same_num_videos"] else f" (N = {floor['num_videos']})"
    return {
        "metric": record["metric"],
        "tag": record.get("tag", ""),
        "ours": _number(record["value"]) + spread,
        "95 % interval": f"[{interval['low']:.4f}, {interval['high']:.4f}]" if interval else "",
        "floor": f"{floor['value']:.4f}{at}" if floor else "",
        "paper": _number(paper_value(record.get("tag", ""), record["metric"])),
        "protocol": name
        or f"{protocol.get('num_frames') or 'all'} frames, size {protocol.get('size') or 'as stored'}",
        "N": str(protocol.get("num_videos", "")),
        "videos": _storage(record),
        "weights": _weights(record),
        "device": record.get("device", ""),
        "time": record.get("time", ""),
        "commit": (record.get("git") or "")[:8] + ("+" if "+" in (record.get("git") or "") else ""),
    }


def render(rows: list[dict[str, str]], form: str) -> str:
    """The table as Markdown, CSV or a page of HTML."""
    if form == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()
    if form == "md":
        cells = [list(COLUMNS), ["---"] * len(COLUMNS)]
        cells += [[row[c].replace("|", "\\|").replace("\n", " ") for c in COLUMNS] for row in rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in cells)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row[column])}</td>" for column in COLUMNS) + "</tr>\n"
        for row in rows
    )
    style = "body{font:14px sans-serif}td,th{padding:4px 8px;border:1px solid #ccc;text-align:left}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Scores</title><style>{style}</style>\n'
        f"<table><tr>{head}</tr>\n{body}</table></html>\n"
    )


def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="JSONL", help="files of the judges' --out")
    parser.add_argument("--format", choices=FORMATS, help="default: the suffix of --out, else md")
    parser.add_argument("--out", type=Path, help="file to write; default: print")
    args = parser.parse_args(argv)
    suffix = args.out.suffix.lstrip(".") if args.out else "md"
    form = args.format or (suffix if suffix in FORMATS else None)
    if form is None:
        raise ValueError(f"--out {args.out}: the suffix is none of {', '.join(FORMATS)}; give --format")
    text = render([row_of(record) for record in read_records(args.records)], form)
    if args.out:
        claim_file(args.out, lambda first: first == text.split("\n", 1)[0].rstrip("\r"))
        write_atomic(args.out, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run(main)
