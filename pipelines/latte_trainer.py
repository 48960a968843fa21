"""The loop of stage two: latents, noise, loss, backward, update, EMA, log, samples, save. Settings: train_latte.py."""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from data.clip import to_float, to_uint8
from data.files import read_json, sha256_of
from data.latents import LatentCache, LatentStream, read_index
from denoiser.diffusion import NUM_TRAIN_STEPS, GaussianDiffusion
from denoiser.latte import Latte
from pipelines.checkpoints import Checkpoints
from pipelines.engine import (
    accumulation_steps,
    autocast,
    finite_or_nan,
    generators,
    main_process_first,
    make_accelerator,
    send,
    uses_deepspeed,
)
from pipelines.latent_cache import cache_fingerprint, cache_folder, cached_clips, draws
from pipelines.latte_settings import TrainLatteConfig
from pipelines.log import MetricLog
from pipelines.loop import fit
from pipelines.media import grid, write_preview
from pipelines.run import check_run, refuse_in_data, refuse_inside, summary
from pipelines.settings import (
    Mode,
    check_clip,
    for_inference,
    normalization,
    open_clips,
    open_vae,
    vae_entry,
)
from pipelines.trainer import Trainer, average
from pipelines.video_pipeline import LatentVideoPipeline
from pipelines.zero import load_optimizer_state, load_weights, optimizer_state, whole_weights

log = logging.getLogger(__name__)
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS_TABLE = "y_embedder."
BUCKETS = 4  # of timesteps, whose losses are logged apart


def build_latte(config: TrainLatteConfig, vae: Any, num_classes: int | None) -> Latte:
    """The denoiser for the latents of `vae`: geometry from the VAE and the clip, size from the config."""
    side = config.clip.size // vae.spatial_compression_ratio
    geometry = {
        "in_channels": vae.config.latent_channels,
        "num_frames": vae.latent_frames(config.clip.num_frames),
        "sample_size": side,
        "num_classes": num_classes,
        "class_dropout_prob": config.denoiser.label_dropout,
    }
    d = config.denoiser
    if d.size != "custom":
        return Latte.from_size(d.size, **geometry)
    numbers = {k: getattr(d, k) for k in ("depth", "hidden_size", "num_heads", "patch_size")}
    if min(numbers.values()) < 1:
        raise ValueError(
            f"denoiser.size=custom needs denoiser.depth, hidden_size, num_heads and patch_size; got {numbers}"
        )
    return Latte(**numbers, **geometry)


def take_weights(latte: Latte, folder: str, class_names: list[str]) -> None:
    """The weights of a trained Latte of the same design; the class table too if it is of the same classes.

    folder: of a pipeline, whose class names are known, or of the denoiser alone: then as many classes are the same ones.
    Raises ValueError with what differs.
    """
    given, same = Path(folder), None
    if (given / "model_index.json").is_file():
        same = read_json(given / "model_index.json").get("class_names") == class_names
        given = given / "transformer"
    if (
        not (given / "config.json").is_file()
        or read_json(given / "config.json").get("_class_name") != "Latte"
    ):
        raise ValueError(f"denoiser.init_from={folder}: neither a pipeline nor a Latte")
    given = Latte.from_pretrained(given)
    same = given.config.num_classes == latte.config.num_classes if same is None else same
    theirs, ours = given.state_dict(), latte.state_dict()
    table = {key for key in {*theirs, *ours} if key.startswith(CLASS_TABLE)}
    differing = [
        f"{key}: {tuple(theirs[key].shape) if key in theirs else 'none'} there, "
        f"{tuple(ours[key].shape) if key in ours else 'none'} here"
        for key in sorted({*theirs, *ours} - (set() if same else table))
        if key not in theirs or key not in ours or theirs[key].shape != ours[key].shape
    ]
    if differing or given.config.patch_size != latte.config.patch_size:
        raise ValueError(
            f"denoiser.init_from={folder} is another Latte ({'; '.join(differing[:3]) or 'patch_size'})"
        )
    latte.load_state_dict({key: ours[key] if key in table and not same else theirs[key] for key in ours})
    log.info(
        "weights of %s taken as they are%s",
        folder,
        "" if same else "; other classes: their table is made anew",
    )


def start_digest(config: TrainLatteConfig) -> str | None:
    """sha256 of the weights that a run begins with; None from noise, or when they are not there any more."""
    places = (Path(config.denoiser.init_from) / name / WEIGHTS for name in ("transformer", ""))
    file = next((place for place in places if config.denoiser.init_from and place.is_file()), None)
    return sha256_of(file) if file else None


def plan(config: TrainLatteConfig) -> str:
    """Settings, sizes, cache size and schedule, for --dry-run; nothing is trained or written."""
    vae = open_vae(config.vae)
    check_clip(vae, config.clip)
    clips = cached_clips(config)
    classes = len(clips.source.class_names) or None
    with torch.device("meta"):
        latte = build_latte(config, vae, classes)
    count = sum(p.numel() for p in latte.parameters())
    fingerprint = cache_fingerprint(config, vae, clips)
    latent = (latte.config.in_channels, latte.config.num_frames, *latte.latent_hw)
    entries = len(clips) * draws(config)
    size = entries * 2 * math.prod(latent) * (4 if config.cache.dtype == "float32" else 2)
    epoch = len(clips) / config.global_batch
    accumulation_steps(config.global_batch, config.micro_batch, 1)
    return (
        f"{summary(config)}\n\nLatte {config.denoiser.size}: {count:,} parameters, latent {' x '.join(map(str, latent))}, "
        f"{classes or 'no'} classes\n{len(clips)} videos ({len(clips.short)} too short, {len(clips.source.damaged)} damaged); "
        f"cache {cache_folder(config, fingerprint)}: {entries:,} clips, {size:,} bytes\n"
        f"{config.steps:,} steps of {config.global_batch} clips, {epoch:,.1f} steps per pass over the videos, mode {config.mode.value}"
    )


class OnlineLatents:
    """mode=online: clips of the endless stream, encoded where the denoiser trains."""

    def __init__(self, vae: Any, device: torch.device):
        """vae: as `for_inference` returns it."""
        self.vae, self.device = vae, device

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = to_float(batch["video"].to(self.device, non_blocking=True))
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()


class LatteTrainer(Trainer):
    """Everything a step touches, built once, by name."""

    must_not_change = ("vae", "class_names", "normalization")

    def __init__(self, config: TrainLatteConfig, accelerator: Any, latte: Latte, vae: Any, encode: Any):
        super().__init__(config, accelerator)
        self.latte, self.vae, self.encode = latte, vae, encode
        self.ema = ModelEmaV3(latte, decay=config.ema_decay)
        if config.gradient_checkpointing:
            latte.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            latte.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(latte, optimizer)
        self.model.train()
        self.ema.to(accelerator.device)
        self.diffusion = GaussianDiffusion()

    def draw(self, batch: dict[str, Tensor], mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """What is random in a step, each sample from its own generator: posterior, noise, timestep, hidden label."""
        samples = []
        for generator in generators(self.config.seed, batch["number"]):
            shape = mean.shape[1:]
            samples.append(
                {
                    "posterior": torch.randn(shape, generator=generator),
                    "noise": torch.randn(shape, generator=generator),
                    "t": torch.randint(NUM_TRAIN_STEPS, (), generator=generator),
                    "drop": torch.rand((), generator=generator) < self.config.denoiser.label_dropout,
                }
            )
        drawn = {k: send(torch.stack([s[k] for s in samples]), mean.device) for k in samples[0]}
        z = mean + torch.exp(0.5 * logvar) * drawn.pop("posterior")
        return drawn | {"x0": self.vae.normalize(z)}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """Mean loss of a micro-batch, and the terms to log, per timestep bucket too."""
        device = self.accelerator.device
        if self.encode is None:
            mean, logvar = (batch[k].to(device, non_blocking=True) for k in ("mean", "logvar"))  # pinned
        else:
            mean, logvar = self.encode(batch)
        drawn = self.draw(batch, mean, logvar)
        t = drawn["t"]
        x_t = self.diffusion.q_sample(drawn["x0"], drawn["noise"], t)
        labels = {}
        if self.latte.config.num_classes is not None:
            labels = {"y": batch["label"].to(device, non_blocking=True), "force_drop": drawn["drop"]}
        with autocast(self.accelerator, self.config):
            output = self.model(x_t, t, **labels).sample
        terms = self.diffusion.training_loss(output, drawn["x0"], drawn["noise"], t)
        logged = {name if name == "loss" else f"loss/{name}": v.mean() for name, v in terms.items()}
        bucket = t * BUCKETS // NUM_TRAIN_STEPS
        logged |= {f"loss_at_t/{b}_of_{BUCKETS}": (terms["mse"], bucket == b) for b in range(BUCKETS)}
        return terms["loss"].mean(), logged

    def train_step(self, batches: Any) -> None:
        """One optimizer step over all micro-batches."""
        config, accelerator = self.config, self.accelerator
        self.set_learning_rate(self.optimizer)
        largest = config.grad_clip if self.step >= config.clip_start else 0.0
        if uses_deepspeed(accelerator):
            self.model.optimizer.clip_grad = largest  # it clips inside its own step
        for _ in range(accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                loss, logged = self.loss(next(batches))
                accelerator.backward(finite_or_nan(loss))
                self.note(logged)
                if accelerator.sync_gradients:
                    finite = self.update(self.model, self.optimizer, largest, "grad_norm")
        with whole_weights(self.latte):
            average(self.ema, self.latte, finite)
        self.finish_step(finite)

    def trained(self) -> list[nn.Module]:
        return [self.model]

    def try_step(self) -> None:
        """One micro-batch of empty clips or latents."""
        size, c, clip = self.config.micro_batch, self.latte.config, self.config.clip
        batch = {"number": torch.arange(size), "label": torch.zeros(size, dtype=torch.int64)}
        latents = torch.zeros(size, c.in_channels, c.num_frames, *self.latte.latent_hw)
        shape = (size, clip.num_frames, clip.size, clip.size, 3)
        batch |= {"video": torch.zeros(shape, dtype=torch.uint8)} if self.encode else {}
        self.loss(batch | {"mean": latents, "logvar": latents})[0].backward()

    def save(self, folder: Path) -> None:
        """Weights as diffusers folders, optimizer and counters in trainer.pt; every process calls it.

        The same files whatever the launch: one process, DDP or DeepSpeed, see pipelines/zero.py.
        """
        main = self.accelerator.is_main_process
        state = self.counters() | {"optimizer": optimizer_state(self.accelerator, self.model, self.optimizer)}
        with whole_weights(self.latte):
            if main:
                self.latte.save_pretrained(folder / "latte")
        if main:
            self.ema.module.save_pretrained(folder / "latte_ema")
            torch.save(state, folder / "trainer.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        load_weights(self.accelerator, self.model, load_file(folder / "latte" / WEIGHTS))
        load_optimizer_state(self.accelerator, self.model, self.optimizer, state["optimizer"])
        self.ema.module.load_state_dict(load_file(folder / "latte_ema" / WEIGHTS))
        self.load_counters(state)


def open_data(
    config: TrainLatteConfig, accelerator: Any, vae: Any
) -> tuple[Any, Any, list[str], dict[str, Any]]:
    """(endless stream, encoder or None, class names, counts) for the mode; refuses a cache of anything else."""
    with main_process_first(accelerator):
        if config.mode is Mode.online:
            clips = open_clips(config.source, config.clip.spec(), config.seed)
        else:
            clips = cached_clips(config)
    counts = {"videos": len(clips), "damaged": len(clips.source.damaged), "short": len(clips.short)}
    if config.mode is Mode.online:
        encode = OnlineLatents(for_inference(vae, accelerator.device, config.precision), accelerator.device)
        return clips, encode, clips.source.class_names, counts
    fingerprint = cache_fingerprint(config, vae, clips)
    cache = LatentCache(cache_folder(config, fingerprint), expect=fingerprint)
    counts |= {"cached": len(cache), "cache": str(cache.folder), "failed": len(cache.index["failed"])}
    return LatentStream(cache, config.seed), None, clips.source.class_names, counts


def scale_latents(vae: Any, config: TrainLatteConfig, stream: Any = None) -> None:
    """Give a VAE without a scaling rule the statistics of the run's checkpoint, else of the cache; its folder stays as it is.

    stream: of the cache in mode=cached. Online, those of a cache of this VAE in cache.dir serve. Raises ValueError without any.
    """
    if vae.has_scaling_rule:
        return
    checkpoints = Checkpoints(Path(config.run_dir), config.keep_checkpoints)
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(OSError, ValueError):  # a damaged one is told when it is to be loaded
            known = checkpoints.manifest(step).get("normalization") or {}
            if known.get("latents_mean") and known.get("latents_std"):
                return vae.set_latent_statistics(known["latents_mean"], known["latents_std"])
    index = stream.cache.index if isinstance(stream, LatentStream) else None
    if index is None and config.cache.dir and (Path(config.cache.dir) / "index.json").is_file():
        index = read_index(Path(config.cache.dir))
        if not index["complete"] or index["fingerprint"]["vae"] != vae_entry(config.vae, vae):
            index = None
    if index is None:
        raise ValueError(
            f"vae.name={config.vae.name}: its latents have no scaling rule (0.18215 fits SD's latents only); run "
            "pipelines.cache_latents with the same settings: the cache keeps their mean and std (mode=online: cache.dir=DIR of one)"
        )
    return vae.set_latent_statistics(index["statistics"]["mean"], index["statistics"]["std"])


def train(config: TrainLatteConfig) -> Path:
    """Train, or go on, to config.steps; returns the folder of the exported pipeline (EMA denoiser + VAE)."""
    accelerator = make_accelerator(config)
    vae = open_vae(config.vae)
    check_clip(vae, config.clip)
    if config.mode is Mode.online:
        scale_latents(vae, config)
    stream, encode, class_names, counts = open_data(config, accelerator, vae)
    scale_latents(vae, config, stream)
    torch.manual_seed(config.seed)
    latte = build_latte(config, vae, len(class_names) or None)
    run_dir = Path(config.run_dir)
    check_run(run_dir, config)
    refuse_in_data(run_dir, "run_dir", config.source)
    refuse_inside(run_dir, "pipeline", config.vae.path, "vae.path")
    refuse_inside(run_dir, "pipeline", config.denoiser.init_from, "denoiser.init_from")
    going_on = Checkpoints(run_dir, config.keep_checkpoints).steps() and not config.resume.names
    if config.denoiser.init_from and not going_on:
        take_weights(latte, config.denoiser.init_from, class_names)
    trainer = LatteTrainer(config, accelerator, latte, vae, encode)
    frozen = encode.vae if encode else for_inference(vae, accelerator.device, config.precision)
    pipeline, exported = (
        LatentVideoPipeline(vae=v, transformer=trainer.ema.module, class_names=class_names)
        for v in (frozen, vae)
    )

    def sample(steps: int) -> Tensor:
        n = config.samples.num_videos
        labels = [i % len(class_names) for i in range(n)] if class_names else None
        with autocast(accelerator, config):
            scale = config.samples.guidance_scale
            return pipeline(labels=labels, num_videos=n, num_steps=steps, guidance_scale=scale).videos

    trainer.rehearse((lambda: sample(2)) if config.samples.every else None)
    log.info("%s: %s", config.source.name, ", ".join(f"{v} {k}" for k, v in counts.items()))

    def look(metrics: MetricLog) -> None:
        if accelerator.is_main_process:
            videos = sample(config.samples.steps)
            if videos.isfinite().all():
                sheet = grid(list(to_uint8(videos)))
                metrics.video(trainer.step, "samples/ema", sheet)
                write_preview(run_dir / "media" / f"samples_{trainer.step:08d}.mp4", sheet)
            else:
                log.warning(
                    "step %d: the samples are not finite: no grid; the training diverges", trainer.step
                )
        accelerator.wait_for_everyone()

    fit(
        trainer,
        stream,
        run_dir,
        program="train_latte",
        mode=config.mode.value,
        info={
            "data": counts,
            "vae": vae_entry(config.vae, vae),
            "ema_decay": config.ema_decay,
            "class_names": class_names,
            "normalization": normalization(vae),
            "start_sha256": start_digest(config),
        },
        look=look,
        look_every=config.samples.every,
        export_name="pipeline",
        export=exported.save_pretrained,
    )
    accelerator.wait_for_everyone()
    return run_dir / "pipeline"
