"""Intervals for rates, and the test of two rates on the same prompts.

A defence success rate is a count out of n, often 100 or fewer, and often 0 or n: the normal
approximation then gives an interval of zero width, as if nothing could be doubted. The Wilson
score interval (Wilson 1927) does not: 0 of 100 reads 0.0 to 3.7 %.

Two models asked the same prompts are compared prompt by prompt: McNemar's test looks only at the
prompts on which they differ, and so sees what two overlapping intervals hide.
"""

from __future__ import annotations


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a binomial proportion, by scipy.

    Args:
        successes: how many of the n trials had the property, 0..n.
        n: number of trials; 0 trials leave everything possible, (0, 1).

    Raises:
        ValueError: a negative n, or successes outside 0..n.
    """
    from scipy.stats import binomtest

    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes: expected a count in 0..n, found {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    found = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def rate_interval(rate: float, n: int) -> tuple[float, float]:
    """The Wilson interval of a rate in 0..1 measured on n trials."""
    return wilson(round(rate * n), n)


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value of the exact two-sided McNemar test, by scipy.

    Under the null hypothesis each prompt on which two models differ falls to either side with
    probability 1/2.

    Args:
        only_first, only_second: prompts with the property under one model and not the other.

    Raises:
        ValueError: a negative count.
    """
    from scipy.stats import binomtest

    if min(only_first, only_second) < 0:
        raise ValueError(f"counts: expected 0 or more, found {only_first} and {only_second}")
    differing = only_first + only_second
    return float(binomtest(only_first, differing).pvalue) if differing else 1.0
