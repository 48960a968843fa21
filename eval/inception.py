"""Inception Score from probabilities or logits (Salimans et al.; Saito et al., TGAN2, for videos).

IS = exp(mean_i KL(p(c | x_i) || p(c))), in float64. `eval/inception_score.py` is the program.
"""

import numpy as np


def inception_score(probabilities, splits: int = 1) -> tuple[float, float]:
    """probabilities: (N, K), rows sum to 1. Returns (mean, standard deviation) over contiguous splits.

    With splits=1 the deviation is 0. Raises ValueError for NaN, rows that are not a distribution, or splits > N.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2:
        raise ValueError(f"probabilities have shape {p.shape}: need (N, K), one row per video")
    if not (p >= 0).all() or np.abs(p.sum(axis=1) - 1).max(initial=0) > 1e-3:
        raise ValueError("rows of probabilities must be >= 0 and sum to 1 (a softmax, not logits)")
    with np.errstate(divide="ignore"):
        return _score(np.log(p), p, splits)


def inception_score_from_logits(logits, splits: int = 1) -> tuple[float, float]:
    """logits: (N, K), through a log-softmax in float64: no probability underflows to zero."""
    from scipy.special import log_softmax

    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    if not np.isfinite(log_p).all():
        raise ValueError("logits are not finite: wrong weights or damaged input")
    return _score(log_p, np.exp(log_p), splits)


def _score(log_p: np.ndarray, p: np.ndarray, splits: int) -> tuple[float, float]:
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits={splits}: between 1 and the number of videos, {len(p)}")
    scores = []
    for s in range(splits):
        rows = slice(s * len(p) // splits, (s + 1) * len(p) // splits)
        part, log_part = p[rows], log_p[rows]
        with np.errstate(divide="ignore"):
            log_marginal = np.log(part.mean(axis=0))
        positive = part > 0  # p log p -> 0
        terms = np.where(
            positive, part * (np.where(positive, log_part, 0) - np.where(positive, log_marginal, 0)), 0
        )
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
