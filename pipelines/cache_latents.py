"""Stage two, first part: encode every clip once and keep the posterior's mean and log-variance.

    python -m pipelines.cache_latents --config configs/stage2/ucf101.yaml --vae odvae

Reads the settings of train_latte. The same command again goes on where it stopped, and tries again what could not be
read; processes share the shards, also those of several launches at once. --verify checks a whole cache.
"""

import hashlib
import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.cli import run
from pipelines.config import parse
from pipelines.latent_cache import cache_fingerprint, cache_folder, cached_clips, draws
from pipelines.latte_settings import FLAGS, TrainLatteConfig
from pipelines.settings import Mode, check_clip, for_inference, open_vae

if TYPE_CHECKING:
    from data.dataset import VideoClips
    from data.latent_writer import LatentCacheWriter
    from data.latents import LatentCache

log = logging.getLogger(__name__)


def read_entry(config: TrainLatteConfig, clips: "VideoClips", entry: int) -> Any:
    """Pixels of an entry: uint8 (T, size, size, 3). Raises ValueError or OSError if its video cannot be read."""
    import numpy as np

    video, draw = divmod(entry, draws(config))
    crop, mirrored = (draw // 2, draw % 2) if config.cache.flips else (draw, 0)
    pixels = clips.clip_uint8(video, np.random.default_rng((config.seed, video, crop)))
    return pixels[:, :, ::-1].copy() if mirrored else pixels


def encode_shard(
    config: TrainLatteConfig, vae: Any, clips: "VideoClips", entries: range, device: Any
) -> tuple[dict, list]:
    """Tensors (mean, logvar, label, video, draw) of the entries, and those whose video could not be read.

    vae: on the device, as `for_inference` returns it.
    """
    import torch

    from data.clip import to_float
    from data.latents import DTYPES

    dtype, rows, failed = DTYPES[config.cache.dtype], [], []
    batch: list[tuple[int, Any]] = []

    def encode() -> None:
        if not batch:
            return
        x = torch.stack([pixels for _, pixels in batch]).to(device, vae.dtype)
        posterior = vae.encode(x).latent_dist
        mean, logvar = (v.float().cpu().to(dtype) for v in (posterior.mean, posterior.logvar))
        rows.extend((m, s, entry) for m, s, (entry, _) in zip(mean, logvar, batch, strict=True))
        batch.clear()

    for entry in entries:
        try:
            pixels = read_entry(config, clips, entry)
        except (ValueError, OSError) as error:
            name = clips.name(entry // draws(config))
            failed.append({"entry": entry, "video": name, "reason": str(error)})
            log.warning("not cached: %s: %s", name, error)
            continue
        batch.append((entry, to_float(pixels)))
        if len(batch) == config.cache.batch:
            encode()
    encode()
    videos, numbers = (
        zip(*(divmod(entry, draws(config)) for _, _, entry in rows), strict=True) if rows else ((), ())
    )
    ids = {"video": videos, "draw": numbers, "label": [clips.label(v) for v in videos]}
    moments = {"mean": [m for m, _, _ in rows], "logvar": [s for _, s, _ in rows]}
    none = torch.zeros((0, 1, 1, 1, 1), dtype=dtype)
    tensors = {k: torch.stack(v) if v else none for k, v in moments.items()}
    return tensors | {k: torch.tensor(v, dtype=torch.int64) for k, v in ids.items()}, failed


def shards_to_do(config: TrainLatteConfig, writer: "LatentCacheWriter", clips: "VideoClips") -> list[int]:
    """Shards that are missing, and those that lack a clip which can be read by now."""

    def readable(entry: int) -> bool:
        try:
            read_entry(config, clips, entry)
        except (ValueError, OSError):
            return False
        return True

    again = [s for s, failed in writer.failures().items() if any(readable(clip["entry"]) for clip in failed)]
    if again:
        log.info("%d shards lack clips that can be read now: they are made anew", len(again))
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

    A VAE that brings no scaling rule gets the measured statistics written into its config.json.
    """
    import torch
    from tqdm import tqdm

    from data.latent_writer import LatentCacheWriter
    from data.latents import LatentCache
    from pipelines.engine import main_process_first, make_accelerator, matrix_products, same_everywhere

    accelerator = make_accelerator()
    main = accelerator.is_main_process
    vae, clips, fingerprint, folder = open_parts(config, accelerator)
    with main_process_first(accelerator):
        writer = LatentCacheWriter(folder, fingerprint, len(clips) * draws(config), config.cache.shard_size)
    frozen = for_inference(vae, accelerator.device, config.precision)
    todo = same_everywhere(accelerator, shards_to_do(config, writer, clips) if main else None)
    log.info("%s: %d videos x %d draws", folder, len(clips), draws(config))
    log.info("%d of %d shards to encode", len(todo), writer.num_shards)
    again = [s for s in todo if writer.is_written(s)]
    mine = my_share(todo, accelerator.process_index, accelerator.num_processes)
    with torch.inference_mode(), matrix_products(config):
        for shard in tqdm(mine, desc="cache", unit="shard", disable=not main or None):
            if shard in again or not writer.is_written(shard):  # else another launch was quicker
                tensors, failed = encode_shard(
                    config, frozen, clips, writer.entries(shard), accelerator.device
                )
                writer.write(shard, tensors, failed)
    accelerator.wait_for_everyone()
    if main:
        index = writer.finish({"class_names": clips.source.class_names})
        if index["failed"]:
            log.warning(
                "%d clips could not be read and are not in the cache; index.json lists them, the same command tries again",
                len(index["failed"]),
            )
        log.info("latent mean %s, std %s", *(_short(index["statistics"][k]) for k in ("mean", "std")))
        _store_statistics(config, vae, index["statistics"])
    accelerator.wait_for_everyone()
    return LatentCache(folder, expect=fingerprint)


def open_parts(config: TrainLatteConfig, accelerator: Any) -> tuple[Any, "VideoClips", dict[str, Any], Path]:
    """(VAE, clips, fingerprint, folder) of a cache."""
    from pipelines.engine import main_process_first

    vae = open_vae(config.vae)
    check_clip(vae, config.clip)
    with main_process_first(accelerator):
        clips = cached_clips(config)
    fingerprint = cache_fingerprint(config, vae, clips)
    return vae, clips, fingerprint, cache_folder(config, fingerprint)


def verify_cache(config: TrainLatteConfig) -> int:
    """Check every byte of a cache and that each clip is there once; prints the summary, returns how many shards are bad."""
    from data.latents import LatentCache
    from pipelines.engine import make_accelerator

    _, _, fingerprint, folder = open_parts(config, make_accelerator())
    cache = LatentCache(folder, expect=fingerprint)
    damage = list(cache.verify())
    print("\n".join(damage), end="\n" if damage else "")
    print(
        f"{folder}: {len(cache)} clips in {len(cache.ends)} shards, {len(cache.index['failed'])} clips could not be read, "
        f"{len(damage)} shards damaged"
    )
    return len(damage)


def _short(values: list[float]) -> str:
    return "[" + ", ".join(f"{v:.3f}" for v in values) + "]"


def _store_statistics(config: TrainLatteConfig, vae: Any, statistics: dict[str, list[float]]) -> None:
    """Into the VAE's own folder, once, if it has no scaling rule: every later user then normalises alike."""
    import json

    from data.files import remove_leftovers, write_json
    from vae.registry import vae_folder

    if vae.has_scaling_rule:
        return
    file = vae_folder(config.vae.name, config.vae.path or None) / "config.json"
    remove_leftovers(file.parent)
    content = json.loads(file.read_text())
    write_json(file, {**content, "latents_mean": statistics["mean"], "latents_std": statistics["std"]})
    log.info("no scaling rule in %s: measured latents_mean and latents_std stored there", file)


def main(argv: list[str] | None = None) -> int:
    verify = "check every shard of the cache, write nothing; exit code 1 if one is damaged"
    config, args = parse(
        TrainLatteConfig, argv, "cache_latents", __doc__, FLAGS, {"--verify": verify}, planned=True
    )
    if args.plan:
        from pipelines.plan.report import plan_text

        print(plan_text("cache_latents", config, args.card))
        return 0
    from pipelines.log import console

    console()
    if args.dry_run:
        from pipelines.latte_trainer import plan

        print(plan(config))
        return 0
    if config.mode is Mode.online:
        log.info("mode=online: nothing to cache")
        return 0
    if args.verify:
        return 1 if verify_cache(config) else 0
    build_cache(config)
    return 0


if __name__ == "__main__":
    run(main)
