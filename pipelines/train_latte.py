"""Stage two: train Latte on the latents of a VAE (paper 4.1), from a cache or encoded in every step.

    python -m pipelines.cache_latents --config configs/stage2/ucf101.yaml --vae odvae
    python -m pipelines.train_latte   --config configs/stage2/ucf101.yaml --vae odvae

Both programs read the same settings. The same command again resumes. Several GPUs and DeepSpeed:
accelerate launch --config_file configs/accelerate/FILE.yaml -m pipelines.train_latte ...

From top to bottom: settings, networks, loss, one step, the loop, preparation, command line.
"""

import argparse
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.clip import ClipSpec, to_uint8
from data.core.cli import run as run_program
from data.core.lazy import lazy
from data.core.option import option
from pipelines.training import folder as run_folder
from pipelines.training.config import at_least, parse
from pipelines.training.log import end_of_stage_two
from pipelines.training.settings import CacheType, Mode, Precision, ResumeConfig, SourceConfig, VAEConfig
from pipelines.training.trainer import Trainer

torch = lazy("torch")
timm = lazy("timm.utils.model_ema")
safetensors = lazy("safetensors.torch")
diffusion = lazy("denoiser.diffusion")
distributed = lazy("pipelines.training.distributed")
latents = lazy("pipelines.training.latents")
media = lazy("pipelines.media")
openers = lazy("pipelines.training.open")
plan = lazy("pipelines.plan.report")
programs = lazy("pipelines.plan.programs")
start = lazy("pipelines.training.start")
training_run = lazy("pipelines.training.run")
video_pipeline = lazy("pipelines.video_pipeline")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from denoiser.latte import Latte
    from pipelines.training.run import TrainingRun

log = logging.getLogger(__name__)
BUCKETS = 4  # of timesteps, whose errors of the noise are logged apart, as loss_at_t/0_of_4 (the least noise) to 3_of_4
FLAGS = {"--vae": "vae.name", "--vae-path": "vae.path", "--data": "source.root", "--dataset": "source.name"}


# ---- settings --------------------------------------------------------------------------------------------


@dataclass
class DenoiserConfig:
    size: str = option("XL/2", "Latte size S|B|L|XL / patch 2|4|8, or custom: the four numbers below")
    depth: int = option(0, "number of blocks (alternating spatial, temporal); size=custom only")
    hidden_size: int = option(0, "size=custom: width")
    num_heads: int = option(0, "size=custom: attention heads")
    patch_size: int = option(0, "size=custom: latent pixels of a token's side")
    init_from: str = option(
        "",
        "a trained Latte to begin with: its folder, or that of its pipeline; a table of other classes is made again",
    )
    label_dropout: float = option(0.1, "how often training hides the class, for classifier-free guidance")


@dataclass
class CacheConfig:
    dir: str = option("", "folder; empty: runs/cache/<source>-<vae>-<fingerprint>", free=True)
    crops: int = option(4, "clips drawn of each video")
    num_videos: int = option(0, "only the first N videos, to time a training; 0: all")
    flips: bool = option(False, "store each clip mirrored too (encoded from mirrored pixels)")
    dtype: CacheType = option(CacheType.float32, "of the stored moments")
    shard_size: int = option(256, "clips of a shard")
    batch: int = option(1, "clips encoded at once", free=True)


@dataclass
class SamplesConfig:
    every: int = option(10_000, "steps between grids of EMA samples; 0 disables them", free=True)
    num_videos: int = option(9, "videos of a grid, always the same noise and classes", free=True)
    steps: int = option(50, "sampling steps", free=True)
    guidance_scale: float = option(1.0, "classifier-free guidance", free=True)


@dataclass
class ValConfig:
    """The loss on clips that no step sees: those of source.val_fraction, or of another cache."""

    every: int = option(2000, "steps between validations; 0 disables them", free=True)
    num_videos: int = option(16, "held-out clips of a validation, each at four timesteps", free=True)
    latents: str = option(
        "",
        "cache of held-out clips, e.g. of source.split=test, of ucf101 of source.list_file=testlist01.txt; empty: "
        "those that source.val_fraction holds out, encoded at the start",
        free=True,
    )


@dataclass
class TrainLatteConfig:
    run_dir: str = option("runs/latte", "folder of this run", free=True)
    # How much is trained, and on how many clips at once
    seed: int = option(0, "random seed for initialization, data order, crops, noise and timesteps")
    steps: int = option(200_000, "optimizer steps", free=True)
    mode: Mode = option(
        Mode.cached, "cached latents, or online: the VAE encodes in every step (the paper's TSpeed)"
    )
    global_batch: int = option(8, "clips per step, over all processes")
    micro_batch: int = option(
        1, "clips per process and forward pass; gradient accumulation follows", free=True
    )
    # The optimizer and the moving average
    learning_rate: float = option(1e-4, "AdamW, constant")
    warmup_steps: int = option(0, "steps of linear warm-up")
    weight_decay: float = option(0.0, "of AdamW")
    grad_clip: float = option(0.1, "maximum gradient norm; 0 disables clipping")
    clip_start: int = option(
        0, "step from which gradients are clipped (Latte: 100000 on UCF101, 20000 on SkyTimelapse)"
    )
    ema_decay: float = option(0.9999, "decay of the EMA weights used for sampling")
    ema_warmup: bool = option(
        False, "let the decay rise as (1 + step) / (10 + step) up to ema_decay; the paper's is constant"
    )
    # Arithmetic, memory and time of a step
    precision: Precision = option(
        Precision.fp32, "of the denoiser, and of the VAE when it encodes: fp32|tf32|bf16"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, about a third more time", free=True
    )
    compile: bool = option(
        False,
        "torch.compile the repeated blocks: fewer and larger kernels, after minutes of compiling",
        free=True,
    )
    max_skipped: int = option(10, "steps with a non-finite gradient in a row before the run stops")
    # Groups of settings, each with a dataclass of its own
    denoiser: DenoiserConfig = option(DenoiserConfig, "")
    vae: VAEConfig = option(VAEConfig, "")
    cache: CacheConfig = option(CacheConfig, "")
    source: SourceConfig = option(lambda: SourceConfig(val_fraction=0.0), "")
    clip: ClipSpec = option(lambda: ClipSpec(num_frames=81), "")
    samples: SamplesConfig = option(SamplesConfig, "")
    val: ValConfig = option(ValConfig, "")
    resume: ResumeConfig = option(ResumeConfig, "")
    workers: int = option(4, "loader processes", free=True)
    # What is logged and kept, and how often
    log_every: int = option(50, "steps between log entries", free=True)
    log_with: str = option(
        "tensorboard", "tensorboard, and any tracker of accelerate's, e.g. tensorboard,wandb; none", free=True
    )
    save_every: int = option(10_000, "steps between checkpoints", free=True)
    keep_checkpoints: int = option(2, "newest checkpoints kept", free=True)

    def __post_init__(self):
        # Lower bounds of the numbers
        at_least(self, 1, "steps", "global_batch", "micro_batch", "log_every", "save_every", "max_skipped")
        at_least(self, 1, "cache.crops", "cache.shard_size", "cache.batch")
        at_least(self, 1, "samples.num_videos", "val.num_videos")
        at_least(self, 0, "seed", "grad_clip", "clip_start", "warmup_steps", "ema_decay")
        at_least(self, 0, "samples.every", "val.every", "source.val_fraction", "cache.num_videos")
        at_least(self, 0, "workers", "weight_decay")
        # Rules that a lower bound does not say, and settings that contradict one another
        if self.samples.every and not 2 <= self.samples.steps <= 1000:
            raise ValueError(
                f"samples.steps={self.samples.steps}: from 2 to 1000; samples.every=0 draws none"
            )
        if self.ema_decay >= 1 or self.source.val_fraction >= 1:
            raise ValueError(
                f"ema_decay={self.ema_decay}, source.val_fraction={self.source.val_fraction}: both below 1"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")
        if self.mode is Mode.cached and self.clip.flip:
            raise ValueError(
                "clip.flip=true draws again in every step; with a cache say cache.flips=true, or mode=online"
            )
        if not 0 <= self.denoiser.label_dropout < 1:
            raise ValueError(f"denoiser.label_dropout={self.denoiser.label_dropout}: must be in [0, 1)")
        if self.cache.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"cache.dtype={self.cache.dtype!r}: float32, float16 or bfloat16")


# ---- network and optimizer -------------------------------------------------------------------------------


class LatteTrainer(Trainer):
    """The denoiser and its optimizer, and what one step does with them.

    vae: frozen, for its scaling of latents. encode: an OnlineLatents, or None when batches hold cached latents.
    """

    must_not_change = ("vae", "class_names", "normalization")

    def __init__(self, config: TrainLatteConfig, accelerator: Any, latte: "Latte", vae: Any, encode: Any):
        super().__init__(config, accelerator)
        self.latte, self.vae, self.encode = latte, vae, encode
        # The copy of the weights that is averaged, before the denoiser is wrapped or compiled.
        self.ema = timm.ModelEmaV3(latte, decay=config.ema_decay)
        if config.gradient_checkpointing:
            latte.enable_gradient_checkpointing()
        if config.compile:
            distributed.compile_blocks(latte, accelerator)
        # The denoiser wrapped for this launch (DDP, DeepSpeed), and its optimizer.
        optimizer = torch.optim.AdamW(
            latte.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(latte, optimizer)
        self.model.train()
        self.ema.to(accelerator.device)
        self.diffusion = diffusion.GaussianDiffusion()

    # ---- loss --------------------------------------------------------------------------------------------

    def draw(self, batch: dict[str, "Tensor"], mean: "Tensor", logvar: "Tensor") -> dict[str, "Tensor"]:
        """Draw what is random in a step, each sample from its own generator.

        mean, logvar: (B, C, t, h, w) of the posterior. Returns scaled latents x0 and noise (B, C, t, h, w), timesteps
        t (B,), and drop (B,): whose label is hidden, for classifier-free guidance.
        """
        # One sample after the other, always in this order: the numbers of a sample never depend on its batch.
        shape, dropout = mean.shape[1:], self.config.denoiser.label_dropout
        columns: dict[str, list[Tensor]] = {"posterior": [], "noise": [], "t": [], "drop": []}
        for generator in distributed.generators(self.config.seed, batch["number"]):
            columns["posterior"].append(torch.randn(shape, generator=generator))
            columns["noise"].append(torch.randn(shape, generator=generator))
            columns["t"].append(torch.randint(diffusion.NUM_TRAIN_STEPS, (), generator=generator))
            columns["drop"].append(torch.rand((), generator=generator) < dropout)
        drawn = {name: distributed.send(torch.stack(rows), mean.device) for name, rows in columns.items()}
        # A latent is drawn from its posterior and scaled for the denoiser.
        z = mean + torch.exp(0.5 * logvar) * drawn.pop("posterior")
        return drawn | {"x0": self.vae.normalize(z)}

    def loss(self, batch: dict[str, "Tensor"]) -> tuple["Tensor", dict[str, Any]]:
        """(mean loss of a micro-batch, terms to log), the error of the noise also for each quarter of the timesteps."""
        # Latents: the posterior of each clip, from the cache or from the VAE.
        device = self.accelerator.device
        if self.encode is None:
            mean = batch["mean"].to(device, non_blocking=True).float()
            logvar = batch["logvar"].to(device, non_blocking=True).float()
        else:
            mean, logvar = self.encode(batch)

        # Noise: x_t of the forward process (DDPM, Eq. 4).
        drawn = self.draw(batch, mean, logvar)
        t = drawn["t"]
        x_t = self.diffusion.q_sample(drawn["x0"], drawn["noise"], t)

        # Prediction of the noise and its variance; error of the noise plus the variational bound.
        labels = {}
        if self.latte.config.num_classes is not None:
            labels = {"y": batch["label"].to(device, non_blocking=True), "force_drop": drawn["drop"]}
        with distributed.autocast(self.accelerator, self.config):
            output = self.model(x_t, t, **labels).sample
        terms = self.diffusion.training_loss(output, drawn["x0"], drawn["noise"], t)

        # To log: the mean of each term, and the error in each quarter of the timesteps.
        logged: dict[str, Any] = {}
        for name, value in terms.items():
            logged[name if name == "loss" else f"loss/{name}"] = value.mean()
        bucket = t * BUCKETS // diffusion.NUM_TRAIN_STEPS
        for b in range(BUCKETS):
            logged[f"loss_at_t/{b}_of_{BUCKETS}"] = terms["mse"], bucket == b
        return terms["loss"].mean(), logged

    def held_out_loss(self, model: "Callable", held_out: dict[str, "Tensor"]) -> float:
        """The mean loss on held-out latents: each clip at one timestep of every quarter, evenly spread over all clips.

        Timesteps and noise are those of every other call and of every other run. held_out: mean, logvar (N, C, t, h, w)
        of the posterior, label (N,).
        """
        device, count, losses = self.accelerator.device, len(held_out["label"]), []
        for numbers in torch.arange(count * BUCKETS).split(self.config.micro_batch):
            # Timesteps: number n is of clip n // 4, in the quarter n % 4.
            clip, bucket = numbers // BUCKETS, numbers % BUCKETS
            t = (2 * (bucket * count + clip) + 1) * diffusion.NUM_TRAIN_STEPS // (2 * BUCKETS * count)
            mean, logvar = held_out["mean"][clip].to(device), held_out["logvar"][clip].to(device)
            # Latents and noise of those numbers, from generators of their own.
            draws = distributed.generators(0, numbers.tolist())
            posterior = distributed.normal(draws, mean.shape[1:], device)
            noise = distributed.normal(draws, mean.shape[1:], device)
            x0, t = self.vae.normalize(mean + torch.exp(0.5 * logvar) * posterior), t.to(device)
            # The loss, with the true class of each clip.
            conditional = self.latte.config.num_classes is not None
            labels = {"y": held_out["label"][clip].to(device)} if conditional else {}
            with torch.no_grad(), distributed.autocast(self.accelerator, self.config):
                output = model(self.diffusion.q_sample(x0, noise, t), t, **labels).sample
            losses.append(self.diffusion.training_loss(output, x0, noise, t)["loss"])
        return torch.cat(losses).mean().item()

    # ---- one step, and the loop --------------------------------------------------------------------------

    def train_step(self, batches: "Iterator[dict[str, Any]]") -> None:
        """Make one optimizer step."""
        config, accelerator = self.config, self.accelerator
        # Learning rate, and the norm to which gradients are clipped from clip_start on.
        self.set_learning_rate(self.optimizer)
        largest = config.grad_clip if self.step >= config.clip_start else 0.0
        if distributed.uses_deepspeed(accelerator):
            self.model.optimizer.clip_grad = largest  # DeepSpeed clips inside its own step

        for _ in range(accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                # Batch, loss and backward.
                loss, logged = self.loss(next(batches))
                accelerator.backward(distributed.finite_or_nan(loss))
                self.add_to_log(logged)
                # Update after the last micro-batch, skipped on the device if a gradient is not finite.
                if accelerator.sync_gradients:
                    finite = self.update(self.model, self.optimizer, largest, "grad_norm")

        # Moving average, which is what samples.
        with distributed.whole_weights(self.latte):
            self.update_ema(self.latte, finite)
        self.finish_step(finite)

    def fit(
        self,
        run: "TrainingRun",
        held_out: "dict[str, Tensor] | None",
        sample: "Callable[[int], Tensor]",
        export: "Callable",
    ) -> None:
        """Train to config.steps: the loop of stage two. sample(steps): videos of the EMA weights."""
        validated = bool(self.config.val.latents or self.config.source.val_fraction)
        val_every = self.config.val.every if validated else 0
        if self.step == 0 and val_every:
            self.validate(run, held_out)
        # A start that was killed between a checkpoint and its samples left them to this one.
        preview = run.folder / "media" / f"samples_{self.step:08d}.mp4"
        lost = self.step > 0 and run.due(self.config.samples.every) and not preview.is_file()
        if distributed.same_everywhere(self.accelerator, lost):
            self.show_samples(run, sample)
        # One iteration is one optimizer step; run.steps() ends at config.steps or on a signal.
        for _ in run.steps():
            self.train_step(run.batches)
            run.end_step()
            # What is due after this step: log entry, held-out loss, checkpoint, samples.
            if run.due(self.config.log_every):
                run.log()
            if run.due(val_every):
                self.validate(run, held_out)
            if run.due(self.config.save_every) or run.stopping:
                run.save()
            if run.due(self.config.samples.every):
                self.show_samples(run, sample)
        # The result: averaged denoiser and VAE as one pipeline.
        run.export("pipeline", export)

    def validate(self, run: "TrainingRun", held_out: "dict[str, Tensor] | None") -> None:
        """Log the loss of the EMA weights and of the raw ones (val/loss_raw) on held-out latents, if there are any."""
        run.meter.pause()
        with distributed.whole_weights(self.latte):
            if run.main and held_out is not None:
                # The raw weights in the structure of the EMA model: without the hooks that training adds.
                network, raw = self.ema.module, dict(self.latte.named_parameters())

                def trained(*inputs: "Tensor", **labels: "Tensor") -> Any:
                    return torch.func.functional_call(network, raw, inputs, labels)

                scores = {
                    "val/loss": self.held_out_loss(network, held_out),
                    "val/loss_raw": self.held_out_loss(trained, held_out),
                }
                run.metrics.scalars(self.step, scores)
                log.info("step %d: held-out loss EMA %.4f; raw %.4f", self.step, *scores.values())
        self.accelerator.wait_for_everyone()

    def show_samples(self, run: "TrainingRun", sample: "Callable[[int], Tensor]") -> None:
        """Write a grid of samples of the EMA weights to TensorBoard and as a preview."""
        run.meter.pause()
        # Only the main process draws; the others wait below.
        if run.main:
            videos = sample(self.config.samples.steps)
            if videos.isfinite().all():
                sheet = media.grid(list(to_uint8(videos)))
                run.metrics.video(self.step, "samples/ema", sheet)
                media.write_preview(run.folder / "media" / f"samples_{self.step:08d}.mp4", sheet)
            else:
                log.warning("step %d: the samples are not finite: no grid; the training diverges", self.step)
        self.accelerator.wait_for_everyone()

    # ---- what the machinery asks for ---------------------------------------------------------------------

    def trained(self) -> list["nn.Module"]:
        return [self.model]

    def try_step(self) -> None:
        """One micro-batch of empty clips or latents."""
        size, c, clip = self.config.micro_batch, self.latte.config, self.config.clip
        batch = {"number": torch.arange(size), "label": torch.zeros(size, dtype=torch.int64)}
        # Either the clips or the latents are used, as the mode is.
        latents = torch.zeros(size, c.in_channels, c.num_frames, *self.latte.latent_hw)
        shape = (size, clip.num_frames, clip.size, clip.size, 3)
        batch |= {"video": torch.zeros(shape, dtype=torch.uint8)} if self.encode else {}
        self.loss(batch | {"mean": latents, "logvar": latents})[0].backward()

    def save(self, folder: Path) -> None:
        """Weights as diffusers folders, optimizer and counters in trainer.pt; every process calls it.

        The same files whatever the launch: one process, DDP or DeepSpeed, see pipelines/training/distributed.py.
        """
        # Gathered on every process, also where DeepSpeed has shards of them.
        main = self.accelerator.is_main_process
        state = self.counters() | {
            "optimizer": distributed.optimizer_state(self.accelerator, self.model, self.optimizer)
        }
        with distributed.whole_weights(self.latte):
            if main:
                self.latte.save_pretrained(folder / "latte")
        if main:
            self.ema.module.save_pretrained(folder / "latte_ema")
            torch.save(state, folder / "trainer.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        distributed.load_weights(
            self.accelerator, self.model, safetensors.load_file(folder / "latte" / start.WEIGHTS)
        )
        distributed.load_optimizer_state(self.accelerator, self.model, self.optimizer, state["optimizer"])
        self.ema.module.load_state_dict(safetensors.load_file(folder / "latte_ema" / start.WEIGHTS))
        self.load_counters(state)


# ---- preparation -----------------------------------------------------------------------------------------


def train(config: TrainLatteConfig) -> Path:
    """Train, or resume, to config.steps; returns the folder of the exported pipeline (EMA denoiser and VAE)."""
    accelerator = distributed.make_accelerator(config)

    # What a wrong setting can spoil is checked before anything is opened or written.
    inputs = {"vae.path": config.vae.path, "denoiser.init_from": config.denoiser.init_from}
    run_folder.check_new_run(config, "pipeline", inputs)

    # The frozen VAE, the stream of its latents, and how they are scaled.
    vae = openers.open_vae(config.vae)
    openers.check_clip(vae, config.clip)
    if config.mode is Mode.online:
        latents.scale_latents(vae, config)
    stream, encode, clips, counts = latents.open_data(config, accelerator, vae)
    class_names = clips.source.class_names
    latents.scale_latents(vae, config, stream)
    val_cache = latents.held_out_cache(config, vae, clips)
    log.info("%s", openers.counts_line(config, counts))

    # The denoiser.
    torch.manual_seed(config.seed)
    latte = start.build_latte(config, vae, len(class_names) or None)
    if config.samples.every and config.samples.guidance_scale != 1 and latte.null_label is None:
        raise ValueError(
            f"samples.guidance_scale={config.samples.guidance_scale:g}: guidance needs classes and "
            "denoiser.label_dropout above 0; samples.guidance_scale=1 draws without it"
        )
    if config.denoiser.init_from and run_folder.needs_initial_weights(config):
        start.take_latte_weights(latte, config.denoiser.init_from, class_names, vae)
    trainer = LatteTrainer(config, accelerator, latte, vae, encode)

    # Samples come from the VAE in the precision of the run; the export has its own weights.
    fast_vae = encode.vae if encode else openers.for_inference(vae, accelerator.device, config.precision)
    averaged = {"transformer": trainer.ema.module, "class_names": class_names}
    pipeline = video_pipeline.LatentVideoPipeline(vae=fast_vae, **averaged)
    pipeline.set_progress_bar_config(disable=True)
    exported = video_pipeline.LatentVideoPipeline(vae=vae, **averaged)

    def sample(steps: int) -> "Tensor":
        count, scale = config.samples.num_videos, config.samples.guidance_scale
        labels = [i % len(class_names) for i in range(count)] if class_names else None
        with distributed.autocast(accelerator, config):
            return pipeline(labels, steps, scale, num_videos=count, output_type="video").frames

    # A step and a short sampling once before the start, so that a lack of memory shows now.
    trainer.rehearse((lambda: sample(2)) if config.samples.every else None)
    # Clips for the held-out loss, encoded once.
    held_out = None
    if accelerator.is_main_process and config.val.every:
        held_out = latents.held_out(config, val_cache, fast_vae, accelerator.device)
    # What a checkpoint says of its making; must_not_change names what a resumed run must share.
    info = {
        "data": counts,
        "vae": openers.vae_entry(config.vae, vae),
        "ema_decay": config.ema_decay,
        "class_names": class_names,
        "normalization": openers.normalization(vae),
        "start_sha256": start.latte_start_digest(config),
    }
    # The run folder is locked from here to the end; real clips lie beside the samples, to compare.
    with training_run.TrainingRun(trainer, stream, "train_latte", config.mode.value, info) as run:
        real = run.folder / "media" / "real.mp4"
        if run.main and config.samples.every and not real.exists():
            tiles, names = latents.real_clips(clips, config.samples.num_videos)
            media.write_preview(real, media.grid(tiles), names)
        trainer.fit(run, held_out, sample, exported.save_pretrained)
    return run.folder / "pipeline"


# ---- command line ----------------------------------------------------------------------------------------


def config_from(argv: list[str] | None) -> tuple[TrainLatteConfig, argparse.Namespace]:
    """Read the settings of a command line, and its switches."""
    return parse(TrainLatteConfig, argv, "train_latte", __doc__, FLAGS, planned=True)


def main(argv: list[str] | None = None) -> int:
    config, args = config_from(argv)
    if args.plan:
        print(plan.plan_text("train_latte", partial(programs.stage_two, LatteTrainer), config, args.card))
    elif args.dry_run:
        print(start.describe_latte_run(config))
    else:
        end_of_stage_two(config, train(config))
    return 0


if __name__ == "__main__":
    run_program(main)
