"""How the samples of a batch are spread over the ranks of a group."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["inverse", "split_by_tokens"]


def split_by_tokens(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Spread samples so that all parts have about the same number of tokens.

    Longest first (Graham 1969, "Bounds on multiprocessing timing anomalies"): each sample goes to the part with the
    fewest tokens so far, then the fewest samples, then the lowest number. Two parts differ by at most the longest
    sample, and the fullest has at most 4/3 - 1/(3 * parts) times the tokens of the best split there is. The same
    lengths always give the same parts; with at least as many (non-empty) samples as parts, no part is empty.

    Args:
        lengths: tokens of each sample, >= 0.
        parts: number of parts, >= 1.

    Returns:
        The indices of each part, ascending.
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, found {parts}")
    if parts == 1:
        return [list(range(len(lengths)))]
    members: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, 0, part) for part in range(parts)]
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, count, part = heap[0]
        members[part].append(sample)
        heapq.heapreplace(heap, (tokens + lengths[sample], count + 1, part))
    return [sorted(indices) for indices in members]


def inverse(parts: Sequence[Sequence[int]]) -> list[int]:
    """Where each sample lies once the parts stand one after the other."""
    position = [0] * sum(len(part) for part in parts)
    for place, sample in enumerate(sample for part in parts for sample in part):
        position[sample] = place
    return position
