"""Where the latents of stage two come from: a cache, or the VAE in every step; and how they are scaled.

config: a TrainLatteConfig.
"""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.clip import to_float
from data.core.files import printable
from data.dataset import VideoClips, list_digest
from data.decoder import BadVideo
from data.latents import LatentCache, LatentStream, differences, fingerprint_id, read_index
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.distributed import open_everywhere
from pipelines.training.open import for_inference, open_clips, vae_entry, video_counts
from pipelines.training.settings import Mode, SourceConfig

log = logging.getLogger(__name__)


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
    source = {
        "name": config.source.name,
        "videos": len(clips),
        "list_sha256": list_digest(clips),
    }
    return {
        "vae": vae_entry(config.vae, vae),
        "clip": clips.spec.settings(),
        "source": source | _demo_world(config.source),
        "draws": {"crops": config.cache.crops, "flips": config.cache.flips, "seed": config.seed},
        "dtype": config.cache.dtype,
    }


def _demo_world(source: SourceConfig) -> dict[str, Any]:
    """What decides the demo's videos beside their names, where it is not the default: older fingerprints stay valid."""
    if source.name != "demo":
        return {}
    default, found = SourceConfig(), {}
    for key in ("demo_seed", "demo_edge"):
        if getattr(source, key) != getattr(default, key):
            found[key] = getattr(source, key)
    return found


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
    # The clips, whose scan the first process makes and keeps for the others.
    online = config.mode is Mode.online
    clips = open_everywhere(
        accelerator,
        lambda: open_clips(config.source, config.clip, config.seed) if online else cached_clips(config),
    )
    counts = video_counts(clips)
    if online:
        encode = OnlineLatents(for_inference(vae, accelerator.device, config.precision), accelerator.device)
        return clips, encode, clips, counts
    # A cache must be that of this VAE, these clips and these draws.
    fingerprint = cache_fingerprint(config, vae, clips)
    cache = LatentCache(cache_folder(config, fingerprint), expect=fingerprint)
    counts |= {"cached": len(cache), "cache": str(cache.folder), "failed": len(cache.index["failed"])}
    return LatentStream(cache, config.seed), None, clips, counts


def held_out(
    config: Any, cache: LatentCache | None, frozen: Any, device: torch.device
) -> dict[str, Tensor] | None:
    """Posterior mean, logvar (N, C, t, h, w) float32 and label (N,) of clips for validation; None if nothing is held out.

    From `held_out_cache`; else the middle of each video that source.val_fraction holds out, encoded here. frozen: the VAE
    as `for_inference` returns it.
    """
    # Rows of a cache, or the middle clip of each video that is held out, encoded now
    if cache is not None:
        rows = [cache[row] for row in _spread(config.val.num_videos, len(cache))]
    elif config.source.val_fraction > 0:
        still = dataclasses.replace(config.clip, crop="center", flip=False, position="center")
        videos = open_clips(config.source, still, 0, held_out=True)
        encode, rows = OnlineLatents(frozen, device), []
        for number in _spread(config.val.num_videos, len(videos)):
            sample = videos[number]
            mean, logvar = encode({"video": sample["video"][None]})
            rows.append({"mean": mean[0].cpu(), "logvar": logvar[0].cpu(), "label": int(sample["label"])})
    else:
        return None
    # One tensor of each kind
    batch = torch.utils.data.default_collate(rows)
    return {name: batch[name] for name in ("mean", "logvar", "label")}


def _spread(count: int, available: int) -> list[int]:
    """`count` numbers, or fewer, evenly over 0 .. available - 1, so over all parts of a mixture."""
    count = min(count, available)
    return [n * available // count for n in range(count)]


FREE = ("crop", "flip", "position")  # which part of a video: validation may take another than training


def held_out_cache(config: Any, vae: Any, clips: Any) -> LatentCache | None:
    """The cache val.latents, None without one. clips: those of the training.

    Raises ValueError for a cache of another VAE, geometry or classes, or of the training's own videos.
    """
    if not (config.val.latents and config.val.every):
        return None
    cache, wanted = LatentCache(config.val.latents), cache_fingerprint(config, vae, clips)
    place, have = f"val.latents={config.val.latents}", cache.fingerprint

    def decisive(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key not in FREE}

    # The same VAE and geometry, other videos, the same classes
    for key in ("vae", "clip"):
        if lines := differences(decisive(have[key]), decisive(wanted[key])):
            raise ValueError(
                f"{place}: {key}: {'; '.join(lines[:4])}; cache the held-out videos with the training's settings"
            )
    if have["source"] == wanted["source"]:
        raise ValueError(
            f"{place}: holds the training's own videos; cache others, e.g. with source.split=test, or for ucf101 with "
            "source.list_file=testlist01.txt"
        )
    if cache.index["class_names"] != clips.source.class_names:
        raise ValueError(f"{place}: has other classes than the training's source")
    # Equal names may be equal videos; that is not certain, so it is only said.
    trained = set(map(clips.name, range(len(clips)))) if cache.video_names else set()
    if shared := [name for name in cache.video_names if name in trained]:
        log.warning(
            "%s: %d of its %d videos have the name of a training video, e.g. %s; are they the same ones?",
            place,
            len(shared),
            len(cache.video_names),
            printable(shared[0]),
        )
    return cache


def real_clips(clips: Any, count: int) -> tuple[list[np.ndarray], list[str]]:
    """Real clips, uint8 (T, size, size, 3), and the names of their videos, in the order of the tiles of generated ones.

    Tile i is of class i modulo their number; without classes they are the first of the stream. A clip that cannot be
    read, or of a class without videos, is black and has no name.
    """
    classes, found, names = len(clips.source.class_names), [], []
    for tile in range(count):
        # Of the tile's class, in turn; without classes the stream's own order.
        picture, name = np.zeros((clips.spec.num_frames, clips.spec.size, clips.spec.size, 3), np.uint8), ""
        if classes:
            of_class = np.flatnonzero(clips.videos.column("label") == tile % classes)
            with contextlib.suppress(BadVideo):
                if len(of_class):
                    number = int(of_class[tile // classes % len(of_class)])
                    picture = clips.clip_uint8(number, np.random.default_rng((0, tile)))
                    name = clips.name(number)
        else:
            sample = clips[tile]
            picture, name = np.asarray(sample["video"]), clips.name(int(sample["index"]))
        found.append(picture)
        names.append(printable(name))
    return found, names


def scale_latents(vae: Any, config: Any, stream: Any = None) -> None:
    """Give a VAE without a scaling rule the statistics of the run's checkpoint, else of the cache; its folder stays as it is.

    stream: of the cache in mode=cached. Online, those of a cache of this VAE in cache.dir serve. Raises ValueError without any.
    """
    if vae.has_scaling_rule:
        return
    # A resumed run keeps the scale that its checkpoint was trained with.
    checkpoints = Checkpoints(Path(config.run_dir), config.keep_checkpoints)
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(OSError, ValueError):  # a damaged one is told when it is to be loaded
            known = checkpoints.manifest(step).get("normalization") or {}
            if known.get("latents_mean") and known.get("latents_std"):
                return vae.set_latent_statistics(known["latents_mean"], known["latents_std"])
    # A new one takes that of the cache of this VAE.
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
