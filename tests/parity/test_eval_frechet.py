"""FVD, KVD and IS against outputs of TATS, cd-fvd, common_metrics, TGAN2 and StyleGAN-V (eval_README.md)."""

import json

import numpy as np
import pytest

from eval.measures import frechet_distance, inception_score, inception_score_from_logits, kernel_distance


@pytest.fixture
def table(golden):
    with np.load(golden / "eval_fvd_kvd.npz") as arrays:
        return (
            arrays["A"].astype(np.float32),
            arrays["B"].astype(np.float32),
            json.loads(str(arrays["results"])),
        )


@pytest.mark.parametrize(("n", "rtol"), [(64, 1e-6), (600, 1e-9)])
def test_frechet_equals_the_independent_references_for_n_below_and_above_d(table, n, rtol):
    a, b, expected = table
    for ddof in (0, 1):
        value = frechet_distance(a[:n], b[:n], ddof=ddof)
        assert value == pytest.approx(expected[f"ref_nuclear_fvd_ddof{ddof}_{n}"], rel=rtol)


@pytest.mark.parametrize("n", [64, 600])
def test_frechet_equals_tats_cd_fvd_and_common_metrics(table, n):
    a, b, expected = table
    one, zero = frechet_distance(a[:n], b[:n]), frechet_distance(a[:n], b[:n], ddof=0)
    assert one == pytest.approx(expected[f"tats_fvd_f64_{n}"], rel=1e-5)
    assert one == pytest.approx(expected[f"tats_fvd_f32_{n}"], rel=1e-2)
    assert one == pytest.approx(expected[f"common_metrics_styleganv_fvd_ddof1_{n}"], rel=1e-5)
    assert zero == pytest.approx(expected[f"cdfvd_fvd_ddof0_{n}"], rel=1e-5)


@pytest.mark.parametrize("n", [64, 600])
def test_kernel_distance_equals_tats(table, n):
    a, b, expected = table
    assert kernel_distance(a[:n], b[:n]) == pytest.approx(expected[f"tats_kvd_f64_{n}"], rel=1e-9)


def scores(seed: int, n: int, temperature: float) -> np.ndarray:
    """The rule of eval_is.npz: logits whose softmax is the table."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, 101))
    logits[np.arange(n), rng.integers(0, 101, n)] += temperature
    return logits


@pytest.mark.parametrize(("name", "seed", "n", "temperature"), [("sharp", 1, 2048, 8), ("small", 4, 200, 6)])
@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_equals_tgan2_and_style_gan_v(golden, name, seed, n, temperature, splits):
    with np.load(golden / "eval_is.npz") as arrays:
        expected, head = json.loads(str(arrays["results"])), arrays["sharp_head"]
    logits = scores(seed, n, temperature)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
    if name == "sharp":
        np.testing.assert_array_equal(p[:4], head)  # the rule gives the golden's own table
    assert inception_score(p, splits) == pytest.approx(expected[f"{name}_tgan2_splits{splits}"], rel=1e-5)
    assert inception_score_from_logits(logits, splits) == pytest.approx(inception_score(p, splits), rel=1e-5)
    shuffled = p.copy()
    np.random.RandomState(42).shuffle(shuffled)
    assert inception_score(shuffled, splits) == pytest.approx(
        expected[f"{name}_styleganv_splits{splits}"], rel=1e-5
    )
