"""
Statistics of paired differences between two arms: interval, tests, correction for many tests, what can be resolved.

The interval and the test answer different questions and are chosen apart. The interval has to hold for any shape of
the differences: `bootstrap_interval`. The test asks what would happen if the two arms were the same: swapping them
would change nothing, so the differences would be symmetric about zero. Student's test then keeps its level where they
are bell-shaped, and exceeds it at Holm's small ones where they are flat or two-pointed. `sign_flip_p` is exact, but
cannot fall below 2/2ⁿ, 0.00049 at 12 seeds, and Holm's first step multiplies it by the number of comparisons: beyond a
hundred of them nothing could ever be found. So Holm gets the p of `paired_t_p`, and the exact one stands beside it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, special, stats

EXACT_FLIPS = 14  # differences up to which all 2ⁿ signs are tried
STUDENT_BELOW = 8  # differences under which resamples are too few to estimate a tail


Values = Sequence[float] | np.ndarray


def _checked(differences: Values) -> np.ndarray:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"differences must be 2 or more finite numbers in one dimension, got {differences}")
    return values


@functools.lru_cache(maxsize=16)
def _resamples(n: int, num_resamples: int, seed: int) -> np.ndarray:
    """Return how often each of `n` values is drawn in each resample, (R, n): resampling is then a matrix product."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples).astype(np.float64)


def bootstrap_interval(
    differences: Values, *, confidence: float = 0.95, num_resamples: int = 20000, seed: int = 0
) -> tuple[float, float]:
    """
    Return the bootstrap-t (studentised) interval of the mean difference.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 12:

        [d̄ - t*(1 - α/2)·s/√n,  d̄ - t*(α/2)·s/√n],   t* = (d̄* - d̄) / (s*/√n)

    With 12 values the percentile and the BCa interval are too narrow, as they take the resamples' spread for the
    mean's, and Student's interval is too narrow for skewed values. This one is second-order accurate, at the price of
    width on the side of the long tail. `scipy.stats.bootstrap` has the other two and not this one.
    A test counts the coverage. Student's interval takes its place below `STUDENT_BELOW` values, and where so many
    values are equal that a limit would be infinite.

    Args:
        differences (array of n `float`, n ≥ 2): arm minus baseline, one for each seed.
        confidence (`float`): in (0, 1).
        num_resamples (`int`): resamples of n values.
        seed (`int`): of the resampling.

    Returns:
        `tuple[float, float]`: low and high, in the unit of the differences.

    Raises:
        ValueError: if there are fewer than two finite differences, or `confidence` is not in (0, 1).
    """
    values = _checked(differences)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    n, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(n)
    limits = (math.inf, math.inf)
    if n >= STUDENT_BELOW and error > 0:
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        # No interpolation: between two infinite t* it would be undefined.
        limits = np.quantile(_studentised(values - mean, num_resamples, seed), tails, method="inverted_cdf")
    if not np.isfinite(limits).all():
        limit = student_quantile((1 + confidence) / 2, n - 1)
        limits = (-limit, limit)
    return mean - float(limits[1]) * error, mean - float(limits[0]) * error


def _studentised(centred: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Return t* of each resample, (R,): infinite where all values drawn are equal and not the mean."""
    n = len(centred)
    counts = _resamples(n, num_resamples, seed)
    shift = counts @ centred / n
    variance = counts @ centred**2 / n - shift**2
    variance[variance < 1e-12 * (centred**2).max()] = 0.0  # rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = shift / np.sqrt(variance / (n - 1))
    return np.where(np.isnan(studentised), 0.0, studentised)


def paired_t_p(differences: Values) -> float:
    """
    Return the two-sided p of Student's paired test of mean zero (Student, Biometrika 6, 1908).

    Where all differences are equal and not zero, t is infinite, which n values cannot bear out: `sign_flip_p` instead.

    Args:
        differences (array of n `float`, n ≥ 2): arm minus baseline, one for each seed.

    Returns:
        `float`: p in (0, 1]; 1 where all differences are zero.

    Raises:
        ValueError: if there are fewer than two finite differences.
    """
    values = _checked(differences)
    scale = float(np.abs(values).max())
    if scale == 0:
        return 1.0
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error < 1e-12 * scale:
        return sign_flip_p(values)
    return 2 * float(special.stdtr(len(values) - 1, -abs(float(values.mean())) / error))


def sign_flip_p(differences: Values, *, num_flips: int = 20000, seed: int = 0) -> float:
    """
    Return the two-sided p of Fisher's permutation test of the mean (The Design of Experiments, 1935, section 21).

    If the two arms are the same, the sign of each seed's difference is a coin: p is the share of sign patterns with a
    mean at least as far from zero. Exact, over all 2ⁿ patterns, up to `EXACT_FLIPS` differences; beyond that over
    random ones, where the pattern that was seen counts as one of them, so that p is never zero (Phipson and Smyth,
    2010).

    Args:
        differences (array of n `float`, n ≥ 2): arm minus baseline, one for each seed.
        num_flips (`int`): random patterns, where not all are tried.
        seed (`int`): of the random patterns.

    Returns:
        `float`: p in (0, 1].

    Raises:
        ValueError: if there are fewer than two finite differences.
    """
    return sign_flip_ps([differences], num_flips=num_flips, seed=seed)[0]


def sign_flip_ps(rows: Sequence[Values], *, num_flips: int = 20000, seed: int = 0) -> list[float]:
    """`sign_flip_p` of several rows of n differences each, in one pass over the patterns of signs."""
    values = np.stack([_checked(row) for row in rows])  # (rows, n)
    n = values.shape[1]
    scale = np.abs(values).sum(axis=1)
    values = values / np.where(scale > 0, scale, 1.0)[:, None]

    def rounded_sum(signed: np.ndarray, axis: int) -> np.ndarray:
        # Sums that are equal on paper have to count as equal; scipy's own tolerance is nothing where they are near 0.
        return np.round(signed.sum(axis=axis), 12)

    tested = stats.permutation_test(
        (values,),
        rounded_sum,
        permutation_type="samples",  # of one sample: its signs
        vectorized=True,
        n_resamples=2**n if n <= EXACT_FLIPS else num_flips,
        batch=256,
        axis=1,
        rng=seed,
    )
    return np.asarray(tested.pvalue).tolist()


def holm(p_values: Values) -> list[float]:
    """
    Return Holm's adjusted p (Scandinavian Journal of Statistics 6, 1979).

    Rejecting where it is below α errs anywhere in the family with probability at most α, however the tests depend:

        p̃₍ᵢ₎ = max over j ≤ i of min(1, (m - j + 1)·p₍ⱼ₎)

    Args:
        p_values (array of m `float` in [0, 1]): one family, in any order.

    Returns:
        `list[float]`: adjusted, in the order given.

    Raises:
        ValueError: if a p is not in [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p must be in [0, 1], got {p_values}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, values[order] * np.arange(len(values), 0, -1)))
    return adjusted.tolist()


def resolvable_difference(sd: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """
    Return the mean difference that the paired t test finds with probability `power`.

    Exact for normal differences (Cohen, Statistical Power Analysis, 1988, chapter 2): δ·sd/√n, with δ the
    noncentrality at which t with n - 1 degrees of freedom has that power.

    Args:
        sd (`float`): standard deviation of the paired differences.
        n (`int`): pairs, at least 2.
        alpha (`float`): two-sided level; the level over m comparisons for Holm's strictest step.
        power (`float`): in (alpha, 1).

    Returns:
        `float`: in the unit of `sd`.

    Raises:
        ValueError: if `sd` is negative, `n` is below 2 or not 0 < alpha < power < 1.
    """
    if sd < 0 or n < 2 or not 0 < alpha < power < 1:
        raise ValueError(f"need sd ≥ 0, n ≥ 2, 0 < alpha < power < 1; got {sd=}, {n=}, {alpha=}, {power=}")
    return sd / math.sqrt(n) * _noncentrality(n - 1, alpha, power)


def mean_and_band(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Return the mean of curves and half the width of its pointwise 95 % band.

    Args:
        curves (`list` of arrays): one per seed; longer ones are cut to the shortest.

    Returns:
        `tuple`: mean, and Student's t times the standard error; None of a single curve.
    """
    values = np.stack([curve[: min(map(len, curves))] for curve in curves])
    n = len(values)
    band = student_quantile(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else None
    return values.mean(axis=0), band


@functools.lru_cache(maxsize=1024)
def student_quantile(probability: float, df: int) -> float:
    """Return q with P(T ≤ q) = `probability` for Student's t with `df` degrees of freedom."""
    return float(special.stdtrit(df, probability))


@functools.lru_cache(maxsize=1024)
def _noncentrality(df: int, alpha: float, power: float) -> float:
    """Return mean difference over its standard error at which the two-sided t test has the power."""
    critical = student_quantile(1 - alpha / 2, df) ** 2

    def missing(noncentrality: float) -> float:
        # The square of a noncentral t is a noncentral F: both tails in one.
        return power - float(stats.ncf.sf(critical, 1, df, noncentrality**2))

    high = 1.0
    while missing(high) > 0:
        high *= 2
    root: Any = optimize.brentq(missing, 0, high, xtol=1e-12)
    return float(root)
