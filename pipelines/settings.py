"""Settings that several programs share: where videos come from, how clips are cut, which VAE. No torch here."""

import dataclasses
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.clip import ClipSpec
from pipelines.config import option

if TYPE_CHECKING:
    from data.dataset import VideoClips
    from data.mixture import MixedClips


class Precision(enum.Enum):
    """fp32: matrix products exact; cuDNN's convolutions may use TF32, torch's default. tf32: both may. bf16: autocast."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class Mode(enum.Enum):
    cached = "cached"
    online = "online"


@dataclass
class ClipConfig:
    """A ClipSpec in a config; the defaults are the paper's clips of stage one."""

    num_frames: int = option(25, "frames of a clip")
    interval: int = option(1, "distance of two frames in the video")
    size: int = option(256, "side of the square clip in pixels")
    resize: str = option("short", "short: scale the short side to size; none: crop the video's own pixels")
    crop: str = option("center", "center|random")
    flip: bool = option(False, "mirror half of the clips")
    short: str = option("skip", "videos with too few frames: skip|stretch|reflect|loop")
    position: str = option("random", "where a clip starts: random|center|start")

    def spec(self, **changes) -> ClipSpec:
        return ClipSpec(**{**self.__dict__, **changes})


@dataclass
class PartConfig:
    """One source of a mixture."""

    name: str = option("", "as source.name; empty: NAME itself")
    root: str = option("", "folder of the data set", free=True)
    split: str = option("train", "train|test, for sources that have splits")
    list_file: str = option("", "as source.list_file")
    weight: float | None = option(None, "its share, in any unit; none given: as many as each has videos")
    demo_videos: int = option(256, "source demo: number of videos")
    demo_classes: int = option(4, "source demo: number of classes (motions)")
    demo_seed: int = option(0, "source demo: seed")


@dataclass
class SourceConfig:
    """Which videos. Damaged ones are found by one scan, listed and left out; the scan is cached in index_dir."""

    name: str = option("folder", "ucf101|sky_timelapse|kinetics400|webvid|panda70m|folder|demo|mixture")
    root: str = option("", "folder of the data set", free=True)
    split: str = option("train", "train|test, of kinetics400 also val, for sources that have splits")
    list_file: str = option(
        "", "the list as published: webvid, panda70m and kinetics400 csv, ucfTrainTestlist"
    )
    labels: str = option("none", "source folder: none, or folder (class = name of the first sub-folder)")
    parts: dict[str, PartConfig] = option(
        dict, "source mixture: its sources by names of your choice", of=PartConfig
    )
    val_fraction: float = option(0.05, "share of videos (UCF101: groups of clips) held out for validation")
    index_dir: str = option("runs/index", "where scans are cached and quarantine lists written", free=True)
    scan_workers: int = option(4, "processes of the scan", free=True)
    reader: str = option("pyav", "pyav, or decord for files where the scan finds it right", free=True)
    max_failed_share: float = option(
        0.05, "share of the videos that may become unreadable in training before the run stops", free=True
    )
    demo_videos: int = option(256, "source demo: number of videos")
    demo_classes: int = option(4, "source demo: number of classes (motions)")
    demo_seed: int = option(0, "source demo: seed")

    def __post_init__(self):
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"source.max_failed_share={self.max_failed_share}: must be in [0, 1]")


def open_clips(
    config: SourceConfig, spec: ClipSpec, seed: int, held_out: bool = False
) -> "VideoClips | MixedClips":
    """The clips of a source: its training part (endless, shuffled) or the held-out part (in order)."""
    if config.name == "mixture":
        return _open_mixture(config, spec, seed, held_out)
    if config.parts:
        raise ValueError(f"source.name={config.name} with source.parts: use source.name=mixture")
    from data.dataset import VideoClips
    from data.sources import open_source

    if config.name == "sky_timelapse" and config.split == "test" and held_out:
        raise ValueError(
            "source.split=test: its clips are those that validate; use split=train or source.val_fraction=0"
        )
    source = open_source(
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
        size=spec.size,
    )
    return VideoClips(source, spec, seed=seed, train=not held_out)


def _open_mixture(config: SourceConfig, spec: ClipSpec, seed: int, held_out: bool) -> "MixedClips":
    """The parts go by the alphabet, so that the order in which they are written does not matter."""
    from data.mixture import MixedClips, part_seed

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
    weights = {name: config.parts[name].weight for name in sorted(config.parts)}
    if None in weights.values() and any(w is not None for w in weights.values()):
        raise ValueError(f"source.parts: weights {weights}: give one to every part or to none")
    clips = {}
    for name in weights:
        part = {**vars(config.parts[name]), "name": config.parts[name].name or name}
        if part["name"] == "mixture":
            raise ValueError(f"source.parts.{name}.name=mixture: a mixture holds no other mixture")
        del part["weight"]
        one = dataclasses.replace(config, parts={}, labels="none", **part)
        clips[name] = open_clips(one, spec, part_seed(seed, name), held_out)
    return MixedClips(clips, None if None in weights.values() else list(weights.values()), seed, not held_out)


MAY_CHANGE = ("learning_rate", "grad_clip", "warmup_steps", "precision")


@dataclass
class ResumeConfig:
    """What may differ from the settings that a run began with, on purpose."""

    change: str = option(
        "",
        f"settings to change on going on, with commas: {', '.join(MAY_CHANGE)}; recorded in env.json",
        free=True,
    )

    def __post_init__(self):
        wrong = [name for name in self.names if name not in MAY_CHANGE]
        if wrong:
            raise ValueError(f"resume.change={self.change}: {wrong[0]} is none of {', '.join(MAY_CHANGE)}")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.change.split(",") if name.strip()]


@dataclass
class VAEConfig:
    """A trained VAE for stage two."""

    name: str = option(
        "odvae", "odvae|sd2_1|svd|cvvae|ops (discrete vqgan and tats cannot feed a diffusion model)"
    )
    path: str = option("", "its diffusers folder; empty: $OMNILATTE_WEIGHTS/<name>", free=True)
    tiling_frames: int = option(
        0, "encode and decode in temporal groups of so many frames (odvae; paper 3.3: 33); 0: off"
    )

    def __post_init__(self):
        check_groups(self.tiling_frames, "vae.tiling_frames")


def for_inference(vae: Any, device: Any, precision: Precision) -> Any:
    """The frozen VAE on a device; for bf16 a copy with bf16 weights, which autocast would cast anew in every step.

    The VAE that was given keeps its float32 weights: they are what is exported, and what its digest names.
    """
    import copy

    if precision is Precision.bf16:
        return copy.deepcopy(vae).bfloat16().to(device)
    return vae.to(device)


def check_groups(num_frames: int, key: str) -> None:
    """ValueError, naming the setting `key`, unless temporal groups may have so many frames; 0 is no tiling."""
    if num_frames and (num_frames < 5 or num_frames % 4 != 1):
        raise ValueError(
            f"{key}={num_frames}: a group has 4k + 1 frames from 5 on, e.g. 33; 0 turns tiling off"
        )


def tile_time(vae: Any, num_frames: int, key: str) -> None:
    """From now on the VAE works in groups of num_frames frames that share one (paper 3.3); 0: as it is.

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
    from vae import load_vae

    vae = load_vae(config.name, config.path or None)
    if vae.discrete:
        raise ValueError(
            f"vae.name={config.name}: its latents are discrete codes; stage two takes odvae, sd2_1, svd, cvvae, ops"
        )
    tile_time(vae, config.tiling_frames, "vae.tiling_frames")
    return vae.requires_grad_(False)


def check_clip(vae: Any, clip: ClipConfig) -> None:
    """ValueError, before anything is written, when the VAE cannot encode such clips."""
    vae.check_frames(clip.num_frames)
    s = vae.spatial_compression_ratio
    if clip.size % s or clip.size < s:
        raise ValueError(
            f"clip.size={clip.size}: must be a multiple of {s}, e.g. {max(1, round(clip.size / s)) * s}"
        )


def normalization(vae: Any) -> dict[str, Any]:
    """How the latents are scaled: decides what the denoiser learned, and belongs to its checkpoint."""
    return {key: vae.config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std")}


def vae_entry(config: VAEConfig, vae: Any) -> dict[str, Any]:
    """What decides the latents of an open VAE: belongs to a cache and to a denoiser's checkpoint.

    Without tiling there is no word of it, as before there was any.
    """
    entry = {"name": config.name, "weights_sha256": weights_digest(vae)}
    return entry | ({"tiling_frames": config.tiling_frames} if config.tiling_frames else {})


def weights_digest(model: Any) -> str:
    """sha256 over names and values of a module's parameters and buffers: what the weights are, wherever they lie."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
