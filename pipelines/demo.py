"""The whole path at small width on CPU: train a VAE, cache latents, train Latte, generate, score, report.html.

    bash scripts/demo.sh                 # procedural moving scenes, no files needed
    bash scripts/demo.sh --data DIR      # a folder of your own videos

Every part is the real one; only the sizes are small (configs/stage1/demo.yaml, configs/stage2/demo.yaml).
"""

import argparse
import json
import logging
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.core.cli import run
from data.core.files import claim_folder
from data.video import list_videos
from pipelines.training.config import load
from pipelines.training.folder import ROOT, versions

log = logging.getLogger(__name__)
NUM_VIDEOS = 32  # generated; the page shows the first SHOWN
NUM_SHORT = 8  # scored by --short, which judges nothing
SHOWN = 16
PAGE_WIDTH = 1000  # pixels
PSNR_GAIN = 6.0  # dB that training must add on held-out clips
FVD_RATIO = 0.5  # of the untrained network's distance, at most


@dataclass
class Outcome:
    """What the page and the exit code need."""

    checks: list[tuple[str, str, str, str]]
    scores: list[tuple[str, str, str]]
    speeds: list[tuple[str, str, str]]
    clips: dict[str, Any]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="folder of videos instead of the procedural scenes")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the runs and report.html (default runs/demo...)"
    )
    parser.add_argument(
        "--short", action="store_true", help="a few steps only: shows that all parts run, judges nothing"
    )
    args = parser.parse_args(argv)
    kind = f"-{Path(args.data).resolve().name}" if args.data else ""
    args.out = args.out or f"runs/demo{kind}{'-short' if args.short else ''}"
    return args


def fetch_judges() -> None:
    """Get the judges' weights on the first call; goes on without them, and says so, when they cannot be had."""
    from eval.fetch_weights import fetch, missing
    from eval.weight_files import TERMS
    from eval.weights import weights_folder

    folder = weights_folder()
    try:
        if not os.environ.get("OMNILATTE_WEIGHTS") and missing(folder):
            log.info("fetching the judging networks, 111 MB, into %s", folder)
            log.info("fetched %s, verified. %s", ", ".join(fetch(folder)), " ".join(TERMS))
    except (ValueError, OSError) as error:
        log.warning("%s; the demo goes on without them", error)


def weights_of(kind: str) -> Path | None:
    """The file of a judging network, None when it is not there. ValueError for a file that cannot be used."""
    from eval.weights import find_weights, open_weights

    try:
        path = find_weights(kind)
    except ValueError:
        return None
    open_weights(kind, path)
    return path


def loss_settings(run_dir: Path) -> list[str]:
    """LPIPS for stage one if its weights are there; a run that has begun keeps what it began with."""
    from omegaconf import OmegaConf

    saved = run_dir / "config.yaml"
    begun = OmegaConf.load(saved).loss.perceptual_weight > 0 if saved.is_file() else None
    use = weights_of("alexnet") is not None if begun is None else begun
    if not use:
        log.warning("stage one without LPIPS%s", "" if begun is None else ", as this run began")
    # 0.1: at 32 pixels a weight of 1 costs FVD (of reconstructions 876 for 730) and gains 0.003 of LPIPS
    return ["loss.perceptual_weight=0.1", "loss.perceptual_net=alex"] if use else []


def settings(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Configs of the image VAE, stage one, stage two and sampling: the demo files, the data, the output folder."""
    from pipelines.sample import SampleConfig
    from pipelines.train_latte import TrainLatteConfig
    from pipelines.train_vae import TrainVAEConfig

    out = Path(args.out)
    source = [f"source.index_dir={out / 'index'}"]
    if args.data:
        source += ["source.name=folder", f"source.root={args.data}", "clip.short=loop"]
    stage_one = list(source)
    if args.data:
        stage_one += ["source.val_fraction=0.2"]
    if args.short:
        stage_one += [
            "steps=6",
            "log_every=2",
            "val_every=3",
            "save_every=3",
            "val_videos=2",
            "loss.gan_start=4",
        ]
    latte_steps = ["steps=6", "log_every=2", "save_every=3", "source.demo_videos=16"] if args.short else []
    image = load(
        TrainVAEConfig, ROOT / "configs/stage1/demo_image.yaml", [*stage_one, f"run_dir={out / 'image'}"]
    )
    start = [f"run_dir={out / 'vae'}", f"model.init_from={out / 'image' / 'vae'}"]
    start += loss_settings(out / "vae")
    vae = load(TrainVAEConfig, ROOT / "configs/stage1/demo.yaml", [*stage_one, *start])
    stage_two = [f"run_dir={out / 'latte'}", f"vae.path={out / 'vae' / 'vae'}", f"cache.dir={out / 'cache'}"]
    latte = load(TrainLatteConfig, ROOT / "configs/stage2/demo.yaml", [*source, *latte_steps, *stage_two])
    wanted = [
        f"num_videos={NUM_VIDEOS}",
        f"out={out / 'samples'}",
        f"pipeline={out / 'latte' / 'pipeline'}",
        "batch=8",
    ]
    sampling = load(SampleConfig, ROOT / "configs/sample/demo.yaml", wanted)
    return image, vae, latte, sampling


def untrained_samples(sampling: Any, latte: Any, count: int) -> list[Any]:
    """The same pipeline with a freshly initialised denoiser: what the trained one is compared with."""
    import torch

    from data.clip import to_uint8
    from denoiser.latte import Latte
    from pipelines.training.distributed import draw_seed
    from pipelines.video_pipeline import LatentVideoPipeline

    pipe = LatentVideoPipeline.from_pretrained(sampling.pipeline)
    torch.manual_seed(latte.seed)
    fresh = Latte.from_config(pipe.transformer.config).eval()
    pipe = LatentVideoPipeline(vae=pipe.vae, transformer=fresh, class_names=pipe.config.class_names)
    seeds = [draw_seed(sampling.seed, i) for i in range(count)]
    result = pipe(num_videos=count, seeds=seeds, sampler=sampling.sampler, num_steps=sampling.num_steps)
    return list(to_uint8(result.videos))


def real_clips(latte: Any, least: int, most: int) -> tuple[list[Any], Any, list[str]]:
    """Windows of the training videos, one of each within these bounds; their videos' numbers; the names of the classes."""
    import numpy as np

    from pipelines.training.open import open_clips

    clips = open_clips(latte.source, latte.clip, latte.seed)
    rng = np.random.default_rng(latte.seed)
    numbers = np.arange(min(max(least, len(clips)), most)) % len(clips)
    return [clips.clip_uint8(i, rng) for i in numbers], numbers, list(clips.class_names)


def reconstruct(vae_config: Any, folder: Path) -> tuple[list[tuple[Any, Any]], Any, float]:
    """Held-out clips and their reconstructions by the trained VAE; the VAE; PSNR of the same network untrained."""
    import torch

    from data.clip import to_float, to_uint8
    from pipelines.train_vae import evaluate
    from pipelines.training.open import open_clips
    from pipelines.training.start import build_vae_model
    from vae import load_vae

    vae = load_vae(folder)
    clips = open_clips(vae_config.source, replace(vae_config.clip, position="center"), 0, held_out=True)
    pairs = []
    with torch.inference_mode():
        for n in range(min(4, len(clips))):
            x = to_float(clips[n]["video"])[None]
            pairs.append((to_uint8(x)[0], to_uint8(vae.decode(vae.encode(x).latent_dist.mode()).sample)[0]))
    torch.manual_seed(vae_config.seed)
    scores, _ = evaluate(build_vae_model(vae_config), clips, vae_config.val_videos, torch.device("cpu"))
    return pairs, vae, scores["val/psnr"]


def score(
    real: list[Any], numbers: Any, fake: list[Any], untrained: list[Any]
) -> tuple[dict[str, dict], Any, Any]:
    """`eval.fvd.score` of the generated videos, with the untrained network's values; the protocol; the provenance.

    real: of the videos `numbers`, those beyond len(fake) are for the floor. Without weights a random I3D, named so.
    """
    import numpy as np

    from eval.extraction import Judged
    from eval.features import extract_features, i3d_extractor
    from eval.fvd import distances
    from eval.fvd import score as judge_features
    from eval.protocol import Protocol

    i3d, num = i3d_extractor(weights_of("i3d") or "random:0"), len(fake)
    sets = {"real": real, "fake": fake, "untrained": untrained}
    features = {name: extract_features(videos, i3d) for name, videos in sets.items()}
    videos = {"real": numbers, "fake": np.arange(num)}
    judged = {side: Judged(features[side], groups, groups, {}) for side, groups in videos.items()}
    protocol = Protocol(num_videos=num, num_frames=len(fake[0]), size=fake[0].shape[1:3])
    found = judge_features(judged["real"], judged["fake"], protocol)
    before = distances(features["real"][:num], features["untrained"])
    found = {metric: {**values, "untrained": before[metric]} for metric, values in found.items()}
    return found, protocol, i3d.provenance


def score_rows(found: dict[str, dict], protocol: Any, provenance: Any) -> list[tuple[str, str, str]]:
    """FVD and KVD with interval, floor and protocol, and why there is no IS."""
    from eval.fvd import floor_text
    from eval.weight_files import WEIGHT_FILES

    rows, size = [], "x".join(map(str, protocol.size))
    for metric, values in found.items():
        low, high = values["interval"]["low"], values["interval"]["high"]
        how = f"95 % [{low:.1f}, {high:.1f}], floor {floor_text(values['floor'])}, {size} px"
        how += f", {protocol.label(metric.lower())}, protocol {protocol.title()}, I3D {provenance.file}"
        rows.append((provenance.metric_name(metric), f"{values['value']:.1f}", how))
    if path := weights_of("c3d"):
        reason = f"{path} is there: bash scripts/evaluate.sh measures it"
    else:
        official = WEIGHT_FILES["c3d"]
        reason = f"{official.network} weights are missing: {official.file} is at {official.source}"
    return [*rows, ("IS", "not run", reason)]


def judge(vae_config: Any, latte: Any, sampling: Any, short: bool) -> Outcome:
    """Score everything and check that learning is visible."""
    import torch

    from data.video import read_frames
    from eval.efficiency import encoder_speed
    from eval.fidelity import psnr, ssim
    from pipelines.sample import file_name
    from pipelines.training.log import read_metrics

    pairs, vae, untrained = reconstruct(vae_config, Path(latte.vae.path))
    num = NUM_SHORT if short else NUM_VIDEOS
    real, numbers, names = real_clips(latte, num, 2 * num)
    frames = range(latte.clip.num_frames)
    fake = [read_frames(sampling.folder / file_name(i), frames) for i in range(NUM_VIDEOS)]
    found, protocol, provenance = score(real, numbers, fake[:num], untrained_samples(sampling, latte, num))
    validation = [r for r in read_metrics(Path(vae_config.run_dir)) if "val/psnr" in r]
    tail, trained = validation[0]["val/psnr"], validation[-1]["val/psnr"]
    fvd = found["FVD"]
    if provenance.seed is None:  # the VAE alone costs 730 here, and the floor is 305: half is out of reach
        rule, good = "its whole interval below untrained", fvd["interval"]["high"] < fvd["untrained"]
    else:
        rule, good = f"at most {FVD_RATIO:g} x untrained", fvd["value"] <= FVD_RATIO * fvd["untrained"]

    def verdict(good: bool) -> str:
        return "not judged (--short)" if short else "pass" if good else "fail"

    checks = [
        (
            "held-out PSNR of the VAE",
            f"{untrained:.2f} -> {trained:.2f} dB",
            f"at least +{PSNR_GAIN:g} dB",
            verdict(trained - untrained >= PSNR_GAIN),
        ),
        (
            provenance.metric_name("FVD"),
            f"{fvd['untrained']:.1f} -> {fvd['value']:.1f}",
            rule,
            verdict(good),
        ),
    ]
    scores = score_rows(found, protocol, provenance)
    held_out = f"{len(pairs)} held-out clips, posterior mean, in memory on uint8"
    scores += [("PSNR at tail initialization", f"{tail:.2f} dB", "the same held-out clips, before stage one")]
    scores += [("PSNR", f"{sum(psnr(*p) for p in pairs) / len(pairs):.2f} dB", held_out)]
    scores += [("SSIM", f"{sum(ssim(*p) for p in pairs) / len(pairs):.4f}", held_out), lpips_row(pairs)]
    clip = torch.zeros(1, 3, vae_config.clip.num_frames, vae_config.clip.size, vae_config.clip.size)
    speed = encoder_speed(lambda x: vae.encode(x).latent_dist.mode(), clip, warmup=1, repeats=3)
    return Outcome(
        checks,
        scores,
        speeds(vae_config, latte, speed),
        {"pairs": pairs, "real": real, "fake": fake, "names": names},
    )


def lpips_row(pairs: list[tuple[Any, Any]]) -> tuple[str, str, str]:
    from eval.fidelity import load_lpips, lpips_distance

    try:
        network, provenance = load_lpips()
    except ValueError as error:
        return "LPIPS", "not run", str(error)
    value = sum(lpips_distance(*p, network) for p in pairs) / len(pairs)
    return provenance.metric_name("LPIPS"), f"{value:.4f}", f"AlexNet, {provenance.file}"


def speeds(vae_config: Any, latte: Any, cspeed: dict[str, Any]) -> list[tuple[str, str, str]]:
    """TMem, TSpeed of both trainings and CSpeed, with what they were measured on."""
    rows = []
    for name, config in (("stage one", vae_config), ("stage two", latte)):
        found = json.loads((Path(config.run_dir) / "efficiency.json").read_text())
        speed = f"{found['tspeed']:.3f} it/s" if found["tspeed"] else "not measured (too few steps)"
        memory = found["tmem"]["device_mib"]
        size = f"global batch {found['global_batch']}, {config.clip.num_frames} x {config.clip.size} x {config.clip.size}"
        rows.append((f"TSpeed, {name}", speed, f"mode {found['mode']}, {size}"))
        rows.append(
            (
                f"TMem, {name}",
                f"{memory:,.0f} MiB" if memory else "not measured",
                "GPU memory; none here" if not memory else size,
            )
        )
    shape = f"1 x 3 x {cspeed['frames']} x {cspeed['height']} x {cspeed['width']}, {cspeed['dtype']}, {cspeed['device']}"
    rows.append(("CSpeed", f"{cspeed['batches_per_s']:.3f} it/s", f"encoder, {shape}"))
    return rows


def page(path: Path, outcome: Outcome, vae_config: Any, latte: Any, seconds: float) -> None:
    import numpy as np

    from pipelines.media import comparison, grid
    from pipelines.report import Section, clip_figure, curve_figure, series_of, write_report
    from pipelines.training.log import read_metrics

    stage_one, stage_two = (read_metrics(Path(c.run_dir)) for c in (vae_config, latte))
    clips = outcome.clips
    side_by_side = np.concatenate([comparison(a, b) for a, b in clips["pairs"]], axis=1)
    labelled = f"classes in turn: {', '.join(clips['names'])}; " if clips["names"] else ""
    curves = [
        curve_figure(
            series_of(stage_one, "loss/rec"),
            "Stage one: mean absolute error of the reconstruction",
            log_y=True,
        ),
        curve_figure(series_of(stage_one, "val/psnr"), "Stage one: PSNR on held-out clips, dB (EMA weights)"),
        curve_figure(
            series_of(stage_two, "loss/mse"),
            "Stage two: mean squared error of the predicted noise",
            log_y=True,
        ),
    ]
    wide = SHOWN // 2
    sections = [
        Section(
            "Is learning visible?",
            header=("check", "untrained -> trained", "rule", "result"),
            rows=outcome.checks,
        ),
        Section(
            "Reconstruction",
            "original | reconstruction | error x 4, on clips the VAE never saw",
            figures=[clip_figure(side_by_side, "held-out clips", width=480)],
        ),
        Section(
            "Generation",
            figures=[
                clip_figure(
                    grid(clips["fake"][:SHOWN], wide),
                    f"generated, {labelled}seeds 0 to {SHOWN - 1}",
                    width=PAGE_WIDTH,
                ),
                clip_figure(grid(clips["real"][:SHOWN], wide), "real", width=PAGE_WIDTH),
            ],
        ),
        Section("Scores", header=("score", "value", "protocol"), rows=outcome.scores),
        Section("Efficiency", header=("figure", "value", "measured on"), rows=outcome.speeds),
        Section("Curves", figures=curves),
        Section(
            "Versions",
            header=("package", "version"),
            rows=list(versions().items()),
            folded="of Python and the packages",
        ),
    ]
    subtitle = f"{time.strftime('%Y-%m-%d %H:%M')}, {platform.machine()}, {os.cpu_count()} cores, {seconds / 60:.1f} minutes for this run"
    write_report(path, "OmniLatte demo: OD-VAE and Latte, from clips to scores", subtitle, sections)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.data and not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data}: no such folder")
    if args.data and len(found := list_videos(args.data)) < 2:
        raise ValueError(f"--data {args.data}: {len(found)} videos; at least 2, one is held out")
    from pipelines import train_latte, train_vae
    from pipelines.cache_latents import build_cache
    from pipelines.sample import sample
    from pipelines.training.log import console

    console()
    fetch_judges()
    image_config, vae_config, latte, sampling = settings(args)
    claim_folder(args.out, "demo", lambda folder: (folder / "image" / "config.yaml").is_file())
    start = time.monotonic()
    log.info("1/6 an image VAE, in the place of SD2.1-VAE")
    train_vae.train(image_config)
    log.info("2/6 stage one: OD-VAE from it by tail initialization")
    train_vae.train(vae_config)
    log.info("3/6 cache latents")
    build_cache(latte)
    log.info("4/6 stage two: train Latte")
    train_latte.train(latte)
    log.info("5/6 generate %d videos", NUM_VIDEOS)
    sample(sampling)
    log.info("6/6 score and report")
    outcome = judge(vae_config, latte, sampling, args.short)
    path = Path(args.out) / "report.html"
    page(path, outcome, vae_config, latte, time.monotonic() - start)
    for row in outcome.checks:
        print("{:45} {:28} {:24} {}".format(*row))
    for row in [*outcome.scores, *outcome.speeds]:
        print("{:45} {:28} {}".format(*row))
    print(f"open {path}")
    return 1 if any(row[-1] == "fail" for row in outcome.checks) else 0


if __name__ == "__main__":
    run(main)
