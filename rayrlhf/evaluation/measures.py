"""Measures of a set of responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["distinct_n", "distinct_n_and_stderr", "mean_and_stderr", "quantiles", "ratio_and_stderr", "repeated"]


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


def ratio_and_stderr(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """A mean over tokens, and its standard error where tokens come in groups (those of a response, say).

    R = sum of sums / sum of counts; by the delta method (Cochran 1977, "Sampling techniques", eq. 6.9) its error is that of
    the mean of sum_i - R * count_i, divided by the mean count.

    Args:
        sums: [n], of each group.
        counts: [n], its tokens; 0 or more.

    Returns:
        NaN for both without any tokens, for the latter with fewer than two groups.
    """
    total = math.fsum(counts)
    if total == 0:
        return math.nan, math.nan
    ratio = math.fsum(sums) / total
    _, error = mean_and_stderr([s - ratio * c for s, c in zip(sums, counts, strict=True)])
    return ratio, error * len(counts) / total


def quantiles(
    values: Sequence[float], at: Sequence[float] = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
) -> dict[str, float]:
    """Quantiles by name ("0.25"), linear between neighbours; none where there are no values."""
    ordered = sorted(values)
    found = {}
    for share in at if ordered else ():
        place = share * (len(ordered) - 1)
        low = min(int(place), max(0, len(ordered) - 2))
        high = min(low + 1, len(ordered) - 1)
        found[f"{share:g}"] = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return found


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different word n-grams over all of them, in all texts together (Li et al. 2016, section 5.1); 0 where there are none."""
    counted = [_grams(text, n) for text in texts]
    total = sum(grams.total() for grams in counted)
    return len(set().union(*counted)) / total if total else 0.0


def distinct_n_and_stderr(texts: Sequence[str], n: int) -> tuple[float, float]:
    """`distinct_n`, and its standard error by the jackknife over texts (Efron 1982, "The jackknife, the bootstrap and other
    resampling plans", eq. 3.1); NaN for the latter with fewer than two texts that have n-grams."""
    counted = [grams for text in texts if (grams := _grams(text, n))]
    everywhere: Counter[tuple[str, ...]] = Counter()
    for grams in counted:
        everywhere.update(grams)
    total, m = everywhere.total(), len(counted)
    if m < 2:
        return (len(everywhere) / total if total else 0.0), math.nan
    # Without one text, those n-grams are gone which stand nowhere else.
    left_out = [
        (len(everywhere) - sum(count == everywhere[gram] for gram, count in grams.items())) / (total - grams.total())
        for grams in counted
    ]
    mean = math.fsum(left_out) / m
    return len(everywhere) / total, math.sqrt((m - 1) / m * math.fsum((value - mean) ** 2 for value in left_out))


def repeated(texts: Sequence[str]) -> list[bool]:
    """Whether each text is equal to another one, but for white space at its ends."""
    stripped = [text.strip() for text in texts]
    times = Counter(stripped)
    return [times[text] > 1 for text in stripped]


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.lower().split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
