"""The rules of clip lengths and sides that every VAE shares."""

import pytest
import torch
from torch import nn

from vae.interface import VideoVAE


class Model(VideoVAE, nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"latent_channels": 4}
        self.weight = nn.Parameter(torch.zeros(1))


class Grouped(Model):
    temporal_compression_ratio = 4
    frame_rule = "4n"


class Causal(Model):
    temporal_compression_ratio = 4
    frame_rule = "4n+1"


class Images(Model):
    pass


@pytest.mark.parametrize(
    ("cls", "lengths"),
    [(Images, {1: 1, 2: 2, 25: 25}), (Grouped, {4: 1, 8: 2, 16: 4}), (Causal, {1: 1, 5: 2, 25: 7, 81: 21})],
)
def test_pixel_and_latent_frames_are_each_others_inverse(cls, lengths):
    for T, t in lengths.items():
        assert cls().latent_frames(T) == t
        assert cls().pixel_frames(t) == T


@pytest.mark.parametrize(
    ("cls", "T", "message"),
    [
        (Causal, 24, r"T=24: Causal needs T = 4k \+ 1 frames, e.g. 25"),
        (Causal, 26, "e.g. 25"),
        (Causal, 0, "e.g. 1$"),
        (Grouped, 17, "T=17: Grouped needs T = 4k frames, e.g. 16"),
        (Grouped, 1, "e.g. 4"),
        (Images, 0, "at least 1 frame"),
    ],
)
def test_a_wrong_length_is_refused_with_the_nearest_right_one(cls, T, message):
    with pytest.raises(ValueError, match=message):
        cls().latent_frames(T)


def test_no_latent_frames_decode_to_nothing():
    with pytest.raises(ValueError, match="t=0"):
        Causal().pixel_frames(0)


def test_a_valid_clip_passes():
    Causal().check_video(torch.zeros(2, 3, 5, 16, 8))
    Images().check_video(torch.zeros(2, 3, 7, 16, 8))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(1, 3, 5, 16, 8, dtype=torch.float16),
            r"float16, weights of torch.float32: .*x.to\(torch.float32\)",
        ),
        (torch.zeros(1, 3, 5, 16, 8, dtype=torch.float64), "float64, weights of torch.float32"),
        (torch.zeros(1, 3, 5, 16, 8, dtype=torch.uint8), r"uint8: needs float in \[-1, 1\], e.g. x.float"),
        (torch.zeros(1, 3, 5, 16, 8, dtype=torch.int64), "int64: needs float"),
        (torch.zeros(0, 3, 5, 16, 8), "B = 0, a batch needs at least one clip"),
        (torch.zeros(3, 5, 16, 8), r"needs \(B, 3, T, H, W\); an image is T = 1"),
        (torch.zeros(1, 1, 5, 16, 8), r"needs \(B, 3, T, H, W\)"),
        (torch.zeros(1, 3, 5, 12, 8), "H=12, W=8: sides must be multiples of 8, e.g. crop to 8 x 8"),
        (torch.zeros(1, 3, 5, 16, 0), "W=0: sides must be multiples of 8"),
        (torch.zeros(1, 3, 6, 16, 8), "T=6: Causal needs .* e.g. 5"),
    ],
)
def test_a_wrong_clip_is_refused_with_the_rule_and_a_way_out(x, message):
    with pytest.raises(ValueError, match=message):
        Causal().check_video(x)


@pytest.mark.parametrize(
    ("z", "num_frames", "message"),
    [
        (torch.zeros(1, 4, 2, 2, 2, dtype=torch.float16), None, "latents of dtype torch.float16"),
        (torch.zeros(1, 4, 2, 2, 2, dtype=torch.int64), None, "latents of dtype torch.int64"),
        (torch.zeros(0, 4, 2, 2, 2), None, r"needs \(B, 4, t, h, w\), each at least 1"),
        (torch.zeros(1, 4, 0, 2, 2), None, r"needs \(B, 4, t, h, w\), each at least 1"),
        (torch.zeros(1, 8, 2, 2, 2), None, r"needs \(B, 4, t, h, w\)"),
        (torch.zeros(4, 2, 2, 2), None, r"needs \(B, 4, t, h, w\)"),
        (torch.zeros(1, 4, 2, 2, 2), 9, "num_frames=9 is 3 latent frames, but z has 2"),
        (torch.zeros(1, 4, 2, 2, 2), 6, "T=6: Causal needs"),
    ],
)
def test_wrong_latents_are_refused_with_the_rule(z, num_frames, message):
    with pytest.raises(ValueError, match=message):
        Causal().check_latents(z, num_frames)


def test_latents_of_the_right_shape_give_their_number_of_frames():
    z = torch.zeros(1, 4, 2, 2, 2)
    assert Causal().check_latents(z) == Causal().check_latents(z, 5) == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast brings the dtypes together itself
        assert Causal().check_latents(z.bfloat16()) == 5
        Causal().check_video(torch.zeros(1, 3, 5, 16, 8, dtype=torch.bfloat16))
