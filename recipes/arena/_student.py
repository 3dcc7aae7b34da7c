"""Student's t without scipy, which is no dependency of this project: tail, quantile, and power."""

import functools
import math
from collections.abc import Callable

import numpy as np

_SMALLEST_P = 2.0**-52  # the tail is 1 minus a sum


def student_p(t: float, df: int) -> float:
    """
    Return the two-sided tail of Student's t, P(|T| ≥ |t|).

    Abramowitz and Stegun, 26.7.3 and 26.7.4: exact finite sums in θ = arctan(t / √df).

    Args:
        t (`float`): the statistic.
        df (`int`): degrees of freedom, at least 1.

    Returns:
        `float`: the tail, at least 2⁻⁵² unless `t` is infinite.

    Raises:
        ValueError: if `df` is below 1.
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")
    if math.isinf(t):
        return 0.0
    theta = math.atan(abs(t) / math.sqrt(df))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = df % 2
    term = math.cos(theta) if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df - 1, 2):
        term *= square * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return min(1.0, max(_SMALLEST_P, 1 - inside))


@functools.lru_cache(maxsize=1024)
def student_quantile(probability: float, df: int) -> float:
    """
    Return q with P(T ≤ q) = `probability` for Student's t, by bisection on `student_p`.

    Args:
        probability (`float`): in (0, 1); no closer to either end than 1e-12.
        df (`int`): degrees of freedom, at least 1.

    Returns:
        `float`: the quantile.

    Raises:
        ValueError: if `probability` is not in (0, 1), or as `student_p`.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1), got {probability}")
    if probability < 0.5:
        return -student_quantile(1 - probability, df)
    tail = 2 * (1 - probability)
    return _bisect(lambda t: student_p(t, df) <= tail)


def _bisect(reached: Callable[[float], bool]) -> float:
    """Return the smallest positive number at which `reached`, a rising predicate, is true."""
    low, high = 0.0, 1.0
    while not reached(high):
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@functools.lru_cache(maxsize=1024)
def noncentrality(df: int, alpha: float, power: float) -> float:
    """
    Return the noncentrality δ at which the two-sided t test has the power.

    The statistic is (z + δ)/u with z normal and u² a chi-square over its degrees of freedom; the density of u is
    summed on a grid.

    Args:
        df (`int`): degrees of freedom, at least 1.
        alpha (`float`): two-sided level.
        power (`float`): in (alpha, 1).

    Returns:
        `float`: mean difference over its standard error.
    """
    critical = student_quantile(1 - alpha / 2, df)
    top = 1 + 8 / math.sqrt(df)
    u = (np.arange(2000) + 0.5) / 2000 * top
    log_density = (df - 1) * np.log(u) - df * u**2 / 2
    density = np.exp(log_density - log_density.max())
    density /= density.sum()

    def normal_above(values: np.ndarray) -> np.ndarray:
        return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in values])

    def found(delta: float) -> bool:
        return float(density @ (normal_above(critical * u - delta) + normal_above(critical * u + delta))) >= power

    return _bisect(found)
