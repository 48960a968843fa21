"""Run the programs' own steps on the pretended GPU, with the settings of a run, and count what they cost.

No data and no weights are needed: networks have their sizes from the settings, or from a VAE's config.json where its
folder is there; clips and latents are empty tensors.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pipelines.plan.cards import Card, seconds
from pipelines.plan.compiled import compiled_blocks
from pipelines.plan.cost import Cost, Costs
from pipelines.plan.pretend import DEVICE, Pretended, pretended_gpu
from pipelines.training.open import imagined_vae


@dataclass
class Task:
    """One kind of work of a program. times: how often it runs in the unit that the plan states, e.g. steps of a video."""

    name: str
    cost: Cost
    times: float = 1.0


@dataclass
class Simulation:
    """unit: what the summed times make up, e.g. "step" or "video", "" for nothing. syncs: where the host waits in it.

    resident: bytes that stay, by what they are.
    """

    unit: str
    tasks: list[Task]
    syncs: list[str] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(task.cost.peak for task in self.tasks)

    def seconds(self, card: Card, tf32: bool) -> float:
        """Time of one unit on a card."""
        return sum(seconds(task.cost, card, tf32) * task.times for task in self.tasks)


@contextmanager
def _device() -> Iterator[tuple[Pretended, Costs]]:
    """The pretended GPU with a counter; accelerate believes in it too."""
    from accelerate import Accelerator

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of torch, that such tensors have no data
        gpu = stack.enter_context(pretended_gpu())
        costs = stack.enter_context(Costs())
        stack.enter_context(mock.patch.object(Accelerator, "device", DEVICE))
        stack.enter_context(compiled_blocks(costs))
        yield gpu, costs


def _measure(costs: Costs, work: Callable[[], Any]) -> Cost:
    costs.start()
    work()
    return costs.cost


def _train_step(trainer: Any, costs: Costs, batches: Iterator[Any]) -> Cost:
    """A whole optimizer step, from steps of one and of two micro-batches: the further ones cost what the second does."""
    count = trainer.config.global_batch // trainer.config.micro_batch

    def of(micro_batches: int) -> Cost:
        at, accelerator = trainer.step, trainer.accelerator
        accelerator.gradient_accumulation_steps, accelerator.step = micro_batches, 0
        cost = _measure(costs, lambda: trainer.train_step(batches))
        trainer.step = at
        return cost

    # One micro-batch, then two: the difference is what each further one costs.
    one = of(1)
    if count == 1:
        return one
    two = of(2)
    micro_batch = two.works - one.works
    for work, times in micro_batch.items():
        two.works[work] += (count - 2) * times
    two.layout_copies += (count - 2) * (two.layout_copies - one.layout_copies)
    two.operations += (count - 2) * (two.operations - one.operations)
    return two


# ---- stage one -------------------------------------------------------------------------------------------


def _perceptual(config: Any) -> Any:
    """The perceptual loss of the settings with random weights, None without one."""
    if config.loss.perceptual_weight == 0:
        return None
    import lpips

    from vae.losses import LPIPSLoss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about lpips' way to call it
        network = lpips.LPIPS(net=config.loss.perceptual_net.value, pnet_rand=True, verbose=False)
        return LPIPSLoss(network, config.gradient_checkpointing)


def stage_one_parts(
    make_trainer: Callable[..., Any],
    config: Any,
    accelerator: Any,
    where: torch.device,
    sides: tuple[int, int] | None = None,
) -> tuple[Any, Iterator[Any], dict[str, tuple]]:
    """(trainer, endless batches, {phase: (a step of it, its share of all steps)}) of train_vae without data and weights.

    where: the device on which the networks are made; the trainer moves them to the accelerator's. sides: height and width
    of clips that are not square.
    """
    from pipelines.training.settings import GANSchedule
    from pipelines.training.start import build_vae_model

    # Networks of the settings' sizes, with no weights from anywhere.
    loss, clip = config.loss, config.clip
    with where:
        perceptual = _perceptual(config)
        vae = build_vae_model(config)
        # VidTok's mix factors are made from numbers: real, they cannot be copied.
        if isinstance(next(vae.parameters()), FakeTensor):
            vae._apply(torch.empty_like)
    # The trainer, and batches of random pixels as the loader would give them.
    trainer = make_trainer(config, accelerator, vae, perceptual and perceptual.to(accelerator.device))
    shape = (config.micro_batch, clip.num_frames, *(sides or (clip.size, clip.size)), 3)
    batches = _endless(lambda: {"video": _pinned(_pixels(shape)), "number": list(range(config.micro_batch))})
    # Which kinds of steps there are, a step number of each, and how large its share of the run is.
    if trainer.discriminator is None:
        return trainer, batches, {"VAE": (0, 1.0)}
    full = loss.gan_start + loss.gan_warmup
    even = full + full % 2
    before = min(loss.gan_start, config.steps) / config.steps
    phases: dict[str, tuple[int, float]] = {"before the discriminator": (0, before)} if before else {}
    if loss.gan_schedule is GANSchedule.both:
        phases["VAE and discriminator"] = (full, 1 - before)
    elif before < 1:
        phases["VAE, with the discriminator's term"] = (even, (1 - before) / 2)
        phases["discriminator"] = (even + 1, (1 - before) / 2)
    return trainer, batches, phases


def stage_one(
    make_trainer: Callable[..., Any], config: Any, sides: tuple[int, int] | None = None
) -> Simulation:
    """A step of train_vae in each of its phases, optimizer states present.

    make_trainer: VAETrainer. config: TrainVAEConfig. sides: as of `stage_one_parts`.
    """
    from pipelines.training.distributed import make_accelerator

    accelerator = make_accelerator(config)
    with _device() as (gpu, costs):
        trainer, batches, phases = stage_one_parts(
            make_trainer, config, accelerator, torch.device("cpu"), sides
        )
        for at, _ in phases.values():  # the optimizers' states come with the first updates
            trainer.step, accelerator.gradient_accumulation_steps = at, 1
            trainer.train_step(batches)
        gpu.syncs.found.clear()
        # Each phase, from a state in which all optimizers have theirs.
        tasks = []
        for name, (at, share) in phases.items():
            trainer.step = at
            tasks.append(Task(name, _train_step(trainer, costs, batches), share))
        return Simulation("step", tasks, list(gpu.syncs.found), {"weights, optimizers, EMA": costs.live})


def _pixels(shape: tuple[int, ...]) -> Tensor:
    """Clips as the loader hands them over."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if isinstance(tensor, FakeTensor) or torch.cuda.is_available() else tensor


def _endless(make: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield make()


# ---- stage two -------------------------------------------------------------------------------------------


def _frozen(vae: Any, device: Any, precision: Any) -> Any:
    """As `for_inference`, in place: an imagined weight made from a number (SVD's mix factors) cannot be copied."""
    return (vae.bfloat16() if precision.value == "bf16" else vae).to(device)


CLASSES = {"ucf101": 101, "kinetics400": 400}  # of sources that have classes; the others' are in their files


def stage_two_parts(
    make_trainer: Callable[..., Any], config: Any, accelerator: Any, where: torch.device
) -> tuple[Any, Iterator[Any], Any]:
    """(trainer, endless batches, frozen VAE) of train_latte without data and weights. where: as of `stage_one_parts`."""
    from pipelines.training.latents import OnlineLatents
    from pipelines.training.settings import Mode
    from pipelines.training.start import build_latte

    # The frozen VAE, which also draws the sample grids, and the denoiser of its latents.
    device = accelerator.device
    vae = imagined_vae(config.vae)
    with where:
        latte = build_latte(config, vae, CLASSES.get(config.source.name))
    frozen = _frozen(vae, device, config.precision)  # also what draws the sample grids
    online = config.mode is Mode.online
    encode = OnlineLatents(frozen, device) if online else None
    trainer = make_trainer(config, accelerator, latte, vae, encode)
    # Batches: pixels for the encoder, or latents.
    B, clip = config.micro_batch, config.clip
    side = clip.size // vae.spatial_compression_ratio
    latent = (B, vae.latent_channels, vae.latent_frames(clip.num_frames), side, side)

    def batch() -> dict[str, Any]:
        one: dict[str, Any] = {"label": _pinned(torch.zeros(B, dtype=torch.int64)), "number": list(range(B))}
        if online:
            return one | {"video": _pinned(_pixels((B, clip.num_frames, clip.size, clip.size, 3)))}
        return one | {k: _pinned(0.1 * torch.randn(latent)) for k in ("mean", "logvar")}

    return trainer, _endless(batch), frozen


def stage_two(make_trainer: Callable[..., Any], config: Any) -> Simulation:
    """A step of train_latte with optimizer states present. make_trainer: LatteTrainer. config: TrainLatteConfig."""
    from pipelines.training.distributed import make_accelerator

    accelerator = make_accelerator(config)
    with _device() as (gpu, costs):
        trainer, batches, _vae = stage_two_parts(make_trainer, config, accelerator, torch.device("cpu"))
        # The first step makes the optimizer's state; the second is what all others cost.
        accelerator.gradient_accumulation_steps = 1
        trainer.train_step(batches)  # makes the optimizer's state
        gpu.syncs.found.clear()
        cost = _train_step(trainer, costs, batches)
        return Simulation(
            "step", [Task("step", cost)], list(gpu.syncs.found), {"weights, optimizer, EMA, VAE": costs.live}
        )


# ---- the VAE alone, caches, samples ----------------------------------------------------------------------


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, device=DEVICE, dtype=dtype)


def encode_and_decode(
    vae_of: Callable[[], Any],
    frames: int,
    size: int,
    batch: int = 1,
    autocast: bool = False,
    dtype: torch.dtype = torch.float32,
    decode: bool = True,
) -> Simulation:
    """encode and decode of one batch of clips. vae_of: makes the VAE; autocast: bf16; dtype: of weights and clip."""
    with _device() as (_, costs):
        vae = vae_of().to(DEVICE, dtype)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            # What is prepared once a model, before the count begins.
            x = _empty(batch, 3, frames, size, size, dtype=dtype)
            short = min(frames, sum(vae.clip_lengths))
            z = vae.encode(x[:, :, :short]).latent_dist.mode().to(dtype)  # what is prepared once a model
            if decode:
                vae.decode(z)
            del z
            # Encoding, then decoding what it gave; the clip is gone by then.
            resident = costs.live - x.nbytes
            latents: list[Tensor] = []
            cost = _measure(costs, lambda: latents.append(vae.encode(x).latent_dist.mode().to(dtype)))
            tasks = [Task("encode", cost)]
            if decode:
                z = latents.pop()
                del x
                tasks.append(Task("decode", _measure(costs, lambda: vae.decode(z).sample)))
        return Simulation("batch", tasks, [], {"weights": resident})


def benchmark(config: Any) -> Simulation:
    """benchmark: one encode and one decode of each variant. config: BenchmarkConfig."""
    from vae import ODVAE

    # Each variant alone: weights of one do not weigh on another.
    dtype = torch.bfloat16 if config.precision.value == "bf16" else torch.float32
    tasks, resident = [], {}
    for variant in config.variants:

        def build(variant: int = variant) -> Any:
            return ODVAE.preset(
                config.preset,
                variant=variant,
                block_out_channels=tuple(config.block_out_channels),
                layers_per_block=config.layers_per_block,
                norm_num_groups=config.norm_num_groups,
            ).eval()

        found = encode_and_decode(
            build, config.num_frames, config.size, config.batch, dtype=dtype, decode=config.decode
        )
        tasks += [Task(f"variant {variant}: {task.name}", task.cost) for task in found.tasks]
        resident[f"weights of variant {variant}"] = found.resident["weights"]
    return Simulation("", tasks, [], resident)


def cache(config: Any) -> Simulation:
    """cache_latents: encoding one batch of clips. config: TrainLatteConfig."""
    with _device() as (gpu, costs):
        vae = _frozen(imagined_vae(config.vae), DEVICE, config.precision)
        resident, clip = costs.live, config.clip
        with torch.inference_mode():
            shape = (config.cache.batch, 3, clip.num_frames, clip.size, clip.size)
            encode = lambda: vae.encode(_empty(*shape).to(vae.dtype))  # noqa: E731
            encode()  # what is prepared once a model
            gpu.syncs.found.clear()
            cost = _measure(costs, encode)
        tasks = [Task("encode", cost, 1 / config.cache.batch)]
        return Simulation("clip", tasks, list(gpu.syncs.found), {"VAE": resident})


def reconstruct(config: Any) -> Simulation:
    """reconstruct: a clip through the VAE. config: ReconstructConfig."""
    with _device() as (_, costs):
        vae = imagined_vae(config.vae)
        if vae.frame_rule == "4n":
            vae.enable_frame_padding()
        vae, size = vae.to(DEVICE), config.clip.size
        x = _empty(1, 3, config.clip.num_frames, size, size)
        with torch.inference_mode():
            cost = _measure(costs, lambda: vae(x, sample_posterior=False).sample)
        return Simulation("clip", [Task("reconstruct", cost)])


def _half(config: Any) -> bool:
    return config.precision.value == "bf16"


def sample(config: Any, trained: Any = None) -> Simulation:
    """sample: a denoising step of a batch and the decoding of a video. config: SampleConfig; its pipeline may be absent.

    trained: TrainLatteConfig of a pipeline that is yet to be trained.
    """
    from denoiser.latte import Latte
    from denoiser.sampling import cfg_forward
    from pipelines.training.open import tile_time
    from pipelines.training.start import build_latte
    from pipelines.video_pipeline import LatentVideoPipeline

    with _device() as (_, costs):
        # The networks, of a training that is planned or of a pipeline's folder.
        if trained:
            vae = imagined_vae(trained.vae)
            latte = build_latte(trained, vae, CLASSES.get(trained.source.name))
        else:
            geometry, _, vae_settings = _pipeline_parts(Path(config.pipeline))
            vae, latte = imagined_vae(vae_settings), Latte(**geometry)
        # As the program: frozen, in its precision, compiled if asked for.
        tile_time(vae, config.tiling_frames, "tiling_frames")
        classes, latte = latte.config.num_classes is not None, latte.to(DEVICE).eval().requires_grad_(False)
        pipe = LatentVideoPipeline(vae=_frozen(vae, DEVICE, config.precision), transformer=latte)
        if config.compile:
            latte.compile_repeated_blocks()
        resident, B = costs.live, config.batch
        shape = (latte.config.in_channels, latte.config.num_frames, *latte.latent_hw)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=_half(config)):
            # One step of the batch, and one video decoded.
            x, t = _empty(B, *shape), torch.zeros(B, dtype=torch.int64, device=DEVICE)
            y = torch.zeros(B, dtype=torch.int64, device=DEVICE) if classes else None
            one = _measure(costs, lambda: cfg_forward(latte, x, t, y, config.guidance_scale))
            pipe.decode_latents(_empty(1, *shape))  # what is prepared once a model
            two = _measure(costs, lambda: pipe.decode_latents(_empty(1, *shape)))
        tasks = [Task("denoising step of the batch", one, config.num_steps / B), Task("decode", two)]
        return Simulation("video", tasks, [], {"denoiser and VAE": resident})


def _pipeline_parts(folder: Path) -> tuple[dict[str, Any], bool, Any]:
    """(Latte's settings, has classes, VAE's settings) of a pipeline's folder; Latte-XL/2 on UCF101 with OD-VAE without one."""
    from denoiser.latte import LATTE_SIZES
    from pipelines.training.settings import VAEConfig
    from vae.registry import name_of

    file = folder / "transformer" / "config.json"
    if not file.is_file():
        return {**LATTE_SIZES["XL/2"], "num_classes": 101}, True, VAEConfig()
    config = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("_")}
    kind = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
    return (
        config,
        config.get("num_classes") is not None,
        VAEConfig(name=name_of(kind), path=str(folder / "vae")),
    )
