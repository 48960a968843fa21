"""Laws of the distances between feature sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from eval.measures import frechet_distance, kernel_distance

sizes = st.tuples(st.integers(2, 60), st.integers(2, 60), st.integers(1, 40), st.integers(0, 2**32 - 1))


def sets(n: int, m: int, dim: int, seed: int):
    """Two correlated, heavy-tailed sets of different mean, at the scale of logits."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((dim, dim))
    return rng.standard_t(5, (n, dim)) @ mix, rng.standard_t(5, (m, dim)) @ mix + rng.standard_normal(dim)


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_distance_to_itself_is_zero_for_n_below_and_above_d(size):
    a, _ = sets(*size)
    assert abs(frechet_distance(a, a)) < 1e-8 * max(1.0, a.var(axis=0, ddof=1).sum())
    assert abs(frechet_distance(a, a[::-1])) < 1e-8 * max(1.0, a.var(axis=0, ddof=1).sum())


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_distances_are_symmetric_and_do_not_depend_on_order(size):
    a, b = sets(*size)
    rng = np.random.default_rng(0)
    for distance in (frechet_distance, kernel_distance):
        value, scale = distance(a, b), 1e-9 * (1.0 + abs(distance(a, b)) + np.square(a).sum())
        assert abs(distance(b, a) - value) < scale
        assert abs(distance(rng.permutation(a), rng.permutation(b)) - value) < scale


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_frechet_distance_is_never_negative_and_moves_with_a_shift(size):
    a, b = sets(*size)
    shift = np.full(a.shape[1], 3.0)
    assert frechet_distance(a, b) > -1e-8 * np.square(a).sum()
    assert frechet_distance(a, a + shift) == pytest.approx(np.square(shift).sum(), rel=1e-8)


def test_self_distance_of_realistic_features_is_below_1e_8():
    a, _ = sets(600, 2, 400, 1)
    for n in (64, 399, 600):
        assert abs(frechet_distance(a[:n], a[:n])) < 1e-8


def test_equals_the_matrix_square_root_for_full_rank_covariances():
    a, b = sets(300, 200, 12, 3)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(np.trace(sqrtm(ca @ cb)))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_equals_the_double_sum_over_pairs():
    a, b = sets(7, 5, 3, 4)

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [
        np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)
    ]
    between = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_both_distances_grow_with_noise():
    a, b, noise = np.random.default_rng(6).standard_normal((3, 500, 8))
    for distance in (frechet_distance, kernel_distance):
        values = [distance(a, b + level * noise) for level in (0.0, 1.0, 2.0, 4.0)]
        assert values == sorted(values)


def test_the_callers_features_stay_as_they_are():
    a, b = (np.ascontiguousarray(x) for x in sets(10, 10, 4, 7))
    before = a.copy(), b.copy()
    frechet_distance(a, b)
    kernel_distance(a, b)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4)), "N >= 2"),
        (np.zeros((5, 4)), np.zeros((5, 3)), "D=4"),
        (np.zeros(4), np.zeros((5, 4)), r"\(N, D\)"),
        (np.full((5, 4), np.nan), np.zeros((5, 4)), "NaN"),
    ],
)
def test_impossible_features_are_refused(a, b, message):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=message):
            distance(a, b)
