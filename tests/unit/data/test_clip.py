"""Frame choice, resize and crop, the pixel scale."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.clip import (
    ClipSpec,
    crop_resize_uint8,
    frame_indices,
    span,
    to_float,
    to_uint8,
    upstream_linspace,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_clips_have_exact_steps_and_reach_every_start():
    spec = ClipSpec(num_frames=5, interval=3)
    assert span(spec) == 13
    starts = set()
    for seed in range(200):
        indices = frame_indices(16, spec, rng(seed))
        assert (np.diff(indices) == 3).all()
        assert indices.max() < 16
        starts.add(int(indices[0]))
    assert starts == {0, 1, 2, 3}  # the last one too
    assert frame_indices(13, spec, rng()).tolist() == [0, 3, 6, 9, 12]


def test_position_fixes_the_start():
    indices = {p: frame_indices(101, ClipSpec(num_frames=11, position=p), rng()) for p in ("start", "center")}
    assert indices["start"][0] == 0
    assert indices["center"][0] == 45


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("loop", [0, 1, 2, 3, 0, 1, 2, 3, 0]),
        ("reflect", [0, 1, 2, 3, 2, 1, 0, 1, 2]),
        ("stretch", [0, 0, 0, 1, 1, 1, 2, 2, 3]),
    ],
)
def test_short_videos_follow_the_policy(policy, expected):
    spec = ClipSpec(num_frames=9, short=policy)
    assert frame_indices(4, spec, rng()).tolist() == expected
    assert frame_indices(1, spec, rng()).tolist() == [0] * 9


def test_a_short_video_without_a_policy_is_an_error_with_a_way_out():
    with pytest.raises(ValueError, match=r"8 frames: 9 frames 1 apart need 9.*short=stretch"):
        frame_indices(8, ClipSpec(num_frames=9), rng())


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": "middle"},
        {"short": "pad"},
        {"resize": "long"},
        {"position": "end"},
        {"num_frames": 0},
        {"size": 6.5},
    ],
)
def test_unknown_choices_are_refused_with_the_known_ones(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClipSpec(**wrong)


def test_to_uint8_undoes_to_float_on_all_levels():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_uint8(to_float(levels)), levels)
    video = to_float(levels)
    assert (video.min().item(), video.max().item()) == (-1, 1)
    assert to_uint8(video.expand(2, 5, *video.shape)).shape == (2, 5, 1, 16, 16, 3)


def test_to_uint8_clamps_rounds_half_to_even_and_refuses_nan():
    values = torch.tensor([-3.0, 3.0, 0.0, 1 / 127.5 * 0.4]).view(1, 1, 1, 4).expand(3, 1, 1, 4)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 255, 128, 128]
    assert to_uint8(values.bfloat16()).dtype == np.uint8
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(values * float("nan"))


@pytest.mark.parametrize(("height", "width", "size"), [(48, 80, 32), (90, 60, 32), (30, 41, 64)])
def test_the_pixel_path_is_antialiased_bilinear_within_one_level(height, width, size):
    frames = rng(1).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    short = min(height, width)
    resized = [height * size // short, width * size // short]
    exact = torch.from_numpy(frames).permute(0, 3, 1, 2).double()
    exact = F.interpolate(exact, size=resized, mode="bilinear", antialias=True)
    top, left = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    exact = exact[:, :, top : top + size, left : left + size].permute(0, 2, 3, 1).numpy()
    ours = crop_resize_uint8(frames, ClipSpec(size=size), rng())
    # Exact scale on both axes when the long side is a whole number; else its rounding moves pixels slightly.
    if (height * size % short, width * size % short) == (0, 0):
        assert np.abs(ours - exact).max() <= 1.0
    else:
        assert np.abs(ours - exact).mean() < 8


def test_pixels_of_the_right_size_pass_unchanged():
    frames = rng(2).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(crop_resize_uint8(frames, ClipSpec(size=32), rng()), frames)
    wide = rng(3).integers(0, 256, (2, 32, 50, 3), dtype=np.uint8)
    assert np.array_equal(crop_resize_uint8(wide, ClipSpec(size=32), rng()), wide[:, :, 9:41])
    native = crop_resize_uint8(wide, ClipSpec(size=20, resize="none"), rng())
    assert np.array_equal(native, wide[:, 6:26, 15:35])
    with pytest.raises(ValueError, match="50x32: smaller than size=40"):
        crop_resize_uint8(wide, ClipSpec(size=40, resize="none"), rng())


def test_random_crops_cover_the_long_side_and_flips_are_half():
    ramp = np.broadcast_to(np.arange(50, dtype=np.uint8)[None, None, :, None], (1, 32, 50, 3))
    spec = ClipSpec(size=32, crop="random", flip=True)
    clips = [crop_resize_uint8(ramp, spec, rng(seed))[0, 0, :, 0] for seed in range(300)]
    mirrored = [clip[0] > clip[-1] for clip in clips]
    assert {int(min(clip[0], clip[-1])) for clip in clips} == set(range(19))
    assert 110 < sum(mirrored) < 190


def test_a_clip_of_floats_is_the_uint8_path_scaled():
    frames = rng(4).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    spec = ClipSpec(num_frames=3, size=16, crop="random", flip=True)
    clip = to_float(crop_resize_uint8(frames, spec, rng(5)))
    assert clip.shape == (3, 3, 16, 16)
    assert clip.dtype == torch.float32
    assert np.array_equal(to_uint8(clip), crop_resize_uint8(frames, spec, rng(5)))


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="need uint8"):
        crop_resize_uint8(np.zeros((2, 8, 8, 3), np.float32), ClipSpec(size=8), rng())
    with pytest.raises(ValueError, match="need"):
        to_uint8(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="begin=7"):
        upstream_linspace(7, 7, 4, 1)
