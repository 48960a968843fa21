"""ODVAE against Open-Sora-Plan v1.2.0's own code at width 32, and the exact design against its frozen reference.

Provenance and the weight rule: golden/odvae_README.md. Upstream ran on CPU in float32; an independent
re-implementation differed by 1.5e-6 (latents) and 8.8e-6 (pixels), hence the tolerances.
"""

import json

import numpy as np
import pytest
import torch

from tests.parity.rule import fill_by_rule
from vae.inflate import compvis_name, source_name
from vae.odvae import ODVAE
from vae.release import config_from_upstream

LATENT, PIXEL = 2e-5, 5e-5
RELEASED = {"variant4": "osp_v1_2", "osp_v1_1": "osp_v1_1"}


def load(golden, name):
    return {k: torch.from_numpy(v) for k, v in np.load(golden / f"odvae_{name}.npz").items()}


def build(preset):
    return fill_by_rule(ODVAE.preset(preset, block_out_channels=(32, 64, 128, 128)))


def close(got, want, atol):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.mark.parametrize("name", RELEASED)
def test_released_layouts_have_upstreams_keys_and_shapes(name, golden):
    info = json.loads((golden / f"odvae_{name}.json").read_text())
    model = build(RELEASED[name])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == info["keys"]
    config = config_from_upstream(info["config"])
    assert {k: model.config[k] for k in config} == config


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", RELEASED)
def test_released_layouts_answer_as_upstream(name, grad, golden):
    frozen, model = load(golden, name), build(RELEASED[name])
    with torch.set_grad_enabled(grad):
        posterior = model.encode(frozen["x"]).latent_dist
        close(posterior.mean, frozen["mean"], LATENT)
        close(posterior.logvar, frozen["logvar"], LATENT)
        close(model.decode(frozen["mean"]).sample, frozen["dec"], PIXEL)
        image = model.encode(frozen["img_x"]).latent_dist
        close(image.mean, frozen["img_mean"], LATENT)
        close(image.logvar, frozen["img_logvar"], LATENT)
        close(model.decode(frozen["img_mean"]).sample, frozen["img_dec"], PIXEL)


@pytest.mark.parametrize("grad", [False, True])
def test_the_exact_design_answers_as_its_reference(grad, golden):
    frozen, model = load(golden, "exact_variant4"), build("odvae")
    with torch.set_grad_enabled(grad):
        posterior = model.encode(frozen["x"]).latent_dist
        close(posterior.mean, frozen["mean"], LATENT)
        close(posterior.logvar, frozen["logvar"], LATENT)
        close(model.decode(frozen["mean"]).sample, frozen["dec"], PIXEL)
        close(model.encode(frozen["x"][:, :, :1]).latent_dist.mean, frozen["img_mean"], LATENT)
        close(model.decode(frozen["img_mean"]).sample, frozen["img_dec"], PIXEL)


@torch.no_grad()
def test_temporal_tiling_answers_as_upstream(golden):
    frozen, model = load(golden, "variant4_tile17"), build("osp_v1_2")
    close(model.encode(frozen["x"]).latent_dist.mean, frozen["mean"], LATENT)
    close(model.decode(frozen["mean"]).sample, frozen["dec"], PIXEL)
    model.enable_tiling(num_frames=9, num_latents=3)  # upstream: 9 frames, 3 latents
    posterior = model.encode(frozen["x"]).latent_dist
    close(posterior.mean, frozen["tile_mean"], LATENT)
    close(posterior.logvar, frozen["tile_logvar"], LATENT)
    close(model.decode(frozen["mean"]).sample, frozen["tile_dec_of_untiled_mean"], PIXEL)
    close(model.decode(frozen["tile_mean"]).sample, frozen["tile_dec_of_tile_mean"], PIXEL)


def test_every_tensor_of_sd_vae_goes_where_upstream_puts_it(golden):
    pairs = json.loads((golden / "odvae_keymap_sdvae_to_variant4.json").read_text())
    named = {compvis_name(pair["src"]): pair["src"] for pair in pairs}
    assert len(named) == len(pairs) == 248
    with torch.device("meta"):
        shapes = {k: list(v.shape) for k, v in ODVAE().state_dict().items()}
    assert shapes == {pair["dst"]: pair["dst_shape"] for pair in pairs}
    for pair in pairs:
        assert named[source_name(pair["dst"], named)] == pair["src"]
