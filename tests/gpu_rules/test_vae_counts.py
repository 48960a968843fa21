"""Kernels, layout copies and bytes of OD-VAE's inference, counted on the pretended GPU: they depend on no machine."""

import pytest
import torch

from pipelines.plan.programs import encode_and_decode
from vae import ODVAE

SMALL = {"block_out_channels": (32, 64, 64, 64)}


def counted(preset: str, frames: int, size: int, autocast: bool = False):
    dtype = torch.float32 if autocast else torch.bfloat16
    make = lambda: ODVAE.preset(preset, **SMALL).eval().requires_grad_(False)  # noqa: E731
    encode, decode = encode_and_decode(make, frames, size, autocast=autocast, dtype=dtype).tasks
    return encode.cost, decode.cost


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_odvae_infers_in_few_kernels_and_never_changes_the_layout(autocast):
    # 21 latents of 256 x 256 are five steps, at any width; the issue of one step a latent took 5,331 and 8,742 kernels.
    encode, decode = counted("odvae", 81, 256, autocast)
    assert (encode.layout_copies, decode.layout_copies) == (0, 0)
    assert encode.kernels < 800
    assert decode.kernels < 1100


def test_the_released_layout_encodes_whole_clips_without_layout_copies():
    encode, _ = counted("osp_v1_2", 9, 64)
    assert encode.layout_copies == 0
    assert encode.kernels < 150


def test_a_longer_clip_costs_kernels_by_the_step_not_by_the_latent():
    few, many = (counted("odvae", 1 + 4 * latents, 256)[0].kernels for latents in (5, 10))
    assert many < 1.8 * few
    assert counted("odvae", 17, 256)[0].kernels == few  # a step of four latents instead of five
