"""Laws of the Inception Score."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from eval import inception_score as program
from eval.measures import inception_score, inception_score_from_logits
from eval.protocol import INCEPTION_PROTOCOLS


def test_one_video_of_each_class_scores_the_number_of_classes():
    assert inception_score(np.eye(101)) == (pytest.approx(101.0), 0.0)


def test_one_class_for_all_scores_one():
    assert inception_score(np.tile(np.eye(101)[3], (20, 1)))[0] == pytest.approx(1.0)
    assert inception_score(np.full((20, 101), 1 / 101))[0] == pytest.approx(1.0)


def test_a_probability_of_zero_is_no_nan():
    assert inception_score_from_logits(np.eye(5) * 2000.0)[0] == pytest.approx(5.0)
    assert inception_score_from_logits(np.eye(5) * -2000.0)[0] == pytest.approx(
        inception_score((1 - np.eye(5)) / 4)[0]
    )


def test_splits_are_contiguous_and_cover_all_rows():
    p = np.repeat(np.eye(4), 5, axis=0)
    assert inception_score(p, splits=4) == (pytest.approx(1.0), pytest.approx(0.0))
    mean, std = inception_score(p, splits=2)
    assert (mean, std) == (pytest.approx(2.0), pytest.approx(0.0))
    assert np.isfinite(inception_score(p, splits=3)).all()  # 20 rows: 6, 7, 7


@pytest.mark.parametrize(
    ("p", "splits", "message"),
    [
        (np.zeros((3, 4)), 1, "sum to 1"),
        (np.full((3, 4), np.nan), 1, "sum to 1"),
        (np.eye(4), 5, "splits=5"),
        (np.eye(4), 0, "splits=0"),
        (np.ones(4), 1, "shape"),
    ],
)
def test_what_is_no_table_of_distributions_is_refused(p, splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(p, splits)


@pytest.mark.parametrize("name", ["tgan2", "stylegan-v"])
def test_the_program_splits_by_name_or_shuffled_as_stylegan_v(name, capsys):
    rng = np.random.default_rng(0)
    by_name = rng.standard_normal((20, 101))
    by_name[np.arange(20), np.arange(20) // 2] += 8  # a split of neighbours holds one class
    places = rng.permutation(20)
    judged = SimpleNamespace(features=by_name[places], groups=np.arange(20), places=places, summary={})
    protocol = replace(INCEPTION_PROTOCOLS[name], num_videos=20, splits=10, size=(8, 8))
    extractor = SimpleNamespace(provenance=SimpleNamespace(metric_name=lambda metric: metric))
    program.report(judged, protocol, extractor, None, SimpleNamespace(out=None))
    order = np.arange(20)
    if name == "stylegan-v":
        np.random.RandomState(42).shuffle(order)
    expected = inception_score_from_logits(by_name[order], 10)[0]
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(expected, abs=1e-4)
