"""Latte against frozen outputs of Vchitect/Latte @ b27c24a (CPU, float32).

Tolerance: 2e-6 absolute on outputs of order 1; the smallest mistake probed there (erf instead of tanh GELU)
shows as 7e-6, a wrong LayerNorm epsilon as 1.4e-5.
"""

import json
import zlib

import numpy as np
import pytest
import torch

from denoiser.embeddings import sincos_1d, sincos_2d, timestep_embedding
from denoiser.latte import Latte
from denoiser.release import from_release, infer_config, to_release
from denoiser.sampling import cfg_forward

TINY = {"depth": 4, "hidden_size": 64, "num_heads": 4, "num_frames": 5, "sample_size": 8}


def frozen_weights(shapes: dict) -> dict:
    """The weights the frozen outputs were made with: seeded by the key's CRC, scaled by 0.05."""
    state = {}
    for key, shape in shapes.items():
        if key == "pos_embed":
            side = int(shape[1] ** 0.5)
            value = sincos_2d(side, side, shape[2])[None]
        elif key == "temp_embed":
            value = sincos_1d(range(shape[1]), shape[2])[None]
        else:
            rng = np.random.default_rng(zlib.crc32(key.encode()))
            value = rng.standard_normal(shape).astype(np.float32) * np.float32(0.05)
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


@pytest.fixture
def frozen(golden):
    return {key: torch.from_numpy(value) for key, value in np.load(golden / "latte_cls.npz").items()}


@pytest.fixture
def model(golden):
    shapes = json.loads((golden / "latte_state_dict_shapes.json").read_text())["latte_cls"]
    return from_release(frozen_weights(shapes), num_heads=4)


def video(x):
    """Upstream (B, F, C, H, W) -> ours (B, C, T, H, W)."""
    return x.transpose(1, 2)


def test_output_equals_upstream(model, frozen):
    with torch.no_grad():
        out = model(video(frozen["x"]), frozen["t"], frozen["y"]).sample
    torch.testing.assert_close(out, video(frozen["out"]), atol=2e-6, rtol=0)


def test_every_intermediate_equals_upstream(model, frozen):
    seen = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _, args, out, i=i: seen.update({f"in{i}": args[0], f"out{i}": out})
        )
    model.t_embedder.register_forward_hook(lambda _, args, out: seen.update(t_emb=out))
    model.x_embedder.register_forward_hook(lambda _, args, out: seen.update(patch=out))
    model.final_layer.register_forward_hook(lambda _, args, out: seen.update(final=out))
    with torch.no_grad():
        model(video(frozen["x"]), frozen["t"], frozen["y"])
    frames = {"patch": "inter_patch_embed", "final": "inter_final_layer"}
    for i in range(4):
        for side in ("in", "out"):
            rows = seen[f"{side}{i}"] if i % 2 == 0 else seen[f"{side}{i}"].transpose(1, 2)
            torch.testing.assert_close(
                rows.flatten(0, 1), frozen[f"inter_block{i}_{side}"], atol=2e-6, rtol=0
            )
    for ours, theirs in frames.items():
        torch.testing.assert_close(seen[ours].flatten(0, 1), frozen[theirs], atol=2e-6, rtol=0)
    torch.testing.assert_close(seen["t_emb"], frozen["inter_t_emb"], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("scale", "name", "atol"), [(7.0, "7", 5e-6), (1.5, "1p5", 2e-6)])
def test_guidance_equals_upstream(model, frozen, scale, name, atol):
    x, t, y = video(frozen["cfg_x"])[:2], frozen["cfg_t"][:2], frozen["cfg_y"][:2]
    with torch.no_grad():
        out = cfg_forward(model, x, t, y, scale)
    torch.testing.assert_close(out, video(frozen[f"cfg_out_scale{name}"])[:2], atol=atol, rtol=0)


@pytest.mark.parametrize("dim", [256, 7])
def test_timestep_embedding_equals_upstream(frozen, dim):
    t = frozen["temb_t"]
    error = (timestep_embedding(t, dim) - frozen[f"temb_{dim}"]).abs().amax(dim=1)
    # exp() differs by one rounding (6e-8) of a frequency between CPUs, which t then multiplies.
    assert (error <= 1e-6 + 6e-8 * t).all(), error


def test_position_tables_equal_upstream_to_the_bit(model, frozen):
    assert torch.equal(model.pos_embed, frozen["pos_embed"])
    assert torch.equal(model.temp_embed, frozen["temp_embed"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("latte_cls", {"num_classes": 10}),
        ("latte_uncond", {}),
        ("latte_uncond_nosigma", {"learn_sigma": False}),
        (
            "latte_f21p4",
            {
                "sample_size": 16,
                "patch_size": 4,
                "hidden_size": 72,
                "depth": 2,
                "num_heads": 3,
                "num_frames": 21,
                "num_classes": 101,
            },
        ),
    ],
)
def test_exported_keys_and_shapes_equal_upstream(golden, name, changes):
    shapes = json.loads((golden / "latte_state_dict_shapes.json").read_text())[name]
    config = {**TINY, **changes}
    exported = {key: list(value.shape) for key, value in to_release(Latte(**config)).items()}
    assert exported == shapes
    inferred = infer_config(frozen_weights(shapes), num_heads=config["num_heads"])
    assert {key: inferred[key] for key in config} == config


def test_xl2_exports_the_293_keys_of_ucf101(golden):
    shapes = json.loads((golden / "latte_xl2_ucf101_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        model = Latte.from_size("XL/2", num_frames=16, num_classes=101)
    tables = {"pos_embed": model.pos_embed, "temp_embed": model.temp_embed}
    ours = {key: list(value.shape) for key, value in {**tables, **model.state_dict()}.items()}
    assert len(ours) == 293
    assert ours == shapes
    assert list(ours) == list(shapes)
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert infer_config(meta) == {key: model.config[key] for key in infer_config(meta)}
