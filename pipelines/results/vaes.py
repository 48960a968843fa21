"""Compare video VAEs on the same clips: `python -m pipelines.table vaes --data DIR name=FOLDER ...` (docs/finetune.md).

One row per VAE: parameters, compression, latent numbers per pixel, PSNR, SSIM, LPIPS, rFVD with its interval, time and
memory. Writes vaes.md, .csv and .html with the same clips side by side, and keeps each VAE's record for the next call.
"""

import argparse
import csv
import hashlib
import io
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.clip import ClipSpec, to_float, to_uint8
from data.core.files import claim_folder, read_json, write_atomic, write_json
from data.dataset import VideoClips
from data.progress import Progress
from eval.features import Extractor, default_device, extract_features, i3d_extractor
from eval.fidelity import check_lpips_size, load_lpips
from eval.weights import score_name
from pipelines.efficiency import memory_peaks, reset_peaks
from pipelines.plan.pretend import LOWEST_TORCH, too_old
from pipelines.plan.programs import encode_and_decode
from pipelines.reconstruct import rfvd_scores, score_frames
from pipelines.results.markdown import markdown_table, plain
from pipelines.results.page import COLORS, Section, clip_figure, curve_svg, svg_figure, write_page
from pipelines.scores import read_records
from pipelines.training.folder import refuse_in_data
from pipelines.training.open import open_clips, weights_digest
from pipelines.training.settings import SourceConfig
from vae import build_vae, load_vae
from vae.registry import name_of

log = logging.getLogger(__name__)
Record = dict[str, Any]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.table vaes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("vaes", nargs="+", metavar="NAME=FOLDER", help="a VAE: its name in the table, and its folder")
    add("--data", required=True, help="folder of videos")
    add("--out", default="runs/vaes", help="folder of the table (default runs/vaes)")
    add("--clips", type=int, default=16, help="one of each video, of the first N videos (default 16)")
    add("--size", type=int, default=256, help="side of the clips in pixels (default 256)")
    add("--frames", type=int, default=0, help="least length; default: 17, or what all VAEs of the table take")
    add("--lpips-weights", help="AlexNet file or folder (default $OMNILATTE_WEIGHTS, else weights/)")
    add("--i3d-weights", help="I3D file or folder, for rFVD (default as for LPIPS)")
    add(
        "--latte", action="append", default=[], metavar="NAME=JSONL", help="FVD record of a Latte on that VAE"
    )
    add("--index-dir", default="runs/index", help="where the scan is kept (default runs/index)")
    return parser.parse_args(argv)


def named(words: Sequence[str], what: str) -> dict[str, str]:
    """{name: path} of words NAME=PATH. ValueError for another form, a name twice, or one that the output needs."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if (
            not (name and equals and path)
            or name in found
            or "/" in name
            or name.startswith(".")
            or name == "original"
        ):
            raise ValueError(
                f"{word!r}: {what} are written NAME=PATH, each name once, without / or a leading dot, not 'original'"
            )
        found[name] = path
    return found


# ---- which clips -----------------------------------------------------------------------------------------


def common_length(vaes: dict[str, Any], least: int) -> int:
    """The least length of `least` frames or more that all VAEs with a first frame alone take: 1 + lcm * k."""
    groups = [vae.clip_lengths[0] for vae in vaes.values() if vae.clip_lengths[1] == 1]
    group = math.lcm(*groups)
    T = -(-(max(least, 1) - 1) // group) * group + 1
    while not all(_takes(vae, T) for vae in vaes.values() if vae.clip_lengths[1] == 1):
        T += group
    return T


def _takes(vae: Any, T: int) -> bool:
    try:
        vae.check_frames(T)
    except ValueError:
        return False
    return True


def own_length(vae: Any, T: int) -> int:
    """The least length from T on that the VAE takes; the clip is padded to it with its last frame."""
    longest = T + 2 * sum(vae.clip_lengths)
    for n in range(T, longest + 1):
        if _takes(vae, n):
            return n
    raise ValueError(f"{type(vae).__name__} takes no clip of {T} to {longest} frames; choose other --frames")


# ---- one VAE ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def through(vae: Any, clip: np.ndarray, device: torch.device) -> tuple[np.ndarray, float, float]:
    """(reconstruction uint8 (T, H, W, 3), seconds to encode, to decode) of one clip; padded where the VAE needs it."""
    T = len(clip)
    padded = np.concatenate([clip, clip[-1:].repeat(own_length(vae, T) - T, axis=0)])
    x = to_float(padded)[None].to(device)
    marks = [_now(device)]
    found = vae.encode(x)
    z = found.latents if vae.discrete else found.latent_dist.mode()
    marks.append(_now(device))
    y = vae.decode(z).sample
    marks.append(_now(device))
    return to_uint8(y.float().clamp(-1, 1))[0][:T], marks[1] - marks[0], marks[2] - marks[1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(vae: Any, T: int, size: int, measured: dict[str, float | None]) -> tuple[float | None, str]:
    """(MiB of encode and decode of one clip, measured or modelled): modelled where there is no GPU to measure on.

    (None, why) with a torch that cannot model it.
    """
    if measured.get("allocated_mib"):
        return measured["allocated_mib"], "measured"
    if too_old():
        return None, f"modelled with torch >= {LOWEST_TORCH}"

    def same_size() -> Any:
        config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
        return build_vae(name_of(type(vae).__name__), **config).eval()

    simulation = encode_and_decode(same_size, own_length(vae, T), size)
    return simulation.peak / 2**20, "modelled, one GPU, fp32"


def measure(
    vae: Any, clips: list[np.ndarray], device: torch.device, network: Any, lpips: str, extractor: Any
) -> tuple[Record, list[np.ndarray]]:
    """(what a row says, the reconstructions) of one VAE."""
    T, size = clips[0].shape[:2]
    # Reconstruct every clip: times, scores and pictures.
    vae = vae.to(device)
    through(vae, clips[0], device)  # the first call chooses kernels
    reset_peaks(device)
    decoded, times, scores = [], [], []
    for clip in _counted(clips, type(vae).__name__):
        video, *seconds = through(vae, clip, device)
        per_frame = score_frames(clip, video, network, lpips)
        decoded.append(video)
        times.append(seconds)
        scores.append({name: float(np.mean(values)) for name, values in per_frame.items()})
    # What the latents cost, in numbers and in memory.
    own = own_length(vae, T)
    numbers = vae.latent_frames(own) * vae.latent_channels * (size // vae.spatial_compression_ratio) ** 2
    mib, how = peak_memory(vae, T, size, memory_peaks(device))
    encode, decode = np.median(times, axis=0)
    record = {
        "class": type(vae).__name__,
        "weights_sha256": weights_digest(vae),
        "params": sum(p.numel() for p in vae.parameters()),
        "ratio": [vae.temporal_compression_ratio, vae.spatial_compression_ratio],
        "numbers_per_pixel": numbers / (T * size * size),
        "frames": T,
        "padded_to": own if own != T else None,
        **{name: float(np.mean([s[name] for s in scores])) for name in scores[0]},
        "encode_s": float(encode),
        "decode_s": float(decode),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_mib": mib,
        "peak_how": how,
    }
    return record | rfvd(clips, decoded, extractor), decoded


def _counted(clips: list[np.ndarray], name: str) -> Any:
    with Progress(len(clips), name, "clip") as bar:
        for clip in clips:
            yield clip
            bar.update()


def rfvd(clips: list[np.ndarray], decoded: list[np.ndarray], extractor: Extractor | None) -> Record:
    """{"rFVD": value, "rFVD_interval": [low, high]}, under the name that the network allows; {} without one."""
    if extractor is None:
        return {}
    real, fake = (extract_features(videos, extractor) for videos in (clips, decoded))
    return rfvd_scores(real, fake, extractor.provenance)


# ---- the table -------------------------------------------------------------------------------------------


def _judges(args: argparse.Namespace, device: torch.device) -> tuple[Any, str, Extractor | None, list[str]]:
    """(LPIPS network, its name, I3D, remarks); a judge whose weights are not there is left out, and said so."""
    remarks: list[str] = []
    network, lpips, extractor = None, "lpips", None
    try:
        network, judge = load_lpips(args.lpips_weights, device)
        lpips = score_name("lpips", judge.as_dict())
        check_lpips_size(args.size, args.size)
    except ValueError as error:
        network = None
        remarks.append(f"LPIPS not run: {error}")
    try:
        if args.clips < 2:
            raise ValueError(f"--clips {args.clips}: a distance of distributions needs two clips")
        extractor = i3d_extractor(args.i3d_weights, device)
    except ValueError as error:
        remarks.append(f"rFVD not run: {error}")
    return network, lpips, extractor, remarks


HEADS = {
    "VAE": lambda n, r: n,
    "class": lambda n, r: r["class"],
    "parameters": lambda n, r: f"{r['params']:,}",
    "time x side": lambda n, r: "{} x {}".format(*r["ratio"]),
    "numbers per pixel": lambda n, r: f"{r['numbers_per_pixel']:.4f}",
    "frames": lambda n, r: f"{r['frames']}" + (f", padded to {r['padded_to']}" if r["padded_to"] else ""),
    "PSNR, dB": lambda n, r: f"{r['psnr']:.2f}",
    "SSIM": lambda n, r: f"{r['ssim']:.4f}",
}
TAIL = {
    "encode, s": lambda n, r: f"{r['encode_s']:.3g}",
    "decode, s": lambda n, r: f"{r['decode_s']:.3g}",
    "peak MiB": lambda n, r: (
        f"not run: {r['peak_how']}" if r["peak_mib"] is None else f"{r['peak_mib']:,.0f} ({r['peak_how']})"
    ),
    "on": lambda n, r: r["device"],
}


def table_of(records: dict[str, Record], latte: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) as text; what was not measured is "not run"."""
    scores = [
        k
        for k in next(iter(records.values()))
        if ("lpips" in k.lower() or "rFVD" in k) and "_interval" not in k
    ]
    header = [
        *HEADS,
        *(k.replace("lpips", "LPIPS") for k in scores),
        *TAIL,
        *(["FVD of Latte"] if latte else []),
    ]

    def score(record: Record, key: str) -> str:
        if key not in record:
            return "not run"
        low, high = record.get(f"{key}_interval", (None, None))
        return f"{record[key]:.4f}" if low is None else f"{record[key]:.1f} [{low:.1f}, {high:.1f}]"

    rows = []
    for name, record in records.items():
        cells = [form(name, record) for form in HEADS.values()]
        cells += [score(record, key) for key in scores] + [form(name, record) for form in TAIL.values()]
        rows.append(cells + ([latte.get(name, "not run")] if latte else []))
    return header, rows


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
    header, rows = table_of(records, latte)
    notes = "".join(f"\n{plain(line)}\n" for line in remarks)
    write_atomic(out / "vaes.md", markdown_table(header, [list(map(plain, row)) for row in rows]) + notes)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomic(out / "vaes.csv", text.getvalue())
    figures = []
    for key, label in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        points = {n: ([r["numbers_per_pixel"]], [r[key]]) for n, r in records.items()}
        words = "; ".join(f"{n} {r[key]:.4g} at {r['numbers_per_pixel']:.4f}" for n, r in records.items())
        svg = curve_svg(points, xlabel="latent numbers per pixel", ylabel=label)
        figures.append(svg_figure(svg, f"{label} against latent numbers per pixel", f"{label}: {words}"))
    clips = []
    for n in range(len(shown["original"])):
        strip = np.concatenate([videos[n] for videos in shown.values()], axis=2)
        clips.append(clip_figure(strip, f"clip {n}: {' | '.join(shown)}", width=strip.shape[2], kind="film"))
    first = next(iter(records.values()))
    sections = [
        Section("Table", " ".join(remarks), header, rows, dim_from=99),
        Section("Quality against rate", figures=figures),
        Section("The same clips", f"From left to right: {', '.join(shown)}.", figures=clips),
    ]
    subtitle = f"{len(records)} VAEs, clips of {first['frames']} frames"
    return write_page(out / "vaes.html", "Video VAEs on the same clips", subtitle, sections)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    folders = named(args.vaes, "VAEs")
    latte = latte_scores(args.latte, list(folders))
    if len(folders) > len(COLORS):
        raise ValueError(f"{len(folders)} VAEs: the page tells {len(COLORS)} apart; make two tables")
    if args.clips < 1:
        raise ValueError(f"--clips {args.clips}: at least one")
    # Open all VAEs before anything is measured: a wrong folder or size shows at once.
    device = default_device()
    vaes = {name: load_vae(folder).requires_grad_(False) for name, folder in folders.items()}
    for name, vae in vaes.items():
        try:
            vae.check_sides(args.size, args.size)
        except ValueError as error:
            raise ValueError(f"--size {args.size} for {name}: {error}") from error
    # The same clips for all: the middle of each video, at a length that every VAE takes.
    T = common_length(vaes, args.frames or 17)
    out = Path(args.out)
    source = SourceConfig(root=args.data, val_fraction=0.0, index_dir=args.index_dir)
    refuse_in_data(out, "--out", source)
    spec = ClipSpec(num_frames=T, size=args.size, position="center")
    found: VideoClips = open_clips(source, spec, 0, held_out=False)
    network, lpips, extractor, remarks = _judges(args, device)
    claim_folder(out, "table vaes", lambda folder: (folder / "vaes.md").is_file())
    count = min(args.clips, len(found))
    clips = [found.clip_uint8(n, np.random.default_rng((0, n))) for n in range(count)]
    remarks.append(
        f"{count} clips of {T} x {args.size} x {args.size}, posterior means, frames rounded to uint8."
    )
    if count < args.clips:
        remarks.append(
            f"Asked for {args.clips} clips: {len(found.short)} videos are shorter than {T} frames."
        )
    # What a kept measurement must share with this call to stand for it.
    judged = {
        "lpips": lpips if network is not None else None,
        "rfvd": extractor and extractor.provenance.as_dict(),
    }
    pixels = hashlib.sha256(b"".join(clip.tobytes() for clip in clips)).hexdigest()
    videos = [found.name(n) for n in range(count)]
    settings = {"clip": asdict(spec), "videos": videos, "pixels_sha256": pixels, "judges": judged}

    # Measure each VAE, or take its record of an earlier call; one at a time is on the device.
    records: dict[str, Record] = {}
    shown: dict[str, list[np.ndarray]] = {"original": clips[:4]}
    for name, vae in vaes.items():
        file = out / f"{name}.json"
        known = read_json(file) if file.is_file() else {}
        if known.get("settings") == settings and known["record"]["weights_sha256"] == weights_digest(vae):
            log.info("%s: measured before (%s)", name, file)
            records[name] = known["record"]
            shown[name] = [through(vae.to(device), clip, device)[0] for clip in clips[:4]]
        else:
            records[name], decoded = measure(vae, clips, device, network, lpips, extractor)
            shown[name] = decoded[:4]
            write_json(file, {"settings": settings, "record": records[name]})
        vae.to("cpu")
    page = write(out, records, shown, remarks, latte)
    print((out / "vaes.md").read_text(), end="")
    print(page)
    return 0
