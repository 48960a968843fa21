"""Scores of feature sets, and how sure they are: Frechet and kernel distance (FVD, KVD), Inception Score, intervals, floor.

Features in, float64 out. Float64 is required: in float32 the Frechet distance of a set to itself came out between -0.3
and +2.0 on realistic I3D features of 64 to 600 clips.

Intervals are bootstrapped: videos are drawn with replacement (all clips of a video together), `resamples` times. A
resampled set repeats videos, which raises FVD by itself, about as much as the finite sample did; so the interval is the
spread of the resamples about their own mean, laid around the value: [value + q(2.5 %) - mean, value + q(97.5 %) - mean].
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg

# ---- distances ------------------------------------------------------------------------------------------


def _features(features, name: str) -> np.ndarray:
    """Check features (N, D) and convert them to float64."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2:
        raise ValueError(f"{name} has shape {features.shape}: features are (N, D), one row per clip")
    if len(features) < 2:
        raise ValueError(
            f"{name} has N={len(features)}: a distance between sets needs N >= 2 clips, e.g. 2048"
        )
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        raise ValueError(f"{name} has NaN or infinity in {bad} of {len(features)} rows: check those clips")
    return features


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = _features(a, "a"), _features(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has D={a.shape[1]}, b has D={b.shape[1]}: both need the same network")
    return a, b


def frechet_distance(a, b, ddof: int = 1) -> float:
    """Compute the squared Frechet distance between the Gaussians of two feature sets (FVD when they are I3D logits).

    a: (N, D), b: (M, D) features. ddof: 1 divides the covariances by N - 1 (TATS), 0 by N (StyleGAN-V).
    Raises ValueError for N < 2, NaN, or different D.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), where the trace of the root is the nuclear norm of
    A B^T, A and B the centred features over sqrt(N - ddof): no matrix root, no epsilon, always real, and
    right for N < D too. For N > D the R factor of a QR decomposition stands in for the features.
    """
    a, b = _pair(a, b)
    # The squared distance of the means, and the traces of both covariances from the scaled, centred features.
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    a = (a - mean_a) / np.sqrt(len(a) - ddof)  # a new array: the caller's features stay as they are
    b = (b - mean_b) / np.sqrt(len(b) - ddof)
    traces = np.square(a).sum() + np.square(b).sum()
    # With more clips than dimensions R has the same Gram matrix as the features and is smaller: (D, D).
    if len(a) > a.shape[1]:
        a = scipy.linalg.qr(a, mode="r")[0][: a.shape[1]]
    if len(b) > b.shape[1]:
        b = scipy.linalg.qr(b, mode="r")[0][: b.shape[1]]
    # tr (C_a C_b)^(1/2): the nuclear norm of A B^T.
    root = scipy.linalg.svdvals(a @ b.T).sum()
    return float(np.square(mean_a - mean_b).sum() + traces - 2.0 * root)


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute (x.y / D + 1)^3 of all pairs of rows: (N, D), (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kernel_distance(a, b) -> float:
    """Compute the unbiased squared MMD with the kernel (x.y / D + 1)^3 (KVD when the features are I3D logits).

    a: (N, D), b: (M, D). All samples at once, no subsets and no factor, as TATS (tats/fvd/fvd.py): the value
    may be negative. Raises ValueError for N < 2, NaN, or different D.
    """
    a, b = _pair(a, b)

    def within(x):
        # Without the diagonal, which pairs each clip with itself: this is what makes the estimate unbiased.
        gram = _cubic_kernel(x, x)
        return (gram.sum() - np.trace(gram)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2.0 * _cubic_kernel(a, b).mean())


# ---- Inception Score ------------------------------------------------------------------------------------


def inception_score(probabilities, splits: int = 1) -> tuple[float, float]:
    """Score class probabilities: exp of the mean KL divergence from their marginal.

    probabilities: (N, K), rows sum to 1. Returns (mean, standard deviation) over contiguous splits; with splits=1 the
    deviation is 0. Raises ValueError for NaN, rows that are not a distribution, or splits > N.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2:
        raise ValueError(f"probabilities have shape {p.shape}: need (N, K), one row per video")
    if not (p >= 0).all() or np.abs(p.sum(axis=1) - 1).max(initial=0) > 1e-3:
        raise ValueError("rows of probabilities must be >= 0 and sum to 1 (a softmax, not logits)")
    with np.errstate(divide="ignore"):
        return _score(np.log(p), p, splits)


def inception_score_from_logits(logits, splits: int = 1) -> tuple[float, float]:
    """Score logits (N, K) as `inception_score`, by a log-softmax in float64: no probability underflows to zero."""
    from scipy.special import log_softmax

    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    if not np.isfinite(log_p).all():
        raise ValueError("logits are not finite: wrong weights or damaged input")
    return _score(log_p, np.exp(log_p), splits)


def _score(log_p: np.ndarray, p: np.ndarray, splits: int) -> tuple[float, float]:
    """Score probabilities p (N, K) and their logarithms: mean and deviation over contiguous splits."""
    if not 1 <= splits <= len(p):
        raise ValueError(f"splits={splits}: between 1 and the number of videos, {len(p)}")
    scores = []
    for s in range(splits):
        rows = slice(s * len(p) // splits, (s + 1) * len(p) // splits)
        part, log_part = p[rows], log_p[rows]
        # p(c), the mean over the split's videos.
        with np.errstate(divide="ignore"):
            log_marginal = np.log(part.mean(axis=0))
        # KL(p(c | x) || p(c)), where a class without probability adds nothing (p log p -> 0).
        positive = part > 0
        terms = np.where(
            positive, part * (np.where(positive, log_part, 0) - np.where(positive, log_marginal, 0)), 0
        )
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


# ---- intervals ------------------------------------------------------------------------------------------

RESAMPLES = 200
LEVEL = 0.95


def _counts(groups: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw how often each clip is in each resample: (resamples, N) float64."""
    num = int(groups.max()) + 1
    drawn = rng.multinomial(num, np.full(num, 1 / num), size=resamples)
    return drawn[:, groups].astype(np.float64)


def _interval(value: float, values: np.ndarray, seed: int) -> dict:
    """Lay the spread of the resamples' values (R,) around the value, as the module describes."""
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
    """Return mean, centred features scaled so that their Gram matrix is the covariance, and its trace."""
    total = counts.sum()
    mean = counts @ features / total
    keep = counts > 0
    centred = (features[keep] - mean) * np.sqrt(counts[keep, None] / (total - ddof))
    return mean, centred, float(np.square(centred).sum())


def _nuclear(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the nuclear norm of a b^T for features of one dimension.

    Squared singular values are enough for an interval, and faster.
    """
    if min(len(a), len(b)) <= a.shape[1]:
        # Few clips: the singular values of the smaller product.
        small, large = (a, b) if len(a) < len(b) else (b, a)
        product = small @ large.T
        squares = scipy.linalg.eigvalsh(product @ product.T)
    else:
        # Many clips: the eigenvalues of R^T C_b R, where R R^T is the covariance of a.
        covariance = a.T @ a
        np.fill_diagonal(covariance, covariance.diagonal() * (1 + 1e-12))  # a root exists for every rank
        try:
            root = scipy.linalg.cholesky(covariance, lower=True)
        except np.linalg.LinAlgError:
            values, vectors = scipy.linalg.eigh(covariance)
            root = vectors * np.sqrt(np.maximum(values, 0))
        squares = scipy.linalg.eigvalsh(root.T @ (b.T @ b) @ root)
    return float(np.sqrt(np.maximum(squares, 0)).sum())


def _frechet(a, b, ddof: int, counts_a: np.ndarray, counts_b: np.ndarray) -> float:
    """Compute the FVD of two weighted sets."""
    mean_a, a, trace_a = _weighted(a, counts_a, ddof)
    mean_b, b, trace_b = _weighted(b, counts_b, ddof)
    return float(np.square(mean_a - mean_b).sum() + trace_a + trace_b - 2 * _nuclear(a, b))


LEADING = (50, 100, 200)  # principal directions of the short way: the first that are enough
PROBES = 6  # resamples computed in full, to judge that
CLOSE = 0.02  # the standard deviation of the error, in those of the resamples


class _ShortWay:
    """FVD of many resamples: the trace of the root in full along the leading principal directions of both sets, to first
    order along the others. Means and traces are exact."""

    def __init__(self, a: np.ndarray, b: np.ndarray, ddof: int, w: np.ndarray, v: np.ndarray):
        """Prepare sets a (N, D), b (M, D), N and M > D, with counts w (R, N), v (R, M)."""
        # Turn both sets into the principal directions of their summed covariance, the largest first.
        mean = a.mean(axis=0)
        a, b = a - mean, b - mean
        turn = scipy.linalg.eigh(np.cov(a.T) + np.cov(b.T))[1][:, ::-1]
        self.a, self.b, self.w, self.v, self.ddof = a @ turn, b @ turn, w, v, ddof
        # Per resample, what is cheap and exact: both traces, and the distance of the means.
        means, self.rest = [], 0.0
        for x, counts in ((self.a, w), (self.b, v)):
            total = counts.sum(axis=1)
            means.append(counts @ x / total[:, None])
            squares = counts @ np.square(x).sum(axis=1) - total * np.square(means[-1]).sum(axis=1)
            self.rest += squares / (total - ddof)
        self.rest += np.square(means[0] - means[1]).sum(axis=1)
        self.first_order = self._first_order(a.shape[1])

    def _first_order(self, rank: int) -> np.ndarray:
        """Compute tr (C_a C_b)^(1/2) along `rank` directions, linear in the covariances around the sets' own: (R,).

        It is (tr T C_a + tr T^-1 C_b) / 2 with the T that carries one Gaussian to the other.
        """
        # Covariances of the sets themselves, made regular by a little of the identity.
        a = self.a[:, :rank] - self.a[:, :rank].mean(axis=0)
        b = self.b[:, :rank] - self.b[:, :rank].mean(axis=0)
        covariance_a, covariance_b = a.T @ a / (len(a) - self.ddof), b.T @ b / (len(b) - self.ddof)
        least = 1e-10 * (np.trace(covariance_a) + np.trace(covariance_b)) / rank * np.eye(rank)
        # T = R^-T V S V^T R^-1 with C_a = R R^T and R^T C_b R = V S^2 V^T.
        root = scipy.linalg.cholesky(covariance_a + least, lower=True)
        squares, vectors = scipy.linalg.eigh(root.T @ (covariance_b + least) @ root)
        sizes = np.sqrt(np.maximum(squares, 1e-20 * squares[-1]))
        # Each clip's part in the two traces, weighted by how often a resample has the clip.
        back = a @ scipy.linalg.solve_triangular(root, vectors, lower=True, trans="T")
        ahead = b @ (root @ vectors)
        share_a = self.w @ (np.square(back) @ sizes) / (len(a) - self.ddof)
        share_b = self.v @ (np.square(ahead) @ (1 / sizes)) / (len(b) - self.ddof)
        return (share_a + share_b) / 2

    def values(self, rank: int, most: int | None = None) -> np.ndarray:
        """Compute the distances of all resamples, or the first `most`, with `rank` leading directions."""
        a, b = np.ascontiguousarray(self.a[:, :rank]), np.ascontiguousarray(self.b[:, :rank])
        # The trace of the root in full along the leading directions; the others add their first-order part.
        leading = []
        for counts_a, counts_b in zip(self.w[:most], self.v[:most], strict=True):
            x, y = _weighted(a, counts_a, self.ddof)[1], _weighted(b, counts_b, self.ddof)[1]
            leading.append(_nuclear(x, y))
        others = self.first_order - self._first_order(rank)
        return self.rest[:most] - 2 * (np.array(leading) + others[:most])


def _frechets(a: np.ndarray, b: np.ndarray, ddof: int, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute `_frechet` of each row of the counts w (R, N) and v (R, M).

    The features of a network lie mostly along few directions, and there `_ShortWay` is 10 times faster. A few resamples
    computed in full say whether it is close enough, and what it is off by in all; otherwise all are computed in full.
    """
    # A few resamples in full: what the short way is measured against.
    pairs = list(zip(w, v, strict=True))
    full = np.array([_frechet(a, b, ddof, *pair) for pair in pairs[:PROBES]])
    # With clips enough, take the first number of directions whose error is small, less its mean.
    if min(len(a), len(b)) > 2 * a.shape[1] > 2 * LEADING[0] and full.std(ddof=1) > 0:
        try:
            short = _ShortWay(a, b, ddof, w, v)
            for rank in LEADING:
                error = short.values(rank, PROBES) - full
                if rank < a.shape[1] and error.std(ddof=1) <= CLOSE * full.std(ddof=1):
                    return short.values(rank) - error.mean()
        except scipy.linalg.LinAlgError:  # features without variance: the linear step has no root
            pass
    # No number of directions was enough: the others in full too.
    return np.append(full, [_frechet(a, b, ddof, *pair) for pair in pairs[PROBES:]])


def frechet_interval(
    real, fake, groups_real, groups_fake, value: float, ddof: int = 1, seed: int = 0
) -> dict:
    """Bootstrap the interval of an FVD. Features (N, 400); groups: the video's number of each clip. JSON-ready."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    rng = np.random.default_rng(seed)
    w, v = _counts(groups_real, RESAMPLES, rng), _counts(groups_fake, RESAMPLES, rng)
    return _interval(value, _frechets(real, fake, ddof, w, v), seed)


def _kernel(real: np.ndarray, fake: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute the KVD of weighted sets, a value for each row of the counts w (R, N) and v (R, M).

    A clip is never paired with its own copy, which would raise every resample.
    """

    def within(x, counts):
        kernel = _cubic_kernel(x, x)
        np.fill_diagonal(kernel, 0.0)
        # n clips of a set make n^2 pairs; those of a clip with a copy of itself are on the diagonal.
        pairs = counts.sum(axis=1) ** 2 - np.square(counts).sum(axis=1)
        return np.einsum("rn,rn->r", counts @ kernel, counts) / np.maximum(pairs, 1.0)

    # Every clip of one side with every clip of the other: (R,)
    between = np.einsum("rn,rn->r", w @ _cubic_kernel(real, fake), v) / (w.sum(axis=1) * v.sum(axis=1))
    return within(real, w) + within(fake, v) - 2.0 * between


def kernel_interval(real, fake, groups_real, groups_fake, value: float, seed: int = 0) -> dict:
    """Bootstrap the interval of a KVD, as `frechet_interval`."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    rng = np.random.default_rng(seed)
    w, v = _counts(groups_real, RESAMPLES, rng), _counts(groups_fake, RESAMPLES, rng)
    return _interval(value, _kernel(real, fake, w, v), seed)


def inception_interval(logits, groups, value: float, splits: int = 1, seed: int = 0) -> dict:
    """Bootstrap the interval of an IS from logits (N, 101), the score of each resample taken with the same splits."""
    logits = np.asarray(logits, np.float64)
    counts = _counts(groups, RESAMPLES, np.random.default_rng(seed)).astype(int)
    values = []
    for row in counts:
        # A clip that was drawn n times stands in the resample n times.
        drawn = np.repeat(np.arange(len(logits)), row)
        values.append(inception_score_from_logits(logits[drawn], min(splits, len(drawn)))[0])
    return _interval(value, np.array(values), seed)


def same_distribution_floor(
    real: np.ndarray,
    num: int,
    distances: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    groups: np.ndarray | None = None,
) -> dict | None:
    """Score real clips against other real clips: what a perfect generator would get.

    real: (N, D) features in the seeded order, the first `num` of them judged. With 2 num of them the floor is the
    first half against the second at the same N; with fewer, two halves of what is there, at an N of their own,
    where the bias is larger. None with fewer than 4 clips. groups: (N,) the video of each clip; where one video has
    clips in both parts, the videos are parted instead, for clips of one video are not independent.
    """
    half = num if len(real) >= 2 * num else len(real) // 2
    first, second = real[:half], real[half : 2 * half]
    if groups is not None and np.isin(groups[:half], groups[half : 2 * half]).any():
        # In the seeded order, as many videos as have half of the clips
        videos, firsts, counts = np.unique(groups, return_index=True, return_counts=True)
        order = np.argsort(firsts)
        of_first = np.isin(groups, videos[order][np.cumsum(counts[order]) <= len(groups) / 2])
        half = min(half, of_first.sum(), (~of_first).sum())
        first, second = real[of_first][:half], real[~of_first][:half]
    if half < 2:
        return None
    values = distances(first, second)
    return {"values": values, "num_videos": int(half), "same_num_videos": bool(half == num)}
