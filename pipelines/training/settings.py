"""Settings that several programs share: where videos come from, how clips are cut, which VAE. No torch here."""

from dataclasses import dataclass
from enum import StrEnum

from data.core.option import option
from data.demo import EDGE


class Precision(StrEnum):
    """fp32: matrix products exact; cuDNN's convolutions may use TF32, torch's default. tf32: both may. bf16: autocast."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class Mode(StrEnum):
    """Of stage two: latents from a cache, or encoded in every step."""

    cached = "cached"
    online = "online"


class Init(StrEnum):
    """How a VAE gets its first weights (paper 3.3); weights: those of a trained VAE, unchanged."""

    tail = "tail"
    average = "average"
    random = "random"
    weights = "weights"


class Train(StrEnum):
    """What stage one trains; decoder: the encoder, and so the latents, stay as they are."""

    auto = "auto"
    decoder = "decoder"
    all = "all"


class GANSchedule(StrEnum):
    """alternate: even steps train the VAE, odd ones the discriminator. both: each step trains both."""

    alternate = "alternate"
    both = "both"


class PerceptualNet(StrEnum):
    """The network of LPIPS: vgg, the paper's, or alex, a tenth of the time."""

    vgg = "vgg"
    alex = "alex"


class LossType(StrEnum):
    l1 = "l1"
    l2 = "l2"


class CacheType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class PartConfig:
    """One source of a mixture."""

    name: str = option("", "as source.name; empty: NAME itself")
    root: str = option("", "folder of the data set", free=True)
    split: str = option("train", "train|test, for sources that have splits")
    list_file: str = option("", "as source.list_file")
    weight: float | None = option(
        None, "its share, in any unit; if no part has one: proportional to the number of videos"
    )
    demo_videos: int = option(256, "source demo: number of videos")
    demo_classes: int = option(4, "source demo: number of classes (motions)")
    demo_seed: int = option(0, "source demo: seed")
    demo_edge: float = option(EDGE, "source demo: width of the shapes' soft edges, of the picture's side")


@dataclass
class SourceConfig:
    """Which videos. Damaged ones are found by one scan, listed and left out; the scan is cached in index_dir."""

    name: str = option("folder", "ucf101|sky_timelapse|kinetics400|webvid|panda70m|folder|csv|demo|mixture")
    root: str = option("", "folder of the data set", free=True)
    split: str = option(
        "train", "train|test, of kinetics400 and csv also val, of csv also all, for sources that have splits"
    )
    list_file: str = option(
        "",
        "the list as published: webvid, panda70m and kinetics400 csv, ucfTrainTestlist; of csv: a .csv, .tsv or .jsonl with a "
        "column path and, if there are any, label, start_s, end_s, split",
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
        0.05, "share of the videos that may become unreadable before a training or a cache stops", free=True
    )
    demo_videos: int = option(256, "source demo: number of videos")
    demo_classes: int = option(4, "source demo: number of classes (motions)")
    demo_seed: int = option(0, "source demo: seed")
    demo_edge: float = option(EDGE, "source demo: width of the shapes' soft edges, of the picture's side")

    def __post_init__(self):
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"source.max_failed_share={self.max_failed_share}: must be in [0, 1]")


MAY_CHANGE = ("learning_rate", "grad_clip", "warmup_steps", "precision")


@dataclass
class ResumeConfig:
    """What may differ from the settings that a run began with, on purpose."""

    change: str = option(
        "",
        f"settings to change on resume, separated by commas: {', '.join(MAY_CHANGE)}; recorded in env.json",
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
        "odvae",
        "odvae|sd2_1|svd|cvvae|ops (not vqgan and tats: discrete), or of diffusers wan|cogvideox|ltx|... (docs/finetune.md)",
    )
    path: str = option("", "its diffusers folder; empty: $OMNILATTE_WEIGHTS/<name>", free=True)
    tiling_frames: int = option(
        0, "encode and decode in temporal groups of this many frames (odvae; paper 3.3: 33); 0: off"
    )

    def __post_init__(self):
        check_groups(self.tiling_frames, "vae.tiling_frames")


def check_groups(num_frames: int, key: str) -> None:
    """ValueError, naming the setting `key`, unless temporal groups may have this many frames; 0 is no tiling."""
    if num_frames and (num_frames < 5 or num_frames % 4 != 1):
        raise ValueError(
            f"{key}={num_frames}: a group has 4k + 1 frames from 5 on, e.g. 33; 0 turns tiling off"
        )
