"""The baselines against frozen outputs of their own repositories (weights drawn by rule, CPU, float32).

Tolerances: 1e-4 absolute on outputs of order 1 to 10; TATS with group norm reaches 172, there 1e-4 relative.
CV-VAE: its record keeps mean, standard deviation and largest value of upstream's reconstruction and the largest
difference that chunking makes, not the arrays.
"""

import json

import numpy as np
import pytest
import torch

from tests.parity.rule import draw
from vae import CVVAE, TATSVQGAN, build_vae
from vae.baselines.ops import TemporalVAE
from vae.baselines.release import convert_vqgan
from vae.reading import Release


def weights(info: dict) -> dict:
    return {key: draw(key, row["shape"]) for key, row in info["state_dict"].items()}


def read(golden, name):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden / f"{name}.npz").items()}
    return arrays, json.loads((golden / f"{name}.json").read_text())


def close(a, b, atol=1e-4, rtol=0.0):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


@torch.no_grad()
def test_tats_encodes_and_decodes_as_upstream(golden):
    arrays, info = read(golden, "zoo_tats_group")
    model = TATSVQGAN(latent_channels=16, num_codes=64, norm_type="group").eval()
    model.load_state_dict(weights(info))
    close(model.pre_vq_conv(model.encoder(0.5 * arrays["x"])), arrays["pre_quant"])
    encoded = model.encode(arrays["x"])
    assert torch.equal(encoded.codes, arrays["codes"])
    close(encoded.latents, arrays["embeddings"], atol=1e-5)
    recon = model.decode(encoded.latents).sample
    close(recon, 2 * arrays["recon_native"], rtol=1e-4, atol=1e-3)  # values reach 344


@pytest.mark.parametrize("T", [1, 4, 9, 13, 17])
@torch.no_grad()
def test_the_temporal_vae_of_open_sora_answers_as_upstream(golden, T):
    arrays, info = read(golden, "zoo_ops_temporal")
    model = TemporalVAE(4, 32, (1, 2, 2, 4), 4, (False, True, True), 32).eval()
    model.load_state_dict(weights(info))
    mean, logvar = model.moments(arrays[f"x_t{T}"]).chunk(2, dim=1)
    close(mean, arrays[f"mean_t{T}"])
    close(logvar, arrays[f"logvar_t{T}"])
    close(model.decode(mean, T), arrays[f"recon_t{T}"])


def cvvae(golden, **config):
    info = json.loads((golden / "zoo_cvvae.json").read_text())
    model = CVVAE(block_out_channels=(32, 64, 128, 128), **config).eval()
    model.load_state_dict(weights(info))
    return model, info


def clip(T, size):
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, T, size, size)).astype(np.float32))


@torch.no_grad()
def test_cvvae_reconstructs_nine_frames_with_upstream_s_statistics(golden):
    model, info = cvvae(golden)
    recon = model(clip(9, 64)).sample
    found = {"mean": recon.mean(), "std": recon.std(), "absmax": recon.abs().max()}
    for name, value in info["recon_stats"].items():
        assert abs(found[name].item() - value) < 1e-5, name


@torch.no_grad()
def test_groups_of_frames_change_cvvae_s_result_by_as_much_as_upstream(golden):
    model, info = cvvae(golden)
    x = clip(33, 32)
    mean = model.encode(x).latent_dist.mean
    recon = model.decode(mean).sample
    model.register_to_config(frames_at_a_time=None)
    whole = model.encode(x).latent_dist.mean
    whole_recon = model.decode(whole).sample
    notes = info["notes"]
    assert abs((mean - whole).abs().max().item() - notes["chunk_vs_nochunk_mean_maxabs"]) < 5e-5
    assert (
        abs((recon - whole_recon).abs().max().item() - notes["chunk_vs_nochunk_recon_from_own_mean"]) < 5e-5
    )


@torch.no_grad()
def test_vqgan_converted_from_taming_s_names_answers_as_taming(golden):
    arrays, info = read(golden, "zoo_vqgan_gumbel")
    model = convert_vqgan(Release("golden", weights(info)))
    x = arrays["x"].transpose(0, 1)[None]  # two images as one clip
    close(model.quant_conv(model.encoder(arrays["x"])), arrays["pre_quant"])
    close(model.quantize.proj(arrays["pre_quant"]), arrays["logits"])
    encoded = model.encode(x)
    assert torch.equal(encoded.codes[0], arrays["codes"])
    assert torch.equal(encoded.latents[0].transpose(0, 1), arrays["z_q"])
    close(model.decode(encoded.latents).sample[0].transpose(0, 1), arrays["recon"])


@pytest.mark.parametrize("name", ["cvvae", "ops", "tats"])
def test_the_full_size_model_has_exactly_upstream_s_keys_and_shapes(golden, name):
    upstream = json.loads((golden / f"zoo_fullkeys_{name}.json").read_text())
    training_only = ("image_discriminator.", "video_discriminator.", "perceptual_model.")
    upstream = {key: shape for key, shape in upstream.items() if not key.startswith(training_only)}
    if name == "ops":  # config.latents_mean and latents_std here
        assert upstream.pop("shift") == upstream.pop("scale") == [1, 4, 1, 1, 1]
    with torch.device("meta"):
        model = build_vae(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == upstream


@pytest.mark.parametrize(
    ("column", "name", "config"),
    [
        ("sd", "sd2_1", {}),
        ("svd", "svd", {}),
        ("svd", "vqgan", {}),
        ("cvvae", "cvvae", {}),
        ("ops_none", "ops", {}),
        ("ops_17", "ops", {"micro_frame_size": 17}),
        ("tats", "tats", {}),
    ],
)
def test_latent_frames_agree_with_upstream_s_for_every_length(golden, column, name, config):
    frames = json.loads((golden / "zoo_frames.json").read_text())["frames"]
    with torch.device("meta"):
        model = build_vae(name, **config)
    for T, row in frames.items():
        if row[column] is None:
            with pytest.raises(ValueError, match=f"T={T}: .* needs"):
                model.latent_frames(int(T))
        else:
            assert model.latent_frames(int(T)) == row[column]
