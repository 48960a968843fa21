"""Check on a real GPU that everything runs there, is right, and takes the memory and time that `--plan` says.

    python -m pipelines.gpu_check                      # about 6 minutes on an H100; writes docs/results/gpu/<card>-<date>.md
    python -m pipelines.gpu_check --tiny               # the same calls at small sizes, on a CPU too, in a minute
    python -m pipelines.gpu_check --only stage_one,stage_two --out DIR

Networks have random weights, clips are random; no data, no downloads. Each check prints one JSON line as soon as it is
done, so a kill loses only the check that it meets. Exit code 1 when a check fails.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.core.cli import run

GIB = 2**30
Result = dict[str, Any]


@dataclass
class Session:
    """What all checks share. predicted: {row of pipelines/plan/tasks.py: result of `predict`}, on its way."""

    tiny: bool
    out: Path
    device: Any
    predicted: dict[str, "Future[Result]"] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full


CHECKS: list[tuple[str, float, Callable[[Session], Result]]] = []


def check(seconds: float) -> Callable[[Callable[[Session], Result]], Callable[[Session], Result]]:
    """Register a check. seconds: what it takes on an H100."""

    def register(function: Callable[[Session], Result]) -> Callable[[Session], Result]:
        CHECKS.append((function.__name__, seconds, function))
        return function

    return register


# ---- measuring -------------------------------------------------------------------------------------------


def measure(s: Session, work: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> Result:
    """{"s": median seconds of a run, "peak_gib", "reserved_gib"}; memory is None on a CPU."""
    import torch

    def wait() -> None:
        if s.cuda:
            torch.cuda.synchronize()

    for _ in range(warmup):
        work()
    wait()
    if s.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    memory = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if s.cuda else (None, None)
    gib = [None if m is None else round(m / GIB, 2) for m in memory]
    return {"s": round(sorted(times)[len(times) // 2], 4), "peak_gib": gib[0], "reserved_gib": gib[1]}


def relative(found: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference, in float64; NaN stays NaN."""
    found, reference = found.double().cpu(), reference.double().cpu()
    return float((found - reference).norm() / reference.norm())


def require(ok: bool, what: str) -> None:
    if not ok:
        raise AssertionError(what)


def odvae(s: Session, preset: str = "odvae", where: Any = None, **settings: Any) -> Any:
    """An OD-VAE with random weights, made on the device itself: a CPU needs seconds for it."""
    import torch

    from vae import ODVAE

    torch.manual_seed(0)
    if s.tiny:
        settings = {"block_out_channels": (32, 32, 32, 32), **settings}
    with torch.device(where or s.device):
        return ODVAE.preset(preset, **settings).eval().requires_grad_(False)


def clip(s: Session, frames: int, size: int, dtype: Any = None) -> Any:
    import torch

    return torch.rand(1, 3, frames, size, size, device=s.device).mul_(2).sub_(1).to(dtype or torch.float32)


def half(s: Session, on: bool = True) -> Any:
    """bf16 autocast on a GPU; nothing on a CPU, where such convolutions take minutes."""
    import torch

    return torch.autocast(s.device.type, torch.bfloat16, enabled=on and s.cuda)


def predict(row: str) -> Result:
    """{"task": {"peak_gib", "s" by card}} of a row of pipelines/plan/tasks.py, in a process that sees no GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from pipelines.plan.cards import CARDS, seconds
    from pipelines.plan.tasks import ROWS, simulate

    torch.set_num_threads(1)
    found = next(r for r in ROWS if r.name == row)
    simulation = simulate(found.program, found.config())
    return {
        task.name: {
            "peak_gib": round(task.cost.peak / GIB, 2),
            "kernels": task.cost.kernels,
            "s": {name: round(seconds(task.cost, card, found.tf32), 4) for name, card in CARDS.items()},
        }
        for task in simulation.tasks
    }


# ---- is it right? ----------------------------------------------------------------------------------------


@check(25)
def ceilings(s: Session) -> Result:
    """What the card reaches: products, a copy, and convolutions of the four shapes that make up the VAE."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    n = s.size(8192, 256)
    a = torch.randn(n, n, device=s.device, dtype=torch.bfloat16)
    found: Result = {
        "matmul_tflops": {"bf16": round(2 * n**3 / measure(s, lambda: a @ a, 10)["s"] / 1e12, 1)}
    }
    b = a.float()
    for name in ("highest", "high"):
        torch.set_float32_matmul_precision(name)
        found["matmul_tflops"][f"fp32 {name}"] = round(2 * n**3 / measure(s, lambda: b @ b, 5)["s"] / 1e12, 1)
    torch.set_float32_matmul_precision("highest")
    source = torch.empty(s.size(2**31, 2**20), dtype=torch.uint8, device=s.device).random_()
    target = torch.empty_like(source)
    moved = 2 * source.numel() / measure(s, lambda: target.copy_(source), 10)["s"]
    found["copy_tb_s"] = round(moved / 1e12, 3)
    found["conv3d_tflops"] = {}
    for C, T, side in s.size([(128, 6, 256), (256, 6, 128), (512, 4, 64), (512, 3, 32)], [(8, 3, 16)]):
        x, w = torch.randn(1, C, T, side, side, device=s.device), torch.randn(C, C, 3, 3, 3, device=s.device)
        work = 2 * 27 * C * C * (T - 2) * side * side
        for name, dtype, last in (
            ("bf16 contiguous", torch.bfloat16, False),
            ("bf16 channels last", torch.bfloat16, True),
            ("tf32 channels last", torch.float32, True),
        ):
            layout = torch.channels_last_3d if last else torch.contiguous_format
            xx, ww = (v.to(dtype).contiguous(memory_format=layout) for v in (x, w))
            took = measure(s, lambda: F.conv3d(xx, ww, None, 1, (0, 1, 1)), 10)["s"]  # noqa: B023 (called here)
            found["conv3d_tflops"][f"{C} x {T} x {side}, {name}"] = round(work / took / 1e12, 1)
    return found


@check(20)
def precisions(s: Session) -> Result:
    """Encode, decode and both streams of each preset, and the baselines, in every precision, against fp32."""
    import torch

    from vae import ODVAE

    found: Result = {}
    for preset in ("odvae", "osp_v1_2"):
        vae = odvae(s, preset, block_out_channels=(32, 64, 64, 64))
        x = clip(s, 9, 64)
        with torch.inference_mode():
            z = vae.encode(x).latent_dist.mode()
            y = vae.decode(z).sample
            with half(s):
                pairs = {"autocast": (vae.encode(x).latent_dist.mode(), vae.decode(z).sample)}
                if vae.causal:
                    pieces = [p.mode() for p in vae.stream_encode(x.split(4, dim=2))]
                    frames = list(vae.stream_decode(z.split(1, dim=2)))
                    pairs["streams"] = (torch.cat(pieces, dim=2), torch.cat(frames, dim=2))
            for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items() if s.cuda else ():
                low = ODVAE.from_config(vae.config).to(s.device, dtype).eval()
                low.load_state_dict(vae.state_dict())
                pairs[name] = (low.encode(x.to(dtype)).latent_dist.mode(), low.decode(z.to(dtype)).sample)
        for name, (a, b) in pairs.items():
            errors = found[f"{preset}, {name}"] = [round(relative(a, z), 5), round(relative(b, y), 5)]
            require(max(errors) < 0.08, f"{preset}, {name}: {errors} from fp32")
    return found


@check(25)
def same_as_cpu(s: Session) -> Result:
    """fp32 at full width against the CPU, without and with TF32; streams against whole clips, to the bit."""
    import torch

    from eval.features import exact_float32

    vae = odvae(s, where="cpu")
    x = torch.rand(1, 3, 9, s.size(64, 32), s.size(64, 32)) * 2 - 1
    with torch.inference_mode():
        z = vae.encode(x).latent_dist.mode()
        y = vae.decode(z).sample
        vae, x, zd = vae.to(s.device), x.to(s.device), z.to(s.device)
        found: Result = {}
        with exact_float32(s.device.type):
            found["encode, exact"] = relative(vae.encode(x).latent_dist.mode(), z)
            found["decode, exact"] = relative(vae.decode(zd).sample, y)
        whole, video = vae.encode(x).latent_dist.mode(), vae.decode(zd).sample
        found["encode, TF32 convolutions"] = relative(whole, z)
        found["decode, TF32 convolutions"] = relative(video, y)
        pieces = torch.cat([p.mode() for p in vae.stream_encode(x.split(3, dim=2))], dim=2)
        frames = torch.cat(list(vae.stream_decode(zd.split(1, dim=2))), dim=2)
        found["stream equal to the bit"] = [torch.equal(pieces, whole), torch.equal(frames, video)]
        found["repeats to the bit"] = torch.equal(vae.encode(x).latent_dist.mode(), whole)
    for kind in ("encode", "decode"):
        require(found[f"{kind}, exact"] < 1e-3, f"{found}")
    return found


@check(10)
def beyond_int32(s: Session) -> Result:
    """A convolution and a GroupNorm of more than 2^31 elements against the same in parts."""
    import torch
    import torch.nn.functional as F

    C, T, side = s.size((256, 131, 256), (8, 9, 16))
    x = torch.randn(1, C, T, side, side, device=s.device, dtype=torch.bfloat16)
    w = torch.randn(8, C, 3, 3, 3, device=s.device, dtype=torch.bfloat16) / C
    y, h = F.conv3d(x, w, padding=(0, 1, 1)), T // 2
    parts = [F.conv3d(v, w, padding=(0, 1, 1)) for v in (x[:, :, : h + 2], x[:, :, h:])]
    group = F.group_norm(x, 8)[0, -C // 8 :]
    values = x[0, -C // 8 :].float()
    found = {
        "elements_of_2^31": round(x.numel() / 2**31, 3),
        "convolution": relative(y, torch.cat(parts, dim=2)),
        "last group of the norm": relative(group, (values - values.mean()) / values.std(unbiased=False)),
    }
    require(found["convolution"] < 1e-2 and found["last group of the norm"] < 2e-2, f"{found}")
    return found


@check(25)
def judges(s: Session) -> Result:
    """I3D and C3D on the device against the CPU: TF32 must be off. And clips a second."""
    import numpy as np
    import torch

    from eval.features import c3d_extractor, extract_features, i3d_extractor

    rng, found = np.random.default_rng(0), {}
    few = [rng.integers(0, 255, (16, 64, 64, 3), dtype=np.uint8) for _ in range(2)]
    many = few * s.size(32, 1)
    for name, make in (("i3d", i3d_extractor), ("c3d", c3d_extractor)):
        reference = torch.from_numpy(extract_features(few, make("random:0", "cpu"), 2))
        network = make("random:0", s.device)
        difference = relative(torch.from_numpy(extract_features(few, network, 2)), reference)
        took = measure(s, lambda: extract_features(many, network, 8), 1)["s"]  # noqa: B023 (called here)
        found[name] = {"difference": difference, "clips_per_s": round(len(many) / took, 1)}
        require(difference < 1e-4, f"{name}: {found[name]}")
    return found


# ---- does it fit, and how fast is it? --------------------------------------------------------------------


@contextlib.contextmanager
def _cleared(s: Session) -> Iterator[None]:
    import torch

    try:
        yield
    finally:
        gc.collect()
        if s.cuda:
            torch.cuda.empty_cache()


TINY = {
    "train_vae": (
        "model.block_out_channels=[32,32,32,32]",
        "clip.num_frames=9",
        "clip.size=32",
        "loss.discriminator_width=8",
    ),
    "train_latte": (
        "clip.num_frames=9",
        "clip.size=64",
        "denoiser.size=custom",
        "denoiser.depth=2",
        "denoiser.hidden_size=32",
        "denoiser.num_heads=2",
        "denoiser.patch_size=2",
    ),
}


def _config(s: Session, row: str) -> Any:
    from pipelines.plan.tasks import ROWS

    found = next(r for r in ROWS if r.name == row)
    cpu = () if s.cuda or found.tf32 else ("precision=fp32",)
    return found.config((*TINY[found.program], *cpu) if s.tiny else ())


def _train_vae(s: Session, row: str, repeats: int = 3) -> Result:
    """Each phase of stage one: seconds, peak; and the rehearsal's peak, which should be the largest of them."""
    import torch

    from pipelines.plan.programs import stage_one_parts
    from pipelines.train_vae import VAETrainer
    from pipelines.training.distributed import make_accelerator

    config = _config(s, row)
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    trainer, batches, phases = stage_one_parts(VAETrainer, config, accelerator, s.device)
    one = next(batches)
    found: Result = {"rehearsal": measure(s, trainer.rehearse, 1, 0)}
    for at, _ in phases.values():  # every optimizer has its state before the first is measured
        trainer.step = at
        trainer.train_step(iter([one]))
    for phase, (at, _) in phases.items():

        def step(at: int = at) -> None:
            trainer.step = at
            trainer.train_step(iter([one]))

        found[phase] = measure(s, step, repeats)
    losses = trainer.flush_window()
    found["losses"] = {k: round(v, 4) for k, v in losses.items()}
    require(all(v == v for v in losses.values()) and "skipped" not in losses, f"{losses}")
    return found


@check(60)
def stage_one(s: Session) -> Result:
    """The paper's step of stage one in each phase: bf16, with gradient checkpointing, and fp32."""
    return _each_row(s, "train_vae", _train_vae)


@check(10)
def stage_one_too_large(s: Session) -> Result:
    """Clips that no card holds: one clear line from the rehearsal."""
    from pipelines.plan.programs import stage_one_parts
    from pipelines.plan.tasks import ROWS
    from pipelines.train_vae import VAETrainer
    from pipelines.training.distributed import make_accelerator

    if not s.cuda or s.tiny:
        return {"skipped": "needs a GPU"}
    config = ROWS[0].config(("micro_batch=4", "global_batch=4"))
    with _cleared(s):
        trainer, _, _ = stage_one_parts(VAETrainer, config, make_accelerator(config), s.device)
        try:
            trainer.rehearse()
        except ValueError as error:
            return {"message": str(error)}
    raise AssertionError("4 clips of 25 x 256 x 256 fit")


def _each_row(s: Session, program: str, measured: Callable[[Session, str], Result]) -> Result:
    """The rows of a program, each on a device that the one before has left; a failed one does not stop the others."""
    from pipelines.plan.tasks import ROWS

    found: Result = {}
    failed = []
    for row in ROWS:
        if row.program == program:
            try:
                with _cleared(s):
                    found[row.name] = measured(s, row.name)
            except Exception as error:
                found[row.name] = f"{type(error).__name__}: {error}"[:600]
                failed.append(row.name)
    if failed:
        found["failed"] = failed
    return found


def _train_latte(s: Session, row: str, repeats: int = 5) -> Result:
    import torch

    from pipelines.plan.programs import stage_two_parts
    from pipelines.train_latte import LatteTrainer
    from pipelines.training.distributed import make_accelerator, matrix_products

    config = _config(s, row)
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    trainer, batches, _vae = stage_two_parts(LatteTrainer, config, accelerator, s.device)
    one = next(batches)
    with matrix_products(config):
        found = measure(s, lambda: trainer.train_step(iter([one])), repeats, 2)
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train_step(iter([one]))
        # until the host is free: the device may still work
        found["host_s"] = round(time.perf_counter() - start, 4)
    found["host_cpu_s"] = round(time.process_time() - cpu, 4)
    found["loss"] = round(trainer.flush_window()["loss"], 4)
    require(found["loss"] == found["loss"], f"{found}")
    return {"step": found}


@check(90)
def stage_two(s: Session) -> Result:
    """Latte-XL/2 on latents of 81 frames: batches, checkpointing, precisions, with the encoder in the step."""
    return _each_row(s, "train_latte", _train_latte)


@check(40)
def vae_sizes(s: Session) -> Result:
    """Seconds and peak of encode and decode by size and precision, and of the released layout at the int32 border."""
    import torch

    found: Result = {}
    vae = odvae(s)
    for frames, size, repeats in s.size([(81, 256, 3), (25, 512, 2), (321, 256, 1)], [(9, 32, 1)]):
        z = torch.randn(1, 4, (frames - 1) // 4 + 1, size // 8, size // 8, device=s.device)
        for name, on in (("bf16 autocast", True), ("fp32", False)):
            if on or frames == 81:
                with torch.inference_mode(), half(s, on):
                    x = clip(s, frames, size)
                    key = f"{frames} x {size}, {name}"
                    found[f"encode {key}"] = measure(s, lambda: vae.encode(x), repeats)  # noqa: B023
                    found[f"decode {key}"] = measure(s, lambda: vae.decode(z), repeats)  # noqa: B023
    frames, size = s.size((81, 256), (9, 32))
    dtype = torch.bfloat16 if s.cuda else torch.float32
    vae = odvae(s).to(dtype)
    x, z = clip(s, frames, size, dtype), torch.randn(1, 4, (frames - 1) // 4 + 1, size // 8, size // 8)
    z = z.to(s.device, dtype)
    with torch.inference_mode():
        found["encode, bf16 weights"] = measure(s, lambda: vae.encode(x), 3)
        found["decode, bf16 weights"] = measure(s, lambda: vae.decode(z), 3)
    released = odvae(s, "osp_v1_2")
    for frames in s.size((81, 129), (9,)):
        z = torch.randn(1, 4, (frames - 1) // 4 + 1, size // 8, size // 8, device=s.device)
        with _cleared(s), torch.inference_mode(), half(s):
            try:
                key = f"osp_v1_2 decode {frames} x {size}"
                found[key] = measure(s, lambda: released.decode(z), 1, 1)  # noqa: B023 (called here)
            except RuntimeError as error:  # beyond 2^31 elements: whether it runs is the question
                found[key] = str(error)[:200]
    return found


@check(25)
def sampling(s: Session) -> Result:
    """A denoising step of four videos with guidance, a decode; and the same seeds on CPU and device at a small size."""
    import torch

    from denoiser.latte import Latte
    from denoiser.sampling import cfg_forward
    from pipelines.training.open import for_inference
    from pipelines.training.settings import Precision
    from pipelines.video_pipeline import LatentVideoPipeline

    torch.manual_seed(0)
    kind = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
    small = Latte(**kind, in_channels=4, num_frames=3, sample_size=4, num_classes=5)
    torch.nn.init.normal_(small.final_layer.linear.weight, std=0.1)
    pipe = LatentVideoPipeline(odvae(s, where="cpu", block_out_channels=(32, 32, 32, 32)), small)
    call = {"labels": [0, 1], "seeds": [3, 4], "num_steps": 8, "guidance_scale": 4.0}
    reference = pipe(**call).latents
    found: Result = {"latents_from_cpu": relative(pipe.to(s.device)(**call).latents, reference)}
    require(found["latents_from_cpu"] < 5e-2, f"{found}")
    with torch.device(s.device):
        full = {"in_channels": 4, "num_frames": 21, "sample_size": 32, "num_classes": 101}
        latte = small if s.tiny else Latte.from_size("XL/2", **full)
    latte = latte.to(s.device).eval().requires_grad_(False)
    B, shape = s.size(4, 2), (latte.config.in_channels, latte.config.num_frames, *latte.latent_hw)
    x, z = torch.randn(B, *shape, device=s.device), torch.randn(1, *shape, device=s.device)
    t = torch.full((B,), 500, device=s.device)
    y = torch.arange(B, device=s.device)
    frozen = for_inference(odvae(s), s.device, Precision.bf16 if s.cuda else Precision.fp32)
    pipe = LatentVideoPipeline(vae=frozen, transformer=latte)
    with torch.inference_mode(), half(s):
        found["denoising step of the batch"] = measure(s, lambda: cfg_forward(latte, x, t, y, 7.0), 5, 2)
        found["decode"] = measure(s, lambda: pipe.decode_latents(z), 3)
    return found


@check(20)
def busy(s: Session) -> Result:
    """Kernels, and the share of the time in which the device computes, of an encode and of a step of stage two."""
    import torch

    if not s.cuda:
        return {"skipped": "needs a GPU"}
    from torch.profiler import ProfilerActivity, profile

    found: Result = {}

    def look(name: str, work: Callable[[], Any]) -> None:
        work()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = sum(e.device_time_total for e in events) / 1e6
        found[name] = {"wall_s": round(wall, 4), "kernels": len(events), "kernel_s": round(kernels, 4)}
        table = profiler.key_averages().table(
            sort_by="cuda_time_total", row_limit=25, max_name_column_width=90
        )
        (s.out / f"profile-{name}.txt").write_text(table)

    vae = odvae(s)
    x, z = (
        clip(s, *s.size((81, 256), (9, 32))),
        torch.randn(1, 4, *s.size((21, 32, 32), (3, 4, 4)), device=s.device),
    )
    with torch.inference_mode(), half(s):
        look("encode", lambda: vae.encode(x))
        look("decode", lambda: vae.decode(z))
    return found


# ---- the programs ----------------------------------------------------------------------------------------


def _program(*words: str, processes: int = 0, env: dict[str, str] | None = None) -> float:
    """Run a module to its end; seconds. AssertionError, with the end of what it printed, when it fails."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    )
    start = time.time()
    done = subprocess.run(
        [sys.executable, *launch, "-m", *words],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **(env or {})},
    )
    require(
        done.returncode == 0, f"{words[0]}: exit {done.returncode}: {(done.stdout + done.stderr)[-1200:]}"
    )
    return round(time.time() - start, 1)


def _resume(s: Session, processes: int, env: dict[str, str]) -> Result:
    """Cache, six steps of Latte at once and as three and three: the weights of both ends compared."""
    import torch
    from safetensors.torch import load_file

    found: Result = {"took": {}}
    with tempfile.TemporaryDirectory() as root:
        odvae(s, where="cpu", block_out_channels=(32, 32, 32, 32)).save_pretrained(f"{root}/vae")
        settings = [
            "source.name=demo",
            "source.demo_videos=16",
            "clip.num_frames=9",
            "clip.size=32",
            "denoiser.size=custom",
            "denoiser.depth=2",
            "denoiser.hidden_size=64",
            "denoiser.num_heads=2",
            "denoiser.patch_size=1",
            "samples.every=0",
            "workers=2",
            "log_every=1",
            "save_every=100",
            "global_batch=4",
            "micro_batch=2",
            "cache.crops=1",
            f"precision={'bf16' if s.cuda else 'fp32'}",
            f"vae.path={root}/vae",
            f"cache.dir={root}/cache",
            f"source.index_dir={root}/index",
        ]
        found["took"]["cache_latents"] = _program("pipelines.cache_latents", *settings)
        ends = {}
        for name, stops in (("whole", [6]), ("resumed", [3, 6])):
            for steps in stops:
                words = [*settings, f"run_dir={root}/{name}", f"steps={steps}"]
                took = _program("pipelines.train_latte", *words, processes=processes, env=env)
                found["took"][f"train_latte to step {steps}, {name}"] = took
            file = f"{root}/{name}/pipeline/transformer/diffusion_pytorch_model.safetensors"
            ends[name] = load_file(file)
    pairs = [(value, ends["resumed"][key]) for key, value in ends["whole"].items()]
    found["resumed equal to the bit"] = all(torch.equal(a, b) for a, b in pairs)
    found["largest difference"] = max(float((a - b).abs().max()) for a, b in pairs)
    require(found["largest difference"] < 1e-4, f"{found}")
    return found


@check(75)
def programs(s: Session) -> Result:
    """cache_latents, train_latte and its resume as programs of their own; on a GPU through torchrun and NCCL."""
    return _resume(s, 1 if s.cuda else 0, {})


@check(80)
def programs_zero2(s: Session) -> Result:
    """The same under DeepSpeed's ZeRO-2."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        return {"skipped": str(error)}
    if s.tiny and not s.cuda:
        return {"skipped": "needs a GPU"}
    env = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero2.json",
    }
    return _resume(s, 1, env)


# ---- the program and its page ----------------------------------------------------------------------------


def versions(s: Session) -> Result:
    import torch

    from eval.records import git_commit

    card = torch.cuda.get_device_name() if s.cuda else "cpu"
    found = {"card": card, "torch": torch.__version__, "python": sys.version.split()[0], "git": git_commit()}
    if s.cuda:
        found |= {
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / GIB, 1),
        }
    return found | {"command": " ".join(["python -m pipelines.gpu_check", *sys.argv[1:]])}


def page(s: Session, about: Result, rows: list[Result], predictions: dict[str, Result]) -> str:
    """The results as Markdown: predicted beside measured, then every check's figures."""
    from pipelines.plan.cards import find_card

    lines = [f"# GPU check: {about['card']}, {time.strftime('%Y-%m-%d')}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in about.items() if k not in ("card", "command")) + ".", ""]
    lines += [f"Command: `{about['command']}`. Random weights and clips; medians; one card, one process.", ""]
    measured = {k: v for row in rows for k, v in row.items() if k in predictions and isinstance(v, dict)}
    sample_row = next((r for r in rows if r["check"] == "sampling"), {})
    measured |= {name: sample_row for name in predictions if name.startswith("sampling")}
    sizes = next((r for r in rows if r["check"] == "vae_sizes"), {})
    measured |= {
        name: {"encode": sizes.get("encode, bf16 weights")}
        for name in predictions
        if name.startswith("caching")
    }
    if predictions:
        card = find_card("").name
        lines += [
            f"Predicted by the planner for {card} (modelled) beside measured:",
            "",
            "| task | part | GiB predicted | GiB measured | ms predicted | ms measured |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, parts in predictions.items():
            for part, value in parts.items():
                got = (measured.get(name) or {}).get(part) or {}
                shown = [value["peak_gib"], got.get("peak_gib", "not run"), round(1000 * value["s"][card], 1)]
                shown.append(round(1000 * got["s"], 1) if "s" in got else "not run")
                lines.append(f"| {name} | {part} | " + " | ".join(map(str, shown)) + " |")
        lines.append("")
    for row in rows:
        state = "passed" if row["ok"] else ("left out" if row["ok"] is None else "FAILED")
        lines += [f"## {row['check']}: {state}, {row['seconds']} s", "", "```json"]
        body = {k: v for k, v in row.items() if k not in ("check", "ok", "seconds")}
        lines += [json.dumps(body, indent=1), "```", ""]
    return "\n".join(lines)


def run_checks(s: Session, chosen: list[str], limit: float) -> list[Result]:
    """Run the checks in turn, a JSON line each; none begins that would end after `limit` seconds."""
    began, rows = time.time(), []
    with open(s.out / "gpu_check.jsonl", "w") as file:
        for name, expected, function in sorted(
            (c for c in CHECKS if c[0] in chosen), key=lambda c: chosen.index(c[0])
        ):
            start, row = time.time(), {"check": name}
            if not s.tiny and start - began + 0.7 * expected > limit:
                row |= {"ok": None, "note": f"{start - began:.0f} of {limit:.0f} s are spent"}
            else:
                try:
                    with _cleared(s):
                        result = function(s)
                    row |= {"ok": not result.get("failed"), **result}
                except Exception as error:  # the next check runs all the same
                    where = traceback.format_exc(limit=-3)[-900:]
                    row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500], "where": where}
            row["seconds"] = round(time.time() - start, 1)
            line = json.dumps(row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.gpu_check", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too: a rehearsal")
    parser.add_argument("--only", default="", help="checks, separated by commas, in this order; default: all")
    parser.add_argument(
        "--out", default="", help="folder of the results; default: docs/results/gpu, --tiny: a new one"
    )
    parser.add_argument("--seconds", type=float, default=540, help="no check begins that would end later")
    parser.add_argument(
        "--no-predictions", action="store_true", help="do not run the planner beside the checks"
    )
    args = parser.parse_args(argv)
    names = [name for name, _, _ in CHECKS]
    chosen = args.only.split(",") if args.only else names
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(f"--only {','.join(unknown)}: the checks are {', '.join(names)}")
    import torch

    if not (args.tiny or torch.cuda.is_available()):
        raise ValueError("no CUDA device is here; --tiny rehearses the checks on a CPU")
    root = Path(__file__).resolve().parent.parent
    os.chdir(root)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    default = Path(tempfile.mkdtemp(prefix="gpu_check-")) if args.tiny else root / "docs/results/gpu"
    out = Path(args.out).resolve() if args.out else default
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    session = Session(args.tiny, out, device)
    about = versions(session)
    print(json.dumps(about), flush=True)
    with contextlib.ExitStack() as stack:
        if not (args.tiny or args.no_predictions):
            import multiprocessing

            from pipelines.plan.tasks import ROWS

            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(4, mp_context=spawn))
            session.predicted = {row.name: pool.submit(predict, row.name) for row in ROWS}
        rows = run_checks(session, chosen, args.seconds)
        predictions = {}
        for name, future in session.predicted.items():
            try:
                predictions[name] = future.result(timeout=60)
            except Exception as error:
                print(
                    json.dumps({"prediction": name, "error": f"{type(error).__name__}: {error}"[:300]}),
                    flush=True,
                )
    with open(out / "gpu_check.jsonl", "a") as file:
        file.write(json.dumps({"about": about, "predictions": predictions}) + "\n")
    short = "".join(c if c.isalnum() else "-" for c in about["card"].lower().removeprefix("nvidia "))
    name = f"{short}-{time.strftime('%Y-%m-%d')}"
    os.replace(out / "gpu_check.jsonl", out / f"{name}.jsonl")
    (out / f"{name}.md").write_text(page(session, about, rows, predictions))
    failed = [row["check"] for row in rows if row["ok"] is False]
    print(
        f"{len(rows)} checks, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}; {out}/{name}.md"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    # Under its own name: the predicting processes import it from there.
    from pipelines.gpu_check import main as program

    run(program)
