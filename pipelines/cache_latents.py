"""Stage two, first part: encode every clip once and keep the posterior's mean and log-variance.

    python -m pipelines.cache_latents --config configs/stage2/ucf101.yaml --vae odvae

Reads the settings of train_latte. The same command again continues where it stopped, and tries again what could not be
read; processes share the shards, also those of several launches at once. --verify checks a whole cache.
"""

import argparse
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.clip import to_float
from data.core.cli import run
from data.core.files import printable
from data.core.lazy import lazy
from data.processes import Pool
from data.progress import Progress
from data.video import BadVideo
from pipelines.train_latte import FLAGS, TrainLatteConfig
from pipelines.training.config import parse
from pipelines.training.log import box, command
from pipelines.training.settings import Mode

torch = lazy("torch")
latent_files = lazy("data.latents")
latent_writer = lazy("data.latent_writer")
distributed = lazy("pipelines.training.distributed")
latents = lazy("pipelines.training.latents")
openers = lazy("pipelines.training.open")
plan = lazy("pipelines.plan.report")
programs = lazy("pipelines.plan.programs")
start = lazy("pipelines.training.start")

if TYPE_CHECKING:
    from data.dataset import VideoClips
    from data.latent_writer import LatentCacheWriter
    from data.latents import LatentCache

log = logging.getLogger(__name__)


def read_entries(
    config: TrainLatteConfig, clips: "VideoClips", entries: Iterable[int]
) -> Iterator[tuple[int, Any]]:
    """(entry, its pixels uint8 (T, size, size, 3), or the BadVideo that says why not), decoded ahead by `workers` processes."""

    def job(entry: int) -> tuple:
        video, draw = divmod(entry, latents.draws(config))
        return clips.clip_job(
            video, np.random.default_rng((config.seed, video, draw // 2 if config.cache.flips else draw))
        )

    def here(function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except BadVideo as error:
            return error

    with Pool(config.workers) if config.workers else nullcontext() as pool:
        jobs = map(job, entries)
        read = pool.in_order(jobs, 2 * config.workers) if pool else (here(*one) for one in jobs)
        for entry, pixels in zip(entries, read, strict=True):
            mirrored = config.cache.flips and entry % 2 and not isinstance(pixels, BadVideo)
            yield entry, pixels[:, :, ::-1].copy() if mirrored else pixels


def encode_shard(
    config: TrainLatteConfig, vae: Any, clips: "VideoClips", entries: range, device: Any
) -> tuple[dict, list]:
    """Tensors (mean, logvar, label, video, draw) of the entries, and those whose video could not be read.

    vae: on the device, as `for_inference` returns it.
    """
    dtype, rows, failed = latent_files.DTYPES[config.cache.dtype], [], []
    batch: list[tuple[int, Any]] = []

    def encode() -> None:
        if not batch:
            return
        x = torch.stack([pixels for _, pixels in batch]).to(device, vae.dtype)
        posterior = vae.encode(x).latent_dist
        mean, logvar = (v.float().cpu().to(dtype) for v in (posterior.mean, posterior.logvar))
        for m, s, (entry, _) in zip(mean, logvar, batch, strict=True):
            if not (m.isfinite().all() and s.isfinite().all()):
                raise ValueError(
                    f"the latents of {clips.name(entry // latents.draws(config))} are not finite: are the VAE's weights whole? "
                    "precision=fp32 and cache.dtype=float32 reach farther; the shards before are kept"
                )
        rows.extend((m, s, entry) for m, s, (entry, _) in zip(mean, logvar, batch, strict=True))
        batch.clear()

    for entry, pixels in read_entries(config, clips, entries):
        if isinstance(pixels, BadVideo):
            name = clips.name(entry // latents.draws(config))
            failed.append({"entry": entry, "video": name, "reason": str(pixels)})
            log.warning("not cached: %s: %s", printable(name), pixels)
            continue
        batch.append((entry, to_float(pixels)))
        if len(batch) == config.cache.batch:
            encode()
    encode()
    videos, numbers = (
        zip(*(divmod(entry, latents.draws(config)) for _, _, entry in rows), strict=True)
        if rows
        else ((), ())
    )
    ids = {"video": videos, "draw": numbers, "label": [clips.label(v) for v in videos]}
    moments = {"mean": [m for m, _, _ in rows], "logvar": [s for _, s, _ in rows]}
    none = torch.zeros((0, 1, 1, 1, 1), dtype=dtype)
    tensors = {k: torch.stack(v) if v else none for k, v in moments.items()}
    return tensors | {k: torch.tensor(v, dtype=torch.int64) for k, v in ids.items()}, failed


def shards_to_do(config: TrainLatteConfig, writer: "LatentCacheWriter", clips: "VideoClips") -> list[int]:
    """Shards that are missing, and those that lack a clip which can be read by now."""
    lacking = {clip["entry"]: shard for shard, failed in writer.failures().items() for clip in failed}
    read = read_entries(config, clips, list(lacking))
    again = sorted({lacking[entry] for entry, pixels in read if not isinstance(pixels, BadVideo)})
    if again:
        log.info("%d shards lack clips that can be read now: they are made again", len(again))
    return sorted([*writer.missing(), *again])


def my_share(todo: list[int], rank: int, world: int) -> list[int]:
    """This process's shards. It begins at a place of its own, so that two launches at once meet as late as possible."""
    mine = todo[rank::world]
    start = int(hashlib.sha256(f"{platform.node()}-{os.getpid()}".encode()).hexdigest(), 16) % max(
        1, len(mine)
    )
    return mine[start:] + mine[:start]


def build_cache(config: TrainLatteConfig) -> "LatentCache":
    """Encode what is missing; returns the complete cache. Measures the latents' mean and std per channel.

    index.json keeps them: training scales the latents of a VAE that brings no rule by them. The VAE's folder stays as it is.
    """

    accelerator = distributed.make_accelerator()
    main = accelerator.is_main_process
    vae, clips, fingerprint, folder = open_parts(config, accelerator)
    with distributed.main_process_first(accelerator):
        writer = latent_writer.LatentCacheWriter(
            folder, fingerprint, len(clips) * latents.draws(config), config.cache.shard_size
        )
    frozen = openers.for_inference(vae, accelerator.device, config.precision)
    todo = distributed.same_everywhere(accelerator, shards_to_do(config, writer, clips) if main else None)
    log.info("%s: %d videos x %d draws", folder, len(clips), latents.draws(config))
    log.info("%d of %d shards to encode", len(todo), writer.num_shards)
    again = [s for s in todo if writer.is_written(s)]
    mine = my_share(todo, accelerator.process_index, accelerator.num_processes)
    with torch.inference_mode(), distributed.matrix_products(config):
        with Progress(len(mine), "cache", "shard", main) as bar:
            for shard in mine:
                if shard in again or not writer.is_written(shard):  # else another launch was quicker
                    entries = writer.entries(shard)
                    writer.write(shard, *encode_shard(config, frozen, clips, entries, accelerator.device))
                bar.update()
    accelerator.wait_for_everyone()
    if main:
        names = [clips.name(video) for video in range(len(clips))]
        index = writer.finish({"class_names": clips.source.class_names}, names)
        if index["failed"]:
            log.warning(
                "%d clips could not be read and are not in the cache; index.json lists them, the same command tries again",
                len(index["failed"]),
            )
        log.info("latent mean %s, std %s", *(_short(index["statistics"][k]) for k in ("mean", "std")))
    accelerator.wait_for_everyone()
    return latent_files.LatentCache(folder, expect=fingerprint)


def open_parts(config: TrainLatteConfig, accelerator: Any) -> tuple[Any, "VideoClips", dict[str, Any], Path]:
    """(VAE, clips, fingerprint, folder) of a cache."""
    vae = openers.open_vae(config.vae)
    openers.check_clip(vae, config.clip)
    with distributed.main_process_first(accelerator):
        clips = latents.cached_clips(config)
    fingerprint = latents.cache_fingerprint(config, vae, clips)
    return vae, clips, fingerprint, latents.cache_folder(config, fingerprint)


def verify_cache(config: TrainLatteConfig) -> int:
    """Check every byte of a cache and that each clip is there once; prints the summary, returns how many shards are bad."""
    _, _, fingerprint, folder = open_parts(config, distributed.make_accelerator())
    cache = latent_files.LatentCache(folder, expect=fingerprint)
    damage = list(cache.verify())
    print("\n".join(damage), end="\n" if damage else "")
    print(
        f"{folder}: {len(cache)} clips in {len(cache.ends)} shards, {len(cache.index['failed'])} clips could not be read, "
        f"{len(damage)} shards damaged"
    )
    return len(damage)


def _short(values: list[float]) -> str:
    return "[" + ", ".join(f"{v:.3f}" for v in values) + "]"


def config_from(argv: list[str] | None) -> tuple[TrainLatteConfig, argparse.Namespace]:
    """The settings of a command line, and its switches."""
    verify = "check every shard of the cache, write nothing; exit code 1 if one is damaged"
    switches = {"--verify": verify}
    return parse(TrainLatteConfig, argv, "cache_latents", __doc__, FLAGS, switches, planned=True)


def main(argv: list[str] | None = None) -> int:
    config, args = config_from(argv)
    if args.plan:
        print(plan.plan_text("cache_latents", programs.cache, config, args.card))
        return 0
    if args.dry_run:
        print(start.describe_latte_run(config))
    elif config.mode is Mode.online:
        log.info("mode=online: nothing to cache")
    elif args.verify:
        return 1 if verify_cache(config) else 0
    else:
        cache, words = build_cache(config), sys.argv[1:] if argv is None else argv
        rows = {"latents": str(cache.folder), "check": command("cache_latents", *words, "--verify")}
        box(f"finished: {len(cache)} clips", rows | {"next": command("train_latte", *words)})
    return 0


if __name__ == "__main__":
    run(main)
