"""Inflation from an image VAE: tail init is the image VAE on every frame it should be (Eq. 4)."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from tests.unit.vae.tiny import clip, moments, tiny
from vae.inflate import compvis_name, inflate


@pytest.fixture
def image_vae():
    return (
        AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=4,
        )
        .double()
        .eval()
    )


def by_frame(fn, x):
    """Apply an image function to every frame of (1, C, T, H, W)."""
    return fn(x[0].transpose(0, 1)).transpose(0, 1)[None]


def image_encode(vae, x):
    return by_frame(lambda f: vae.encode(f).latent_dist.parameters, x)


def image_decode(vae, z):
    return by_frame(lambda f: vae.decode(f).sample, z)


@torch.no_grad()
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_tail_init_is_the_image_vae_on_images_and_on_every_fourth_frame(variant, image_vae):
    model, x = tiny(variant=variant), clip(9)
    inflate(model, image_vae.state_dict())
    z = image_encode(image_vae, x[:, :, ::4])  # latent j is the image latent of frame 4j
    torch.testing.assert_close(moments(model, x), z, atol=1e-12, rtol=1e-11)
    torch.testing.assert_close(moments(model, x[:, :, :1]), z[:, :, :1], atol=1e-12, rtol=1e-11)
    z = z[:, :4]
    held = [0, 1, 1, 1, 1, 2, 2, 2, 2]  # frame k shows latent ceil(k / 4)
    want = image_decode(image_vae, z)[:, :, held]
    torch.testing.assert_close(model.decode(z).sample, want, atol=1e-12, rtol=1e-11)
    torch.testing.assert_close(model.decode(z[:, :, :1]).sample, want[:, :, :1], atol=1e-12, rtol=1e-11)


@torch.no_grad()
def test_average_init_is_the_image_vae_on_one_frame(image_vae):
    model, x = tiny(), clip(1)
    report = inflate(model, image_vae.state_dict(), method="average")
    assert report["average"] == 47
    # One frame stands at every tap, so any split of a kernel over time passes below: it must be an equal one.
    spread = [value for value in model.state_dict().values() if value.ndim == 5 and value.shape[2] == 3]
    assert len(spread) == 47
    for value in spread:
        assert torch.equal(value[:, :, 0], value[:, :, 1])
        assert torch.equal(value[:, :, 1], value[:, :, 2])
        assert value.abs().max() > 0
    torch.testing.assert_close(moments(model, x), image_encode(image_vae, x), atol=1e-12, rtol=1e-11)


@torch.no_grad()
def test_random_init_leaves_3d_kernels_alone_and_copies_the_rest(image_vae):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert inflate(model, image_vae.state_dict(), method="random")["random"] == 47
    for key, value in model.state_dict().items():
        kernel3d = value.ndim == 5 and value.shape[2] == 3
        assert torch.equal(value, before[key]) == kernel3d, key


def compvis_names(state):
    """As LDM stores the VAE: its own names, 1x1 attention kernels."""
    state = {compvis_name(k): v for k, v in state.items()}
    return {k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in state.items()}


def test_every_source_gives_the_same_model(image_vae, tmp_path):
    state = image_vae.state_dict()
    image_vae.save_pretrained(tmp_path / "folder")
    ldm = {f"first_stage_model.{k}": v.contiguous() for k, v in compvis_names(state).items()}
    ldm |= {"model.diffusion_model.weight": torch.zeros(3), "first_stage_model.loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": ldm}, tmp_path / "sd.ckpt")
    save_file(ldm, tmp_path / "sd.safetensors")
    old = {
        k.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value"): v
        for k, v in state.items()
    }
    old = {k.replace("to_out.0", "proj_attn"): v for k, v in old.items()}
    ours = {f"autoencoder.{k}": v for k, v in state.items()}  # a saved SDVAE, as scripts/convert.py writes
    want = tiny()
    inflate(want, state)
    for source in (tmp_path / "folder", ours, tmp_path / "sd.ckpt", str(tmp_path / "sd.safetensors"), old):
        model = tiny()
        inflate(model, source)
        for key, value in want.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, msg=key)


def test_inflation_is_strict(image_vae, tmp_path):
    state = image_vae.state_dict()
    with pytest.raises(ValueError, match="one of tail, average, random"):
        inflate(tiny(), state, method="centre")
    missing = {k: v for k, v in state.items() if k != "quant_conv.bias"}
    with pytest.raises(ValueError, match=r"1 tensors of the model have no source .*quant_conv.conv.bias"):
        inflate(tiny(), missing)
    with pytest.raises(ValueError, match=r"encoder.extra.weight"):
        inflate(tiny(), state | {"encoder.extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="wrong shape"):
        inflate(tiny(block_out_channels=(16, 16, 32, 32)), state)
    with pytest.raises(ValueError, match="time_downsample"):
        inflate(tiny("osp_v1_1"), state)
    with pytest.raises(ValueError, match="no such file"):
        inflate(tiny(), tmp_path / "absent.ckpt")
    with pytest.raises(ValueError, match="holds none of"):
        inflate(tiny(), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_an_od_vae_counts_as_the_image_vae_that_it_is_on_single_frames(variant):
    source, model, x = tiny(variant=4), tiny(variant=variant), clip(9)
    inflate(model, source.state_dict())
    z = by_frame(lambda f: moments(source, f[:, :, None])[:, :, 0], x[:, :, ::4])
    torch.testing.assert_close(moments(model, x), z, atol=1e-12, rtol=1e-11)
    images = source.decode(z[:, :4, :1]).sample
    torch.testing.assert_close(model.decode(z[:, :4, :1]).sample, images, atol=1e-12, rtol=1e-11)
