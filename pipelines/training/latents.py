"""Where the latents of stage two come from: a cache, or the VAE in every step; and how they are scaled.

config: a TrainLatteConfig.
"""

import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.clip import to_float
from data.dataset import VideoClips
from data.latents import LatentCache, LatentStream, fingerprint_id, read_index
from data.video import BadVideo
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.distributed import main_process_first
from pipelines.training.open import for_inference, open_clips, vae_entry, video_counts
from pipelines.training.settings import Mode, SourceConfig


def cached_clips(config: Any) -> VideoClips:
    """The videos whose clips are cached. Flips are stored, not drawn."""
    clips = open_clips(config.source, dataclasses.replace(config.clip, flip=False), config.seed)
    if config.cache.num_videos:
        if config.source.name == "mixture":
            raise ValueError(f"cache.num_videos={config.cache.num_videos}: of one source, not of a mixture")
        clips.keep_first(config.cache.num_videos)
    return clips


def cache_fingerprint(config: Any, vae: Any, clips: VideoClips) -> dict[str, Any]:
    """All that decides the content of a cache: VAE and tiling, clips, names of the videos, draws, dtype.

    Not the arithmetic of the encoder (precision): a training may use a cache of the other.
    """
    names = "\n".join(f"{clips.name(i)} {clips.label(i)}" for i in range(len(clips)))
    return {
        "vae": vae_entry(config.vae, vae),
        "clip": clips.spec.settings(),
        "source": {
            "name": config.source.name,
            "videos": len(clips),
            "list_sha256": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
        }
        | _demo_world(config.source),
        "draws": {"crops": config.cache.crops, "flips": config.cache.flips, "seed": config.seed},
        "dtype": config.cache.dtype,
    }


def _demo_world(source: SourceConfig) -> dict[str, Any]:
    """What decides the demo's videos beside their names, where it is not the default: older fingerprints stay valid."""
    if source.name != "demo":
        return {}
    default = SourceConfig()
    return {
        key: value
        for key in ("demo_seed", "demo_edge")
        if (value := getattr(source, key)) != getattr(default, key)
    }


def cache_folder(config: Any, fingerprint: dict[str, Any]) -> Path:
    if config.cache.dir:
        return Path(config.cache.dir)
    return Path("runs/cache") / f"{config.source.name}-{config.vae.name}-{fingerprint_id(fingerprint)[:12]}"


def draws(config: Any) -> int:
    """Entries of one video."""
    return config.cache.crops * (2 if config.cache.flips else 1)


class OnlineLatents:
    """mode=online: clips of the endless stream, encoded where the denoiser trains."""

    def __init__(self, vae: Any, device: torch.device):
        """vae: as `for_inference` returns it."""
        self.vae, self.device = vae, device

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = to_float(batch["video"].to(self.device, non_blocking=True))
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()


def open_data(config: Any, accelerator: Any, vae: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(endless stream, encoder or None, the clips behind it, counts) for the mode; refuses a cache of anything else."""
    with main_process_first(accelerator):
        if config.mode is Mode.online:
            clips = open_clips(config.source, config.clip, config.seed)
        else:
            clips = cached_clips(config)
    counts = video_counts(clips)
    if config.mode is Mode.online:
        encode = OnlineLatents(for_inference(vae, accelerator.device, config.precision), accelerator.device)
        return clips, encode, clips, counts
    fingerprint = cache_fingerprint(config, vae, clips)
    cache = LatentCache(cache_folder(config, fingerprint), expect=fingerprint)
    counts |= {"cached": len(cache), "cache": str(cache.folder), "failed": len(cache.index["failed"])}
    return LatentStream(cache, config.seed), None, clips, counts


def real_clips(clips: Any, count: int) -> list[np.ndarray]:
    """Real clips, uint8 (T, size, size, 3), in the order of the tiles of generated ones: tile i is of class i modulo their number.

    A clip that cannot be read is black; without classes they are the first of the stream.
    """
    classes, found = len(clips.source.class_names), []
    for tile in range(count):
        if not classes:
            found.append(np.asarray(clips[tile]["video"]))
            continue
        of_class = np.flatnonzero(clips.videos.column("label") == tile % classes)
        try:
            number = int(of_class[tile // classes % len(of_class)]) if len(of_class) else 0
            clip = clips.clip_uint8(number, np.random.default_rng((0, tile)))
            found.append(clip if len(of_class) else np.zeros_like(clip))
        except BadVideo:
            found.append(np.zeros((clips.spec.num_frames, clips.spec.size, clips.spec.size, 3), np.uint8))
    return found


def scale_latents(vae: Any, config: Any, stream: Any = None) -> None:
    """Give a VAE without a scaling rule the statistics of the run's checkpoint, else of the cache; its folder stays as it is.

    stream: of the cache in mode=cached. Online, those of a cache of this VAE in cache.dir serve. Raises ValueError without any.
    """
    if vae.has_scaling_rule:
        return
    checkpoints = Checkpoints(Path(config.run_dir), config.keep_checkpoints)
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(OSError, ValueError):  # a damaged one is told when it is to be loaded
            known = checkpoints.manifest(step).get("normalization") or {}
            if known.get("latents_mean") and known.get("latents_std"):
                return vae.set_latent_statistics(known["latents_mean"], known["latents_std"])
    index = stream.cache.index if isinstance(stream, LatentStream) else None
    if index is None and config.cache.dir and (Path(config.cache.dir) / "index.json").is_file():
        index = read_index(Path(config.cache.dir))
        if not index["complete"] or index["fingerprint"]["vae"] != vae_entry(config.vae, vae):
            index = None
    if index is None:
        raise ValueError(
            f"vae.name={config.vae.name}: its latents have no scaling rule (0.18215 fits SD's latents only); run "
            "pipelines.cache_latents with the same settings: the cache keeps their mean and std (mode=online: cache.dir=DIR of one)"
        )
    return vae.set_latent_statistics(index["statistics"]["mean"], index["statistics"]["std"])
