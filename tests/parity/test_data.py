"""Latte's frame choice and transforms (Vchitect/Latte b27c24a, datasets/*.py and video_transforms.py)."""

import json
import re

import numpy as np
import pytest

from data.clip import ClipSpec, crop_resize_uint8, frame_indices, upstream_linspace


def _cases(golden, rule):
    cases = json.loads((golden / "latte_frame_sampling.json").read_text())
    return [
        (*map(int, re.findall(r"=(\d+)", name)), indices)
        for name, indices in cases.items()
        if name.startswith(rule)
    ]


def test_upstream_linspace_is_latte_s_rule_for_ucf101(golden):
    cases = _cases(golden, "ucf")
    assert len(cases) >= 6
    for total, begin, num_frames, interval, indices in cases:
        assert upstream_linspace(total, begin, num_frames, interval).tolist() == indices


def test_stretch_is_latte_s_rule_for_a_video_that_is_too_short(golden):
    cases = [case for case in _cases(golden, "ucf") if case[0] <= case[2] * case[3] and case[1] == 0]
    assert len(cases) >= 2
    for total, _, num_frames, interval, indices in cases:
        spec = ClipSpec(num_frames=num_frames, interval=interval, short="stretch")
        assert frame_indices(total, spec, np.random.default_rng(0)).tolist() == indices


def test_frames_are_exactly_spaced_as_in_latte_s_rule_for_sky(golden):
    compared = 0
    for total, begin, num_frames, interval, indices in _cases(golden, "sky"):
        if len(indices) < num_frames:  # upstream returns fewer frames than asked from a short clip
            continue
        spec = ClipSpec(num_frames=num_frames, interval=interval, position="start")
        assert (frame_indices(total - begin, spec, np.random.default_rng(0)) + begin).tolist() == indices
        compared += 1
    assert compared >= 4


def test_enlarged_clips_equal_latte_s_short_edge_resize_and_centre_crop(golden):
    frozen = np.load(golden / "latte_transforms.npz")
    clip = frozen["clip"].transpose(0, 2, 3, 1)
    upstream = (frozen["ucf32"].transpose(0, 2, 3, 1) + 1) * 127.5  # float: upstream does not round
    ours = crop_resize_uint8(clip, ClipSpec(num_frames=3, size=32), np.random.default_rng(0))
    # Pillow rounds after each of two passes: one level. When pictures shrink the two differ on purpose:
    # upstream samples without antialiasing, so its sky16 is not reproduced.
    assert np.abs(ours - upstream).max() == pytest.approx(0, abs=1.0)
