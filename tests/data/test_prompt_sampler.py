from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data import PromptSampler
from rayrlhf.errors import InputRefused

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31 - 1)
requests = st.lists(st.integers(0, 30), max_size=12)


def stream(size: int, seed: int, shuffle: bool, epochs: int) -> list[int]:
    """The naive reference: whole epochs, each from a sampler of its own that is put at the epoch's beginning."""
    whole = []
    for epoch in range(epochs):
        sampler = PromptSampler(size, seed, shuffle)
        sampler.load_state_dict({**sampler.state_dict(), "epoch": epoch, "position": 0})
        whole += sampler.next(size)
    return whole


@settings(max_examples=150, deadline=None)
@given(sizes, seeds, st.booleans(), requests)
def test_any_requests_read_the_same_stream(size: int, seed: int, shuffle: bool, wanted: list[int]) -> None:
    sampler = PromptSampler(size, seed, shuffle)
    taken = [index for n in wanted for index in sampler.next(n)]
    total = sum(wanted)
    assert taken == stream(size, seed, shuffle, total // size + 1)[:total]
    assert (sampler.epoch, sampler.position) == divmod(total, size)
    for start in range(0, total - size + 1, size):
        assert Counter(taken[start : start + size]) == Counter(range(size))


@settings(max_examples=150, deadline=None)
@given(sizes, seeds, st.booleans(), requests, requests)
def test_resume_equals_no_interruption(
    size: int, seed: int, shuffle: bool, before: list[int], after: list[int]
) -> None:
    one = PromptSampler(size, seed, shuffle, "abc")
    for n in before:
        one.next(n)
    state = json.loads(json.dumps(one.state_dict()))
    other = PromptSampler(size, seed, shuffle, "abc")
    other.next(3)
    other.load_state_dict(state)
    assert [other.next(n) for n in after] == [one.next(n) for n in after]
    assert other.state_dict() == one.state_dict()


def test_orders_differ_between_epochs_and_seeds_and_stay_as_they_are() -> None:
    sampler = PromptSampler(50, 7, True)
    first, second = sampler.next(50), sampler.next(50)
    assert first != second != list(range(50))
    assert first != PromptSampler(50, 8, True).next(50)
    # written down once: a new order for the same seed would make old checkpoints go on elsewhere
    assert PromptSampler(8, 0, True).next(16) == WRITTEN_DOWN
    assert PromptSampler(3, 0, False).next(7) == [0, 1, 2, 0, 1, 2, 0]


WRITTEN_DOWN = [3, 1, 6, 5, 7, 2, 0, 4, 4, 3, 6, 1, 7, 2, 5, 0]


def test_a_state_of_other_prompts_is_refused() -> None:
    state = PromptSampler(10, 1, True, "abc").state_dict()
    with pytest.raises(InputRefused) as refused:
        PromptSampler(11, 2, False, "abd").load_state_dict(state)
    assert len(refused.value.problems) == 4
    assert "number of training prompts was 10" in refused.value.problems[0] and "is 11 now" in refused.value.problems[0]
    with pytest.raises(InputRefused, match="position 10, can't be"):
        PromptSampler(10, 1, True, "abc").load_state_dict({**state, "position": 10})
    with pytest.raises(InputRefused, match="was None"):
        PromptSampler(10, 1, True, "abc").load_state_dict({})


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PromptSampler(0, 0, True)
    with pytest.raises(ValueError, match="-1"):
        PromptSampler(3, 0, True).next(-1)
