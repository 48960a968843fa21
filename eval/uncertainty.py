"""How sure a score is: bootstrap intervals of FVD, KVD and IS, and the floor of two halves of one distribution.

Videos are drawn with replacement (all clips of a video together), `resamples` times. A resampled set repeats
videos, which raises FVD by itself, about as much as the finite sample did; so the interval is the spread of the
resamples about their own mean, laid around the value: [value + q(2.5 %) - mean, value + q(97.5 %) - mean].
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg

from eval.inception import inception_score_from_logits

RESAMPLES = 200
LEVEL = 0.95


def _counts(groups: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each clip is in each resample: (resamples, N) float64."""
    num = int(groups.max()) + 1
    drawn = rng.multinomial(num, np.full(num, 1 / num), size=resamples)
    return drawn[:, groups].astype(np.float64)


def _interval(value: float, values: np.ndarray, seed: int) -> dict:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - values.mean()
    return {
        "low": float(value + low),
        "high": float(value + high),
        "std": float(values.std(ddof=1)),
        "level": LEVEL,
        "resamples": len(values),
        "seed": seed,
        "method": "bootstrap over videos, centred on the value",
    }


def _weighted(features: np.ndarray, counts: np.ndarray, ddof: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, centred features scaled so that their Gram matrix is the covariance, and its trace."""
    total = counts.sum()
    mean = counts @ features / total
    keep = counts > 0
    centred = (features[keep] - mean) * np.sqrt(counts[keep, None] / (total - ddof))
    return mean, centred, float(np.square(centred).sum())


def _frechet(a, b, ddof: int, counts_a: np.ndarray, counts_b: np.ndarray) -> float:
    """FVD of two weighted sets. Squared singular values are enough for an interval, and faster."""
    mean_a, a, trace_a = _weighted(a, counts_a, ddof)
    mean_b, b, trace_b = _weighted(b, counts_b, ddof)
    if min(len(a), len(b)) <= a.shape[1]:
        small, large = (a, b) if len(a) < len(b) else (b, a)
        product = small @ large.T
        squares = scipy.linalg.eigvalsh(product @ product.T)
    else:
        covariance = a.T @ a
        np.fill_diagonal(covariance, covariance.diagonal() * (1 + 1e-12))  # a root exists for every rank
        try:
            root = scipy.linalg.cholesky(covariance, lower=True)
        except np.linalg.LinAlgError:
            values, vectors = scipy.linalg.eigh(covariance)
            root = vectors * np.sqrt(np.maximum(values, 0))
        squares = scipy.linalg.eigvalsh(root.T @ (b.T @ b) @ root)
    nuclear = np.sqrt(np.maximum(squares, 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + trace_a + trace_b - 2 * nuclear)


def frechet_interval(
    real, fake, groups_real, groups_fake, value: float, ddof: int = 1, seed: int = 0
) -> dict:
    """Interval of an FVD. Features (N, 400); groups: the video's number of each clip. JSON-ready."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    rng = np.random.default_rng(seed)
    sides = [_counts(groups, RESAMPLES, rng) for groups in (groups_real, groups_fake)]
    values = [_frechet(real, fake, ddof, a, b) for a, b in zip(*sides, strict=True)]
    return _interval(value, np.array(values), seed)


def _kernel(real: np.ndarray, fake: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """KVD of weighted sets, a value for each row of the counts w (R, N) and v (R, M).

    A clip is never paired with its own copy, which would raise every resample.
    """
    dim = real.shape[1]

    def within(x, counts):
        kernel = (x @ x.T / dim + 1.0) ** 3
        np.fill_diagonal(kernel, 0.0)
        pairs = counts.sum(axis=1) ** 2 - np.square(counts).sum(axis=1)
        return np.einsum("rn,rn->r", counts @ kernel, counts) / np.maximum(pairs, 1.0)

    between = np.einsum("rn,rn->r", w @ (real @ fake.T / dim + 1.0) ** 3, v) / (w.sum(axis=1) * v.sum(axis=1))
    return within(real, w) + within(fake, v) - 2.0 * between


def kernel_interval(real, fake, groups_real, groups_fake, value: float, seed: int = 0) -> dict:
    """Interval of a KVD, as `frechet_interval`."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    rng = np.random.default_rng(seed)
    w, v = (_counts(groups, RESAMPLES, rng) for groups in (groups_real, groups_fake))
    return _interval(value, _kernel(real, fake, w, v), seed)


def inception_interval(logits, groups, value: float, splits: int = 1, seed: int = 0) -> dict:
    """Interval of an IS from logits (N, 101), the score of each resample taken with the same splits."""
    logits = np.asarray(logits, np.float64)
    counts = _counts(groups, RESAMPLES, np.random.default_rng(seed)).astype(int)
    values = []
    for row in counts:
        drawn = np.repeat(np.arange(len(logits)), row)
        values.append(inception_score_from_logits(logits[drawn], min(splits, len(drawn)))[0])
    return _interval(value, np.array(values), seed)


def same_distribution_floor(
    real: np.ndarray, num: int, distances: Callable[[np.ndarray, np.ndarray], dict[str, float]]
) -> dict | None:
    """The score of real clips against other real clips: what a perfect generator would get.

    real: (N, D) features in the seeded order, the first `num` of them judged. With 2 num of them the floor is the
    first half against the second at the same N; with fewer, two halves of what is there, at an N of their own,
    where the bias is larger. None with fewer than 4 clips.
    """
    half = num if len(real) >= 2 * num else len(real) // 2
    if half < 2:
        return None
    values = distances(real[:half], real[half : 2 * half])
    return {"values": values, "num_videos": half, "same_num_videos": half == num}
