"""Laws of the Latte model: sizes, initialisation, inputs, labels, precision, saving."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from denoiser import LATTE_SIZES, Latte
from denoiser.latte import TemporalLatteBlock

TINY = {"depth": 4, "hidden_size": 32, "num_heads": 4, "num_frames": 3, "sample_size": (8, 4)}
# Trainable parameters of Vchitect/Latte @ b27c24a, measured: (101 classes, unconditional).
PARAMETERS = {
    "S/2": (32_519_840, 32_480_672),
    "S/4": (32_575_232, 32_536_064),
    "S/8": (32_796_800, 32_757_632),
    "B/2": (129_625_376, 129_547_040),
    "B/4": (129_736_064, 129_657_728),
    "B/8": (130_178_816, 130_100_480),
    "L/2": (456_920_096, 456_815_648),
    "L/4": (457_067_648, 456_963_200),
    "L/8": (457_657_856, 457_553_408),
    "XL/2": (673_799_072, 673_681_568),
    "XL/4": (673_965_056, 673_847_552),
    "XL/8": (674_628_992, 674_511_488),
}


def tiny(**changes):
    """A tiny Latte whose weights are all random, the zero-initialised ones too."""
    model = Latte(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def inputs(B=2, **changes):
    c = {**TINY, **changes}
    return torch.randn(B, 4, c["num_frames"], *c["sample_size"]), torch.arange(B) * 300


@pytest.mark.parametrize("name", LATTE_SIZES)
def test_parameter_counts_equal_upstream(name):
    for num_classes, expected in zip((101, None), PARAMETERS[name], strict=True):
        with torch.device("meta"):
            model = Latte.from_size(name, num_classes=num_classes)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_output_is_exactly_zero_at_initialisation():
    x, t = inputs()
    assert Latte(**TINY)(x, t).sample.abs().max() == 0


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 8), (False, 4)])
def test_output_has_the_shape_of_the_input_with_2c_or_c_channels(learn_sigma, channels):
    x, t = inputs()
    out = tiny(learn_sigma=learn_sigma)(x, t).sample
    assert out.shape == (2, channels, 3, 8, 4)


def test_importing_the_room_does_not_import_torch():
    code = "import sys, denoiser; assert 'torch' not in sys.modules; assert hasattr(denoiser, '__all__')"
    subprocess.run([sys.executable, "-c", code], check=True)


def plain_block(block, x, c):
    """A DiT block in the plainest words: conditioning repeated on every row, attention written out."""
    B, t, N, D = x.shape
    rows = (
        x.transpose(1, 2).reshape(B * N, t, D)
        if isinstance(block, TemporalLatteBlock)
        else x.reshape(B * t, N, D)
    )
    m = block.adaLN_modulation(c.repeat_interleave(len(rows) // B, dim=0))[:, None].chunk(6, dim=-1)
    h = F.layer_norm(rows, (D,), eps=1e-6) * (1 + m[1]) + m[0]
    heads = block.attn.num_heads
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in block.attn.qkv(h).chunk(3, dim=-1))
    weights = (q @ k.mT / (D // heads) ** 0.5).softmax(dim=-1)
    rows = rows + m[2] * block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    h = F.layer_norm(rows, (D,), eps=1e-6) * (1 + m[4]) + m[3]
    rows = rows + m[5] * block.mlp(h)
    return (
        rows.reshape(B, N, t, D).transpose(1, 2)
        if isinstance(block, TemporalLatteBlock)
        else rows.reshape(B, t, N, D)
    )


@pytest.mark.parametrize("i", [0, 1])
def test_fast_block_equals_plain_block_in_float64(i):
    block = tiny().double().blocks[i]
    x, c = torch.randn(2, 3, 8, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x, c), plain_block(block, x, c), atol=1e-12, rtol=0)


def test_spatial_blocks_do_not_see_other_frames_and_temporal_blocks_not_other_patches():
    model = tiny().double()
    x, c = torch.randn(1, 3, 8, 32, dtype=torch.float64), torch.randn(1, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 1, 5] += 1
    differs = [(block(x, c) != block(changed, c)).any(dim=-1)[0] for block in model.blocks[:2]]
    assert differs[0].any(dim=1).tolist() == [False, True, False]
    assert differs[1].any(dim=0).tolist() == [i == 5 for i in range(8)]


def test_float32_forward_is_close_to_float64():
    model, (x, t) = tiny(), inputs()
    single = model(x, t).sample
    double = model.double()(x.double(), t).sample
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)


def test_bf16_weights_run_and_keep_neighbouring_timesteps_apart():
    model, (x, _) = tiny(), inputs()
    full = model(x, 998).sample
    model = model.to(torch.bfloat16)
    half = model(x, 998).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()
    assert not torch.equal(model.t_embedder(torch.tensor([998])), model.t_embedder(torch.tensor([999])))


def test_under_autocast_the_residual_stream_stays_float32_and_the_error_below_a_percent():
    torch.manual_seed(0)
    model = Latte(28, 192, 6, num_frames=3, sample_size=8, num_classes=3).eval()
    with torch.no_grad():  # what begins as zero would make each block the identity
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.normal_(0, 0.02 if parameter.ndim > 1 else 0.2)
    x, t, y = torch.randn(2, 4, 3, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 2])
    streams = [block.register_forward_hook(lambda *a: seen.append(a[2].dtype)) for block in model.blocks]
    seen = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y).sample.double()
    assert seen == [torch.float32] * 28
    for hook in streams:
        hook.remove()
    with torch.no_grad():
        exact = model.double()(x.double(), t, y).sample
    assert (out - exact).norm() / exact.norm() < 0.008  # 0.0049; with a stream in bf16 0.0147


def test_bf16_autocast_trains():
    model, (x, t) = tiny().train(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, t).sample.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_scalar_timestep_means_the_same_for_every_sample():
    model, (x, _) = tiny(), inputs()
    expected = model(x, torch.tensor([7, 7])).sample
    for t in (7, torch.tensor(7), torch.tensor([7])):
        assert torch.equal(model(x, t).sample, expected)


def test_return_dict_false_gives_a_tuple():
    model, (x, t) = tiny(), inputs()
    assert torch.equal(model(x, t, return_dict=False)[0], model(x, t).sample)


def test_no_label_in_evaluation_is_the_null_label():
    model, (x, t) = tiny(num_classes=5), inputs()
    null = torch.full((2,), 5)
    assert model.null_label == 5
    assert torch.equal(model(x, t).sample, model(x, t, null).sample)
    assert not torch.equal(model(x, t).sample, model(x, t, torch.tensor([0, 1])).sample)


def test_label_dropout_hides_a_tenth_of_the_labels_in_training_only():
    embedder = tiny(num_classes=5).y_embedder
    y = torch.zeros(4000, dtype=torch.int64)
    null = embedder.embedding_table.weight[5]
    assert not (embedder(y) == null).all(dim=1).any()
    dropped = (embedder.train()(y) == null).all(dim=1).float().mean()
    assert 0.08 < dropped < 0.12  # 4 standard deviations


def test_force_drop_replaces_the_draw():
    model, (x, t) = tiny(num_classes=5).train(), inputs()
    y = torch.tensor([1, 2])
    half = model(x, t, y, force_drop=torch.tensor([False, True])).sample
    model.eval()
    assert torch.equal(half, model(x, t, torch.tensor([1, 5])).sample)


def test_gradient_checkpointing_changes_no_gradient():
    model, (x, t) = tiny(num_classes=5).train(), inputs()
    y, drop = torch.tensor([1, 2]), torch.tensor([False, True])
    gradients, calls = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        enable()
        model.zero_grad()
        model(x, t, y, drop).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 3, "once plain, twice checkpointed"
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_save_and_load_round_trip_gives_the_same_output(tmp_path):
    model, (x, t) = tiny(num_classes=5), inputs()
    model.save_pretrained(tmp_path)
    loaded = Latte.from_pretrained(tmp_path)
    assert loaded.latent_hw == (8, 4)
    assert loaded.config.num_classes == 5
    assert torch.equal(loaded(x, t).sample, model(x, t).sample)


def test_position_tables_survive_meta_and_empty_and_casts():
    expected = tiny()
    with torch.device("meta"):
        model = Latte(**TINY)
    for how in (lambda m: m.to_empty(device="cpu"), lambda m: m.to(torch.bfloat16).float()):
        model = how(model)
        model.load_state_dict(expected.state_dict())
        torch.testing.assert_close(model.pos_embed, expected.pos_embed, atol=0, rtol=0)
        torch.testing.assert_close(model.temp_embed, expected.temp_embed, atol=0, rtol=0)
    assert not {"pos_embed", "temp_embed"} & set(model.state_dict())


def test_weights_load_into_another_number_of_frames():
    longer = Latte(**{**TINY, "num_frames": 9})
    longer.load_state_dict(tiny().state_dict())
    assert longer.temp_embed.shape == (1, 9, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "depth=3"),
        ({"num_heads": 5}, "hidden_size=32"),
        ({"hidden_size": 30, "num_heads": 5}, "multiple of 4"),
        ({"sample_size": 9}, "patch_size=2"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Latte(**{**TINY, **changes})


def test_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match="XL/2"):
        Latte.from_size("H/2")


@pytest.mark.parametrize(
    "shape", [(2, 4, 1, 8, 4), (2, 4, 4, 8, 4), (2, 3, 3, 8, 4), (2, 4, 3, 4, 8), (2, 4, 8, 4)]
)
def test_latents_of_another_geometry_are_refused(shape):
    with pytest.raises(ValueError, match="takes"):
        tiny()(torch.randn(shape), 0)


def test_wrong_labels_and_timesteps_are_refused():
    x, t = inputs()
    with pytest.raises(ValueError, match="unconditional"):
        tiny()(x, t, torch.tensor([0, 1]))
    model = tiny(num_classes=5)
    for y in (torch.tensor([0, 6]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="labels"):
            model(x, t, y)
    with pytest.raises(ValueError, match="needs labels"):
        model.train()(x, t)
    with pytest.raises(ValueError, match="no null label"):
        tiny(num_classes=5, class_dropout_prob=0.0)(x, t)
    for t in (torch.tensor([0.5, 1.0]), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="timesteps"):
            tiny()(x, t)


def test_a_latte_with_labels_is_exported_as_one_graph():
    model = Latte(depth=2, hidden_size=16, num_heads=2, num_frames=3, sample_size=4, num_classes=3).eval()
    inputs = torch.randn(2, 4, 3, 4, 4), torch.tensor([3, 7]), torch.tensor([0, 2])
    with torch.no_grad():
        graph = torch.export.export(model, inputs, {"return_dict": False}).module()
        assert torch.allclose(graph(*inputs, return_dict=False)[0], model(*inputs).sample, atol=1e-5)


def test_weights_begin_as_those_of_dit():
    model = Latte(**{**TINY, "hidden_size": 256}, num_classes=101)
    embedders = model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.y_embedder.embedding_table
    for embedder in embedders:
        assert embedder.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear) and not name.startswith("t_embedder")
        if linear and module.weight.abs().max() > 0:
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound * 1.0001, name
            assert module.bias.abs().max() == 0, name
