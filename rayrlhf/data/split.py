"""Held-out prompts, apart from all that is trained on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

__all__ = ["choose_groups", "group_equal"]


def group_equal(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """A group number for each item: items that share any key are in one group, directly or by way of others.

    Args:
        keys: the keys of each item, [N] of a few each.

    Returns:
        [N], the position of the group's first item.
    """
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    first: dict[Hashable, int] = {}
    for item, of_item in enumerate(keys):
        for key in of_item:
            one, other = sorted((root(first.setdefault(key, item)), root(item)))
            parent[other] = one
    return [root(item) for item in range(len(keys))]


def choose_groups(groups: Sequence[int], count: int, seed: int) -> list[int]:
    """``count`` items of as many different groups, drawn with ``seed``: each group's first item, in their order."""
    distinct = sorted(set(groups))
    # spawn key 0: a stream apart from the sampler's, which has the same seed
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    chosen = random.permutation(len(distinct))[:count]
    return sorted(distinct[index] for index in chosen.tolist())
