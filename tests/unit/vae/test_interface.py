"""The rules of clip lengths and sides that every VAE shares."""

import pytest
import torch

from vae.interface import VideoVAE


class Grouped(VideoVAE):
    temporal_compression_ratio = 4
    frame_rule = "4n"


class Causal(VideoVAE):
    temporal_compression_ratio = 4
    frame_rule = "4n+1"


class Images(VideoVAE):
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
