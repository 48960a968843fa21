"""Laws of reading and writing Latte's release files."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from denoiser.latte import Latte
from denoiser.release import (
    from_release,
    infer_config,
    pick_state_dict,
    read_release,
    save_release,
    to_release,
)

TINY = {"depth": 2, "hidden_size": 32, "num_heads": 4, "num_frames": 3, "sample_size": 8, "num_classes": 5}


@pytest.fixture
def model():
    model = Latte(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.fixture
def state(model):
    return to_release(model)


def same_weights(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and all(
        torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items()
    )


def test_a_model_written_as_a_release_and_read_back_is_the_same(model, tmp_path):
    save_release(model, tmp_path / "latte.pt")
    loaded = from_release(tmp_path / "latte.pt", num_heads=4)
    assert {key: loaded.config[key] for key in TINY} == TINY
    assert same_weights(loaded, model)
    x = torch.randn(2, 4, 3, 8, 8)
    assert torch.equal(loaded(x, 5).sample, model(x, 5).sample)


def test_a_safetensors_release_reads_too(model, state, tmp_path):
    save_file(state, tmp_path / "latte.safetensors")
    assert same_weights(from_release(tmp_path / "latte.safetensors", num_heads=4), model)


def test_ema_wins_over_model_wins_over_the_bare_dict(state):
    other = {key: value + 1 for key, value in state.items()}
    for content in ({"model": other, "ema": state}, {"model": state, "opt": {}}, state):
        assert torch.equal(
            pick_state_dict(content)["final_layer.linear.bias"], state["final_layer.linear.bias"]
        )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_removed(model, state, prefix):
    assert same_weights(
        from_release({prefix + key: value for key, value in state.items()}, num_heads=4), model
    )


def test_sixteen_frame_weights_start_a_longer_and_larger_model(model, state):
    longer = from_release(state, num_heads=4, num_frames=7, sample_size=(8, 12))
    assert longer.pos_embed.shape == (1, 24, 32)
    assert longer.temp_embed.shape == (1, 7, 32)
    assert same_weights(longer, model)


def test_published_sizes_need_no_number_of_heads(state):
    with torch.device("meta"):
        model = Latte.from_size("S/8", num_frames=16)
    shapes = {**to_release_shapes(model)}
    assert infer_config(shapes)["num_heads"] == 6
    with pytest.raises(ValueError, match="give num_heads"):
        infer_config(state)


def to_release_shapes(model):
    return {"pos_embed": model.pos_embed, "temp_embed": model.temp_embed, **model.state_dict()}


def test_a_missing_an_unknown_or_a_reshaped_key_stops_the_load(state):
    missing = {key: value for key, value in state.items() if key != "blocks.1.mlp.fc1.bias"}
    unknown = {**state, "text_embedder.weight": torch.zeros(1)}
    reshaped = {**state, "t_embedder.mlp.2.bias": torch.zeros(3)}
    for broken, name in (
        (missing, "blocks.1.mlp.fc1.bias"),
        (unknown, "text_embedder"),
        (reshaped, r"\(3,\)"),
    ):
        with pytest.raises(ValueError, match=name):
            from_release(broken, num_heads=4)
    for table in ("pos_embed", "temp_embed"):
        with pytest.raises(ValueError, match=table):
            from_release({key: value for key, value in state.items() if key != table}, num_heads=4)


def test_drifted_tables_pass_and_foreign_tables_stop_the_load(model, state):
    drifted = {**state, "pos_embed": state["pos_embed"] + 2e-4}
    assert torch.equal(from_release(drifted, num_heads=4).pos_embed, model.pos_embed)
    foreign = {**state, "pos_embed": state["pos_embed"].roll(16, dims=-1)}
    with pytest.raises(ValueError, match="pos_embed: differs"):
        from_release(foreign, num_heads=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_refused(model, state, tmp_path, suffix):
    path = tmp_path / f"latte{suffix}"
    if suffix == ".pt":
        save_release(model, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        read_release(path)


def test_a_pickle_with_more_than_tensors_is_refused(state, tmp_path):
    torch.save({"ema": state, "args": argparse.Namespace(lr=1)}, tmp_path / "latte.pt")
    with pytest.raises(ValueError, match="Python objects beside tensors"):
        read_release(tmp_path / "latte.pt")
    with pytest.raises(ValueError, match="expected a tensor"):
        pick_state_dict({"ema": {"weight": 3}})
    with pytest.raises(ValueError, match="state dict"):
        pick_state_dict({})
