"""Every VAE, the denoiser and the judges follow CUDA's dtype rules, in every precision and every way to be called."""

import pytest
import torch
from diffusers import DDPMScheduler

from denoiser.latte import Latte
from eval.c3d import C3D
from eval.i3d import I3D
from eval.i3d_fast import FastI3D
from pipelines.training.open import for_inference
from pipelines.training.settings import Precision
from pipelines.video_pipeline import LatentVideoPipeline
from tests.unit.vae.test_baselines import TINY, valid_T
from vae import ODVAE, build_vae

WIDTHS = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
DESIGNS = (
    [("odvae", v) for v in (1, 2, 3, 4)]
    + [("osp_v1_2", v) for v in (1, 2, 3, 4)]
    + [("osp_v1_1", None), ("osp_v1_0", None)]
)
PRECISIONS = ["autocast bf16", "autocast fp16", "fp32", "bf16", "fp16"]


def called(model, precision):
    """(model in the precision, dtype of its inputs, autocast or not)."""
    kind = torch.bfloat16 if precision.endswith("bf16") else torch.float16
    if precision.startswith("autocast"):
        return model, torch.float32, torch.autocast("cuda", kind)
    dtype = torch.float32 if precision == "fp32" else kind
    return model.to(dtype), dtype, torch.autocast("cuda", enabled=False)


def video(T, dtype, size=32, B=1):
    return torch.zeros(B, 3, T, size, size, device="cuda", dtype=dtype)


@pytest.mark.parametrize("precision", ["autocast bf16", "bf16", "fp32"])
@pytest.mark.parametrize(("preset", "variant"), DESIGNS)
def test_odvae_without_gradients(gpu, preset, variant, precision):
    """Whole clips and streams."""
    kind = {} if variant is None else {"variant": variant}
    whole_and_streamed(ODVAE.preset(preset, **WIDTHS, **kind), precision)


@pytest.mark.parametrize("precision", ["autocast fp16", "fp16"])
@pytest.mark.parametrize("preset", ["odvae", "osp_v1_2"])
def test_odvae_in_fp16(gpu, preset, precision):
    whole_and_streamed(ODVAE.preset(preset, **WIDTHS), precision)


def whole_and_streamed(vae, precision):
    vae, dtype, autocast = called(vae.eval().to("cuda"), precision)
    x = video(9, dtype, size=16)
    with torch.inference_mode(), autocast:
        z = vae.encode(x).latent_dist.mode()
        y = vae.decode(z.to(dtype)).sample
    assert y.shape == x.shape
    if vae.causal:
        with torch.no_grad(), autocast:
            pieces = [p.mode() for p in vae.stream_encode(x.split(4, dim=2))]
            frames = list(vae.stream_decode(torch.zeros_like(z, dtype=dtype).split(1, dim=2)))
        assert sum(f.shape[2] for f in frames) == 9
        assert {p.dtype for p in pieces} == {z.dtype}
        assert {f.dtype for f in frames} == {y.dtype}


@pytest.mark.parametrize("precision", ["autocast bf16", "bf16"])
@pytest.mark.parametrize("preset", ["odvae", "osp_v1_2"])
def test_odvae_tiled(gpu, preset, precision):
    vae, dtype, autocast = called(ODVAE.preset(preset, **WIDTHS).eval().to("cuda"), precision)
    vae.enable_tiling(5)
    vae.enable_spatial_tiling(16)
    x = video(9, dtype, size=24)
    with torch.inference_mode(), autocast:
        assert vae.decode(vae.encode(x).latent_dist.mode().to(dtype)).sample.shape == x.shape


@pytest.mark.parametrize("precision", ["autocast bf16", "fp32"])
@pytest.mark.parametrize(("preset", "variant"), DESIGNS)
def test_odvae_with_gradients(gpu, preset, variant, precision):
    kind = {} if variant is None else {"variant": variant}
    vae, dtype, autocast = called(ODVAE.preset(preset, **WIDTHS, **kind).to("cuda"), precision)
    vae.enable_gradient_checkpointing()
    x = video(5, dtype, size=16, B=2)
    with autocast:
        y = vae.decode(vae.encode(x).latent_dist.sample()).sample
    y.float().sum().backward()
    assert {p.grad.dtype for p in vae.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(TINY))
def test_baselines(gpu, name, precision):
    model = build_vae(name, **TINY[name]).eval().to("cuda")
    vae, dtype, autocast = called(model, precision)
    x = video(valid_T(model), dtype)
    with torch.inference_mode(), autocast:
        z = vae.encode(x).latent_dist.mode() if not vae.discrete else None
        y = vae.decode(z.to(dtype), num_frames=x.shape[2]).sample if z is not None else vae(x).sample
    assert y.shape == x.shape


def latte(**more):
    size = {"depth": 2, "hidden_size": 24, "num_heads": 2, "patch_size": 2, "in_channels": 4, "num_frames": 3}
    return Latte(**size, sample_size=4, num_classes=5, **more)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_denoiser_and_its_pipeline(gpu, precision, monkeypatch):
    """A grid of samples with guidance, decoded by the VAE in its working precision."""
    # the scheduler looks its timestep up in a table on the CPU, which has no data here
    monkeypatch.setattr(DDPMScheduler, "previous_timestep", lambda self, t: t - 500)
    half = precision == "autocast bf16"
    frozen = for_inference(
        ODVAE.preset("odvae", **WIDTHS).eval(),
        torch.device("cuda"),
        Precision.bf16 if half else Precision.fp32,
    )
    model, _, autocast = called(latte().eval().to("cuda"), precision)
    pipe = LatentVideoPipeline(vae=frozen, transformer=model)
    for sampler in ("ddpm", "ddim"):
        with torch.inference_mode(), autocast:
            result = pipe([0, 1], 2, 4.0, sampler=sampler, output_type="video")
        assert result.frames.shape == (2, 3, 9, 32, 32)


@pytest.mark.parametrize("network", [lambda: I3D(), lambda: FastI3D(I3D()), lambda: C3D()])
def test_judges(gpu, network):
    side = 112 if isinstance(network(), C3D) else 224
    with torch.inference_mode():
        features = network().eval().to("cuda")(torch.zeros(1, 3, 16, side, side, device="cuda"))
    assert features.dtype is torch.float32
