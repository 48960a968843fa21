"""Layers: the fast forms equal the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from vae import fast as engine
from vae.layers import FrameAttention, VideoGroupNorm
from vae.resample import SpaceTimeUpsample, SpatialUpsample, double_frames, enlarge, halve_frames
from vae.stream import StreamState


@torch.no_grad()
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_group_norm_of_channels_last_frames_is_exact_far_from_zero(scope):
    norm = VideoGroupNorm(4, 16, scope)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 3, 64, 64) + 10
    if scope == "clip":
        want = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    else:
        frames = [
            F.group_norm(f.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6) for f in x.unbind(2)
        ]
        want = torch.stack(frames, 2)
    fast = x.contiguous(memory_format=torch.channels_last_3d)
    assert (norm(x) - want).abs().max() < 2e-5
    assert (norm.channels_last(x) - want).abs().max() < 2e-5
    assert norm.channels_last(x).stride() == fast.stride()
    assert (engine.norm(norm, fast) - want).abs().max() < 2e-5
    out = torch.empty_like(fast)
    engine.write_norm_silu(norm, fast, out)
    assert (out - F.silu(want)).abs().max() < 2e-5
    double = norm.double().channels_last(x.double())
    torch.testing.assert_close(double, norm(x.double()), atol=1e-12, rtol=1e-12)
    assert norm.bfloat16().channels_last(x.bfloat16()).dtype is torch.bfloat16


def run(layer, x):
    state = StreamState()
    parts = []
    for frame in x.split(1, dim=2):
        parts.append(engine.resample(layer, frame, state))
        state.first = False
    return torch.cat(parts, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["2d", "1x3x3"])
def test_phases_equal_upsampling_then_convolving_in_space(kind):
    layer, x = SpatialUpsample(kind, 6).double(), torch.randn(2, 6, 3, 5, 4).double()
    torch.testing.assert_close(run(layer, x), layer(x), atol=1e-14, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("spatial", ["nearest", "trilinear"])
def test_phases_equal_upsampling_then_convolving_in_space_and_time(spatial):
    layer, x = SpaceTimeUpsample(6, spatial, "nearest").double(), torch.randn(2, 6, 4, 5, 4).double()
    assert layer(x).shape == (2, 6, 7, 10, 8)
    torch.testing.assert_close(run(layer, x), layer(x), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
def test_frames_are_enlarged_in_parts_below_2_31_elements(mode, monkeypatch):
    made = []
    whole = F.interpolate

    def watched(x, **options):
        made.append(whole(x, **options))
        return made[-1]

    monkeypatch.setattr(F, "interpolate", watched)
    y = enlarge(torch.empty(1, 256, 259, 128, 128, device="meta"), mode)
    assert y.shape == (1, 256, 259, 256, 256)
    assert len(made) == 3
    assert all(part.numel() < 2**31 for part in made)
    x = torch.randn(2, 3, 4, 5, 6)
    monkeypatch.setattr("vae.resample.MOST", 400)
    torch.testing.assert_close(enlarge(x, mode), whole(x, scale_factor=(1, 2, 2), mode=mode))
    assert len(made) == 3 + 4


def test_linear_doubling_is_trilinear_interpolation_of_all_but_the_first_frame():
    x = torch.randn(1, 2, 5, 3, 3)
    want = F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear", align_corners=False)
    torch.testing.assert_close(double_frames(x, "linear"), torch.cat((x[:, :, :1], want), 2))
    assert torch.equal(double_frames(x[:, :, :1], "linear"), x[:, :, :1])


def test_halving_keeps_the_first_frame_and_averages_three():
    x = torch.arange(5.0).view(1, 1, 5, 1, 1)
    torch.testing.assert_close(halve_frames(x).flatten(), torch.tensor([0.0, 1.0, 3.0]))


@torch.no_grad()
def test_attention_of_v1_0_is_right_for_an_image_and_scrambles_a_clip():
    right = FrameAttention(8, 4, "clip").eval()
    wrong = FrameAttention(8, 4, "clip", scrambled=True).eval()
    wrong.load_state_dict(right.state_dict())
    x = torch.randn(1, 8, 3, 2, 5)
    torch.testing.assert_close(wrong(x[:, :, :1]), right(x[:, :, :1]))
    assert (wrong(x) - right(x)).abs().max() > 1e-3
    # Upstream's formula: rows of (B, C, t) read as if they were rows of (B t, C).
    y = right.norm(x)
    q, k, v = (layer(y).reshape(3, 8, 10) for layer in (right.q, right.k, right.v))
    weights = torch.softmax(q.transpose(1, 2) @ k * 8**-0.5, dim=2)
    want = x + right.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))
    torch.testing.assert_close(wrong(x), want)


@torch.no_grad()
def test_attention_looks_at_one_frame_only():
    layer, x = FrameAttention(8, 4, "frame").eval(), torch.randn(2, 8, 3, 2, 5)
    frames = torch.cat([layer(f) for f in x.split(1, dim=2)], 2)
    torch.testing.assert_close(layer(x), frames)
