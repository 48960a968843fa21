"""Stage two, first part: encode every clip once and keep the posterior's mean and log-variance.

    python -m pipelines.cache_latents --config configs/stage2/ucf101.yaml --vae odvae

Reads the settings of train_latte. The same command again goes on where it stopped; processes share the shards.
"""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.cli import run
from pipelines.config import parse
from pipelines.settings import Mode, check_clip, open_clips, open_vae, weights_digest
from pipelines.train_latte import FLAGS, TrainLatteConfig

if TYPE_CHECKING:
    from data.dataset import VideoClips
    from data.latents import LatentCache

log = logging.getLogger(__name__)


def cached_clips(config: TrainLatteConfig) -> "VideoClips":
    """The videos whose clips are cached. Flips are stored, not drawn."""
    return open_clips(config.source, config.clip.spec(flip=False), config.seed)


def cache_fingerprint(config: TrainLatteConfig, vae: Any, clips: "VideoClips") -> dict[str, Any]:
    """All that decides the content of a cache: VAE weights, clips, source, draws, dtype."""
    names = "\n".join(f"{clips.name(i)} {clips.label(i)}" for i in range(len(clips)))
    return {
        "vae": {"name": config.vae.name, "weights_sha256": weights_digest(vae)},
        "clip": dataclasses.asdict(clips.spec),
        "source": {
            "name": config.source.name,
            "videos": len(clips),
            "list_sha256": hashlib.sha256(names.encode()).hexdigest(),
        },
        "draws": {"crops": config.cache.crops, "flips": config.cache.flips, "seed": config.seed},
        "dtype": config.cache.dtype,
    }


def cache_folder(config: TrainLatteConfig, fingerprint: dict[str, Any]) -> Path:
    from data.latents import fingerprint_id

    if config.cache.dir:
        return Path(config.cache.dir)
    return Path("runs/cache") / f"{config.source.name}-{config.vae.name}-{fingerprint_id(fingerprint)[:12]}"


def draws(config: TrainLatteConfig) -> int:
    """Entries of one video."""
    return config.cache.crops * (2 if config.cache.flips else 1)


def encode_shard(
    config: TrainLatteConfig, vae: Any, clips: "VideoClips", entries: range, device: Any
) -> tuple[dict, list]:
    """Tensors (mean, logvar, label, video, draw) of the entries, and those whose video could not be read."""
    import numpy as np
    import torch

    from data.clip import to_float
    from data.latents import DTYPES

    per_video, rows, failed = draws(config), [], []
    batch: list[tuple[int, int, Any]] = []

    def encode() -> None:
        if not batch:
            return
        x = torch.stack([pixels for _, _, pixels in batch]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision.value == "bf16"):
            posterior = vae.encode(x).latent_dist
        mean, logvar = (
            v.float().cpu().to(DTYPES[config.cache.dtype]) for v in (posterior.mean, posterior.logvar)
        )
        rows.extend((m, s, video, draw) for m, s, (video, draw, _) in zip(mean, logvar, batch, strict=True))
        batch.clear()

    for entry in entries:
        video, draw = divmod(entry, per_video)
        crop, mirrored = (draw // 2, draw % 2) if config.cache.flips else (draw, 0)
        try:
            pixels = clips.clip_uint8(video, np.random.default_rng((config.seed, video, crop)))
        except (ValueError, OSError) as error:
            failed.append({"entry": entry, "video": clips.name(video), "reason": str(error)})
            log.warning("not cached: %s: %s", clips.name(video), error)
            continue
        batch.append((video, draw, to_float(pixels[:, :, ::-1].copy() if mirrored else pixels)))
        if len(batch) == config.cache.batch:
            encode()
    encode()
    if not rows:
        empty = torch.zeros(0, dtype=torch.int64)
        nothing = torch.zeros((0, 1, 1, 1, 1), dtype=DTYPES[config.cache.dtype])
        return {"mean": nothing, "logvar": nothing, "label": empty, "video": empty, "draw": empty}, failed
    means, logvars, videos, numbers = zip(*rows, strict=True)
    labels = torch.tensor([clips.label(v) for v in videos])
    ids = {"label": labels, "video": torch.tensor(videos), "draw": torch.tensor(numbers)}
    return {"mean": torch.stack(means), "logvar": torch.stack(logvars), **ids}, failed


def build_cache(config: TrainLatteConfig) -> "LatentCache":
    """Encode what is missing; returns the complete cache. Measures the latents' mean and std per channel.

    A VAE that brings no scaling rule gets the measured statistics written into its config.json.
    """
    import torch
    from tqdm import tqdm

    from data.latents import LatentCache, LatentCacheWriter
    from pipelines.engine import make_accelerator

    accelerator = make_accelerator()
    vae = open_vae(config.vae)
    check_clip(vae, config.clip)
    with accelerator.main_process_first():
        clips = cached_clips(config)
    fingerprint = cache_fingerprint(config, vae, clips)
    folder = cache_folder(config, fingerprint)
    with accelerator.main_process_first():
        writer = LatentCacheWriter(folder, fingerprint, len(clips) * draws(config), config.cache.shard_size)
    vae.to(accelerator.device)
    todo = [s for s in writer.missing() if s % accelerator.num_processes == accelerator.process_index]
    log.info(
        "%s: %d videos x %d draws; %d of %d shards to encode",
        folder,
        len(clips),
        draws(config),
        len(todo),
        writer.num_shards,
    )
    with torch.inference_mode():
        for shard in tqdm(todo, desc="cache", unit="shard", disable=not accelerator.is_main_process or None):
            tensors, failed = encode_shard(config, vae, clips, writer.entries(shard), accelerator.device)
            writer.write(shard, tensors, failed)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        index = writer.finish({"class_names": clips.source.class_names})
        if index["failed"]:
            log.warning(
                "%d clips could not be read and are not in the cache; index.json lists them",
                len(index["failed"]),
            )
        log.info("latent mean %s, std %s", *(_short(index["statistics"][k]) for k in ("mean", "std")))
        _store_statistics(config, vae, index["statistics"])
    accelerator.wait_for_everyone()
    return LatentCache(folder, expect=fingerprint)


def _short(values: list[float]) -> str:
    return "[" + ", ".join(f"{v:.3f}" for v in values) + "]"


def _store_statistics(config: TrainLatteConfig, vae: Any, statistics: dict[str, list[float]]) -> None:
    """Into the VAE's own folder, once, if it has no scaling rule: every later user then normalises alike."""
    import json

    from data.files import write_json
    from vae.registry import vae_folder

    if vae.has_scaling_rule:
        return
    file = vae_folder(config.vae.name, config.vae.path or None) / "config.json"
    content = json.loads(file.read_text())
    write_json(file, {**content, "latents_mean": statistics["mean"], "latents_std": statistics["std"]})
    log.info("no scaling rule in %s: measured latents_mean and latents_std stored there", file)


def main(argv: list[str] | None = None) -> int:
    config, args = parse(TrainLatteConfig, argv, "cache_latents", __doc__, FLAGS)
    from pipelines.log import console

    console()
    if args.dry_run:
        from pipelines.latte_trainer import plan

        print(plan(config))
        return 0
    if config.mode is Mode.online:
        log.info("mode=online: nothing to cache")
        return 0
    build_cache(config)
    return 0


if __name__ == "__main__":
    # Under its own name, for other modules import these classes from there: in __main__ they would be other classes.
    from pipelines.cache_latents import main as program

    run(program)
