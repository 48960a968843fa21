"""Settings of stage two (paper 4.1), read by pipelines/cache_latents.py and pipelines/train_latte.py."""

import math
from dataclasses import dataclass

from pipelines.config import at_least, option
from pipelines.settings import ClipConfig, Mode, Precision, ResumeConfig, SourceConfig, VAEConfig


@dataclass
class DenoiserConfig:
    size: str = option("XL/2", "Latte size S|B|L|XL / patch 2|4|8, or custom: the four numbers below")
    depth: int = option(0, "size=custom: blocks, spatial and temporal in turn")
    hidden_size: int = option(0, "size=custom: width")
    num_heads: int = option(0, "size=custom: attention heads")
    patch_size: int = option(0, "size=custom: latent pixels of a token's side")
    init_from: str = option(
        "",
        "a trained Latte to begin with: its folder, or that of its pipeline; a table of other classes is made anew",
    )
    label_dropout: float = option(0.1, "how often training hides the class, for classifier-free guidance")


@dataclass
class CacheConfig:
    dir: str = option("", "folder; empty: runs/cache/<source>-<vae>-<fingerprint>", free=True)
    crops: int = option(4, "clips drawn of each video")
    num_videos: int = option(0, "only the first so many videos, to time a training; 0: all")
    flips: bool = option(False, "store each clip mirrored too (encoded from mirrored pixels)")
    dtype: str = option("float32", "of the stored moments: float32|float16|bfloat16")
    shard_size: int = option(256, "clips of a shard")
    batch: int = option(1, "clips encoded at once", free=True)


@dataclass
class SamplesConfig:
    every: int = option(10_000, "steps between two grids of EMA samples; 0: none", free=True)
    num_videos: int = option(9, "videos of a grid, always the same noise and classes", free=True)
    steps: int = option(50, "sampling steps", free=True)
    guidance_scale: float = option(1.0, "classifier-free guidance", free=True)


@dataclass
class TrainLatteConfig:
    run_dir: str = option("runs/latte", "folder of this run", free=True)
    seed: int = option(0, "of initialization, data order, crops, noise and timesteps")
    steps: int = option(200_000, "optimizer steps", free=True)
    mode: Mode = option(
        Mode.cached, "cached latents, or online: the VAE encodes in every step (the paper's TSpeed)"
    )
    global_batch: int = option(8, "clips per step, over all processes")
    micro_batch: int = option(1, "clips a process holds at once; accumulation follows", free=True)
    learning_rate: float = option(1e-4, "AdamW, constant")
    warmup_steps: int = option(0, "steps of linear warm-up")
    weight_decay: float = option(0.0, "of AdamW")
    grad_clip: float = option(0.1, "largest gradient norm of an update; 0: not clipped")
    clip_start: int = option(
        0, "step from which gradients are clipped (Latte: 100000 on UCF101, 20000 on SkyTimelapse)"
    )
    ema_decay: float = option(0.9999, "of the averaged weights, which are what samples")
    precision: Precision = option(
        Precision.fp32, "of the denoiser, and of the VAE when it encodes: fp32|tf32|bf16"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, about a third more time", free=True
    )
    max_skipped: int = option(10, "steps with a non-finite gradient in a row before the run stops")
    denoiser: DenoiserConfig = option(DenoiserConfig, "")
    vae: VAEConfig = option(VAEConfig, "")
    cache: CacheConfig = option(CacheConfig, "")
    source: SourceConfig = option(lambda: SourceConfig(val_fraction=0.0), "")
    clip: ClipConfig = option(lambda: ClipConfig(num_frames=81), "")
    samples: SamplesConfig = option(SamplesConfig, "")
    resume: ResumeConfig = option(ResumeConfig, "")
    workers: int = option(4, "loader processes", free=True)
    log_every: int = option(50, "steps between two records", free=True)
    save_every: int = option(10_000, "steps between two checkpoints", free=True)
    keep_checkpoints: int = option(2, "newest checkpoints kept", free=True)

    def __post_init__(self):
        at_least(self, 1, "steps", "global_batch", "micro_batch", "log_every", "save_every", "max_skipped")
        at_least(self, 1, "cache.crops", "cache.shard_size", "cache.batch", "samples.num_videos")
        at_least(
            self, 0, "seed", "grad_clip", "clip_start", "warmup_steps", "ema_decay", "workers", "weight_decay"
        )
        at_least(self, 0, "samples.every", "source.val_fraction", "cache.num_videos")
        if self.ema_decay >= 1 or self.source.val_fraction >= 1:
            raise ValueError(
                f"ema_decay={self.ema_decay}, source.val_fraction={self.source.val_fraction}: both below 1"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")
        if self.mode is Mode.cached and self.clip.flip:
            raise ValueError(
                "clip.flip=true draws anew in every step; with a cache say cache.flips=true, or mode=online"
            )
        if not 0 <= self.denoiser.label_dropout < 1:
            raise ValueError(f"denoiser.label_dropout={self.denoiser.label_dropout}: must be in [0, 1)")
        if self.cache.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"cache.dtype={self.cache.dtype!r}: float32, float16 or bfloat16")


FLAGS = {"--vae": "vae.name", "--vae-path": "vae.path", "--data": "source.root", "--dataset": "source.name"}
