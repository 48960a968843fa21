"""The checks of pipelines/gpu_check.py: each is a function of the session that returns what it measured.

Networks have random weights, clips are random. A check raises, or returns {"failed": ...}, when something is wrong.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from denoiser.latte import Latte
from denoiser.sampling import cfg_forward
from eval.features import c3d_extractor, exact_float32, extract_features, i3d_extractor
from pipelines.plan.card_tools import (
    CHECKS,
    Result,
    Session,
    check,
    cleared,
    clip,
    half,
    measure,
    odvae,
    relative,
    require,
    streamed,
)
from pipelines.plan.programs import stage_one_parts, stage_two_parts
from pipelines.plan.tasks import ROWS, find_row
from pipelines.train_latte import LatteTrainer
from pipelines.train_vae import VAETrainer
from pipelines.training.distributed import make_accelerator, matrix_products
from pipelines.training.open import for_inference
from pipelines.training.settings import Precision
from pipelines.video_pipeline import LatentVideoPipeline
from vae import ODVAE

__all__ = ["CHECKS"]

# ---- is it right? ----------------------------------------------------------------------------------------


@check(25)
def ceilings(s: Session) -> Result:
    """What the card reaches: products, a copy, and convolutions of the four shapes that make up the VAE."""
    # Matrix products, in bf16 and in float32 with TF32 and without
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
    # A copy: each byte is read and written
    source = torch.empty(s.size(2**31, 2**20), dtype=torch.uint8, device=s.device).random_()
    target = torch.empty_like(source)
    moved = 2 * source.numel() / measure(s, lambda: target.copy_(source), 10)["s"]
    found["copy_tb_s"] = round(moved / 1e12, 3)
    # Convolutions of the VAE's four levels, in each layout and precision
    found["conv3d_tflops"] = {}
    for C, T, side in s.size([(128, 6, 256), (256, 6, 128), (512, 4, 64), (512, 3, 32)], [(8, 3, 16)]):
        x, w = torch.randn(1, C, T, side, side, device=s.device), torch.randn(C, C, 3, 3, 3, device=s.device)
        work = 2 * 27 * C * C * (T - 2) * side * side
        for name, dtype, layout in (
            ("bf16 contiguous", torch.bfloat16, torch.contiguous_format),
            ("bf16 channels last", torch.bfloat16, torch.channels_last_3d),
            ("tf32 channels last", torch.float32, torch.channels_last_3d),
        ):
            xx = x.to(dtype).contiguous(memory_format=layout)
            ww = w.to(dtype).contiguous(memory_format=layout)
            took = measure(s, lambda: F.conv3d(xx, ww, None, 1, (0, 1, 1)), 10)["s"]  # noqa: B023 (called here)
            found["conv3d_tflops"][f"{C} x {T} x {side}, {name}"] = round(work / took / 1e12, 1)
    return found


@check(20)
def precisions(s: Session) -> Result:
    """Encode, decode and both streams of each preset, and the baselines, in every precision, against fp32."""
    found: Result = {}
    for preset in ("odvae", "osp_v1_2"):
        vae = odvae(s, preset, block_out_channels=(32, 64, 64, 64))
        # The reference: fp32
        x = clip(s, 9, 64)
        with torch.inference_mode():
            z = vae.encode(x).latent_dist.mode()
            y = vae.decode(z).sample
            # The same under autocast, by streams, and with half-precision weights
            with half(s):
                pairs = {"autocast": (vae.encode(x).latent_dist.mode(), vae.decode(z).sample)}
                if vae.causal:
                    pairs["streams"] = streamed(vae, x, z, 4)
            for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items() if s.cuda else ():
                low = ODVAE.from_config(vae.config).to(s.device, dtype).eval()
                low.load_state_dict(vae.state_dict())
                pairs[name] = (low.encode(x.to(dtype)).latent_dist.mode(), low.decode(z.to(dtype)).sample)
        # How far each is from the reference
        for name, (a, b) in pairs.items():
            errors = found[f"{preset}, {name}"] = [round(relative(a, z), 5), round(relative(b, y), 5)]
            require(max(errors) < 0.08, f"{preset}, {name}: {errors} from fp32")
    return found


@check(25)
def same_as_cpu(s: Session) -> Result:
    """fp32 at full width against the CPU, without and with TF32; streams against whole clips, bit for bit."""
    # The reference on the CPU, then the same weights and clip on the device
    vae = odvae(s, where="cpu")
    x = torch.rand(1, 3, 9, s.size(64, 32), s.size(64, 32)) * 2 - 1
    with torch.inference_mode():
        z = vae.encode(x).latent_dist.mode()
        y = vae.decode(z).sample
        vae, x, zd = vae.to(s.device), x.to(s.device), z.to(s.device)
        found: Result = {}
        # Exact arithmetic, and what TF32 changes
        with exact_float32(s.device.type):
            found["encode, exact"] = relative(vae.encode(x).latent_dist.mode(), z)
            found["decode, exact"] = relative(vae.decode(zd).sample, y)
        whole, video = vae.encode(x).latent_dist.mode(), vae.decode(zd).sample
        found["encode, TF32 convolutions"] = relative(whole, z)
        found["decode, TF32 convolutions"] = relative(video, y)
        # Streams and a second call must give the same bits.
        pieces, frames = streamed(vae, x, zd, 3)
        found["stream equal bit for bit"] = [torch.equal(pieces, whole), torch.equal(frames, video)]
        found["repeats bit for bit"] = torch.equal(vae.encode(x).latent_dist.mode(), whole)
    for kind in ("encode", "decode"):
        require(found[f"{kind}, exact"] < 1e-3, f"{found}")
    return found


@check(10)
def beyond_int32(s: Session) -> Result:
    """A convolution and a GroupNorm of more than 2^31 elements against the same in parts."""
    C, T, side = s.size((256, 131, 256), (8, 9, 16))
    x = torch.randn(1, C, T, side, side, device=s.device, dtype=torch.bfloat16)
    w = torch.randn(8, C, 3, 3, 3, device=s.device, dtype=torch.bfloat16) / C
    # The convolution over two halves that overlap by its size in time
    y, h = F.conv3d(x, w, padding=(0, 1, 1)), T // 2
    parts = [F.conv3d(v, w, padding=(0, 1, 1)) for v in (x[:, :, : h + 2], x[:, :, h:])]
    # The last group of the norm, whose elements reach beyond 2^31
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
    rng, found = np.random.default_rng(0), {}
    # Few clips for the numbers, many for the speed
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
    found = find_row(row)
    cpu = () if s.cuda else ("compile=false", *(() if found.tf32 else ("precision=fp32",)))
    return found.config((*TINY[found.program], *cpu) if s.tiny else ())


def _train_vae(s: Session, row: str, repeats: int = 3) -> Result:
    """Each phase of stage one: seconds, peak; and the rehearsal's peak, which should be the largest of them."""
    # The trainer, a batch, and a step number of each phase
    config = _config(s, row)
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    trainer, batches, phases = stage_one_parts(VAETrainer, config, accelerator, s.device)
    one = next(batches)
    found: Result = {"rehearsal": measure(s, trainer.rehearse, 1, 0)}
    for at, _ in phases.values():  # every optimizer has its state before the first is measured
        trainer.step = at
        trainer.train_step(iter([one]))
    # Each phase in the order of a training, without its data
    for phase, (at, _) in phases.items():

        def step(at: int = at) -> None:
            trainer.step = at
            trainer.train_step(iter([one]))

        found[phase] = measure(s, step, repeats)
    # Losses that are numbers, and no step skipped
    losses = trainer.flush_window()
    found["losses"] = {name: round(loss, 4) for name, loss in losses.items()}
    require(not np.isnan(list(losses.values())).any() and "skipped" not in losses, f"{losses}")
    return found


@check(60)
def stage_one(s: Session) -> Result:
    """The paper's step of stage one in each phase: bf16, with gradient checkpointing, and fp32."""
    return _each_row(s, "train_vae", _train_vae)


@check(10)
def stage_one_too_large(s: Session) -> Result:
    """Clips that no card holds: one clear line from the rehearsal."""
    if not s.cuda or s.tiny:
        return {"skipped": "needs a GPU"}
    config = ROWS[0].config(("micro_batch=4", "global_batch=4"))
    with cleared(s):
        trainer, _, _ = stage_one_parts(VAETrainer, config, make_accelerator(config), s.device)
        try:
            trainer.rehearse()
        except ValueError as error:
            return {"message": str(error)}
    raise AssertionError("4 clips of 25 x 256 x 256 fit")


def _each_row(s: Session, program: str, measured: Callable[[Session, str], Result]) -> Result:
    """The rows of a program, each on a device that the one before has left; a failed one does not stop the others."""
    found: Result = {}
    failed = []
    for row in ROWS:
        if row.program == program:
            try:
                with cleared(s):
                    found[row.name] = measured(s, row.name)
            except Exception as error:
                found[row.name] = f"{type(error).__name__}: {error}"[:600]
                failed.append(row.name)
    if failed:
        found["failed"] = failed
    return found


def _train_latte(s: Session, row: str, repeats: int = 5) -> Result:
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
    # Whole clips by size, with and without autocast
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
    # With bf16 weights, as caching and sampling have them
    frames, size = s.size((81, 256), (9, 32))
    dtype = torch.bfloat16 if s.cuda else torch.float32
    vae = odvae(s).to(dtype)
    x, z = clip(s, frames, size, dtype), torch.randn(1, 4, (frames - 1) // 4 + 1, size // 8, size // 8)
    z = z.to(s.device, dtype)
    with torch.inference_mode():
        found["encode, bf16 weights"] = measure(s, lambda: vae.encode(x), 3)
        found["decode, bf16 weights"] = measure(s, lambda: vae.decode(z), 3)
    # The released layout, whose tensors grow beyond 2^31 elements
    released = odvae(s, "osp_v1_2")
    for frames in s.size((81, 129), (9,)):
        z = torch.randn(1, 4, (frames - 1) // 4 + 1, size // 8, size // 8, device=s.device)
        with cleared(s), torch.inference_mode(), half(s):
            try:
                key = f"osp_v1_2 decode {frames} x {size}"
                found[key] = measure(s, lambda: released.decode(z), 1, 1)  # noqa: B023 (called here)
            except RuntimeError as error:  # beyond 2^31 elements: whether it runs is the question
                found[key] = str(error)[:200]
    return found


@check(25)
def sampling(s: Session) -> Result:
    """A denoising step of four videos with guidance, a decode; and the same seeds on CPU and device at a small size."""
    # A small pipeline on the CPU and on the device: the same seeds, almost the same latents
    torch.manual_seed(0)
    kind = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
    small = Latte(**kind, in_channels=4, num_frames=3, sample_size=4, num_classes=5)
    torch.nn.init.normal_(small.final_layer.linear.weight, std=0.1)
    pipe = LatentVideoPipeline(odvae(s, where="cpu", block_out_channels=(32, 32, 32, 32)), small)
    call = {"seeds": [3, 4], "num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "latent"}
    reference = pipe([0, 1], **call).frames
    found: Result = {"latents_from_cpu": relative(pipe.to(s.device)([0, 1], **call).frames, reference)}
    require(found["latents_from_cpu"] < 5e-2, f"{found}")
    # The paper's denoiser, and a VAE ready for inference
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
    # One step of the batch with guidance, and one video decoded
    with torch.inference_mode(), half(s):
        found["denoising step of the batch"] = measure(s, lambda: cfg_forward(latte, x, t, y, 7.0), 5, 2)
        found["decode"] = measure(s, lambda: pipe.decode_latents(z), 3)
    return found


@check(20)
def busy(s: Session) -> Result:
    """Kernels, and the share of the time in which the device computes, of an encode and of a step of stage two."""
    if not s.cuda:
        return {"skipped": "needs a GPU"}
    found: Result = {}

    # Kernels of one call, after one that has chosen them
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
    x = clip(s, *s.size((81, 256), (9, 32)))
    z = torch.randn(1, 4, *s.size((21, 32, 32), (3, 4, 4)), device=s.device)
    with torch.inference_mode(), half(s):
        look("encode", lambda: vae.encode(x))
        look("decode", lambda: vae.decode(z))
    return found


# ---- the programs ----------------------------------------------------------------------------------------


def _program(*words: str, processes: int = 0, env: dict[str, str] | None = None) -> float:
    """Run a module to its end; seconds. AssertionError, with the end of what it printed, when it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes else []), "-m", *words]
    start, env = time.time(), {**os.environ, **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    end = (done.stdout + done.stderr)[-1200:]
    require(done.returncode == 0, f"{words[0]}: exit {done.returncode}: {end}")
    return round(time.time() - start, 1)


def _resume(s: Session, processes: int, env: dict[str, str]) -> Result:
    """Cache, six steps of Latte at once and as three and three: the weights of both ends compared."""
    found: Result = {"took": {}}
    with tempfile.TemporaryDirectory() as root:
        odvae(s, where="cpu", block_out_channels=(32, 32, 32, 32)).save_pretrained(f"{root}/vae")
        # A cache of the demo's videos by a small VAE
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
        # Six steps at once, and three and three
        ends = {}
        for name, stops in (("whole", [6]), ("resumed", [3, 6])):
            for steps in stops:
                words = [*settings, f"run_dir={root}/{name}", f"steps={steps}"]
                took = _program("pipelines.train_latte", *words, processes=processes, env=env)
                found["took"][f"train_latte to step {steps}, {name}"] = took
            file = f"{root}/{name}/pipeline/transformer/diffusion_pytorch_model.safetensors"
            ends[name] = load_file(file)
    # Equal weights at both ends
    found["resumed equal bit for bit"], found["largest difference"] = True, 0.0
    for key, value in ends["whole"].items():
        found["resumed equal bit for bit"] &= torch.equal(value, ends["resumed"][key])
        difference = float((value - ends["resumed"][key]).abs().max())
        found["largest difference"] = max(found["largest difference"], difference)
        require(difference < 1e-4, f"{key} differs by {difference}")
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
    file = "configs/deepspeed/zero2.json"
    return _resume(s, 1, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file})
