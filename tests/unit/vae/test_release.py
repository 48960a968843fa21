"""Open-Sora-Plan's files: every layout of a checkpoint is read strictly, and written back as upstream reads it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.vae.tiny import clip, moments, tiny
from vae.odvae import ODVAE
from vae.release import config_from_upstream, from_release, layout_fields, save_release
from vae.variants import LAYOUTS

SMALL = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32, "dtype": torch.float32}


@pytest.fixture
def released(tmp_path):
    model = tiny("osp_v1_2", **SMALL)
    save_release(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("variant", list(LAYOUTS))
def test_export_then_import_gives_the_same_bits(variant, tmp_path):
    model, x = tiny("osp_v1_2", variant=variant, **SMALL), clip(5, dtype=torch.float32)
    save_release(model, tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["encoder_resnet_blocks"]
    assert ("ResnetBlock23D" in names) == (variant == 2)
    again = from_release(tmp_path)
    assert not again.training
    assert again.config.variant == model.config.variant
    with torch.no_grad():
        assert torch.equal(moments(again, x), moments(model, x))


def test_every_layout_is_found_by_upstreams_block_names():
    for variant, layout in LAYOUTS.items():
        upstream = layout_fields(layout) | {
            "hidden_size": 128,
            "hidden_size_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "z_channels": 4,
        }
        config = config_from_upstream(upstream)
        assert config["variant"] == variant
        assert config["norm_scope"] == "clip"
        with torch.device("meta"):
            assert sum(p.numel() for p in ODVAE(**config).parameters()) == layout.parameters


def wrap_flat(state):
    return state


def wrap_lightning(state):
    return {"state_dict": state, "epoch": 3}


def wrap_generator(state):
    return {"state_dict": {"gen_model": state, "dics_model": {"main.0.weight": torch.ones(1)}}}


def wrap_average(state):
    wrong = {k: torch.zeros_like(v) for k, v in state.items()}
    averaged = {f"module.{k}": v for k, v in state.items()}
    return {"state_dict": {"gen_model": wrong}, "ema_state_dict": averaged}


@pytest.mark.parametrize("wrap", [wrap_flat, wrap_lightning, wrap_generator, wrap_average])
def test_checkpoint_layouts_are_unwrapped_and_training_leftovers_dropped(wrap, released):
    model, folder = released
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | {"loss.discriminator.main.0.weight": torch.ones(2)}
    file.unlink()
    torch.save(wrap(state), folder / "checkpoint.ckpt")
    again = from_release(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_wrong_keys_and_shapes_are_listed(released):
    _, folder = released
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["encoder.surplus"] = state.pop("quant_conv.conv.bias")
    state["decoder.norm_out.weight"] = torch.ones(7)
    save_file(state, file)
    with pytest.raises(
        ValueError, match=r"missing: quant_conv.*extra: encoder.surplus.*wrong shapes: decoder.norm_out"
    ):
        from_release(folder)


def test_unknown_configs_are_refused_by_field(released):
    _, folder = released
    path = folder / "config.json"
    upstream = json.loads(path.read_text())
    for key, value, message in (
        (
            "encoder_mid_resnet",
            "ResnetBlock2D",
            "nearest is variant 4, apart from encoder_mid_resnet=ResnetBlock2D",
        ),
        ("attn_resolutions", [32], "attn_resolutions"),
        ("embed_dim", 8, "embed_dim=8 differs"),
    ):
        path.write_text(json.dumps(upstream | {key: value}))
        with pytest.raises(ValueError, match=message):
            from_release(folder)
    path.write_text(json.dumps({"hidden_size": 128}))
    with pytest.raises(ValueError, match="z_channels"):
        from_release(folder)
    path.unlink()
    with pytest.raises(ValueError, match="must stand beside the weights"):
        from_release(folder)


def test_code_in_a_checkpoint_is_not_run(released, tmp_path):
    model, folder = released
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": state, "callbacks": Evil()}, folder / "checkpoint.ckpt")
    again = from_release(folder)  # read, without the object
    assert torch.equal(again.quant_conv.conv.weight, model.quant_conv.conv.weight)
    torch.save({"state_dict": Evil()}, folder / "checkpoint.ckpt")
    with pytest.raises(ValueError, match="missing: decoder.conv_in"):
        from_release(folder)
    assert not (tmp_path / "ran").exists()


def test_models_that_upstream_cannot_compute_are_not_exported(tmp_path):
    with pytest.raises(ValueError, match="norm_scope='frame'"):
        save_release(tiny("odvae", **SMALL), tmp_path)
    with pytest.raises(ValueError, match="32 groups"):
        save_release(tiny("osp_v1_2"), tmp_path)
