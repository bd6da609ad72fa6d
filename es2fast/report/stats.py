"""Intervals for rates.

A defence success rate is a count out of n, often 100 or fewer, and often 0 or n: the normal
approximation then gives an interval of zero width, as if nothing could be doubted. The Wilson
score interval (Wilson 1927) does not: 0 of 100 reads 0.0 to 3.7 %.
"""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a binomial proportion.

        centre ± half = ( p + z²/2n  ±  z √( p(1−p)/n + z²/4n² ) ) / (1 + z²/n),   p = successes/n

    Args:
        successes: how many of the n trials had the property, 0..n.
        n: number of trials; 0 trials leave everything possible, (0, 1).

    Raises:
        ValueError: a negative n, or successes outside 0..n.
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes: expected a count in 0..n, found {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z_95 * Z_95
    centre = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    low = 0.0 if successes == 0 else (centre - half) / scale  # exact ends, no −1e-17
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def rate_interval(rate: float, n: int) -> tuple[float, float]:
    """The Wilson interval of a rate in 0..1 measured on n trials."""
    return wilson(round(rate * n), n)
