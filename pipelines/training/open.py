"""Open what the settings name: videos, VAEs and the facts about them that belong in checkpoints and caches."""

import contextlib
import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.clip import ClipSpec
from data.core.files import read_json
from data.dataset import VideoClips
from data.mixture import MixedClips, part_seed
from data.sources import Source, open_source
from pipelines.training.config import read_yaml
from pipelines.training.settings import Precision, SourceConfig, VAEConfig
from vae import build_like, load_vae
from vae.adapter import Adapted
from vae.interface import makes_latents

log = logging.getLogger(__name__)


def open_clips(
    config: SourceConfig, spec: ClipSpec, seed: int, held_out: bool = False
) -> VideoClips | MixedClips:
    """The clips of a source: its training part (endless, shuffled) or the held-out part (in order)."""
    # A mixture has parts, any other source has none.
    if config.name == "mixture":
        return _open_mixture(config, spec, seed, held_out)
    if config.parts:
        raise ValueError(f"source.name={config.name} with source.parts: use source.name=mixture")
    if config.name == "sky_timelapse" and config.split == "test" and held_out:
        raise ValueError(
            "source.split=test: its clips are those that validate; use split=train or source.val_fraction=0"
        )
    videos = open_videos(config, spec.size, held_out)
    try:
        return VideoClips(videos, spec, seed=seed, train=not held_out)
    except ValueError as error:
        if not held_out:
            raise
        raise ValueError(
            f"of the videos that are held out (source.val_fraction={config.val_fraction:g}): {error}; or hold out more of them, "
            "or none with source.val_fraction=0"
        ) from error


def videos_line(config: Any, held_out: bool) -> str:
    """Open the data of a config and count it, for --dry-run: "folder: 120 videos, 6 held_out, ..."."""
    clips = open_clips(config.source, config.clip, config.seed)
    held = open_clips(config.source, config.clip, 0, held_out=True) if held_out else ()
    return counts_line(config, video_counts(clips, held))


def counts_line(config: Any, counts: dict[str, Any]) -> str:
    """The counts of a run in words, for people."""
    return f"{config.source.name}: {', '.join(f'{count} {what}' for what, count in counts.items())}"


def video_counts(clips: Any, held_out: Any = None) -> dict[str, int]:
    """How many videos a run has, for its log and its checkpoints."""
    held = {} if held_out is None else {"held_out": len(held_out)}
    return {"videos": len(clips), **held, "damaged": len(clips.source.damaged), "short": len(clips.short)}


def open_videos(config: SourceConfig, size: int, held_out: bool = False) -> Source:
    """The videos of a source that is no mixture. size: of the demo's pictures, pixels."""
    return open_source(
        config.name,
        root=config.root or None,
        split=config.split,
        list_file=config.list_file or None,
        labels=config.labels,
        index_dir=config.index_dir,
        workers=config.scan_workers,
        reader=config.reader,
        val_fraction=config.val_fraction,
        held_out=held_out,
        seed=config.demo_seed if config.name == "demo" else 0,
        num_videos=config.demo_videos,
        num_classes=config.demo_classes,
        size=size,
        edge=config.demo_edge,
    )


def _open_mixture(config: SourceConfig, spec: ClipSpec, seed: int, held_out: bool) -> MixedClips:
    """Open the parts alphabetically, so that the order in which they are written does not matter."""
    # Each part has what a source of its own would need.
    if config.root or config.list_file:
        raise ValueError(
            f"source.root={config.root!r}, source.list_file={config.list_file!r}: a mixture has neither; "
            "give source.parts.NAME.root=..."
        )
    if len(config.parts) < 2:
        raise ValueError(
            f"source.parts={sorted(config.parts)}: a mixture has two sources or more, e.g. "
            "source.parts.web.name=folder source.parts.web.root=/videos source.parts.ucf101.root=/data/UCF-101"
        )
    # Shares of all parts, or of none
    weights = {name: config.parts[name].weight for name in sorted(config.parts)}
    if None in weights.values() and set(weights.values()) != {None}:
        raise ValueError(f"source.parts: weights {weights}: give one to every part or to none")
    # Each part with a seed of its own name.
    clips = {}
    for name, part in sorted(config.parts.items()):
        if (kind := part.name or name) == "mixture":
            raise ValueError(f"source.parts.{name}.name=mixture: a mixture holds no other mixture")
        own = vars(part) | {"name": kind}
        del own["weight"]
        one = dataclasses.replace(config, parts={}, labels="none", **own)
        clips[name] = open_clips(one, spec, part_seed(seed, name), held_out)
    return MixedClips(clips, None if None in weights.values() else list(weights.values()), seed, not held_out)


def for_inference(vae: Any, device: Any, precision: Precision) -> Any:
    """The frozen VAE on a device; for bf16 a copy with bf16 weights, which autocast would cast again in every step.

    The VAE that was given keeps its float32 weights: they are what is exported, and what its digest names.
    """
    if precision is Precision.bf16:
        return copy.deepcopy(vae).bfloat16().to(device)
    return vae.to(device)


def tile_time(vae: Any, num_frames: int, key: str) -> None:
    """Make the VAE work in groups of num_frames frames that share one (paper 3.3); 0: as it is.

    Raises ValueError, naming the setting `key`, for a VAE without temporal tiling.
    """
    if not num_frames:
        return
    try:
        vae.enable_tiling(num_frames)
    except ValueError as error:
        raise ValueError(f"{key}={num_frames}: {error}; {key}=0 goes without") from error


def open_vae(config: VAEConfig) -> Any:
    """The VAE in eval mode, frozen, tiled as asked; discrete ones are refused: diffusion needs continuous latents."""
    vae = load_vae(config.name, config.path or None)
    warn_if_unfinished(config.path)
    if vae.discrete:
        raise ValueError(
            f"vae.name={config.name}: its latents are discrete codes; stage two takes odvae, sd2_1, svd, cvvae, ops"
        )
    tile_time(vae, config.tiling_frames, "vae.tiling_frames")
    return vae.requires_grad_(False)


def imagined_vae(settings: Any) -> Any:
    """The VAE of a config in its size, frozen, with no weights: from the folder's config.json or the paper's size."""
    file, known = Path(settings.path) / "config.json", {}
    if settings.path and file.is_file():
        known = read_json(file)
    vae = build_like(settings.name, known)
    # A random VAE has no scale; any will do for sizes and costs.
    if not vae.has_scaling_rule:
        vae.register_to_config(scaling_factor=1.0)
    tile_time(vae, settings.tiling_frames, "vae.tiling_frames")
    return vae.eval().requires_grad_(False)


def run_of(export: Path) -> dict[str, Any]:
    """What an exported folder and the run around it know: the run's settings and the `step` of the export; {} of others."""
    known: dict[str, Any] = {}
    for file, read in ((export / "export.json", read_json), (export.parent / "config.yaml", read_yaml)):
        if file.is_file():
            known |= read(file)
    return known


def warn_if_unfinished(export: str | Path) -> None:
    """Log that weights were exported before their training had made all its steps; a folder of others says nothing."""
    run: dict[str, Any] = {}
    with contextlib.suppress(ValueError, OSError):  # somebody else's files of these names
        run = run_of(Path(export)) if export else {}
    step, steps = run.get("step"), run.get("steps")
    if isinstance(step, int) and isinstance(steps, int) and step < steps:
        log.warning("%s: exported at step %d of %d; that training is not finished", export, step, steps)


def check_clip(vae: Any, clip: ClipSpec) -> None:
    """ValueError, before anything is written, when the VAE cannot encode such clips."""
    vae.check_frames(clip.num_frames)
    # Sides that the encoder halves evenly, then what the VAE itself asks for.
    s = vae.spatial_compression_ratio
    if clip.size % s or clip.size < s:
        raise ValueError(
            f"clip.size={clip.size}: must be a multiple of {s}, e.g. {max(1, round(clip.size / s)) * s}"
        )
    vae.check_sides(clip.size, clip.size)


def check_scaling(vae: Any, num_frames: int) -> None:
    """ValueError, before anything is encoded, when the VAE's own rule does not scale latents of such clips (Cosmos)."""
    if vae.has_scaling_rule:
        vae.normalize(torch.zeros(1, vae.latent_channels, vae.latent_frames(num_frames), 1, 1))


def normalization(vae: Any) -> dict[str, Any]:
    """How the latents are scaled: decides what the denoiser learned, and belongs to its checkpoint."""
    return vae.latent_rule()


def vae_entry(config: VAEConfig, vae: Any) -> dict[str, Any]:
    """What decides the latents of an open VAE: belongs to a cache and to a denoiser's checkpoint.

    The key is omitted when tiling is off, so that older fingerprints stay valid. Of a VAE of diffusers only what makes
    latents counts: its decoder may be fine-tuned, caches and denoisers stay valid.
    """
    if isinstance(vae, Adapted):
        return {"name": vae.row.name, "latents_sha256": weights_digest(vae, makes_latents)}
    entry = {"name": config.name, "weights_sha256": weights_digest(vae)}
    return entry | ({"tiling_frames": config.tiling_frames} if config.tiling_frames else {})


def weights_digest(model: Any, counts: Callable[[str], bool] = bool) -> str:
    """sha256 over names and values of a module's parameters and buffers: what the weights are, wherever they lie.

    counts: which of them, by name; all if not given.
    """
    # By name, so that the order in which a module registers its tensors does not count.
    digest = hashlib.sha256()
    for name, value in sorted((n, v) for n, v in model.state_dict().items() if counts(n)):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
