"""The loop of stage one: batch, loss, backward, update, EMA, log, validate, save. Settings: pipelines/train_vae.py."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from data.clip import to_float, to_uint8
from eval.fidelity import lpips_distance, psnr, ssim
from pipelines.checkpoints import Checkpoints
from pipelines.engine import (
    autocast,
    finite_or_nan,
    generators,
    main_process_first,
    make_accelerator,
    normal,
    uses_deepspeed,
)
from pipelines.log import MetricLog
from pipelines.loop import fit
from pipelines.media import comparison, write_preview
from pipelines.run import check_run, refuse_in_data, refuse_inside
from pipelines.settings import check_clip, open_clips
from pipelines.trainer import Trainer, as_fused, average
from pipelines.vae_settings import GANSchedule, TrainVAEConfig
from pipelines.vae_start import build_vae_model, initialize, lpips_networks, start_digest
from vae.discriminator import PatchDiscriminator3D
from vae.interface import VideoGaussian
from vae.losses import adaptive_weight, generator_loss, hinge_d_loss, reconstruction_and_kl
from vae.odvae import ODVAE

log = logging.getLogger(__name__)


class Autoencode(nn.Module):
    """Clip and noise to reconstruction and posterior, in one forward: what DDP wraps."""

    def __init__(self, vae: ODVAE):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, T, H, W) in [-1, 1]; noise (B, C, t, h, w). Returns the clip and the moments (B, 2C, t, h, w)."""
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise
        return self.vae.decode(z).sample, posterior.parameters


class VAETrainer(Trainer):
    """Everything a step touches, built once, by name."""

    def __init__(self, config: TrainVAEConfig, accelerator: Any, vae: ODVAE, perceptual: Any = None):
        super().__init__(config, accelerator)
        self.vae = vae
        self.ema = ModelEmaV3(vae, decay=config.ema_decay)
        loss = config.loss
        self.perceptual = perceptual
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.autoencode, self.optimizer = self._prepare(Autoencode(vae))
        self.autoencode.train()
        self.discriminator = None
        if loss.gan_weight > 0:
            torch.manual_seed(config.seed + 1)
            self.discriminator = PatchDiscriminator3D(
                n_layers=loss.discriminator_layers, base=loss.discriminator_width
            )
            self.judge, self.judge_optimizer = self._prepare(self.discriminator)
        self.ema.to(accelerator.device)

    def _prepare(self, module: nn.Module) -> tuple[nn.Module, Any]:
        optimizer = torch.optim.Adam(
            module.parameters(), lr=self.config.learning_rate, betas=tuple(self.config.adam_betas), fused=True
        )
        return self.accelerator.prepare(module, optimizer)

    @property
    def gan_is_on(self) -> bool:
        return self.discriminator is not None and self.step >= self.config.loss.gan_start

    @property
    def vae_feels_d(self) -> bool:
        return self.gan_is_on and self.step >= self.config.loss.gan_start + self.config.loss.gan_warmup

    def phases(self) -> tuple[bool, bool]:
        """(train the VAE, train D) in this step."""
        if not self.gan_is_on:
            return True, False
        if self.config.loss.gan_schedule is GANSchedule.both:
            return True, True
        return self.step % 2 == 0, self.step % 2 == 1

    def generator_loss(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss to differentiate, reconstruction, terms to log)."""
        loss = self.config.loss
        xhat, moments = self.autoencode(x, noise)
        xhat = xhat.float()
        terms = reconstruction_and_kl(
            x,
            xhat,
            VideoGaussian(moments.float()),
            kl_weight=loss.kl_weight,
            perceptual=self.perceptual,
            perceptual_weight=loss.perceptual_weight,
            loss_type=loss.type,
        )
        logged = {"loss/rec": terms.rec, "loss/kl": terms.kl, "loss/nll": terms.nll}
        if self.perceptual is not None:
            logged["loss/lpips"] = terms.perceptual
        total = terms.total
        if self.vae_feels_d:
            self.discriminator.requires_grad_(False)  # its own gradients come from its own step
            adversarial = generator_loss(self.discriminator(xhat))
            weight = loss.gan_weight * adaptive_weight(terms.nll, adversarial, self.vae.last_decoder_layer)
            self.discriminator.requires_grad_(True)
            total = total + weight * adversarial
            logged |= {"gan/generator": adversarial, "gan/weight": weight}
        return total, xhat, logged

    def discriminator_loss(self, x: Tensor, xhat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        real, fake = self.judge(x).float(), self.judge(xhat.detach()).float()
        loss = hinge_d_loss(real, fake)
        return loss, {
            "gan/discriminator": loss,
            "gan/logits_real": real.mean(),
            "gan/logits_fake": fake.mean(),
        }

    def latent_noise(self, x: Tensor, numbers: Any) -> Tensor:
        """(B, C, t, h, w): each sample's noise from its own generator."""
        s = self.vae.spatial_compression_ratio
        shape = (
            self.vae.config.latent_channels,
            self.vae.latent_frames(x.shape[2]),
            x.shape[3] // s,
            x.shape[4] // s,
        )
        return normal(generators(self.config.seed, numbers), shape, x.device)

    def train_step(self, batches: Any) -> None:
        """One optimizer step over all micro-batches: of the VAE, of D, or of both."""
        accelerator, largest = self.accelerator, self.config.grad_clip
        train_vae, train_judge = self.phases()
        trained = ([self.autoencode] if train_vae else []) + ([self.judge] if train_judge else [])
        self.set_learning_rate(self.optimizer, *([self.judge_optimizer] if train_judge else []))
        # D's running statistics see every clip: after a step that is left out they go back too
        seen = list(self.discriminator.buffers()) if self.gan_is_on else []
        before = [buffer.clone() for buffer in seen]
        for _ in range(accelerator.gradient_accumulation_steps):
            batch = next(batches)
            x = to_float(batch["video"].to(accelerator.device, non_blocking=True))
            noise = self.latent_noise(x, batch["number"])
            with accelerator.accumulate(*trained), autocast(accelerator, self.config):
                if train_vae:
                    total, xhat, logged = self.generator_loss(x, noise)
                    accelerator.backward(finite_or_nan(total))
                    self.note(logged)
                else:
                    with torch.no_grad():
                        xhat = self.autoencode(x, noise)[0].float()
                if train_judge:
                    total, logged = self.discriminator_loss(x, xhat)
                    accelerator.backward(finite_or_nan(total))
                    self.note(logged)
        verdicts = []
        if train_vae:
            verdicts += [self.update(self.autoencode, self.optimizer, largest, "grad_norm/vae")]
            average(self.ema, self.vae, verdicts[0])
        if train_judge:
            verdicts += [self.update(self.judge, self.judge_optimizer, largest, "grad_norm/discriminator")]
        finite = torch.stack(verdicts).all()
        for buffer, value in zip(seen, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, value))
        self.finish_step(finite)

    def trained(self) -> list[nn.Module]:
        return [self.autoencode] + ([self.judge] if self.discriminator is not None else [])

    def try_step(self) -> None:
        """Both phases at their heaviest; D's own, when it has one, with the VAE's forward that keeps no gradients."""
        config, loss = self.config, self.config.loss
        self.step = max(self.step, loss.gan_start + loss.gan_warmup)
        clip = (config.micro_batch, 3, config.clip.num_frames, config.clip.size, config.clip.size)
        x = torch.zeros(clip, device=self.accelerator.device)
        noise = self.latent_noise(x, range(config.micro_batch))
        with autocast(self.accelerator, config):
            total, xhat, _ = self.generator_loss(x, noise)
            total.backward()
            if self.discriminator is None:
                return
            if loss.gan_schedule is GANSchedule.alternate:
                self.autoencode.zero_grad()
                del total, xhat
                with torch.no_grad():
                    xhat = self.autoencode(x, noise)[0].float()
            self.discriminator_loss(x, xhat)[0].backward()

    def progress(self) -> dict[str, int]:
        """Of the base class, and the frames of a clip: 1 makes an image VAE, which another run may inflate."""
        return super().progress() | {"num_frames": self.config.clip.num_frames}

    def save(self, folder: Path) -> None:
        """Weights as diffusers folders, the rest in trainer.pt; every process calls it, the main one writes."""
        counters = self.counters()
        if not self.accelerator.is_main_process:
            return
        self.vae.save_pretrained(folder / "vae")
        self.ema.module.save_pretrained(folder / "vae_ema")
        state = counters | {"optimizer": self.optimizer.state_dict()}
        if self.discriminator is not None:
            state |= {"discriminator": self.discriminator.state_dict()}
            state |= {"judge_optimizer": self.judge_optimizer.state_dict()}
        torch.save(state, folder / "trainer.pt")

    def load(self, folder: Path) -> None:
        for module, name in ((self.vae, "vae"), (self.ema.module, "vae_ema")):
            module.load_state_dict(load_file(folder / name / "diffusion_pytorch_model.safetensors"))
            config = json.loads((folder / name / "config.json").read_text())
            module.register_to_config(scaling_factor=config["scaling_factor"])
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(as_fused(state["optimizer"]))
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.judge_optimizer.load_state_dict(as_fused(state["judge_optimizer"]))
        self.load_counters(state)


@torch.no_grad()
def validate(
    vae: ODVAE, clips: Any, count: int, device: torch.device, network: Any = None
) -> tuple[dict[str, float], np.ndarray]:
    """PSNR and SSIM of posterior means on held-out clips, in memory on rounded uint8; and a picture of four.

    network: from `load_lpips`, for LPIPS too. The picture is uint8 (T, rows, columns, 3): original | reconstruction |
    error x 4.
    """
    training, scores, rows = vae.training, [], []
    metrics = {"val/psnr": psnr, "val/ssim": ssim}
    if network is not None:
        metrics["val/lpips"] = lambda original, decoded: lpips_distance(original, decoded, network)
    vae.eval()
    count = min(count, len(clips))
    for n in range(count):
        x = to_float(clips[n * len(clips) // count]["video"][None].to(device))  # of every part of a mixture
        original, decoded = to_uint8(x)[0], to_uint8(vae.decode(vae.encode(x).latent_dist.mode()).sample)[0]
        scores.append([metric(original, decoded) for metric in metrics.values()])
        if n < 4:
            rows.append(comparison(original, decoded))
    vae.train(training)
    means = np.mean(scores, axis=0).tolist()
    return dict(zip(metrics, means, strict=True)), np.concatenate(rows, axis=1)


def train(config: TrainVAEConfig) -> Path:
    """Train, or go on, to config.steps; returns the folder of the exported EMA weights."""
    accelerator = make_accelerator(config)
    if uses_deepspeed(accelerator):
        raise ValueError(
            "stage one has two models and two optimizers: launch it with DDP, configs/accelerate/ddp8.yaml"
        )
    perceptual, network, weights = lpips_networks(config, accelerator.device)
    torch.manual_seed(config.seed)
    vae = build_vae_model(config)
    check_clip(vae, config.clip)
    with main_process_first(accelerator):
        clips = open_clips(config.source, config.clip.spec(), config.seed)
        held_out: Any = []
        if config.source.val_fraction > 0:
            still = config.clip.spec(crop="center", flip=False, position="center")
            held_out = open_clips(config.source, still, 0, held_out=True)
    run_dir = Path(config.run_dir)
    check_run(run_dir, config)
    refuse_in_data(run_dir, "run_dir", config.source)
    refuse_inside(run_dir, "vae", config.model.init_from, "model.init_from")
    # a changed run may have to go back to its beginning
    going_on = bool(Checkpoints(run_dir, config.keep_checkpoints).steps()) and not config.resume.names
    if not going_on:
        initialize(vae, config)
    trainer = VAETrainer(config, accelerator, vae, perceptual)
    shape = (config.clip.num_frames, config.clip.size, config.clip.size, 3)
    empty = [{"video": torch.zeros(shape, dtype=torch.uint8)}]
    trainer.rehearse(lambda: validate(trainer.ema.module, empty, 1, accelerator.device, network))
    counts = {"videos": len(clips), "held_out": len(held_out)}
    counts |= {"damaged": len(clips.source.damaged), "short": len(clips.short)}
    log.info("%s: %s", config.source.name, ", ".join(f"{v} {k}" for k, v in counts.items()))

    def look(metrics: MetricLog) -> None:
        if accelerator.is_main_process and len(held_out):
            clip_count, device = config.val_videos, accelerator.device
            scores, picture = validate(trainer.ema.module, held_out, clip_count, device, network)
            metrics.scalars(trainer.step, scores)
            metrics.video(trainer.step, "val/original_reconstruction_error", picture)
            write_preview(run_dir / "media" / f"val_{trainer.step:08d}.mp4", picture)
            shown = f"PSNR {scores['val/psnr']:.2f} dB, SSIM {scores['val/ssim']:.4f}"
            shown += f", LPIPS {scores['val/lpips']:.4f}" if network is not None else ""
            log.info("step %d: held-out %s", trainer.step, shown)
        accelerator.wait_for_everyone()

    fit(
        trainer,
        clips,
        run_dir,
        program="train_vae",
        mode="online",
        info={
            "data": counts,
            "model": config.model.preset,
            "variant": config.model.variant,
            "start_sha256": start_digest(config),
        },
        look=look,
        look_every=config.val_every,
        export_name="vae",
        weights=weights,
        export=trainer.ema.module.save_pretrained,
        look_at_start=True,
    )
    accelerator.wait_for_everyone()
    return run_dir / "vae"
