"""Stage one: train OD-VAE (paper 3, 4.1), or fine-tune a video VAE of diffusers (docs/finetune.md).

    python -m pipelines.train_vae --config configs/stage1/odvae.yaml source.root=/data/videos model.init_from=/weights/sd2_1
    python -m pipelines.train_vae --config configs/stage1/finetune.yaml source.root=/data/videos model.init_from=/weights/wan/vae

The same command again resumes. The defaults are the paper's: variant 4, tail initialization, 25 x 256 x 256 clips,
Adam 1e-5 constant, batch 8, EMA 0.999, 650k steps. The paper does not give the schedule and the weight of the
adversarial term, nor that of LPIPS: those are the reference code's.

From top to bottom: settings, networks, losses, one step, the loop, preparation, command line.
"""

import argparse
import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.clip import ClipSpec, to_float, to_uint8
from data.core import registry
from data.core.cli import run as run_program
from data.core.lazy import lazy
from data.core.option import option
from pipelines.training import folder as run_folder
from pipelines.training.config import at_least, parse
from pipelines.training.log import end_of_stage_one
from pipelines.training.settings import (
    GANSchedule,
    Init,
    LossType,
    PerceptualNet,
    Precision,
    ResumeConfig,
    SourceConfig,
    Train,
)
from pipelines.training.trainer import Trainer

torch = lazy("torch")
timm = lazy("timm.utils.model_ema")
safetensors = lazy("safetensors.torch")
fidelity = lazy("eval.fidelity")
distributed = lazy("pipelines.training.distributed")
discriminator = lazy("vae.discriminator")
interface = lazy("vae.interface")
losses = lazy("vae.losses")
media = lazy("pipelines.media")
training_run = lazy("pipelines.training.run")
plan = lazy("pipelines.plan.report")
programs = lazy("pipelines.plan.programs")
openers = lazy("pipelines.training.open")
start = lazy("pipelines.training.start")

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from pipelines.training.run import TrainingRun
    from vae.odvae import ODVAE

log = logging.getLogger(__name__)


# ---- settings --------------------------------------------------------------------------------------------


@dataclass
class ODVAEConfig:
    preset: str = option("odvae", "odvae: exact Eq. 4, causal, streamable; osp_v1_2: the released layout")
    variant: int = option(4, "1-4 (paper 3.2)")
    block_out_channels: list[int] = option([128, 256, 512, 512], "widths of the four levels")
    layers_per_block: int = option(2, "residual blocks of a level")
    norm_num_groups: int = option(32, "groups of each GroupNorm")
    init: Init = option(
        Init.tail,
        "how the 2D weights become 3D ones (Eq. 3, Eq. 5); weights: init_from is a video VAE, taken as it is; random ignores it",
    )
    init_from: str = option(
        "",
        "SD2.1-VAE: a diffusers AutoencoderKL folder or a CompVis .ckpt/.safetensors; init=weights: an OD-VAE's "
        "folder, or that of a video VAE of diffusers, whose config then stands for preset, variant, widths and layers",
    )
    train: Train = option(
        Train.auto, "decoder: encoder and latents stay as they are; all; auto: decoder for a VAE of diffusers"
    )


@dataclass
class TermConfig:
    """A loss that was added to data.core.registry.losses."""

    weight: float = option(1.0, "its factor in the sum")


@dataclass
class LossConfig:
    type: LossType = option(LossType.l1, "of the reconstruction")
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
        2000, "step at which the discriminator joins (alternate: it trains in the odd steps from here on)"
    )
    gan_warmup: int = option(
        0, "steps after gan_start before the adversarial term joins the VAE's loss; 0: as the paper's code"
    )
    gan_schedule: GANSchedule = option(
        GANSchedule.alternate, "alternate: even steps train the VAE, odd ones D; both: each"
    )
    discriminator_layers: int = option(3, "layers of the 3D PatchGAN")
    discriminator_width: int = option(64, "channels of its first layer")
    extra: dict[str, TermConfig] = option(
        dict, "losses of your own by their names (docs/extending.md)", of=TermConfig
    )


@dataclass
class TrainVAEConfig:
    run_dir: str = option("runs/odvae", "folder of this run", free=True)
    # How much is trained, and on how many clips at once
    seed: int = option(0, "random seed for initialization, data order and noise")
    steps: int = option(650_000, "optimizer steps", free=True)
    global_batch: int = option(8, "clips per step, over all processes")
    micro_batch: int = option(
        1, "clips per process and forward pass; gradient accumulation follows", free=True
    )
    # The optimizer and the moving average
    learning_rate: float = option(1e-5, "of both Adam optimizers; constant after warmup_steps")
    warmup_steps: int = option(0, "steps of linear warm-up")
    adam_betas: list[float] = option([0.9, 0.999], "of both optimizers")
    grad_clip: float = option(0.0, "maximum gradient norm; 0 disables clipping")
    ema_decay: float = option(0.999, "decay of the EMA weights, which are exported")
    ema_warmup: bool = option(
        False, "let the decay rise as (1 + step) / (10 + step) up to ema_decay; the paper's is constant"
    )
    # Arithmetic, memory and time of a step
    precision: Precision = option(Precision.fp32, "of forward and backward: fp32|tf32|bf16")
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, about a third more time", free=True
    )
    compile: bool = option(
        False,
        "torch.compile the residual blocks of od-vae: fewer and larger kernels, after minutes of compiling",
        free=True,
    )
    max_skipped: int = option(10, "steps with a non-finite loss or gradient in a row before the run stops")
    # Groups of settings, each with a dataclass of its own
    model: ODVAEConfig = option(ODVAEConfig, "")
    loss: LossConfig = option(LossConfig, "")
    source: SourceConfig = option(SourceConfig, "")
    clip: ClipSpec = option(ClipSpec, "")
    resume: ResumeConfig = option(ResumeConfig, "")
    workers: int = option(4, "loader processes", free=True)
    # What is logged, validated and kept, and how often
    log_every: int = option(50, "steps between log entries", free=True)
    log_with: str = option(
        "tensorboard", "tensorboard, and any tracker of accelerate's, e.g. tensorboard,wandb; none", free=True
    )
    val_every: int = option(2000, "steps between validations", free=True)
    val_videos: int = option(16, "held-out clips of a validation", free=True)
    val_lpips: bool = option(
        False, "LPIPS too in each validation (the judge's AlexNet; needs its weights)", free=True
    )
    save_every: int = option(2000, "steps between checkpoints", free=True)
    keep_checkpoints: int = option(2, "newest checkpoints kept", free=True)

    def __post_init__(self):
        # Lower bounds of the numbers
        at_least(self, 1, "steps", "global_batch", "micro_batch", "max_skipped")
        at_least(self, 1, "log_every", "val_every", "val_videos", "save_every")
        at_least(self, 1, "model.layers_per_block", "model.norm_num_groups")
        at_least(self, 0, "seed", "grad_clip", "warmup_steps", "ema_decay", "workers")
        at_least(self, 0, "loss.gan_start", "loss.gan_warmup", "loss.gan_weight")
        at_least(self, 0, "loss.kl_weight", "loss.perceptual_weight", "source.val_fraction")
        # Rules that a lower bound does not say, and settings that contradict one another
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
        for name in self.loss.extra:
            if registry.losses.find(name) is None:
                raise ValueError(
                    f"loss.extra.{name}: no such loss; added are: {', '.join(registry.losses) or 'none'}"
                )
        if len(self.adam_betas) != 2 or not all(0 <= b < 1 for b in self.adam_betas):
            raise ValueError(f"adam_betas={list(self.adam_betas)}: two numbers in [0, 1), e.g. [0.9, 0.999]")
        if not (0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")
        if self.model.variant not in (1, 2, 3, 4):
            raise ValueError(f"model.variant={self.model.variant}: the paper has variants 1, 2, 3 and 4")


# ---- networks and optimizers -----------------------------------------------------------------------------


class VAETrainer(Trainer):
    """The networks and optimizers of stage one, and what one step does with them.

    vae: on the CPU; training moves it. perceptual: an LPIPSLoss on the device, or None.
    """

    def __init__(
        self, config: TrainVAEConfig, accelerator: Any, vae: "ODVAE", perceptual: "nn.Module | None" = None
    ):
        super().__init__(config, accelerator)
        self.vae, self.perceptual = vae, perceptual
        start.freeze(vae, config)
        # The copy of the weights that is averaged, before the VAE is wrapped or compiled.
        self.ema = timm.ModelEmaV3(vae, decay=config.ema_decay)
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        if config.compile:
            distributed.compile_blocks(vae, accelerator)
        # The VAE and its optimizer
        self.autoencode, self.optimizer = self._prepare(interface.Autoencode(vae))
        self.autoencode.train()
        # The discriminator and its optimizer; its first weights depend on the seed alone.
        self.discriminator = None
        if config.loss.gan_weight > 0:
            torch.manual_seed(config.seed + 1)
            self.discriminator = discriminator.PatchDiscriminator3D(
                n_layers=config.loss.discriminator_layers, base=config.loss.discriminator_width
            )
            self.discriminate, self.discriminator_optimizer = self._prepare(self.discriminator)
        self.ema.to(accelerator.device)

    def _prepare(self, module: "nn.Module") -> tuple["nn.Module", Any]:
        """The module wrapped for this launch (DDP), and its optimizer."""
        betas = tuple(self.config.adam_betas)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.config.learning_rate, betas=betas, fused=True)
        return self.accelerator.prepare(module, optimizer)

    def phases(self) -> tuple[bool, bool]:
        """(train the VAE, train the discriminator) in this step."""
        if not self.gan_is_on:
            return True, False
        if self.config.loss.gan_schedule is GANSchedule.both:
            return True, True
        return self.step % 2 == 0, self.step % 2 == 1

    @property
    def gan_is_on(self) -> bool:
        return self.discriminator is not None and self.step >= self.config.loss.gan_start

    def latent_noise(self, x: "Tensor", numbers: Any) -> "Tensor":
        """Draw the posterior's noise (B, C, t, h, w), each sample from its own generator."""
        # The shape comes from the VAE's own compression, so every VAE that is trained here can use it.
        ratio, (H, W) = self.vae.spatial_compression_ratio, x.shape[3:]
        t, h, w = self.vae.latent_frames(x.shape[2]), H // ratio, W // ratio
        draws = distributed.generators(self.config.seed, numbers)
        return distributed.normal(draws, (self.vae.latent_channels, t, h, w), x.device)

    # ---- losses ------------------------------------------------------------------------------------------

    def vae_loss(self, x: "Tensor", noise: "Tensor") -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
        """(loss to differentiate, reconstruction, terms to log) of a clip x (B, 3, T, H, W) in [-1, 1]."""
        loss = self.config.loss
        xhat, moments = self.autoencode(x, noise)
        xhat = xhat.float()

        # Reconstruction, KL and LPIPS (paper 4.1).
        terms = losses.reconstruction_and_kl(
            x,
            xhat,
            interface.VideoGaussian(moments.float()),
            kl_weight=loss.kl_weight if self.vae.has_posterior else 0.0,
            perceptual=self.perceptual,
            perceptual_weight=loss.perceptual_weight,
            loss_type=loss.type,
        )
        total = terms.total
        logged = {"loss/rec": terms.rec, "loss/nll": terms.nll}
        if self.vae.has_posterior:
            logged["loss/kl"] = terms.kl
        if self.perceptual is not None:
            logged["loss/lpips"] = terms.perceptual

        # Terms of plugins (docs/extending.md).
        for name, term in loss.extra.items():
            value = registry.losses[name](x, xhat)
            total = total + term.weight * value
            logged[f"loss/{name}"] = value

        # The adversarial term, with the weight that balances its gradient against that of reconstruction and LPIPS.
        if self.gan_is_on and self.step >= loss.gan_start + loss.gan_warmup:
            self.discriminator.requires_grad_(False)  # its own gradients come from its own loss
            adversarial = losses.generator_loss(self.discriminator(xhat))
            balance = losses.adaptive_weight(terms.nll, adversarial, self.vae.last_decoder_layer)
            self.discriminator.requires_grad_(True)
            total = total + loss.gan_weight * balance * adversarial
            logged |= {"gan/generator": adversarial, "gan/weight": loss.gan_weight * balance}
        return total, xhat, logged | {"loss": total}

    def discriminator_loss(self, x: "Tensor", xhat: "Tensor") -> tuple["Tensor", dict[str, "Tensor"]]:
        """(hinge loss, terms to log) of real clips x and their reconstructions xhat."""
        real, fake = self.discriminate(x).float(), self.discriminate(xhat.detach()).float()
        loss = losses.hinge_d_loss(real, fake)
        return loss, {
            "gan/discriminator": loss,
            "gan/logits_real": real.mean(),
            "gan/logits_fake": fake.mean(),
        }

    # ---- one step, and the loop --------------------------------------------------------------------------

    def train_step(self, batches: "Iterator[dict[str, Any]]") -> None:
        """Make one optimizer step: of the VAE, of the discriminator, or of both."""
        accelerator, device = self.accelerator, self.accelerator.device
        # Which of the two networks this step trains; the learning rate of both.
        train_vae, train_discriminator = self.phases()
        self.set_learning_rate(
            self.optimizer, *([self.discriminator_optimizer] if train_discriminator else [])
        )
        stepped = [self.autoencode] if train_vae else []
        stepped += [self.discriminate] if train_discriminator else []
        # To put back if the step is skipped: a forward of the discriminator changes them.
        running_statistics = self.keep_statistics()

        for _ in range(accelerator.gradient_accumulation_steps):
            # Batch: uint8 frames to the device, then floats in [-1, 1].
            batch = next(batches)
            x = to_float(batch["video"].to(device, non_blocking=True))
            noise = self.latent_noise(x, batch["number"])
            # For networks that draw in their forward pass (LTX 0.9.1): the same after a resume, with the same micro_batch.
            torch.manual_seed(distributed.draw_seed(self.config.seed + 1, int(batch["number"][0])))
            with accelerator.accumulate(*stepped), distributed.autocast(accelerator, self.config):
                # Losses and backward.
                if train_vae:
                    loss, xhat, logged = self.vae_loss(x, noise)
                    accelerator.backward(distributed.finite_or_nan(loss))
                    self.add_to_log(logged)
                else:
                    # The reconstruction alone, as the discriminator's input: no gradient reaches the VAE.
                    with torch.no_grad():
                        xhat = self.autoencode(x, noise)[0].float()
                if train_discriminator:
                    loss, logged = self.discriminator_loss(x, xhat)
                    accelerator.backward(distributed.finite_or_nan(loss))
                    self.add_to_log(logged)

        # Update each network, once for all micro-batches; an update with a non-finite gradient is skipped on the device.
        # Then the moving average of the VAE.
        finite = []
        if train_vae:
            finite += [self.update(self.autoencode, self.optimizer, self.config.grad_clip, "grad_norm/vae")]
            self.update_ema(self.vae, finite[0])
        if train_discriminator:
            largest, name = self.config.grad_clip, "grad_norm/discriminator"
            finite += [self.update(self.discriminate, self.discriminator_optimizer, largest, name)]
        # A skipped step leaves no trace in the statistics. Count the step.
        self.restore_statistics(running_statistics, finite)
        self.finish_step(torch.stack(finite).all())

    def fit(self, run: "TrainingRun", held_out: Any, lpips: "nn.Module | None") -> None:
        """Train to config.steps: the loop of stage one. lpips: for the validations, or None."""
        # Scores before the first step: the curve begins at the initialization.
        if self.step == 0:
            self.validate(run, held_out, lpips)
        # One iteration is one optimizer step; run.steps() ends at config.steps or on a signal.
        for _ in run.steps():
            self.train_step(run.batches)
            run.end_step()
            # What is due after this step: log entry, scores and preview, checkpoint.
            if run.due(self.config.log_every):
                run.log()
            if run.due(self.config.val_every):
                self.validate(run, held_out, lpips)
            if run.due(self.config.save_every) or run.stopping:
                run.save()
        # The result: the averaged weights as a diffusers folder.
        run.export("vae", self.ema.module.save_pretrained)

    def validate(self, run: "TrainingRun", held_out: Any, lpips: "nn.Module | None") -> None:
        """Log scores of the EMA weights and of the raw ones (..._raw) on held-out clips, and write a preview of EMA."""
        run.meter.pause()
        # Only the main process scores; the others wait below.
        if run.main and len(held_out):
            count, device = self.config.val_videos, self.accelerator.device
            scores, picture = evaluate(self.ema.module, held_out, count, device, lpips)
            # Before the first step both are the same weights.
            raw = scores if self.step == 0 else evaluate(self.vae, held_out, count, device, lpips)[0]
            # To the log, to TensorBoard and as a file to look at.
            run.metrics.scalars(self.step, scores | {f"{name}_raw": value for name, value in raw.items()})
            run.metrics.video(self.step, "val/original_reconstruction_error", picture)
            media.write_preview(run.folder / "media" / f"val_{self.step:08d}.mp4", picture)
            words = _scores_text(scores), _scores_text(raw)
            log.info("step %d: held-out EMA %s; raw %s", self.step, *words)
        self.accelerator.wait_for_everyone()

    # ---- what the machinery asks for ---------------------------------------------------------------------

    def trained(self) -> list["nn.Module"]:
        return [self.autoencode] + ([self.discriminate] if self.discriminator is not None else [])

    def keep_statistics(self) -> list["Tensor"]:
        """Copies of the discriminator's running statistics, which every forward changes."""
        return [b.clone() for b in self.discriminator.buffers()] if self.gan_is_on else []

    def restore_statistics(self, kept: list["Tensor"], finite: list["Tensor"]) -> None:
        """Put them back if an update was skipped: such a step leaves nothing behind."""
        good = torch.stack(finite).all()
        for buffer, value in zip(self.discriminator.buffers() if kept else [], kept, strict=True):
            buffer.copy_(torch.where(good, buffer, value))

    def try_step(self) -> None:
        """Both phases at their heaviest; the discriminator's own step runs the VAE without gradients."""
        config, loss = self.config, self.config.loss
        # The step from which all terms of the loss are active.
        self.step = max(self.step, loss.gan_start + loss.gan_warmup)
        # The VAE's phase, on an empty clip.
        shape = (config.micro_batch, 3, config.clip.num_frames, config.clip.size, config.clip.size)
        x = torch.zeros(shape, device=self.accelerator.device)
        noise = self.latent_noise(x, range(config.micro_batch))
        with distributed.autocast(self.accelerator, config):
            total, xhat, _ = self.vae_loss(x, noise)
            total.backward()
            # The discriminator's phase; where the phases alternate, the VAE's graph is gone by then.
            if self.discriminator is None:
                return
            if loss.gan_schedule is GANSchedule.alternate:
                self.autoencode.zero_grad()
                del total, xhat
                with torch.no_grad():
                    xhat = self.autoencode(x, noise)[0].float()
            self.discriminator_loss(x, xhat)[0].backward()

    def progress(self) -> dict[str, int]:
        """As the base class, and the frames of a clip: 1 makes an image VAE, which another run may inflate."""
        return super().progress() | {"num_frames": self.config.clip.num_frames}

    def save(self, folder: Path) -> None:
        """Write weights as diffusers folders and the rest as trainer.pt; every process calls it."""
        # Every process gathers the counters, the main one writes.
        counters = self.counters()
        if not self.accelerator.is_main_process:
            return
        # Weights, as folders that any program can open.
        self.vae.save_pretrained(folder / "vae")
        self.ema.module.save_pretrained(folder / "vae_ema")
        # What only a resumed training needs.
        state = counters | {"optimizer": self.optimizer.state_dict()}
        if self.discriminator is not None:
            state |= {"discriminator": self.discriminator.state_dict()}
            # under the key that checkpoints have always used
            state |= {"judge_optimizer": self.discriminator_optimizer.state_dict()}
        torch.save(state, folder / "trainer.pt")

    def load(self, folder: Path) -> None:
        """Take what `save` wrote."""
        # Weights, raw and averaged, with the scale that their folder states.
        for module, name in ((self.vae, "vae"), (self.ema.module, "vae_ema")):
            module.load_state_dict(
                safetensors.load_file(folder / name / "diffusion_pytorch_model.safetensors")
            )
            config = json.loads((folder / name / "config.json").read_text())
            if "scaling_factor" in config:
                module.register_to_config(scaling_factor=config["scaling_factor"])
        # Optimizers, discriminator and counters.
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(distributed.as_fused(state["optimizer"]))
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(distributed.as_fused(state["judge_optimizer"]))
        self.load_counters(state)


def _scores_text(scores: dict[str, float]) -> str:
    words = []
    for metric in fidelity.METRICS:
        if (value := scores.get(f"val/{metric.key}")) is not None:
            words.append(f"{metric.name} {metric.text(value)} {metric.unit}".rstrip())
    return ", ".join(words)


def evaluate(
    vae: "ODVAE", clips: Any, count: int, device: Any, lpips: "nn.Module | None" = None
) -> tuple[dict[str, float], np.ndarray]:
    """Compute the frame metrics of posterior means on rounded uint8 frames of `count` clips, and a picture of four.

    lpips: from `load_lpips`, for LPIPS too. Scores are named val/psnr, and so on. The picture is uint8 (T, rows, columns,
    3): original | reconstruction | error x 4.
    """
    metrics = fidelity.measures(lpips)
    was_training, scores, rows = vae.training, [], []
    vae.eval()
    # Each clip through the posterior mean, compared after rounding to uint8.
    count = min(count, len(clips))
    for n in range(count):
        x = clips[n * len(clips) // count]["video"][None]  # spread over all parts of a mixture
        with torch.no_grad():
            x = to_float(x.to(device))
            xhat = vae.decode(vae.encode(x).latent_dist.mode()).sample
        original, decoded = to_uint8(x)[0], to_uint8(xhat)[0]
        scores.append([measure(original, decoded) for measure in metrics.values()])
        if n < 4:
            rows.append(media.comparison(original, decoded))
    vae.train(was_training)
    # Means over the clips, under the names of the log.
    means = np.mean(scores, axis=0).tolist()
    named = {f"val/{metric.key}": mean for metric, mean in zip(metrics, means, strict=True)}
    return named, np.concatenate(rows, axis=1)


# ---- preparation -----------------------------------------------------------------------------------------


def train(config: TrainVAEConfig) -> Path:
    """Train, or resume, to config.steps; returns the folder of the exported EMA weights."""
    accelerator = distributed.make_accelerator(config)
    if distributed.uses_deepspeed(accelerator):
        raise ValueError(
            "stage one has two models and two optimizers: launch it with DDP, configs/accelerate/ddp8.yaml"
        )

    # What a wrong setting can spoil is checked before anything is opened or written.
    run_folder.check_new_run(config, "vae", {"model.init_from": config.model.init_from})

    # Networks. LPIPS draws random numbers when it is built, so it comes before the seed.
    perceptual, lpips, weights = start.lpips_networks(config, accelerator.device)
    torch.manual_seed(config.seed)
    vae = start.build_vae_model(config)
    openers.check_clip(vae, config.clip)

    # Data: an endless stream of training clips, and held-out clips that are always cut the same way.
    held_out: Any = []
    clips = distributed.open_everywhere(
        accelerator, lambda: openers.open_clips(config.source, config.clip, config.seed)
    )
    if config.source.val_fraction > 0:
        still = dataclasses.replace(config.clip, crop="center", flip=False, position="center")
        held_out = distributed.open_everywhere(
            accelerator, lambda: openers.open_clips(config.source, still, 0, held_out=True)
        )
    counts = openers.video_counts(clips, held_out)
    log.info("%s", openers.counts_line(config, counts))

    # Weights: a new run starts from the initialization, a resumed one from its checkpoint (TrainingRun below).
    if run_folder.needs_initial_weights(config):
        start.initialize(vae, config)
    trainer = VAETrainer(config, accelerator, vae, perceptual)
    # The heaviest step and a validation once before the start, so that a lack of memory shows now.
    shape = (config.clip.num_frames, config.clip.size, config.clip.size, 3)
    empty = [{"video": torch.zeros(shape, dtype=torch.uint8)}]
    trainer.rehearse(lambda: evaluate(trainer.ema.module, empty, 1, accelerator.device, lpips))

    # What a checkpoint records about how it was made; a resumed run must share start_sha256.
    info = {
        "data": counts,
        "model": type(vae).__name__ if start.is_adapted(vae) else config.model.preset,
        "variant": config.model.variant,
        "start_sha256": start.vae_start_digest(config),
    }
    # The run folder is locked from here to the end of the training.
    with training_run.TrainingRun(trainer, clips, "train_vae", "online", info, weights) as run:
        trainer.fit(run, held_out, lpips)
    return run.folder / "vae"


# ---- command line ----------------------------------------------------------------------------------------


def config_from(argv: list[str] | None) -> tuple[TrainVAEConfig, argparse.Namespace]:
    """Read the settings of a command line, and its switches."""
    flags = {"--data": "source.root", "--dataset": "source.name"}
    return parse(TrainVAEConfig, argv, "train_vae", __doc__, flags, planned=True)


def main(argv: list[str] | None = None) -> int:
    config, args = config_from(argv)
    if args.plan:
        print(plan.plan_text("train_vae", partial(programs.stage_one, VAETrainer), config, args.card))
    elif args.dry_run:
        print(start.describe_vae_run(config))
    else:
        end_of_stage_one(config, train(config))
    return 0


if __name__ == "__main__":
    run_program(main)
