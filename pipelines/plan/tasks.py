"""The tasks of docs/hardware.md and of gpu_check: one name, one set of settings, for what is predicted and what is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipelines.plan import programs
from pipelines.sample import SampleConfig
from pipelines.train_latte import LatteTrainer, TrainLatteConfig
from pipelines.train_vae import TrainVAEConfig, VAETrainer
from pipelines.training.config import load
from vae import build_vae

STAGE1, STAGE2 = "configs/stage1/odvae.yaml", "configs/stage2/ucf101.yaml"
SAMPLE = "configs/sample/ucf101.yaml"


@dataclass(frozen=True)
class Row:
    """program: train_vae, train_latte, cache_latents, sample or vae; settings: what differs from its shipped config."""

    name: str
    program: str
    settings: tuple[str, ...]
    tf32: bool = False

    def config(self, extra: tuple[str, ...] = ()) -> Any:
        cls, file = _program(self.program)
        return load(cls, file, [*self.settings, *extra])


def _program(name: str) -> tuple[type, str]:
    return {
        "train_vae": (TrainVAEConfig, STAGE1),
        "train_latte": (TrainLatteConfig, STAGE2),
        "cache_latents": (TrainLatteConfig, STAGE2),
        "sample": (SampleConfig, SAMPLE),
    }[name]


def _one(size: int) -> tuple[str, ...]:
    return (f"global_batch={size}", f"micro_batch={size}")


ROWS = (
    Row("stage one, 25 x 256 x 256, bf16", "train_vae", _one(1)),
    Row("the same, gradient checkpointing", "train_vae", (*_one(1), "gradient_checkpointing=true")),
    Row("the same, compiled blocks", "train_vae", (*_one(1), "compile=true")),
    Row("the same, fp32", "train_vae", (*_one(1), "precision=fp32")),
    Row("Latte-XL/2 on cached latents of 81 frames, bf16, 1 clip", "train_latte", _one(1)),
    Row("the same, 1 clip, compiled blocks", "train_latte", (*_one(1), "compile=true")),
    Row("the same, 4 clips", "train_latte", _one(4)),
    Row("the same, 8 clips", "train_latte", _one(8)),
    Row(
        "the same, 8 clips, gradient checkpointing", "train_latte", (*_one(8), "gradient_checkpointing=true")
    ),
    Row("the same, 1 clip, online", "train_latte", (*_one(1), "mode=online")),
    Row("the same, 1 clip, tf32", "train_latte", (*_one(1), "precision=tf32"), tf32=True),
    Row(
        "the same, 1 clip, tf32, online",
        "train_latte",
        (*_one(1), "precision=tf32", "mode=online"),
        tf32=True,
    ),
    Row("caching latents, 81 x 256 x 256, bf16", "cache_latents", ()),
    Row("sampling 81 x 256 x 256, DDPM-250, guidance, bf16", "sample", ("batch=4",)),
)


def find_row(name: str) -> Row:
    """The row of that name."""
    return next(row for row in ROWS if row.name == name)


FINETUNE = "configs/stage1/finetune.yaml"
FINETUNED = ("wan", "cogvideox", "ltx", "hunyuanvideo", "mochi")
CLIPS = (17, (256, 256)), (33, (480, 832))  # frames, or the next length that the VAE takes; height and width


def finetune(name: str, frames: int, sides: tuple[int, int], train: str) -> tuple[int, programs.Simulation]:
    """(clip length, costs of a step of one clip) of fine-tuning that VAE of diffusers at its default size, without GAN."""
    with TemporaryDirectory() as folder:
        # The VAE in its size, without weights, and the next length that it takes.
        with torch.device("meta"):
            vae = build_vae(name)
        vae.save_config(folder)
        while True:
            try:
                vae.check_frames(frames)
                break
            except ValueError:
                frames += 1
        # A step of its decoder, or of all of it.
        words = (f"model.init_from={folder}", f"model.train={train}", f"clip.num_frames={frames}")
        config = load(TrainVAEConfig, FINETUNE, [*words, *_one(1), "loss.gan_weight=0"])
        return frames, programs.stage_one(VAETrainer, config, sides)


def simulate(program: str, config: Any) -> programs.Simulation:
    """The costs of a program with these settings, on the pretended GPU."""
    run: dict[str, Callable[[Any], programs.Simulation]] = {
        "train_vae": partial(programs.stage_one, VAETrainer),
        "train_latte": partial(programs.stage_two, LatteTrainer),
        "cache_latents": programs.cache,
        "sample": programs.sample,
        "benchmark": programs.benchmark,
        "reconstruct": programs.reconstruct,
    }
    return run[program](config)
