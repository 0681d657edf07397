"""The split over ranks, against its definition."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.cluster.split import inverse, split_by_tokens

lengths_of = st.lists(st.integers(0, 500), max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths_of, st.integers(1, 9))
def test_every_sample_once_in_order_and_balanced(lengths, parts):
    split = split_by_tokens(lengths, parts)
    assert len(split) == parts
    assert sorted(i for part in split for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in split)
    loads = [sum(lengths[i] for i in part) for part in split]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    if len([n for n in lengths if n]) >= parts:
        assert all(split)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(2, 3))
def test_fullest_part_is_within_grahams_bound_of_the_best_split(lengths, parts):
    def fullest(assignment):
        return max(sum(n for n, a in zip(lengths, assignment, strict=True) if a == p) for p in range(parts))

    best = min(fullest(a) for a in product(range(parts), repeat=len(lengths)))
    found = max(sum(lengths[i] for i in part) for part in split_by_tokens(lengths, parts))
    assert found <= best * (4 / 3 - 1 / (3 * parts)) + 1e-9


def test_worked_example():
    # 9 -> 0, 7 -> 1, 6 -> 2, 5 -> 2 (11), 4 -> 1 (11), 2 -> 0 (11), 2 -> 0: all equal, the lowest number
    assert split_by_tokens([2, 9, 4, 7, 5, 6, 2], 3) == [[0, 1, 6], [2, 3], [4, 5]]


def test_equal_lengths_are_dealt_out():
    assert split_by_tokens([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    assert split_by_tokens([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]


@given(lengths_of, st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_inverse_restores_the_order(lengths, parts):
    split = split_by_tokens(lengths, parts)
    flat = [i for part in split for i in part]
    assert [flat[k] for k in inverse(split)] == list(range(len(lengths)))


def test_no_parts_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        split_by_tokens([1], 0)
