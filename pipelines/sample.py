"""Generate videos with a trained pipeline, lossless, one file each, to be judged.

    python -m pipelines.sample pipeline=runs/latte/pipeline out=runs/latte/samples num_videos=2048

Video i has its own seed and class (i modulo the number of classes), so it is the same whatever the batch size or the
number of processes (to rounding). The same command again makes only what is missing.
"""

import argparse
import json
import logging
import shlex
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.clip import to_uint8
from data.core.cli import run
from data.core.files import read_json, remove_leftovers, sha256_of, write_json
from data.core.lazy import lazy
from data.core.option import option
from data.encode import write_ffv1, write_mp4
from data.progress import Progress
from data.video import read_frames
from pipelines.beside import Beside, Waits
from pipelines.media import grid
from pipelines.training.config import parse
from pipelines.training.folder import is_in_use, summary, versions
from pipelines.training.log import box
from pipelines.training.settings import Precision, check_groups

torch = lazy("torch")
latte = lazy("denoiser.latte")
sampling = lazy("denoiser.sampling")
distributed = lazy("pipelines.training.distributed")
openers = lazy("pipelines.training.open")
plan = lazy("pipelines.plan.report")
programs = lazy("pipelines.plan.programs")
video_pipeline = lazy("pipelines.video_pipeline")

log = logging.getLogger(__name__)


@dataclass
class SampleConfig:
    pipeline: str = option("runs/latte/pipeline", "folder of a LatentVideoPipeline")
    transformer: str = option("", "other denoiser weights, e.g. a checkpoint's latte or latte_ema folder")
    out: str = option("", "folder of the videos; empty: <pipeline>/../samples")
    num_videos: int = option(2048, "how many; more later adds to the same folder")
    batch: int = option(4, "videos denoised at once")
    seed: int = option(0, "video i draws from (seed, i)")
    sampler: str = option("ddpm", "ddpm|ddim|ddim_upstream")
    num_steps: int = option(250, "sampling steps")
    guidance_scale: float = option(
        1.0, "classifier-free guidance; 1 turns it off (Latte evaluates UCF101 with 7)"
    )
    labels: list[str] = option([], "class names or ids to generate; empty: all, in turn")
    precision: Precision = option(Precision.fp32, "of the denoiser and decoder: fp32|tf32|bf16")
    tiling_frames: int = option(
        0, "decode in temporal groups of this many frames (odvae; paper 3.3: 33); 0: off"
    )
    compile: bool = option(
        False,
        "torch.compile the denoiser's blocks: fewer and larger kernels, after minutes of compiling",
        free=True,
    )
    fps: float = option(8.0, "frames per second written into the files")

    def __post_init__(self):
        for name in ("num_videos", "batch", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.fps > 0:
            raise ValueError(f"fps={self.fps}: must be above 0")
        check_groups(self.tiling_frames, "tiling_frames")

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else Path(self.pipeline).parent / "samples"


def file_name(index: int) -> str:
    return f"{index:06d}.mkv"


def begin_manifest(config: SampleConfig, made_by: dict[str, Any]) -> None:
    """Write manifest.json, or re-enter a folder made with the same settings and weights, else ValueError.

    made_by: digests of denoiser and VAE, and what else of them decides the videos.
    """
    # The settings that decide a video: not where it lies, nor how many there are
    decisive = asdict(config) | {"precision": config.precision.value, **made_by}
    for key in ("pipeline", "transformer", "out", "num_videos", "batch", "compile"):
        del decisive[key]
    # A folder of samples must have been made with the same ones.
    file, listed, preview = config.folder / "manifest.json", [], None
    if file.is_file():
        try:
            before = json.loads(file.read_text())
            old = {"tiling_frames": 0, **before["settings"]}  # older manifests have no such setting
            listed, preview = list(before["files"]), before.get("preview_sha256")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: no manifest of samples ({error}); choose another out=") from error
        differing = []
        for key, value in decisive.items():
            if old.get(key) != value:
                differing.append(f"{key}: {old.get(key)!r} -> {value!r}")
        if differing:
            raise ValueError(
                f"out={config.folder} holds other samples ({'; '.join(differing[:4])}); choose another out="
            )
    elif is_in_use(config.folder):
        raise ValueError(f"out={config.folder} is not empty and has no manifest.json; choose another out=")
    config.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(config.folder)
    # Videos beyond num_videos that are there already stay part of the set.
    count = config.num_videos
    for n, name in enumerate(listed):
        if name == file_name(n) and (config.folder / name).is_file():
            count = max(count, n + 1)
    content = {"num_videos": count, "complete": False, "settings": decisive, "lossless": True}
    content |= {"pipeline": config.pipeline, "transformer": config.transformer, "versions": versions()}
    content["files"] = list(map(file_name, range(count)))
    content |= {"preview_sha256": preview} if preview else {}
    write_json(file, content)


def _check_folder(key: str, folder: str, marker: str, inner: str) -> None:
    """ValueError unless the marker is in the folder; with a hint where it is in one below, of a name like `inner`."""
    if (Path(folder) / marker).is_file():
        return
    below = sorted(Path(folder).glob(f"{inner}/{marker}"))
    hint = f"did you mean {key}={below[0].parent}?" if below else "train one with scripts/stage2_latte.sh"
    raise ValueError(f"{key}={folder}: no {marker} there; {hint}")


def load_pipeline(config: SampleConfig, device: Any) -> Any:
    """The pipeline in eval mode on the device."""
    _check_folder("pipeline", config.pipeline, "model_index.json", "*")
    parts = {}
    # Other weights of the denoiser, e.g. those of a checkpoint
    if config.transformer:
        _check_folder("transformer", config.transformer, "config.json", "*latte*")
        if read_json(Path(config.transformer) / "config.json").get("_class_name") != "Latte":
            raise ValueError(f"transformer={config.transformer}: config.json is not that of a Latte")
        parts["transformer"] = latte.Latte.from_pretrained(config.transformer)
    pipe = video_pipeline.LatentVideoPipeline.from_pretrained(config.pipeline, **parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.eval()
    pipe.transformer.eval()
    return pipe


def classes_of(config: SampleConfig, pipe: Any) -> list[int | str]:
    """The classes to take in turn: those asked for, else all; none for an unconditional model.

    A number that is the name of a class means that class. Raises ValueError for what the model cannot generate.
    """
    names = list(pipe.config.class_names)
    classes: list[int | str] = []
    for label in config.labels:
        is_id = label not in names and label.lstrip("-").isdigit()
        classes.append(int(label) if is_id else label)
    pipe.labels(classes or None, 1)
    if config.guidance_scale != 1 and pipe.transformer.null_label is None:
        raise ValueError(
            f"guidance_scale={config.guidance_scale:g}: this model has no null class, use guidance_scale=1"
        )
    return classes or list(range(pipe.transformer.config.num_classes or 0))


def sample(config: SampleConfig) -> Path:
    """Generate what is missing; returns the folder."""
    # The pipeline on this process's device.
    accelerator = distributed.make_accelerator()
    pipe = load_pipeline(config, accelerator.device)
    openers.tile_time(pipe.vae, config.tiling_frames, "tiling_frames")
    # What a wrong setting can spoil is checked before anything is written.
    sampling.make_scheduler(config.sampler, config.num_steps)
    classes = classes_of(config, pipe)
    # Record which weights make these videos.
    if accelerator.is_main_process:
        made_by = {
            "weights_sha256": openers.weights_digest(pipe.transformer),
            "vae_sha256": openers.weights_digest(pipe.vae),
            "normalization": openers.normalization(pipe.vae),
            "class_names": list(pipe.config.class_names),
        }
        # A number that is a class name was an id in earlier versions: their folders are not continued.
        if any(label in pipe.config.class_names and label.lstrip("-").isdigit() for label in config.labels):
            made_by["labels_are_names"] = True
        begin_manifest(config, made_by)
    accelerator.wait_for_everyone()
    pipe.vae = openers.for_inference(pipe.vae, accelerator.device, config.precision)
    if config.compile:
        distributed.compile_blocks(pipe.transformer, accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes

    # What is missing, in turns over the processes.
    missing = []
    for index in range(config.num_videos):
        file = config.folder / file_name(index)
        if not (file.is_file() and file.stat().st_size > 0):
            missing.append(index)
    missing = distributed.same_everywhere(accelerator, missing)  # one of them may have begun already
    mine = missing[rank::world]
    log.info("%s: %d of %d videos to generate", config.folder, len(missing), config.num_videos)
    # A batch is denoised and decoded here while the one before is written beside it.
    waits = Waits()
    with (
        Progress(len(mine), "sample", "video", accelerator.is_main_process, note=lambda: str(waits)) as bar,
        Beside(waits, "writing", 2 * config.batch) as beside,
    ):
        for start in range(0, len(mine), config.batch):
            batch = mine[start : start + config.batch]
            labels = [classes[i % len(classes)] for i in batch] if classes else None
            with (
                torch.inference_mode(),
                distributed.autocast(accelerator, config),
                distributed.matrix_products(config),
            ):
                videos = pipe(
                    labels,
                    config.num_steps,
                    config.guidance_scale,
                    num_videos=len(batch),
                    seeds=[distributed.draw_seed(config.seed, i) for i in batch],
                    sampler=config.sampler,
                    output_type="video",
                ).frames
            for index, video in zip(batch, to_uint8(videos), strict=True):
                beside.do(write_ffv1, config.folder / file_name(index), video, config.fps)
            bar.update(len(batch))
    log.info("%s", waits)
    # The main process completes the manifest and makes a preview of the first videos.
    distributed.wait_for_all(accelerator)
    if accelerator.is_main_process:
        content = json.loads((config.folder / "manifest.json").read_text())
        complete = all((config.folder / name).is_file() for name in content["files"])
        frames = range(pipe.vae.pixel_frames(pipe.transformer.config.num_frames))
        names = map(file_name, range(min(16, config.num_videos)))
        first = [np.asarray(read_frames(config.folder / name, frames)) for name in names]
        # The preview is written again only if it is still the one that this program wrote.
        preview = config.folder.with_name(config.folder.name + "-preview.mp4")
        shown = sha256_of(preview) if preview.is_file() else None
        if (shown is None and not preview.exists()) or shown == content.get("preview_sha256", ""):
            write_mp4(preview, grid(first), config.fps)
            shown = sha256_of(preview)
        else:
            log.warning("%s is not the preview that this program wrote: left as it is", preview)
            shown = content.get("preview_sha256")
        write_json(
            config.folder / "manifest.json", {**content, "complete": complete, "preview_sha256": shown}
        )
        log.info("%d videos in %s; the first ones: %s", config.num_videos, config.folder, preview)
    accelerator.wait_for_everyone()
    return config.folder


def config_from(argv: list[str] | None) -> tuple[SampleConfig, argparse.Namespace]:
    """The settings of a command line, and its switches."""
    return parse(SampleConfig, argv, "sample", __doc__, planned=True)


def as_trained(pipeline: Path) -> str:
    """The options of eval/fvd.py with which real clips are cut as those of the pipeline's training were; "" for the usual ones."""
    clip: Any = {}
    with suppress(ValueError, OSError):  # somebody else's files of these names
        clip = openers.run_of(pipeline).get("clip")
    words = ""
    for key, usual in (("interval", 1), ("fps", 0)):
        value = clip.get(key, usual) if isinstance(clip, dict) else usual
        if isinstance(value, int | float) and value > usual:
            words += f" --real-{key} {value:g}"
    return words


def main(argv: list[str] | None = None) -> int:
    config, args = config_from(argv)
    if args.plan:
        print(plan.plan_text("sample", programs.sample, config, args.card))
    elif args.dry_run:
        print(f"{summary(config)}\n\n{config.num_videos} videos to {config.folder}")
    else:
        folder = sample(config)
        judge = f"python eval/fvd.py --real FOLDER_OF_REAL_VIDEOS --fake {shlex.quote(str(folder))}"
        judge += as_trained(Path(config.pipeline))
        box(f"finished: {config.num_videos} videos", {"videos": str(folder), "next": judge})
    return 0


if __name__ == "__main__":
    run(main)
