"""Intervals cover what they should, are seeded, respect videos; the floor is what equal distributions score."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg

from eval.fvd import distances, score
from eval.measures import (
    RESAMPLES,
    _counts,
    _frechet,
    _frechets,
    _kernel,
    frechet_distance,
    frechet_interval,
    inception_interval,
    inception_score_from_logits,
    kernel_distance,
    kernel_interval,
    same_distribution_floor,
)
from eval.protocol import Protocol


def sets(n: int, dim: int, seed: int, shift: float = 0.5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, dim)), rng.standard_normal((n, dim)) + shift


@pytest.mark.parametrize(("n", "dim"), [(30, 6), (12, 40), (41, 40)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_weighted_distance_equals_that_of_the_repeated_set(n, dim, ddof):
    a, b = sets(n, dim, 0)
    for seed in range(3):
        w, v = _counts(np.arange(n), 2, np.random.default_rng(seed))
        repeated = [np.repeat(x, c.astype(int), axis=0) for x, c in ((a, w), (b, v))]
        assert _frechet(a, b, ddof, w, v) == pytest.approx(frechet_distance(*repeated, ddof), rel=1e-6)


def along_few_directions(decay: float, n: int = 200, dim: int = 60, seed: int = 0):
    """Features whose k-th principal variance falls as k^-decay, as those of a trained network do."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, dim + 1) ** (-decay / 2)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    a, b = (rng.standard_normal((2, n, dim)) * scale) @ turn
    return a, 1.2 * b + 0.1


@pytest.mark.parametrize(("decay", "in_full"), [(3, 6), (0, 200)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_resamples_are_computed_along_the_leading_directions_where_that_is_close(
    monkeypatch, decay, in_full, ddof
):
    a, b = along_few_directions(decay)
    w, v = (_counts(np.arange(200), 200, np.random.default_rng(seed)) for seed in (0, 1))
    wanted = np.array([_frechet(a, b, ddof, *counts) for counts in zip(w, v, strict=True)])
    calls = []
    monkeypatch.setattr("eval.measures.LEADING", (20, 40))
    monkeypatch.setattr("eval.measures._frechet", lambda *args: calls.append(0) or _frechet(*args))
    error = _frechets(a, b, ddof, w, v) - wanted
    assert len(calls) == in_full
    assert np.abs(error).max() < 0.05 * wanted.std()
    assert abs(error.mean()) < 0.01 * wanted.std()


def test_resamples_are_computed_in_full_where_the_short_way_finds_no_root(monkeypatch):
    def fail(*args):
        raise scipy.linalg.LinAlgError("the leading minor is not positive definite")

    a, b = along_few_directions(3)
    w, v = (_counts(np.arange(200), 10, np.random.default_rng(seed)) for seed in (0, 1))
    wanted = [_frechet(a, b, 1, *counts) for counts in zip(w, v, strict=True)]
    monkeypatch.setattr("eval.measures.LEADING", (20, 40))
    monkeypatch.setattr("eval.measures._ShortWay._first_order", fail)
    assert _frechets(a, b, 1, w, v).tolist() == wanted


@pytest.mark.parametrize("value", [0.0, 0.1])  # the mean of many 0.1 is not quite 0.1
@pytest.mark.parametrize("n", [120, 900])
def test_the_interval_of_constant_features_has_no_width_however_many_clips_there_are(n, value):
    dim = {120: 60, 900: 400}[n]
    groups = np.arange(n)
    found = frechet_interval(np.full((n, dim), value), np.full((n, dim), value + 1), groups, groups, dim)
    assert found["std"] < 1e-6
    assert found["low"] == pytest.approx(dim) == found["high"]


def test_the_weighted_kernel_distance_is_the_distance_and_resampling_does_not_raise_it():
    a, b = sets(60, 5, 0)
    value = kernel_distance(a, b)
    assert _kernel(a, b, np.ones((1, 60)), np.ones((1, 60)))[0] == pytest.approx(value, rel=1e-12)
    w, v = (_counts(np.arange(60), 2000, np.random.default_rng(seed)) for seed in (0, 1))
    resampled = _kernel(a, b, w, v)
    assert abs(resampled.mean() - value) < 4 * resampled.std() / np.sqrt(2000)


@pytest.mark.parametrize("metric", ["FVD", "KVD"])
def test_the_interval_covers_the_spread_over_fresh_samples(metric):
    distance = {"FVD": frechet_distance, "KVD": kernel_distance}[metric]
    n, groups = 150, np.arange(150)
    values = np.array([distance(*sets(n, 4, seed)) for seed in range(60)])
    interval_of = {"FVD": frechet_interval, "KVD": kernel_interval}[metric]
    found = [interval_of(*sets(n, 4, s), groups, groups, values[s], seed=s) for s in range(15)]
    assert np.mean([f["std"] for f in found]) == pytest.approx(values.std(ddof=1), rel=0.3)
    covered = np.mean([f["low"] <= values.mean() <= f["high"] for f in found])
    assert covered >= 0.8
    assert all(f["low"] < value < f["high"] for f, value in zip(found, values, strict=False))


def test_clips_of_one_video_are_drawn_together_so_copies_do_not_narrow_the_interval():
    a, b = sets(40, 5, 1)
    groups = np.arange(40)
    plain = kernel_interval(a, b, groups, groups, 0.0)["std"]
    twice = [np.repeat(x, 2, axis=0) + 1e-9 for x in (a, b, groups)]
    grouped = frechet_interval(twice[0], twice[1], np.repeat(groups, 2), np.repeat(groups, 2), 0.0)["std"]
    once = frechet_interval(a, b, groups, groups, 0.0)["std"]
    assert grouped == pytest.approx(once, rel=0.1)
    apart = frechet_interval(twice[0], twice[1], np.arange(80), np.arange(80), 0.0)["std"]
    assert apart < 0.85 * once
    assert plain > 0


def test_an_interval_is_a_function_of_its_seed_and_is_json():
    a, b = sets(30, 4, 2)
    groups = np.arange(30)
    one, two, other = (frechet_interval(a, b, groups, groups, 1.0, seed=s) for s in (0, 0, 1))
    assert one == two != other
    assert one["level"] == 0.95
    assert all(isinstance(value, float | int | str) for value in one.values())


def test_the_interval_of_an_inception_score_covers_it():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((300, 10))
    logits[np.arange(300), rng.integers(0, 10, 300)] += 4
    value, _ = inception_score_from_logits(logits)
    found = inception_interval(logits, np.arange(300), value)
    assert found["low"] < value < found["high"]
    assert 0.01 < found["std"] < 0.5
    assert inception_interval(logits, np.arange(300), value, splits=10)["low"] < value


def test_the_floor_is_the_score_of_real_against_real_at_the_same_number():
    real = np.random.default_rng(4).standard_normal((200, 6))
    floor = same_distribution_floor(real, 100, distances)
    assert (floor["num_videos"], floor["same_num_videos"]) == (100, True)
    assert floor["values"] == distances(real[:100], real[100:])
    half = same_distribution_floor(real[:120], 100, distances)
    assert (half["num_videos"], half["same_num_videos"]) == (60, False)
    assert half["values"]["FVD"] > floor["values"]["FVD"]  # the bias grows as N falls
    assert same_distribution_floor(real[:3], 3, distances) is None


def test_the_interval_of_an_inception_score_is_the_spread_of_its_resamples():
    logits = 3 * np.random.default_rng(3).standard_normal((60, 10))
    groups = np.arange(60) // 2
    values = []
    for row in _counts(groups, RESAMPLES, np.random.default_rng(5)).astype(int):
        drawn = np.concatenate([logits[[n] * count] for n, count in enumerate(row)])
        values.append(inception_score_from_logits(drawn, 3)[0])
    found = inception_interval(logits, groups, 2.0, splits=3, seed=5)
    assert found["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)


def test_each_side_is_drawn_by_its_own_videos():
    a, b = sets(40, 4, 1)
    one, two = np.arange(40), np.arange(40) // 8
    rng = np.random.default_rng(3)
    w, v = _counts(one, RESAMPLES, rng), _counts(two, RESAMPLES, rng)
    expected = _frechets(a, b, 1, w, v).std(ddof=1), _kernel(a, b, w, v).std(ddof=1)
    assert frechet_interval(a, b, one, two, 0.0, seed=3)["std"] == pytest.approx(expected[0])
    assert kernel_interval(a, b, one, two, 0.0, seed=3)["std"] == pytest.approx(expected[1])


@pytest.mark.parametrize(("clips", "num"), [(2, 20), (4, 40), (2, 30)])
def test_no_video_stands_on_both_sides_of_the_floor(clips, num):
    """Clips of one video are alike, so they would make the floor too low."""
    videos = np.random.default_rng(6).standard_normal((20, 6))
    groups = np.tile(np.arange(20), clips)  # a clip of each video first, as they are drawn
    real = videos[groups] + 1e-3 * np.random.default_rng(7).standard_normal((20 * clips, 6))
    seen = []

    def noted(a, b):
        seen.append((a, b))
        return distances(a, b)

    floor = same_distribution_floor(real, num, noted, groups)
    sides = [{int(np.abs(videos - clip).sum(1).argmin()) for clip in side} for side in seen[0]]
    assert not sides[0] & sides[1]
    half = 10 * clips if len(real) < 2 * num else min(num, 10 * clips)
    assert (floor["num_videos"], floor["same_num_videos"]) == (half, half == num)
    assert floor["values"]["FVD"] > 100 * same_distribution_floor(real, num, distances)["values"]["FVD"] > 0


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_score_is_made_with_the_ddof_and_the_seed_of_its_protocol(ddof):
    (a, b), groups = sets(20, 4, 1), np.arange(20)
    real = SimpleNamespace(features=a, groups=groups)  # the second half is for the floor
    fake = SimpleNamespace(features=b[:10], groups=groups[:10])
    found = score(real, fake, Protocol(num_videos=10, ddof=ddof, seed=3))
    sides, values = (a[:10], b[:10], groups[:10], groups[:10]), distances(a[:10], b[:10], ddof)
    assert {metric: one["value"] for metric, one in found.items()} == values
    assert found["FVD"]["interval"] == frechet_interval(*sides, values["FVD"], ddof, 3)
    assert found["KVD"]["interval"] == kernel_interval(*sides, values["KVD"], 3)
    assert found["FVD"]["floor"]["value"] == distances(a[:10], a[10:], ddof)["FVD"]
