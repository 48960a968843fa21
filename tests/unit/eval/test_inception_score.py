"""Laws of the Inception Score."""

import numpy as np
import pytest

from eval.measures import inception_score, inception_score_from_logits


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
