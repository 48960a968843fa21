"""The comparisons of each kind: our way, and a peer's own or the plain way, on the same weights and inputs.

size: "tiny" (tests), "reduced" (a CPU, minutes) or "full" (a GPU). only: part of the names of the cases that are wanted.
Weights and inputs are random, from seed 0.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.bench import peers
from pipelines.bench.pairs import Case

Cases = Iterator[Case]


@dataclass
class Setup:
    """peers: {name: the module with its model}."""

    size: str
    device: torch.device
    peers: dict[str, ModuleType]
    only: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def autocast(self) -> torch.autocast:
        """For float32 weights in `dtype`, the precision in which the machine's own speed is measured."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)


# ---- the VAE's encoder and decoder -----------------------------------------------------------------------

HEADLINE = {  # width, frames, side, what
    "tiny": [(32, 5, 16, "encode decode")],
    "reduced": [(128, 9, 64, "encode decode"), (64, 17, 128, "encode"), (64, 9, 96, "decode")],
    "full": [(128, 81, 256, "encode decode"), (128, 25, 256, "encode decode")],
}
GROWTH = {"tiny": [], "reduced": [5, 17, 33, 65, 129], "full": []}  # frames of 64 x 64 at width 32


def vae(s: Setup) -> Cases:
    """Encoding and decoding by both presets; against Open-Sora-Plan's own code, or our plain network without it."""
    for width, frames, side, what in HEADLINE[s.size]:
        yield from _vae_cases(s, width, frames, side, what)
    for frames in GROWTH[s.size]:
        yield from _vae_cases(s, 32, frames, 64, "encode decode")


def _vae_cases(s: Setup, width: int, frames: int, side: int, what: str) -> Cases:
    from pipelines.plan.pretend import too_old
    from pipelines.plan.programs import encode_and_decode
    from vae import ODVAE

    names = {way: f"{way}, width {width}, {frames} x {side} x {side}" for way in what.split()}
    if not any(s.only in name for name in names.values()):
        return
    torch.manual_seed(0)
    widths = (width, 2 * width, 4 * width, 4 * width)
    released = ODVAE.preset("osp_v1_2", block_out_channels=widths).eval()
    own = ODVAE.preset("odvae", block_out_channels=widths).eval()
    own.load_state_dict(released.state_dict())
    plain = copy.deepcopy(released)
    plain.use_path("plain")
    models: dict[str, Any] = {"plain": plain, "odvae": own, "osp_v1_2": released}
    if "Open-Sora-Plan" in s.peers:
        theirs = peers.open_sora_plan(s.peers["Open-Sora-Plan"], released)
        models = {"Open-Sora-Plan": theirs, "odvae": own, "osp_v1_2": released}
    models = {name: model.to(s.device, s.dtype) for name, model in models.items()}
    first = next(iter(models))
    x = torch.rand(1, 3, frames, side, side, device=s.device, dtype=s.dtype) * 2 - 1
    z = torch.randn(
        1, 4, released.latent_frames(frames), side // 8, side // 8, device=s.device, dtype=s.dtype
    )

    @torch.no_grad()
    def encode(model: Any) -> Tensor:
        encoded = model.encode(x)
        return (encoded if hasattr(encoded, "mode") else encoded.latent_dist).mode()

    @torch.no_grad()
    def decode(model: Any) -> Tensor:
        decoded = model.decode(z)
        return decoded if isinstance(decoded, Tensor) else decoded.sample

    def build() -> Any:
        return ODVAE.preset("odvae", block_out_channels=widths).eval()

    # The floor is modelled; without it where torch is too old for that
    tasks = [] if too_old() else encode_and_decode(build, frames, side, dtype=s.dtype).tasks
    flops = {task.name: task.cost.flops for task in tasks}
    for name, way in (("encode", encode), ("decode", decode)):
        if name not in names or s.only not in names[name]:
            continue

        def same(way: Callable = way) -> dict[str, float]:
            return {"osp_v1_2": float((way(models[first]) - way(released)).abs().max())}

        runs = {label: lambda model=model, way=way: way(model) for label, model in models.items()}
        yield Case(names[name], runs, flops.get(name, 0), same=same)


# ---- the denoiser: a training step, a sampling step ------------------------------------------------------

LATTE = {"tiny": ("S/8", 3, 8), "reduced": ("S/2", 21, 16), "full": ("XL/2", 21, 32)}  # size, frames, side


def _lattes(s: Setup) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    from denoiser.latte import Latte

    torch.manual_seed(0)
    name, frames, side = LATTE[s.size]
    ours = Latte.from_size(name, num_frames=frames, sample_size=side, num_classes=101)
    for parameter in ours.parameters():  # a new Latte answers with zeros
        torch.nn.init.normal_(parameter, std=0.02)
    models = {"Latte": peers.latte(s.peers["Latte"], ours)} if "Latte" in s.peers else {}
    models["ours"] = ours
    x = torch.randn(1, 4, frames, side, side, device=s.device)
    t, y = torch.tensor([500], device=s.device), torch.tensor([3], device=s.device)
    return {name: model.to(s.device).eval() for name, model in models.items()}, x, t, y


def _noise(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """(B, 2C, t, h, w) of either model; theirs has frames before channels."""
    if type(model).__module__.startswith("denoiser"):
        return model(x, t, y).sample
    return model(x.transpose(1, 2), t, y).transpose(1, 2)


def _forward_flops(model: Any, x: Tensor, t: Tensor, y: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _noise(model, x, t, y)
    return counter.get_total_flops()


STAGE_ONE = {"tiny": (32, 5, 16), "reduced": (32, 9, 64), "full": (128, 25, 256)}  # width, frames, side


def train(s: Setup) -> Cases:
    """A step of each stage: forward, backward, Adam or AdamW; each side by its own optimizer's settings."""
    yield from _stage_one(s)
    yield from _stage_two(s)


def _stage_one(s: Setup) -> Cases:
    """The VAE's own part of a step, posterior means for samples: L1 and KL; LPIPS and the GAN are the same on both sides."""
    from vae import ODVAE

    width, frames, side = STAGE_ONE[s.size]
    title = f"stage one training step, width {width}, {frames} x {side} x {side}"
    if s.only not in title:
        return
    torch.manual_seed(0)
    released = ODVAE.preset("osp_v1_2", block_out_channels=(width, 2 * width, 4 * width, 4 * width))
    own = ODVAE.preset("odvae", block_out_channels=released.config.block_out_channels)
    own.load_state_dict(released.state_dict())
    models: dict[str, Any] = {"odvae": own, "osp_v1_2": released}
    if "Open-Sora-Plan" in s.peers:
        models = {"Open-Sora-Plan": peers.open_sora_plan(s.peers["Open-Sora-Plan"], released), **models}
    models = {name: model.to(s.device).train() for name, model in models.items()}
    x = torch.rand(1, 3, frames, side, side, device=s.device) * 2 - 1

    def loss_of(model: Any) -> Tensor:
        with s.autocast():
            encoded = model.encode(x)
            posterior = encoded if hasattr(encoded, "mode") else encoded.latent_dist
            decoded = model.decode(posterior.mode())
            video = decoded if isinstance(decoded, Tensor) else decoded.sample
        return (video.float() - x).abs().sum() + 1e-6 * posterior.kl().sum()

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model).backward()
        optimizer.step()

    def same() -> dict[str, float]:
        if len(models) < 3:
            return {}
        found = []
        for model in (models["Open-Sora-Plan"], models["osp_v1_2"]):
            model.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append((loss.item(), float(torch.nn.utils.get_total_norm(gradients))))
            model.zero_grad(set_to_none=True)
        return {"osp_v1_2": max(abs(ours / theirs - 1) for theirs, ours in zip(*found, strict=True))}

    runs = {}
    for name, model in models.items():
        fused = name != "Open-Sora-Plan"
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, betas=(0.5, 0.9), fused=fused)
        runs[name] = lambda model=model, optimizer=optimizer: step(model, optimizer)
    yield Case(title, runs, same=same)


def _stage_two(s: Setup) -> Cases:
    models, x, t, y = _lattes(s)
    target = torch.randn_like(x)

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        with s.autocast():
            loss = torch.nn.functional.mse_loss(_noise(model, x, t, y)[:, :4], target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()

    def same() -> dict[str, float]:
        with torch.no_grad():
            answers = [_noise(model, x, t, y) for model in models.values()]
        return {"ours": float((answers[0] - answers[-1]).abs().max())}

    runs = {}
    for name, model in models.items():
        fused = name == "ours"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, fused=fused)
        runs[name] = lambda model=model, optimizer=optimizer: step(model, optimizer)
    flops = 3 * _forward_flops(models["ours"], x, t, y)
    yield Case(f"Latte-{LATTE[s.size][0]} training step, {tuple(x.shape)}", runs, flops, same=same)


def sample(s: Setup) -> Cases:
    """One denoising step with guidance: conditional and unconditional in one batch."""
    from denoiser.sampling import cfg_forward

    models, x, t, y = _lattes(s)
    double = torch.cat([x, x]).transpose(1, 2), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 101)])

    def theirs() -> Tensor:
        return models["Latte"].forward_with_cfg(*double, cfg_scale=7.0)[:1].transpose(1, 2)

    def ours() -> Tensor:
        return cfg_forward(models["ours"], x, t, y, 7.0)

    runs = {"Latte": theirs, "ours": ours} if "Latte" in models else {"ours": ours}

    def quiet(run: Callable) -> Callable:
        return torch.no_grad()(s.autocast()(run))

    def same() -> dict[str, float]:
        with torch.no_grad():
            answers = [run()[:, :4] for run in runs.values()]
        return {"ours": float((answers[0] - answers[-1]).abs().max())}

    flops = 2 * _forward_flops(models["ours"], x, t, y)
    title = f"Latte-{LATTE[s.size][0]} sampling step with guidance, {tuple(x.shape)}"
    yield Case(title, {name: quiet(run) for name, run in runs.items()}, flops, same=same)


# ---- caching, data, judging ------------------------------------------------------------------------------

CACHE = {"tiny": (32, 5, 16), "reduced": (64, 9, 64), "full": (128, 81, 256)}  # width, frames, side


def cache(s: Setup) -> Cases:
    """From uint8 pixels to latents on disk, against encoding alone: the share that is not the network's."""
    from data.core.tensors import to_float
    from data.latent_writer import LatentCacheWriter
    from vae import ODVAE

    width, frames, side = CACHE[s.size]
    torch.manual_seed(0)
    model = ODVAE.preset("odvae", block_out_channels=(width, 2 * width, 4 * width, 4 * width))
    model = model.to(s.device, s.dtype).eval()
    pixels = torch.randint(0, 256, (frames, side, side, 3), dtype=torch.uint8)
    x = to_float(pixels)[None].to(s.device, s.dtype)
    with tempfile.TemporaryDirectory() as folder:
        writer = LatentCacheWriter(folder, {}, 1)

        @torch.inference_mode()
        def encode() -> Any:
            return model.encode(x).latent_dist

        @torch.inference_mode()
        def whole() -> None:
            posterior = model.encode(to_float(pixels.to(s.device))[None].to(s.dtype)).latent_dist
            rows = {"mean": posterior.mean.float().cpu(), "logvar": posterior.logvar.float().cpu()}
            ids = {name: torch.zeros(1, dtype=torch.int64) for name in ("label", "video", "draw")}
            writer.write(0, rows | ids, [])

        yield Case(f"cache a clip, {frames} x {side} x {side}", {"encode alone": encode, "ours": whole})


LATENTS = {"tiny": (8, 4, 3, 4), "reduced": (512, 4, 21, 32), "full": (768, 4, 21, 32)}  # rows, C, t, side


def data(s: Setup) -> Cases:
    """The latent cache, read at random and written, against bare safetensors; pixels to numbers."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from data.core.tensors import to_float
    from data.latent_writer import LatentCacheWriter
    from data.latents import LatentCache, LatentStream
    from data.loader import make_loader

    rows, C, t, side = LATENTS[s.size]
    torch.manual_seed(0)
    moments = {k: torch.randn(rows, C, t, side, side).bfloat16() for k in ("mean", "logvar")}
    ids = {"video": torch.arange(rows), "label": torch.zeros(rows, dtype=torch.int64)}
    ids["draw"] = torch.zeros(rows, dtype=torch.int64)
    shards = [{k: v[i : i + 256] for k, v in (moments | ids).items()} for i in range(0, rows, 256)]
    order, batch = np.random.default_rng(0).permutation(rows), 4
    size_bytes = 2 * moments["mean"].nbytes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fingerprint = {"draws": {"crops": 1, "flips": False}}
        writer = LatentCacheWriter(folder / "cache", fingerprint, rows)

        def write() -> None:
            for number, shard in enumerate(shards):
                writer.write(number, shard, [])

        def write_bare() -> None:
            for number, shard in enumerate(shards):
                save_file(shard, folder / f"bare{number}.safetensors")

        yield Case(
            f"write {rows} latents of {C} x {t} x {side} x {side}, bf16",
            {"safetensors": write_bare, "ours": write},
        )
        write(), write_bare()
        writer.finish({})

        def read_bare() -> None:
            files = [safe_open(folder / f"bare{n}.safetensors", "pt") for n in range(len(shards))]
            columns = [(f.get_slice("mean"), f.get_slice("logvar")) for f in files]
            for i in range(0, rows, batch):
                found = [columns[k // 256] for k in order[i : i + batch]]
                places = [int(k) % 256 for k in order[i : i + batch]]
                for c in (0, 1):
                    rows_read = [columns[c][k : k + 1] for columns, k in zip(found, places, strict=True)]
                    torch.cat(rows_read).float()

        cached = LatentCache(folder / "cache")

        def read(workers: int) -> None:
            numbers = [list(range(i, i + batch)) for i in range(0, rows, batch)]
            for found in make_loader(LatentStream(cached), numbers, workers):
                for column in ("mean", "logvar"):
                    found[column].float()

        runs = {
            "safetensors slices, stacked": read_bare,
            "ours": lambda: read(0),
            "ours, 2 workers": lambda: read(2),
        }
        yield Case(f"read {rows} latents at random, in batches of {batch}", runs, bytes=2 * size_bytes)
    frames = np.random.default_rng(0).integers(0, 256, (8 * t, 8 * side, 8 * side, 3), dtype=np.uint8)

    def plain() -> Tensor:
        return torch.from_numpy(frames.transpose(3, 0, 1, 2).copy()).float() / 127.5 - 1

    def same() -> dict[str, float]:
        return {"ours": float((plain() - to_float(frames)).abs().max())}

    title = "pixels to float, {} x {} x {}".format(*frames.shape[:3])
    yield Case(title, {"plain": plain, "ours": lambda: to_float(frames)}, bytes=5 * frames.nbytes, same=same)


def _from_pixels(s: Setup, network: Any, fast: Any, frames: int) -> Case:
    """Features of a clip of 128 x 128 in uint8, by cd-fvd's resizing and network and by ours."""
    from eval.i3d import to_i3d_input

    module = s.peers["cd-fvd"]
    theirs = peers.cd_fvd(module, network).to(s.device)
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 128, 128, 3), dtype=np.uint8)

    @torch.inference_mode()
    def by_them() -> Tensor:
        return theirs(module.preprocess_i3d(pixels[None]).to(s.device))

    @torch.inference_mode()
    def by_us() -> Tensor:
        return fast(to_i3d_input(torch.from_numpy(pixels).to(s.device))[None])

    def same() -> dict[str, float]:
        wanted = by_them()
        return {"ours": float((wanted - by_us()).abs().max() / wanted.abs().max())}

    return Case(
        f"I3D of a clip, {frames} x 128 x 128 in uint8", {"cd-fvd": by_them, "ours": by_us}, same=same
    )


def judge(s: Setup) -> Cases:
    """I3D against the same network unfused and, with its checkout, cd-fvd's; the interval of an FVD against every resample in full."""
    from eval import measures
    from eval.i3d import I3D
    from eval.i3d_fast import FastI3D

    torch.manual_seed(0)
    network = I3D().eval().to(s.device)
    for weight in network.parameters():
        if weight.ndim == 5:  # with torch's own the features vanish
            torch.nn.init.kaiming_normal_(weight)
    fast = FastI3D(network)
    clip = torch.rand(1, 3, 9 if s.size == "tiny" else 16, 224, 224, device=s.device) * 2 - 1

    def same() -> dict[str, float]:
        with torch.inference_mode():
            wanted = network(clip)
            return {"ours": float((wanted - fast(clip)).abs().max() / wanted.abs().max())}

    runs = {"plain": lambda: network(clip), "ours": lambda: fast(clip)}
    runs = {name: torch.inference_mode()(run) for name, run in runs.items()}
    yield Case(f"I3D of a clip, {clip.shape[2]} x 224 x 224", runs, same=same)
    if "cd-fvd" in s.peers:
        yield _from_pixels(s, network, fast, clip.shape[2])

    N, dim = (150, 60) if s.size == "tiny" else (2048, 400)
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    real, fake = (rng.standard_normal((2, N, dim)) / np.arange(1, dim + 1)) @ turn  # variances fall as k^-2
    w, v = (rng.multinomial(N, np.full(N, 1 / N), size=measures.RESAMPLES).astype(float) for _ in range(2))

    def in_full() -> None:
        for counts in zip(w, v, strict=True):
            measures._frechet(real, fake, 1, *counts)

    def short() -> None:
        measures._frechets(real, fake, 1, w, v)

    yield Case(
        f"interval of an FVD, {measures.RESAMPLES} resamples of {N}", {"in full": in_full, "ours": short}
    )


KINDS: dict[str, Callable[[Setup], Cases]] = {
    "vae": vae,
    "train": train,
    "cache": cache,
    "sample": sample,
    "data": data,
    "eval": judge,
}
