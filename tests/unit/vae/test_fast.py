"""Prepared kernels follow their weights and leave no trace; the fused passes equal torch's operations."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch

from data.core import convolution, winograd
from data.core.convolution import convolve, prepared
from tests.unit.vae import reference
from tests.unit.vae.tiny import clip, moments, tiny
from vae import ops
from vae.ops import plain_group_norm


def moments_after(change):
    """Moments before and after `change`, and those of a model that has never been used."""
    model, x = tiny(dtype=torch.float32), clip(5, dtype=torch.float32)
    with torch.no_grad():
        before = moments(model, x)
        model = change(model) or model
        after = moments(model, x.to(model.dtype))
        want = moments(copy.deepcopy(model), x.to(model.dtype))
    assert torch.equal(after, want)
    return before, after


def in_place(model):
    model.encoder.conv_out.conv.weight.mul_(2)


def loaded(model):
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})


def averaged(model):
    parameters = list(model.parameters())
    torch._foreach_lerp_(parameters, [torch.ones_like(p) for p in parameters], 0.3)


def replaced(model):
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data


@pytest.mark.parametrize(
    "change",
    [in_place, loaded, averaged, replaced, lambda model: model.double(), lambda model: model.bfloat16()],
)
def test_prepared_kernels_notice_changed_weights(change):
    before, after = moments_after(change)
    assert (after.to(before.dtype) - before).abs().max() > 1e-9


def test_prepared_kernels_notice_an_optimizer_that_leaves_no_trace():
    model, x = tiny(dtype=torch.float32), clip(5, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with torch.no_grad():
        before = moments(model, x)
    moments(model, x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = moments(model, x)
        assert torch.equal(after, moments(copy.deepcopy(model), x))
        assert (after - before).abs().max() > 1e-3


@torch.no_grad()
def test_prepared_kernels_are_made_once_and_leave_no_trace_in_the_model(monkeypatch):
    model, x, made = tiny(dtype=torch.float32), clip(13, dtype=torch.float32), []
    ready = convolution._ready
    monkeypatch.setattr(convolution, "_ready", lambda *args: made.append(1) or ready(*args))
    keys, attributes = list(model.state_dict()), set(vars(model.encoder.conv_out.conv))
    moments(model, x)
    count = len(made)
    assert count > 0
    moments(model, x)
    assert len(made) == count
    assert list(model.state_dict()) == keys
    assert set(vars(model.encoder.conv_out.conv)) == attributes
    assert torch.equal(moments(pickle.loads(pickle.dumps(model)), x), moments(model, x))
    held = len(convolution._PREPARED)
    del model
    assert len(convolution._PREPARED) < held


@torch.no_grad()
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_a_packed_kernel_gives_the_bits_of_onednn(stride):
    conv = torch.nn.Conv3d(16, 24, 3, stride=stride, padding=(0, 1, 1))
    x = torch.randn(1, 16, 5, 9, 7).contiguous(memory_format=torch.channels_last_3d)
    kernel = prepared(conv, x, stride=conv.stride, padding=conv.padding)
    assert kernel.is_mkldnn == torch.backends.mkldnn.is_available()
    got = convolve(x, kernel, conv.bias, conv.stride, conv.padding)
    want = torch.ops.aten.mkldnn_convolution(x, conv.weight, conv.bias, (0, 1, 1), stride, (1, 1, 1), 1)
    assert torch.equal(got, want)
    torch.testing.assert_close(got.double(), conv.double()(x.double()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("worth", [0, winograd.WORTH])
def test_every_kernel_is_in_the_order_of_the_size_that_it_meets(worth, monkeypatch):
    """Else oneDNN puts it into order in every call, up to 40 times slower."""
    for limit in ("WORTH", "PIXELS", "LEAST"):
        monkeypatch.setattr(winograd, limit, min(worth, getattr(winograd, limit)))
    model, x, sizes, met = tiny(dtype=torch.float32), clip(13, dtype=torch.float32), {}, []
    ready, convolve = convolution._ready, convolution.convolve

    def seen_ready(kernel, x, dtype, stride, padding, groups, size):
        made = ready(kernel, x, dtype, stride, padding, groups, size)
        sizes.update({id(one): (one, size) for one in (made if isinstance(made, tuple) else (made,))})
        return made

    def seen_convolve(x, kernel, *args, **more):
        if id(kernel) in sizes:
            met.append((tuple(x.shape), tuple(sizes[id(kernel)][1])))
        return convolve(x, kernel, *args, **more)

    monkeypatch.setattr(convolution, "_ready", seen_ready)
    monkeypatch.setattr(convolution, "convolve", seen_convolve)
    model.decode(moments(model, x).chunk(2, dim=1)[0])
    assert len(met) > 100
    assert all(x == size for x, size in met)


INTERPRETED = """
import torch
from vae import kernels
from vae.ops import plain_group_norm
kernels.check("cpu")
torch.manual_seed(0)
for dtype, C, G, T, H, W in ((torch.float32, 64, 32, 3, 40, 33), (torch.bfloat16, 16, 4, 2, 64, 64)):
    video = (torch.randn(2, T + 2, H, W, C) * 2 + 10).to(dtype).permute(0, 4, 1, 2, 3)
    x, (w, b, s) = video[:, :, 2:], torch.randn(3, C)
    for by_frame in (True, False):
        for shift in (None, s):
            outs = torch.zeros_like(video), torch.zeros_like(video)  # each writes into its window
            for function, out in zip((kernels.group_norm, plain_group_norm), outs):
                function(x, shift, w, b, G, 1e-6, by_frame, True, out[:, :, 2:])
                assert not out[:, :, :2].any()
            torch.testing.assert_close(*outs, atol=2e-5 if dtype == torch.float32 else 0.07, rtol=1e-2)
"""


def test_triton_kernels_equal_torchs_operations_in_the_interpreter():
    pytest.importorskip("triton")
    env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("by_frame", [True, False])
def test_the_norm_without_triton_is_group_norm_and_silu(by_frame):
    x = (torch.randn(2, 8, 3, 5, 6) + 10).contiguous(memory_format=torch.channels_last_3d)
    weight, bias, shift = torch.randn(3, 8)
    out = torch.empty_like(x)
    plain_group_norm(x, shift, weight, bias, 4, 1e-6, by_frame, True, out)
    shifted = (x + shift.view(1, 8, 1, 1, 1)).double()
    sets = shifted.transpose(1, 2).flatten(0, 1) if by_frame else shifted
    want = torch.nn.functional.group_norm(sets, 4, weight.double(), bias.double(), 1e-6)
    want = want.unflatten(0, (2, 3)).transpose(1, 2) if by_frame else want
    assert (out - torch.nn.functional.silu(want)).abs().max() < 1e-5


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Inference takes the GPU's way, steps of three latents and torch's operations, on the CPU."""
    library = torch.library.Library("omnilatte", "IMPL")
    library.impl("group_norm", plain_group_norm, "CPU")
    library.impl("add_residual", ops._add_residual, "CPU")
    monkeypatch.setattr(ops, "_triton", lambda: None)
    monkeypatch.setattr("vae.odvae.latents_per_step", lambda x, pixels: 3)
    for module in ("ops", "odvae"):
        monkeypatch.setattr(f"vae.{module}.fused", lambda x: True)
    yield
    library._destroy()


@torch.no_grad()
@pytest.mark.parametrize("preset", ["odvae", "osp_v1_2"])
@pytest.mark.parametrize("B", [1, 2])
def test_the_gpus_way_gives_the_plain_network(preset, B, as_on_a_gpu):
    model, x = tiny(preset), clip(21, B=B)
    want = reference.encode(model, x)
    z = want.chunk(2, dim=1)[0]
    got, frames = moments(model, x), model.decode(z).sample
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)  # norms in float32
    torch.testing.assert_close(frames, reference.decode(model, z), atol=2e-5, rtol=2e-5)
    if model.causal:
        pieces = [p.parameters for p in model.stream_encode(x.split(2, dim=2))]
        assert [p.shape[2] for p in pieces] == [1] * 6
        assert torch.equal(torch.cat(pieces, dim=2), got)
        pieces = list(model.stream_decode(z.split(1, dim=2)))
        assert [p.shape[2] for p in pieces] == [1] + [4] * 5
        assert torch.equal(torch.cat(pieces, dim=2), frames)
