"""Settings that several programs share: where videos come from, how clips are cut, which VAE. No torch here."""

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.clip import ClipSpec
from pipelines.config import option

if TYPE_CHECKING:
    from data.dataset import VideoClips


class Precision(enum.Enum):
    fp32 = "fp32"
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
class SourceConfig:
    """Which videos. Damaged ones are found by one scan, listed and left out; the scan is cached in index_dir."""

    name: str = option("folder", "ucf101|sky_timelapse|folder|demo")
    root: str = option("", "folder of the data set", free=True)
    split: str = option("train", "train|test, for sources that have splits")
    list_file: str = option("", "ucfTrainTestlist file: only the videos named there")
    labels: str = option("none", "source folder: none, or folder (class = name of the first sub-folder)")
    val_fraction: float = option(0.05, "share of videos (UCF101: groups of clips) held out for validation")
    index_dir: str = option("runs/index", "where scans are cached and quarantine lists written", free=True)
    scan_workers: int = option(4, "processes of the scan", free=True)
    demo_videos: int = option(256, "source demo: number of videos")
    demo_classes: int = option(4, "source demo: number of classes (motions)")
    demo_seed: int = option(0, "source demo: seed")


def open_clips(config: SourceConfig, spec: ClipSpec, seed: int, held_out: bool = False) -> "VideoClips":
    """The clips of a source: its training part (endless, shuffled) or the held-out part (in order)."""
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
        val_fraction=config.val_fraction,
        held_out=held_out,
        seed=config.demo_seed if config.name == "demo" else 0,
        num_videos=config.demo_videos,
        num_classes=config.demo_classes,
        size=spec.size,
    )
    return VideoClips(source, spec, seed=seed, train=not held_out)


@dataclass
class VAEConfig:
    """A trained VAE for stage two."""

    name: str = option(
        "odvae", "odvae|sd2_1|svd|cvvae|ops (discrete vqgan and tats cannot feed a diffusion model)"
    )
    path: str = option("", "its diffusers folder; empty: $OMNILATTE_WEIGHTS/<name>", free=True)


def open_vae(config: VAEConfig) -> Any:
    """The VAE in eval mode, frozen; discrete ones are refused, for a diffusion model needs continuous latents."""
    from vae import load_vae

    vae = load_vae(config.name, config.path or None)
    if vae.discrete:
        raise ValueError(
            f"vae.name={config.name}: its latents are discrete codes; stage two takes odvae, sd2_1, svd, cvvae, ops"
        )
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


def weights_digest(model: Any) -> str:
    """sha256 over names and values of a module's parameters and buffers: what the weights are, wherever they lie."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
