"""Measures of a set of responses."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["distinct_n", "mean_and_stderr"]


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error (unbiased deviation / sqrt(n)); NaN for the latter with fewer than two values."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different word n-grams over all of them, in all texts together (Li et al. 2016, section 5.1); 0 where there are none."""
    grams: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.lower().split()
        for i in range(len(words) - n + 1):
            grams.add(tuple(words[i : i + n]))
            total += 1
    return len(grams) / total if total else 0.0
