"""Winograd's 3 x 3 convolutions: right to float32, taken where they pay, with the laws of streams and prepared kernels."""

import pytest
import torch
import torch.nn.functional as F

from data.core import convolution, winograd
from tests.unit.vae import reference
from tests.unit.vae.test_stream import assert_streams_equal_the_clip
from tests.unit.vae.tiny import clip, moments, tiny
from vae import fast

pytestmark = pytest.mark.skipif(not convolution.ONEDNN, reason="torch without oneDNN")


@pytest.fixture
def always(monkeypatch):
    """Every 3 x 3 convolution that can be is computed by Winograd; a list of the calls."""
    for limit in ("WORTH", "PIXELS", "LEAST"):
        monkeypatch.setattr(winograd, limit, 0)
    convolve, calls = winograd.convolve_3x3, []
    monkeypatch.setattr(
        winograd, "convolve_3x3", lambda *args, **more: calls.append(args) or convolve(*args, **more)
    )
    return calls


def layer(I, O, kt, stride=1, padding=1):  # noqa: E741
    if kt is None:
        return torch.nn.Conv2d(I, O, 3, stride, padding)
    return torch.nn.Conv3d(I, O, (kt, 3, 3), stride, (0, padding, padding))


@torch.no_grad()
@pytest.mark.parametrize("kt", [None, 1, 2, 3])
@pytest.mark.parametrize(("B", "T", "H", "W"), [(1, 1, 2, 2), (2, 4, 8, 6), (1, 9, 4, 14), (1, 13, 22, 20)])
@pytest.mark.parametrize("band", [1, 2**20])
def test_it_is_the_convolution_in_float64(kt, B, T, H, W, band, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 1)
    monkeypatch.setattr(winograd, "BAND_BYTES", band)
    conv = layer(24, 40, kt)
    x = torch.randn(B, 24, H, W) if kt is None else torch.randn(B, 24, T + kt - 1, H, W)
    got = winograd.convolve_3x3(conv, x, "", lambda w: w, kt or 1)
    assert got.is_contiguous(memory_format=torch.channels_last if kt is None else torch.channels_last_3d)
    torch.testing.assert_close(got.double(), conv.double()(x.double()), atol=3e-6, rtol=3e-6)


@torch.no_grad()
@pytest.mark.parametrize(("B", "T", "H", "W"), [(1, 1, 1, 1), (2, 3, 5, 7), (1, 6, 12, 9)])
@pytest.mark.parametrize("band", [1, 2**20])
@pytest.mark.parametrize("kind", ["space", "first", "space and time"])
def test_enlarging_is_the_convolution_of_the_enlarged_frames(kind, B, T, H, W, band, monkeypatch, always):
    monkeypatch.setattr(winograd, "TILES", 1)
    monkeypatch.setattr(winograd, "BAND_BYTES", band)
    conv, x = layer(24, 40, 1 if kind == "space" else 3), torch.randn(B, 24, T, H, W)
    double = F.interpolate(x.double(), scale_factor=(1, 2, 2))
    if kind == "space":
        got = fast._enlarge(conv, x, "phases", lambda w: w)
    elif kind == "first":
        got = fast._enlarge(conv, x, "first phases", lambda w: w.sum(2, keepdim=True))
        double = double.repeat_interleave(3, dim=2)
    else:  # the frame before x stands first
        x = torch.cat((x[:, :, :1], x), dim=2)
        got = fast._enlarge(conv, x, "phases", fast.temporal_phases, kt=2, frames=2)
        before = F.interpolate(x.double(), scale_factor=(1, 2, 2))
        double = torch.cat((before[:, :, :1], before.repeat_interleave(2, dim=2)), dim=2)[:, :, 1:]
    want = F.conv3d(double, conv.weight.double(), conv.bias.double(), padding=(0, 1, 1))
    want = want[:, :, ::3] if kind == "first" else want
    assert always
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=5e-6)


def test_it_is_taken_where_it_pays_and_can_be(monkeypatch):
    monkeypatch.setattr(winograd, "X86", True)
    large = torch.empty(1, 128, 6, 64, 64)
    assert winograd.suits(layer(128, 128, 3), large, kt=3)
    assert winograd.suits(layer(512, 512, 3), torch.empty(1, 512, 3, 8, 8), kt=3)
    assert winograd.suits(layer(128, 128, None), large[:, :, 0], kt=1)
    assert winograd.suits(layer(128, 128, 3, stride=2), large[..., :63], kt=1, enlarge=True)
    # Too little to gain
    assert not winograd.suits(layer(64, 64, None), large[:, :64, 0], kt=1)
    assert not winograd.suits(layer(3, 512, 3), large[:, :3], kt=3)
    assert not winograd.suits(layer(512, 512, None), torch.empty(1, 512, 8, 8), kt=1)
    assert not winograd.suits(layer(512, 512, 3), torch.empty(1, 512, 3, 4, 6), kt=3)
    # Not this convolution
    assert not winograd.suits(layer(128, 128, 3), large[..., :63], kt=3)
    assert not winograd.suits(layer(128, 128, 3, stride=(1, 2, 2)), large, kt=3)
    assert not winograd.suits(layer(128, 128, 3, padding=0), large, kt=3)
    assert not winograd.suits(torch.nn.Conv3d(512, 512, 1), large, kt=1)
    # Not in this precision, on this device, or in a graph
    assert not winograd.suits(layer(128, 128, 3).double(), large.double(), kt=3)
    assert not winograd.suits(layer(128, 128, 3).bfloat16(), large.bfloat16(), kt=3)
    assert not winograd.suits(layer(128, 128, 3), large.to("meta"), kt=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert not winograd.suits(layer(128, 128, 3), large, kt=3)
    # Not where its kernels cannot be kept, nor where it was never measured
    with torch.inference_mode():
        assert not winograd.suits(layer(128, 128, 3), large, kt=3)
    monkeypatch.setattr(winograd, "X86", False)
    assert not winograd.suits(layer(128, 128, 3), large, kt=3)


def test_doubles_stay_doubles_under_autocast():
    model, x = tiny("odvae"), clip(9)
    with torch.no_grad():
        want = moments(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(moments(model, x), want)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["odvae", "osp_v1_2", "osp_v1_1", "osp_v1_0"])
@pytest.mark.parametrize("B", [1, 2])
def test_the_network_is_the_plain_one_in_float64(preset, B, always):
    model, x = tiny(preset), clip(13, B=B)
    want = reference.encode(model, x)
    z = want.chunk(2, dim=1)[0]
    frames = reference.decode(model, z)
    model.float()
    # In float32 the plain network itself is up to 1.2e-5 off
    assert (moments(model, x.float()) - want).abs().max() < 2e-5
    encoding = len(always)
    assert (model.decode(z.float()).sample - frames).abs().max() < 2e-5
    assert 0 < encoding < len(always)


@torch.no_grad()
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_streams_equal_the_whole_clip_to_the_bit(variant, always):
    model = tiny(variant=variant, dtype=torch.float32)
    assert_streams_equal_the_clip(model, clip(13, dtype=torch.float32))
    assert always


@torch.no_grad()
def test_its_kernels_follow_the_weights_and_no_more_than_two_sizes_are_kept():
    conv, x = layer(64, 64, 3), torch.randn(1, 64, 4, 16, 16)
    before = fast._convolve(conv, x, True, True)
    conv.weight.mul_(2)
    conv.bias.mul_(2)
    torch.testing.assert_close(fast._convolve(conv, x, True, True), 2 * before)
    for side in (15, 16, 14, 13):  # odd ones directly
        want = F.conv3d(x[..., :side], conv.weight, conv.bias, padding=(0, 1, 1))
        assert winograd.suits(conv, x[..., :side], kt=3) == (side % 2 == 0)
        torch.testing.assert_close(
            fast._convolve(conv, x[..., :side], True, True), want, atol=1e-5, rtol=1e-5
        )
        assert len(convolution._PREPARED[conv]["", torch.float32]) == 2
