"""What a latent cache of given settings holds and where it lies; for the program that fills it and the trainer."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.latte_settings import TrainLatteConfig
from pipelines.settings import open_clips, vae_entry

if TYPE_CHECKING:
    from data.dataset import VideoClips


def cached_clips(config: TrainLatteConfig) -> "VideoClips":
    """The videos whose clips are cached. Flips are stored, not drawn."""
    clips = open_clips(config.source, config.clip.spec(flip=False), config.seed)
    if config.cache.num_videos:
        if config.source.name == "mixture":
            raise ValueError(f"cache.num_videos={config.cache.num_videos}: of one source, not of a mixture")
        clips.keep_first(config.cache.num_videos)
    return clips


def cache_fingerprint(config: TrainLatteConfig, vae: Any, clips: "VideoClips") -> dict[str, Any]:
    """All that decides the content of a cache: VAE and tiling, clips, names of the videos, draws, dtype.

    Not the arithmetic of the encoder (precision): a training may use a cache of the other.
    """
    names = "\n".join(f"{clips.name(i)} {clips.label(i)}" for i in range(len(clips)))
    return {
        "vae": vae_entry(config.vae, vae),
        "clip": dataclasses.asdict(clips.spec),
        "source": {
            "name": config.source.name,
            "videos": len(clips),
            "list_sha256": hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest(),
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
