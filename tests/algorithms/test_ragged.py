"""Segment sums and last positions against Python loops."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import last_true, segment_ids, segment_sum

lengths_lists = st.lists(st.integers(0, 6), max_size=6)


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int64)


def test_worked_example():
    offsets = torch.tensor([0, 2, 2, 5])
    assert segment_ids(offsets).tolist() == [0, 0, 2, 2, 2]
    assert segment_sum(torch.tensor([1.0, 2.0, 10.0, 20.0, 30.0]), offsets).tolist() == [3.0, 0.0, 60.0]
    assert last_true(torch.tensor([True, False, False, True, False]), offsets).tolist() == [0, -1, 3]


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.data())
def test_against_loops(lengths, data):
    offsets, total = offsets_of(lengths), sum(lengths)
    x = data.draw(st.lists(st.integers(-1000, 1000), min_size=total, max_size=total))
    mask = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    ids, sums, counts, last, at = [], [], [], [], 0
    for i, n in enumerate(lengths):
        ids += [i] * n
        sums.append(sum(x[at : at + n]))
        counts.append(sum(mask[at : at + n]))
        last.append(max((t for t in range(at, at + n) if mask[t]), default=-1))
        at += n
    assert segment_ids(offsets).tolist() == ids
    assert segment_sum(torch.tensor(x, dtype=torch.float64), offsets).tolist() == sums
    assert segment_sum(torch.tensor(x, dtype=torch.int64), offsets).tolist() == sums
    assert segment_sum(torch.tensor(mask, dtype=torch.bool), offsets).tolist() == counts
    assert last_true(torch.tensor(mask, dtype=torch.bool), offsets).tolist() == last


def test_types_precision_and_gradient():
    offsets = torch.tensor([0, 3, 5])
    assert segment_sum(torch.ones(5), offsets).dtype == torch.float32
    # Added in float32 from the left, the 1 would vanish.
    assert segment_sum(torch.tensor([1e8, 1.0, -1e8, 0.0, 7.0]), offsets).tolist() == [1.0, 7.0]
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (segment_sum(x, offsets) * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [2, 2, 2, 3, 3]
