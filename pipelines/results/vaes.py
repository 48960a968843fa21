"""Compare video VAEs on the same clips: `python -m pipelines.table vaes --data DIR name=FOLDER ...` (docs/finetune.md).

One row per VAE: parameters, compression, latent numbers per pixel, PSNR, SSIM, LPIPS, rFVD with its interval, time and
memory. Writes vaes.md, .csv and .html with the same clips side by side, and keeps each VAE's record for the next call.
"""

import argparse
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from data.clip import ClipSpec
from data.core.files import claim_folder, read_json, write_atomic, write_json
from data.dataset import VideoClips
from eval.features import default_device
from eval.fidelity import METRICS, measures
from pipelines.results.markdown import markdown_table, plain
from pipelines.results.page import COLORS, Section, clip_figure, curve_svg, svg_figure, write_page
from pipelines.scores import read_records
from pipelines.training.folder import refuse_in_data
from pipelines.training.open import open_clips, weights_digest
from pipelines.training.settings import SourceConfig
from pipelines.vae_scores import Record, common_length, measure, open_judges, through
from vae import load_vae

log = logging.getLogger(__name__)
SHOWN = 4  # clips on the page


def parse(argv: Sequence[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.table vaes", description=__doc__, formatter_class=formatter
    )
    add, latte = parser.add_argument, "FVD record of a Latte on that VAE"
    add("vaes", nargs="+", metavar="NAME=FOLDER", help="a VAE: its name in the table, and its folder")
    add("--data", required=True, help="folder of videos")
    add("--out", default="runs/vaes", help="folder of the table (default runs/vaes)")
    add("--clips", type=int, default=16, help="one of each video, of the first N videos (default 16)")
    add("--size", type=int, default=256, help="side of the clips in pixels (default 256)")
    add("--frames", type=int, default=0, help="least length; default: 17, or what all VAEs of the table take")
    add("--lpips-weights", help="AlexNet file or folder (default $OMNILATTE_WEIGHTS, else weights/)")
    add("--i3d-weights", help="I3D file or folder, for rFVD (default as for LPIPS)")
    add("--latte", action="append", default=[], metavar="NAME=JSONL", help=latte)
    add("--index-dir", default="runs/index", help="where the scan is kept (default runs/index)")
    return parser.parse_args(argv)


def named(words: Sequence[str], what: str) -> dict[str, str]:
    """{name: path} of words NAME=PATH. ValueError for another form, a name twice, or one that the output needs."""
    found: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        usable = name and path and "/" not in name and not name.startswith(".") and name != "original"
        if not usable or name in found:
            raise ValueError(
                f"{word!r}: {what} are written NAME=PATH, each name once, without / or a leading dot, not 'original'"
            )
        found[name] = path
    return found


# ---- the table -------------------------------------------------------------------------------------------


def row_of(name: str, record: Record, latte: dict[str, str]) -> dict[str, str]:
    """A row of the table as text, by column. latte: FVD of a Latte by VAE; without any there is no such column."""
    frames, mib = str(record["frames"]), record["peak_mib"]
    row = {
        "VAE": name,
        "class": record["class"],
        "parameters": f"{record['params']:,}",
        "time x side": "{} x {}".format(*record["ratio"]),
        "numbers per pixel": f"{record['numbers_per_pixel']:.4f}",
        "frames": f"{frames}, padded to {record['padded_to']}" if record["padded_to"] else frames,
    }
    # The scores. The names of those of a network say whether its weights are the published ones.
    for metric in METRICS:
        for key, value in record.items():
            if key.partition(" (")[0].removeprefix("random-feature ") == metric.key:
                row[key.replace(metric.key, metric.label)] = metric.text(value)
    for key, value in record.items():
        if "rFVD" in key and not key.endswith("_interval"):
            low, high = record[f"{key}_interval"]
            row[key] = f"{value:.1f} [{low:.1f}, {high:.1f}]"
    row |= {
        "encode, s": f"{record['encode_s']:.3g}",
        "decode, s": f"{record['decode_s']:.3g}",
        "peak MiB": f"not run: {record['peak_how']}" if mib is None else f"{mib:,.0f} ({record['peak_how']})",
        "on": record["device"],
    }
    return row | ({"FVD of Latte": latte.get(name, "not run")} if latte else {})


def latte_scores(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """{VAE: last FVD in its record}; ValueError for a VAE that is not in the table, or a file without FVD."""
    found = {}
    for name, path in named(words, "--latte records").items():
        if name not in known:
            raise ValueError(f"--latte {name}={path}: the table has {', '.join(known)}")
        values = [r for r in read_records([Path(path)]) if "FVD" in r["metric"]]
        if not values:
            raise ValueError(f"--latte {name}={path}: no record of an FVD in it")
        found[name] = f"{values[-1]['value']:.2f} ({values[-1]['metric']})"
    return found


def write(
    out: Path, records: dict[str, Record], shown: dict[str, list], remarks: list[str], latte: dict
) -> Path:
    """Write vaes.md, .csv and .html; returns the page. shown: name -> clips, "original" first."""
    table = pd.DataFrame([row_of(name, record, latte) for name, record in records.items()])
    notes = "".join(f"\n{plain(line)}\n" for line in remarks)
    write_atomic(out / "vaes.md", markdown_table(table.columns, table.map(plain).values) + notes)
    write_atomic(out / "vaes.csv", table.to_csv(index=False, lineterminator="\n"))

    # Quality against rate: one point per VAE, and the numbers in words.
    figures = []
    for metric in measures():
        label, points, words = metric.label, {}, []
        for name, record in records.items():
            rate, score = record["numbers_per_pixel"], record[metric.key]
            points[name] = ([rate], [score])
            words.append(f"{name} {score:.4g} at {rate:.4f}")
        svg = curve_svg(points, xlabel="latent numbers per pixel", ylabel=label)
        told = f"{label}: {'; '.join(words)}"
        figures.append(svg_figure(svg, f"{label} against latent numbers per pixel", told))

    # The same clips side by side.
    clips = []
    for n in range(len(shown["original"])):
        strip = np.concatenate([videos[n] for videos in shown.values()], axis=2)
        clips.append(clip_figure(strip, f"clip {n}: {' | '.join(shown)}", width=strip.shape[2], kind="film"))
    sections = [
        Section("Table", " ".join(remarks), list(table.columns), table.values.tolist(), dim_from=99),
        Section("Quality against rate", figures=figures),
        Section("The same clips", f"From left to right: {', '.join(shown)}.", figures=clips),
    ]
    subtitle = f"{len(records)} VAEs, clips of {next(iter(records.values()))['frames']} frames"
    return write_page(out / "vaes.html", "Video VAEs on the same clips", subtitle, sections)


def main(argv: Sequence[str]) -> int:
    # The words of the command line
    args = parse(argv)
    folders = named(args.vaes, "VAEs")
    latte = latte_scores(args.latte, list(folders))
    if len(folders) > len(COLORS):
        raise ValueError(f"{len(folders)} VAEs: the page tells {len(COLORS)} apart; make two tables")
    if args.clips < 1:
        raise ValueError(f"--clips {args.clips}: at least one")

    # Open all VAEs before anything is measured: a wrong folder or size shows at once.
    device, out = default_device(), Path(args.out)
    vaes = {name: load_vae(folder).requires_grad_(False) for name, folder in folders.items()}
    for name, vae in vaes.items():
        try:
            vae.check_sides(args.size, args.size)
        except ValueError as error:
            raise ValueError(f"--size {args.size} for {name}: {error}") from error

    # The same clips for all: the middle of each video, at a length that every VAE takes.
    source = SourceConfig(root=args.data, val_fraction=0.0, index_dir=args.index_dir)
    refuse_in_data(out, "--out", source)
    spec = ClipSpec(num_frames=common_length(vaes, args.frames or 17), size=args.size, position="center")
    found: VideoClips = open_clips(source, spec, 0, held_out=False)
    count, T = min(args.clips, len(found)), spec.num_frames
    judges = open_judges(args.lpips_weights, args.i3d_weights, args.size, count, T, device)
    claim_folder(out, "table vaes", lambda folder: (folder / "vaes.md").is_file())
    clips = [found.clip_uint8(n, np.random.default_rng((0, n))) for n in range(count)]
    made = f"{count} clips of {T} x {args.size} x {args.size}, posterior means, frames rounded to uint8."
    remarks = [*judges.remarks, made]
    if count < args.clips:
        less = f"{len(found.short)} videos are shorter than {T} frames."
        remarks.append(f"Asked for {args.clips} clips: {less}")

    # What a kept measurement must share with this call to stand for it.
    pixels = hashlib.sha256(b"".join(map(np.ndarray.tobytes, clips))).hexdigest()
    videos = list(map(found.name, range(count)))
    settings = {"clip": asdict(spec), "videos": videos, "pixels_sha256": pixels, "judges": judges.identity()}

    # Measure each VAE, or take its record of an earlier call; one at a time is on the device.
    records: dict[str, Record] = {}
    shown: dict[str, list[np.ndarray]] = {"original": clips[:SHOWN]}
    for name, vae in vaes.items():
        file = out / f"{name}.json"
        known = read_json(file) if file.is_file() else {}
        if known.get("settings") == settings and known["record"]["weights_sha256"] == weights_digest(vae):
            log.info("%s: measured before (%s)", name, file)
            records[name] = known["record"]
            shown[name] = [through(vae.to(device), clip, device)[0] for clip in clips[:SHOWN]]
        else:
            records[name], decoded = measure(vae, clips, device, judges)
            shown[name] = decoded[:SHOWN]
            write_json(file, {"settings": settings, "record": records[name]})
        vae.to("cpu")
    page = write(out, records, shown, remarks, latte)
    print((out / "vaes.md").read_text(), end="")
    print(page)
    return 0
