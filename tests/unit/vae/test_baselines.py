"""The six baselines answer one interface: shapes, frame rules, posteriors, saving and loading."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

from tests.unit.vae.tiny import four_tiles
from vae import build_vae, load_vae
from vae.baselines.cvvae import _tiled
from vae.tiling import tile_starts

IMAGE = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
TINY = {
    "sd2_1": IMAGE,
    "svd": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "cvvae": IMAGE,
    "ops": {
        "spatial_block_out_channels": (8, 8, 16, 16),
        "spatial_layers_per_block": 1,
        "filters": 8,
        "num_res_blocks": 1,
        "norm_num_groups": 4,
    },
    "vqgan": {**IMAGE, "z_channels": 8, "latent_channels": 8, "num_codes": 32},
    "tats": {"hidden_channels": 4, "latent_channels": 8, "num_codes": 32},
}
CONTINUOUS = ["sd2_1", "svd", "cvvae", "ops"]
FRAME_WISE = ["sd2_1", "svd", "vqgan"]


def tiny(name, **config):
    return build_vae(name, **{**TINY[name], **config}).eval()


def clip(B=1, T=5, size=32, dtype=torch.float32):
    return torch.rand(B, 3, T, size, size, dtype=dtype) * 2 - 1


def valid_T(model):
    return 8 if model.frame_rule == "4n" else 5


@pytest.mark.parametrize(
    ("name", "millions", "exact"),
    [
        ("vqgan", 69.00, 68_995_971),
        ("sd2_1", 83.65, 83_653_863),
        ("svd", 97.74, 97_742_847),
        ("tats", 52.19, 52_192_773),
        ("cvvae", 182.45, 182_446_475),
        ("ops", 393.34, 393_341_007),
    ],
)
def test_parameters_at_the_paper_s_size_are_table_1_s(name, millions, exact):
    with torch.device("meta"):
        model = build_vae(name)
    count = sum(p.numel() for p in model.parameters())
    if name == "tats":  # Table 1 counts its discriminators and LPIPS too
        assert count == 23_652_227
        count += model.num_training_parameters
    assert count == exact
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("name", list(TINY))
@torch.no_grad()
def test_encode_and_decode_keep_the_shapes_that_the_interface_promises(name):
    model = tiny(name)
    T = valid_T(model)
    x = clip(B=2, T=T)
    t = model.latent_frames(T)
    shape = (2, model.config.latent_channels, t, 4, 4)
    encoded = model.encode(x)
    if model.discrete:
        z = encoded.latents
        assert encoded.codes.shape == (2, t, 4, 4)
        assert encoded.codes.dtype == torch.int64
        assert torch.equal(model.embed(encoded.codes), z)
        assert torch.equal(model.encode(x, return_dict=False)[1], encoded.codes)
    else:
        z = encoded.latent_dist.mode()
        assert encoded.latent_dist.kl().shape == (2,)
        assert torch.equal(model.encode(x, return_dict=False)[0].mode(), z)
    assert z.shape == shape
    assert model.decode(z, num_frames=T).sample.shape == x.shape
    assert model.decode(z, return_dict=False)[0].shape[2] == model.pixel_frames(t)
    assert torch.equal(model(x).sample, model.decode(z, num_frames=T).sample)


@pytest.mark.parametrize("name", list(TINY))
@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other(name):
    model = tiny(name).double()
    x = clip(B=2, T=valid_T(model), dtype=torch.float64)
    both = model(x).sample
    torch.testing.assert_close(both[1:], model(x[1:]).sample, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", list(TINY))
@torch.no_grad()
def test_a_vae_is_causal_if_and_only_if_the_last_latent_changes_no_frame_before_it(name):
    model = tiny(name).double()
    z = torch.randn(1, model.config.latent_channels, 2, 4, 4, dtype=torch.float64)
    changed = torch.cat([z[:, :, :1], -z[:, :, 1:]], dim=2)
    before = model.pixel_frames(1)
    frames, others = (model.decode(v).sample for v in (z, changed))
    assert not torch.allclose(frames[:, :, before:], others[:, :, before:])
    assert torch.allclose(frames[:, :, :before], others[:, :, :before]) == model.causal


@pytest.mark.parametrize("name", list(TINY))
@torch.no_grad()
def test_a_saved_folder_loads_as_the_same_model(name, tmp_path, monkeypatch):
    model = tiny(name)
    x = clip(T=valid_T(model))
    if not model.discrete:
        model.set_latent_statistics([0.1, -0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    model.save_pretrained(tmp_path / name)
    assert sorted(f.name for f in (tmp_path / name).iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    monkeypatch.setenv("OMNILATTE_WEIGHTS", str(tmp_path))
    for loaded in (load_vae(tmp_path / name), load_vae(name), load_vae(name, path=tmp_path / name)):
        assert type(loaded) is type(model)
        assert not loaded.training
        assert torch.equal(loaded(x).sample, model(x).sample)
        if not model.discrete:
            assert loaded.config.latents_std == [1.0, 2.0, 3.0, 4.0]
            z = torch.randn(1, 4, 2, 4, 4)
            assert torch.equal(loaded.normalize(z), model.normalize(z))
    assert load_vae(name, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CONTINUOUS)
def test_denormalize_undoes_normalize(name):
    model = tiny(name)
    z = torch.randn(1, 4, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z)
    if name == "ops":
        mean = torch.tensor([-0.10, 0.34, 0.27, 0.98]).view(1, 4, 1, 1, 1)
        std = torch.tensor([3.85, 2.32, 2.33, 3.06]).view(1, 4, 1, 1, 1)
        torch.testing.assert_close(model.normalize(z), (z - mean.double()) / std.double(), atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(model.normalize(z), z * 0.18215)


@pytest.mark.parametrize("name", ["vqgan", "tats"])
def test_a_discrete_vae_has_no_scaling_rule(name):
    model = tiny(name)
    assert model.discrete
    assert not model.has_scaling_rule
    with pytest.raises(ValueError, match="measure latent statistics first"):
        model.normalize(torch.zeros(1, 8, 2, 4, 4))


@pytest.mark.parametrize("name", FRAME_WISE)
@torch.no_grad()
def test_the_size_of_frame_batches_changes_neither_result_nor_draw(name):
    model = tiny(name).double()
    x = clip(B=2, dtype=torch.float64)
    outputs, draws = [], []
    for frame_batch in (1, 3, 100):
        model.register_to_config(frame_batch=frame_batch)
        outputs.append(model(x).sample)
        if not model.discrete:
            posterior = model.encode(x).latent_dist
            draws.append(posterior.sample(torch.Generator().manual_seed(1)))
    for values in (outputs, draws):
        for other in values[1:]:
            torch.testing.assert_close(other, values[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("bad", [0, -1])
def test_a_frame_batch_below_one_is_refused(bad):
    with pytest.raises(ValueError, match="frame_batch"):
        tiny("sd2_1", frame_batch=bad)


@pytest.mark.parametrize(
    ("cls", "name", "extra"),
    [
        (AutoencoderKL, "sd2_1", {"up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4}),
        (AutoencoderKLTemporalDecoder, "svd", {}),
    ],
)
@torch.no_grad()
def test_a_plain_diffusers_folder_opens_as_the_wrapper(cls, name, extra, tmp_path):
    plain = cls(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, **extra
    ).eval()
    plain.save_pretrained(tmp_path)
    model = load_vae(name, path=tmp_path)
    assert type(model) is type(load_vae(tmp_path)) is type(tiny(name))
    x = clip(T=3)
    frames = x[0].transpose(0, 1)
    mean = plain.encode(frames).latent_dist.mean
    z = model.encode(x).latent_dist.mean
    assert torch.equal(z[0].transpose(0, 1), mean)
    expected = plain.decode(mean, **({"num_frames": 3} if name == "svd" else {})).sample
    assert torch.equal(model.decode(z).sample[0].transpose(0, 1), expected)
    assert model.config.scaling_factor == plain.config.scaling_factor


def test_shift_and_scaling_factor_of_a_diffusers_vae_become_latent_statistics(tmp_path):
    AutoencoderKL(
        latent_channels=16, shift_factor=0.5, scaling_factor=2.0, use_quant_conv=False
    ).save_pretrained(tmp_path)
    model = load_vae(tmp_path)
    z = torch.randn(1, 16, 1, 2, 2)
    torch.testing.assert_close(model.normalize(z), (z - 0.5) * 2.0)


@torch.no_grad()
def test_svd_decodes_the_whole_clip_unless_a_chunk_size_is_set():
    model = tiny("svd")
    z = torch.randn(1, 4, 6, 4, 4)
    whole = model.decode(z).sample
    model.register_to_config(decode_chunk_size=6)
    assert torch.equal(model.decode(z).sample, whole)
    model.register_to_config(decode_chunk_size=3)
    chunked = model.decode(z).sample
    assert torch.equal(chunked[:, :, 3:], model.decode(z[:, :, 3:]).sample)
    assert (chunked - whole).abs().max() > 1e-4


@torch.no_grad()
def test_gumbel_noise_is_drawn_only_when_asked_for_and_follows_its_generator():
    model, x = tiny("vqgan"), clip()
    assert torch.equal(model.encode(x).codes, model.encode(x).codes)
    noisy = tiny("vqgan", gumbel_sample=True)
    noisy.load_state_dict(model.state_dict())
    draws = [noisy.encode(x, generator=torch.Generator().manual_seed(s)).codes for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], model.encode(x).codes)


@torch.no_grad()
def test_gumbel_noise_draws_codes_with_the_softmax_of_the_logits():
    quantizer = tiny("vqgan", num_codes=4).quantize
    h = torch.randn(1, 8, 1, 1).expand(20000, 8, 1, 1)
    codes = quantizer(h, sample=True, generator=torch.Generator().manual_seed(0))
    frequency = codes.flatten().bincount(minlength=4) / 20000
    expected = (quantizer.proj(h[:1]) * 1.0).softmax(1).flatten()
    assert (frequency - expected).abs().max() < 0.015  # four standard deviations


@torch.no_grad()
def test_tats_finds_the_nearest_entry_and_pads_only_when_told():
    model = tiny("tats").double()
    h = torch.randn(2, 8, 3, 2, 2, dtype=torch.float64)
    table = model.codebook.embeddings
    distances = torch.cdist(h.movedim(1, -1).reshape(-1, 8), table)
    assert torch.equal(model.codebook(h)[1].flatten(), distances.argmin(1))
    x = clip(T=9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"T=9: TATSVQGAN needs T = 4k frames, e\.g\. 8"):
        model.encode(x)
    model.enable_frame_padding()
    encoded = model.encode(x)
    assert encoded.codes.shape[1] == model.latent_frames(9) == 3
    padded = torch.cat([x] + [x[:, :, -1:]] * 3, dim=2)
    assert torch.equal(encoded.codes, model.encode(padded).codes)
    assert torch.equal(model(x).sample, model(padded).sample[:, :, :9])
    model.disable_frame_padding()
    with pytest.raises(ValueError, match="T=9"):
        model.encode(x)


@torch.no_grad()
def test_cvvae_groups_share_one_frame():
    model = tiny("cvvae", frames_at_a_time=8).double()
    x = clip(T=17, dtype=torch.float64)
    z = model.encode(x).latent_dist.mean
    first, second = (model.encode(part).latent_dist.mean for part in (x[:, :, :9], x[:, :, 8:]))
    assert torch.equal(z, torch.cat([first, second[:, :, 1:]], dim=2))
    recon = model.decode(z).sample
    first, second = (model.decode(part).sample for part in (z[:, :, :3], z[:, :, 2:]))
    assert torch.equal(recon, torch.cat([first, second[:, :, 1:]], dim=2))
    with pytest.raises(ValueError, match="T=16: CVVAE needs T = 4k \\+ 1 frames"):
        model.encode(x[:, :, :16])
    with pytest.raises(ValueError, match="frames_at_a_time=6"):
        tiny("cvvae", frames_at_a_time=6)


@torch.no_grad()
def test_cvvae_tiles_cover_the_frame_and_blend_linearly():
    assert tile_starts(96, 64, 48) == [0, 48]
    assert tile_starts(112, 64, 48) == [0, 48]
    assert tile_starts(113, 64, 48) == [0, 48, 96]
    assert tile_starts(64, 64, 48) == [0]
    x = torch.rand(1, 2, 1, 112, 160, dtype=torch.float64)
    torch.testing.assert_close(_tiled(lambda tile: tile, x, 64, 64, 0.25), x)
    number = iter(range(100))
    row = _tiled(lambda tile: torch.full_like(tile, next(number)), x[..., :64, :112], 64, 64, 0.25)[
        0, 0, 0, 0
    ]
    ramp = torch.arange(16) / 16  # upstream's weights j / overlap
    assert torch.equal(row, torch.cat([torch.zeros(48), ramp, torch.ones(48)]).double())


@torch.no_grad()
def test_cvvae_s_tiles_of_a_larger_frame_are_worked_on_apart_and_joined_as_upstream():
    model = tiny("cvvae", tile_spatial_size=64, tile_overlap_ratio=0.25).double()
    x = clip(T=5, size=96, dtype=torch.float64)
    z = model.encode(x).latent_dist.mean
    frames = model.decode(z).sample

    torch.testing.assert_close(z, four_tiles(lambda v: model.encoder(v)[:, :4], x, 64, 48, 2))
    torch.testing.assert_close(frames, four_tiles(model.decoder, z, 8, 6, 16))
    model.register_to_config(tile_spatial_size=None)
    assert (model.encode(x).latent_dist.mean - z).abs().max() > 1e-3


@torch.no_grad()
def test_ops_is_its_two_stages_with_the_inner_factor_between():
    model = tiny("ops")
    x = clip(T=6)
    frames = x[0].transpose(0, 1)
    inner = model.spatial_vae.module.encode(frames).latent_dist.mean * 0.18215
    inner = inner.transpose(0, 1)[None]
    z = model.encode(x).latent_dist.mean
    torch.testing.assert_close(z, model.temporal_vae.moments(inner)[:, :4])
    back = model.temporal_vae.decode(z, 6)
    assert back.shape[2] == 6
    frames = model.spatial_vae.module.decode(back[0].transpose(0, 1) / 0.18215).sample
    torch.testing.assert_close(model.decode(z, num_frames=6).sample[0].transpose(0, 1), frames)
    # without a number of frames all 4t come, the surplus in front
    torch.testing.assert_close(model.decode(z).sample[:, :, 2:], model.decode(z, num_frames=6).sample)


@torch.no_grad()
def test_ops_in_chunks_of_17_codes_every_chunk_alone():
    model = tiny("ops", micro_frame_size=17)
    x = clip(T=25)
    z = model.encode(x).latent_dist.mean
    assert z.shape[2] == model.latent_frames(25) == 7
    parts = [model.encode(part).latent_dist.mean for part in (x[:, :, :17], x[:, :, 17:])]
    torch.testing.assert_close(z, torch.cat(parts, dim=2))
    assert model.pixel_frames(5) == 17
    recon = model.decode(z, num_frames=25).sample
    torch.testing.assert_close(recon[:, :, 17:], model.decode(z[:, :, 5:], num_frames=8).sample)
    assert model(x).sample.shape == x.shape


@torch.no_grad()
def test_ops_draws_its_inner_latents_only_when_asked_for():
    model, x = tiny("ops"), clip()
    mode = model.encode(x).latent_dist.mean
    draws = [
        model.encode(x, sample_posterior=True, generator=torch.Generator().manual_seed(s)).latent_dist.mean
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], mode)
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(model(x, True, generator=g[0]).sample, model(x, True, generator=g[1]).sample)


@pytest.mark.parametrize("name", list(TINY))
def test_wrong_inputs_are_value_errors_that_name_the_rule(name):
    model = tiny(name)
    T = valid_T(model)
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, T, 36, 32))
    with pytest.raises(ValueError, match="needs \\(B, 3, T, H, W\\)"):
        model.encode(torch.zeros(3, T, 32, 32))
    with pytest.raises(ValueError, match="latents of shape"):
        model.decode(torch.zeros(1, 5, 2, 4, 4))
    with pytest.raises(ValueError, match="B = 0"):
        model.encode(torch.zeros(0, 3, T, 32, 32))
    with pytest.raises(ValueError, match="video of dtype torch.float16, weights of torch.float32"):
        model.encode(torch.zeros(1, 3, T, 32, 32).half())
    channels = model.config.latent_channels
    with pytest.raises(ValueError, match="latents of dtype torch.int64"):
        model.decode(torch.zeros(1, channels, 2, 4, 4).long())
    with pytest.raises(ValueError, match="each at least 1"):
        model.decode(torch.zeros(0, channels, 2, 4, 4))
    with pytest.raises(ValueError, match="num_frames"):
        model.decode(torch.zeros(1, channels, 2, 4, 4), num_frames=12 if name == "tats" else 13)
    with pytest.raises(ValueError, match="tiling cannot be switched on"):
        model.enable_tiling()
