"""The whole path at small width on CPU: train a VAE, cache latents, train Latte, generate, score, report.html.

    bash scripts/demo.sh                 # procedural moving scenes, no files needed
    bash scripts/demo.sh --data DIR      # a folder of your own videos

Every part is the real one; only the sizes are small (configs/stage1/demo.yaml, configs/stage2/demo.yaml).
"""

import argparse
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

from data.core.cli import run
from data.core.files import claim_folder
from data.core.lazy import lazy
from data.finding import list_videos
from pipelines.training.config import load
from pipelines.training.folder import ROOT, versions

cache_latents = lazy("pipelines.cache_latents")
demo_scores = lazy("pipelines.demo_scores")
fetch_weights = lazy("eval.fetch_weights")
media = lazy("pipelines.media")
omegaconf = lazy("omegaconf")
pages = lazy("pipelines.results.page")
sampling = lazy("pipelines.sample")
train_latte = lazy("pipelines.train_latte")
train_vae = lazy("pipelines.train_vae")
training_log = lazy("pipelines.training.log")
weight_files = lazy("eval.weight_files")
weights = lazy("eval.weights")

log = logging.getLogger(__name__)
NUM_VIDEOS = 32  # generated and scored; the page shows the first SHOWN
NUM_SHORT = 4  # scored by --short, which judges nothing
SHOWN = 16
PAGE_WIDTH = 1064  # pixels
SHORT_VAE = "steps=6 log_every=2 val_every=3 save_every=3 val_videos=2 loss.gan_start=4".split()
SHORT_LATTE = "steps=6 log_every=2 save_every=3 source.demo_videos=16".split()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="folder of videos instead of the procedural scenes")
    parser.add_argument("--out", metavar="DIR", help="folder of runs and report.html (runs/demo...)")
    parser.add_argument("--seed", type=int, default=0, help="of every part (default 0)")
    parser.add_argument("--short", action="store_true", help="a few steps: all parts run, nothing is judged")
    args = parser.parse_args(argv)
    kind = f"-{Path(args.data).resolve().name}" if args.data else ""
    args.out = args.out or f"runs/demo{kind}{'-short' if args.short else ''}"
    if args.data and not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data}: no such folder")
    if args.data and len(found := list_videos(args.data)) < 2:
        raise ValueError(f"--data {args.data}: {len(found)} videos; at least 2, one is held out")
    return args


def fetch_judges(out: Path) -> None:
    """Get the judges' weights on the first call; continues without them, and says so, when they cannot be had.

    They go where every program looks for them; in a checkout that cannot be written to, into the demo's own folder.
    """
    # OMNILATTE_WEIGHTS names a folder of the user: nothing is fetched into it.
    if os.environ.get("OMNILATTE_WEIGHTS"):
        return
    folder = weights.weights_folder()
    if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK) and fetch_weights.missing(folder):
        folder = out / "weights"
        os.environ["OMNILATTE_WEIGHTS"] = str(folder)
    # Missing weights cost the demo's scores, not the demo.
    try:
        if fetch_weights.missing(folder):
            log.info("fetching the judging networks, 111 MB, into %s", folder)
            log.info(
                "fetched %s, verified. %s",
                ", ".join(fetch_weights.fetch(folder)),
                " ".join(weight_files.TERMS),
            )
    except (ValueError, OSError) as error:
        log.warning("%s; the demo continues without them", error)


def loss_settings(run_dir: Path) -> list[str]:
    """LPIPS for stage one if its weights are there; a run that has begun keeps what it began with."""
    saved = run_dir / "config.yaml"
    begun = omegaconf.OmegaConf.load(saved).loss.perceptual_weight > 0 if saved.is_file() else None
    if begun or (begun is None and demo_scores.weights_of("alexnet")):
        return []
    log.warning("stage one without LPIPS%s", "" if begun is None else ", as this run began")
    return ["loss.perceptual_weight=0"]


def stages(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Settings of the image VAE, stage one, stage two and sampling: the demo's files, the data, the output folder."""

    def settings(kind: type, file: str, *words: str) -> Any:
        return load(kind, ROOT / "configs" / file, [*words, f"seed={args.seed}"])

    # What all parts share: where the videos come from, and which are held out
    out = Path(args.out)
    source, held_out = [f"source.index_dir={out / 'index'}"], []
    if args.data:
        source += ["source.name=folder", f"source.root={args.data}", "clip.short=loop"]
        held_out = ["source.val_fraction=0.2"]
    vae = [*source, *held_out, *(SHORT_VAE if args.short else [])]
    start = [
        f"run_dir={out / 'vae'}",
        f"model.init_from={out / 'image' / 'vae'}",
        *loss_settings(out / "vae"),
    ]
    latte = [*source, *(SHORT_LATTE if args.short else []), f"run_dir={out / 'latte'}"]
    latte += [f"vae.path={out / 'vae' / 'vae'}", f"cache.dir={out / 'cache'}"]
    samples = [f"num_videos={NUM_VIDEOS}", f"out={out / 'samples'}", f"pipeline={out / 'latte' / 'pipeline'}"]
    return (
        settings(train_vae.TrainVAEConfig, "stage1/demo_image.yaml", *vae, f"run_dir={out / 'image'}"),
        settings(train_vae.TrainVAEConfig, "stage1/demo.yaml", *vae, *start),
        settings(train_latte.TrainLatteConfig, "stage2/demo.yaml", *latte),
        settings(sampling.SampleConfig, "sample/demo.yaml", *samples),
    )


def page(path: Path, outcome: Any, stage_one: Path, stage_two: Path, seconds: float) -> None:
    """report.html of the run folders of both stages."""
    # Clips that play: generated ones above real ones
    names = outcome.class_names
    labelled = f"classes in turn: {', '.join(names)}; " if names else ""
    title = f"generated, {labelled}seeds 0 to {SHOWN - 1}"
    clips = []
    for name, videos in ((title, outcome.fake), ("real, of the training videos", outcome.real)):
        clips.append(pages.clip_figure(media.grid(videos[:SHOWN], SHOWN // 2), name, width=PAGE_WIDTH))
    decoded = [pages.clip_figure(outcome.decoded, "held-out clips", width=480)]
    # Curves of both stages
    curves = []
    for stage, metric, caption in (
        (stage_one, "loss/rec", "Stage one: mean absolute error"),
        (stage_one, "val/psnr", "Stage one: PSNR on held-out clips, dB (EMA weights)"),
        (stage_two, "loss/mse", "Stage two: error of the predicted noise"),
    ):
        series = pages.series_of(training_log.read_metrics(stage), metric)
        curves.append(pages.curve_figure(series, caption, log_y=metric.startswith("loss")))
    # The sections, in the order of a reader's questions
    told = "original | reconstruction | error x 4, on clips the VAE never saw"
    checks = ("check", "untrained -> trained", "rule", "result")
    packages, folded = list(versions().items()), "of Python and the packages"
    sections = [
        pages.Section("Is learning visible?", header=checks, rows=outcome.checks),
        pages.Section("Reconstruction", told, figures=decoded),
        pages.Section("Generation", figures=clips),
        pages.Section("Scores", header=("score", "value", "protocol"), rows=outcome.scores),
        pages.Section("Efficiency", header=("figure", "value", "measured on"), rows=outcome.speeds),
        pages.Section("Curves", figures=curves),
        pages.Section("Versions", header=("package", "version"), rows=packages, folded=folded),
    ]
    # When, where and how long, below the title.
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {seconds / 60:.1f} minutes for this run"
    subtitle = f"{time.strftime('%Y-%m-%d %H:%M')}, {machine}"
    pages.write_page(path, "OmniLatte demo: OD-VAE and Latte, from clips to scores", subtitle, sections)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    claim_folder(args.out, "demo", lambda folder: (folder / "image" / "config.yaml").is_file())
    fetch_judges(Path(args.out))
    # Settings of all parts first: a wrong one shows before the first part runs.
    image, vae, latte, samples = stages(args)
    num = NUM_SHORT if args.short else NUM_VIDEOS
    parts = [
        ("an image VAE, in the place of SD2.1-VAE", lambda: train_vae.train(image)),
        ("stage one: OD-VAE from it by tail initialization", lambda: train_vae.train(vae)),
        ("cache latents", lambda: cache_latents.build_cache(latte)),
        ("stage two: train Latte", lambda: train_latte.train(latte)),
        (f"generate {NUM_VIDEOS} videos", lambda: sampling.sample(samples)),
        ("score and report", lambda: demo_scores.judge(vae, latte, samples, num, args.short)),
    ]
    # One part after the other; each resumes where an earlier start stopped.
    began = time.monotonic()
    for number, (name, part) in enumerate(parts, 1):
        log.info("%d/%d %s", number, len(parts), name)
        start = time.monotonic()
        outcome = part()
        log.info("%d/%d took %.0f s", number, len(parts), time.monotonic() - start)
    path = Path(args.out) / "report.html"
    page(path, outcome, Path(vae.run_dir), Path(latte.run_dir), time.monotonic() - began)
    # The results on the console, and the exit code: a check that fails is a failure.
    for row in outcome.checks:
        print("{:45} {:28} {:24} {}".format(*row))
    for row in [*outcome.scores, *outcome.speeds]:
        print("{:45} {:28} {}".format(*row))
    print(f"open {path}")
    return 1 if any(row[-1] == "fail" for row in outcome.checks) else 0


if __name__ == "__main__":
    run(main)
