"""Settings of stage one; the defaults are the paper's (3, 4.1). Program: pipelines/train_vae.py."""

import enum
import math
from dataclasses import dataclass

from pipelines.config import at_least, option
from pipelines.settings import ClipConfig, Precision, ResumeConfig, SourceConfig


class Init(enum.Enum):
    tail = "tail"
    average = "average"
    random = "random"
    weights = "weights"


class PerceptualNet(enum.Enum):
    vgg = "vgg"
    alex = "alex"


class GANSchedule(enum.Enum):
    alternate = "alternate"
    both = "both"


@dataclass
class ODVAEConfig:
    preset: str = option("odvae", "odvae: exact Eq. 4, causal, streamable; osp_v1_2: the released layout")
    variant: int = option(4, "1-4 (paper 3.2)")
    block_out_channels: list[int] = option([128, 256, 512, 512], "widths of the four levels")
    layers_per_block: int = option(2, "residual blocks of a level")
    norm_num_groups: int = option(32, "groups of each GroupNorm")
    init: Init = option(
        Init.tail,
        "how the 2D weights become 3D ones (Eq. 3, Eq. 5); weights: init_from is an OD-VAE, taken as it is; random ignores it",
    )
    init_from: str = option(
        "",
        "SD2.1-VAE: a diffusers AutoencoderKL folder or a CompVis .ckpt/.safetensors; init=weights: an OD-VAE's folder",
    )


@dataclass
class LossConfig:
    type: str = option("l1", "reconstruction: l1|l2")
    kl_weight: float = option(1e-6, "weight of the KL term")
    perceptual_weight: float = option(1.0, "weight of LPIPS; 0 turns it off and needs no weights")
    perceptual_net: PerceptualNet = option(
        PerceptualNet.vgg, "its network: vgg, the paper's, or alex, a tenth of the time"
    )
    perceptual_weights: str = option(
        "", "file or folder of its weights; empty: $OMNILATTE_WEIGHTS or weights/"
    )
    gan_weight: float = option(
        0.5, "factor on the adaptive weight of the adversarial term; 0: no discriminator"
    )
    gan_start: int = option(
        2000, "step at which D begins to train, and the adversarial term after gan_warmup"
    )
    gan_warmup: int = option(
        0, "steps in which D alone learns before the VAE feels it; 0: as the paper's code"
    )
    gan_schedule: GANSchedule = option(
        GANSchedule.alternate, "alternate: even steps train the VAE, odd ones D; both: each"
    )
    discriminator_layers: int = option(3, "layers of the 3D PatchGAN")
    discriminator_width: int = option(64, "channels of its first layer")


@dataclass
class TrainVAEConfig:
    run_dir: str = option("runs/odvae", "folder of this run", free=True)
    seed: int = option(0, "of initialization, data order and noise")
    steps: int = option(650_000, "optimizer steps", free=True)
    global_batch: int = option(8, "clips per step, over all processes")
    micro_batch: int = option(1, "clips a process holds at once; accumulation follows", free=True)
    learning_rate: float = option(1e-5, "Adam, constant")
    warmup_steps: int = option(0, "steps of linear warm-up")
    adam_betas: list[float] = option([0.9, 0.999], "of both optimizers")
    grad_clip: float = option(0.0, "largest gradient norm of an update; 0: not clipped")
    ema_decay: float = option(0.999, "of the averaged weights, which are what is exported")
    precision: Precision = option(Precision.fp32, "of forward and backward: fp32|tf32|bf16")
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, about a third more time", free=True
    )
    max_skipped: int = option(10, "steps with a non-finite loss or gradient in a row before the run stops")
    model: ODVAEConfig = option(ODVAEConfig, "")
    loss: LossConfig = option(LossConfig, "")
    source: SourceConfig = option(SourceConfig, "")
    clip: ClipConfig = option(ClipConfig, "")
    resume: ResumeConfig = option(ResumeConfig, "")
    workers: int = option(4, "loader processes", free=True)
    log_every: int = option(50, "steps between two records", free=True)
    val_every: int = option(2000, "steps between two validations", free=True)
    val_videos: int = option(16, "held-out clips of a validation", free=True)
    val_lpips: bool = option(
        False, "LPIPS too in each validation (the judge's AlexNet; needs its weights)", free=True
    )
    save_every: int = option(2000, "steps between two checkpoints", free=True)
    keep_checkpoints: int = option(2, "newest checkpoints kept", free=True)

    def __post_init__(self):
        at_least(
            self,
            1,
            "steps",
            "global_batch",
            "micro_batch",
            "log_every",
            "val_every",
            "val_videos",
            "save_every",
        )
        at_least(self, 1, "max_skipped", "model.layers_per_block", "model.norm_num_groups")
        at_least(self, 0, "seed", "grad_clip", "warmup_steps", "ema_decay", "workers", "loss.gan_start")
        at_least(self, 0, "loss.gan_warmup")
        at_least(
            self, 0, "loss.kl_weight", "loss.gan_weight", "loss.perceptual_weight", "source.val_fraction"
        )
        if self.ema_decay >= 1 or self.source.val_fraction >= 1:
            raise ValueError(
                f"ema_decay={self.ema_decay}, source.val_fraction={self.source.val_fraction}: both below 1"
            )
        if self.loss.perceptual_weights.startswith("random:"):
            raise ValueError(
                f"loss.perceptual_weights={self.loss.perceptual_weights}: a loss of random features teaches nothing; "
                "loss.perceptual_weight=0 trains without one"
            )
        if self.val_lpips and self.source.val_fraction == 0:
            raise ValueError("val_lpips=true: source.val_fraction=0 holds no clips out; use e.g. 0.05")
        if len(self.adam_betas) != 2 or not all(0 <= b < 1 for b in self.adam_betas):
            raise ValueError(f"adam_betas={list(self.adam_betas)}: two numbers in [0, 1), e.g. [0.9, 0.999]")
        if not (0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")
        if self.model.variant not in (1, 2, 3, 4):
            raise ValueError(f"model.variant={self.model.variant}: the paper has variants 1, 2, 3 and 4")
