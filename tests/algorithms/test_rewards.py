"""Scores and token rewards against worked numbers and loops."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import RunningMoments, penalties, shape_scores, token_rewards

F64 = torch.float64
numbers = st.floats(-100, 100, allow_nan=False)


def test_moments_worked_example():
    moments = RunningMoments()
    assert moments.std == 0.0
    moments.update(torch.tensor([2.0, 4.0]))
    moments.update(torch.tensor([9.0]))
    # mean 5, squared distances 9 + 1 + 16 = 26, unbiased variance 13
    assert (moments.count, moments.mean, moments.m2) == (3, pytest.approx(5), pytest.approx(26))
    assert moments.std == pytest.approx(13**0.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(numbers, max_size=7), max_size=6))
def test_moments_in_pieces_are_those_of_the_whole(pieces):
    moments = RunningMoments()
    for piece in pieces:
        moments.update(torch.tensor(piece, dtype=F64))
        # through JSON and back after each piece: a resume changes nothing
        moments = RunningMoments.from_state_dict(json.loads(json.dumps(moments.state_dict())))
    everything = [x for piece in pieces for x in piece]
    assert moments.count == len(everything)
    if everything:
        assert moments.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
    if len(everything) > 1:
        assert moments.std == pytest.approx(statistics.stdev(everything), abs=1e-6)


def test_moments_far_from_zero():
    moments = RunningMoments()
    for x in ([1e8 + 1, 1e8 + 2], [1e8 + 3], [1e8 + 4]):
        moments.update(torch.tensor(x, dtype=F64))
    assert moments.std == pytest.approx((5 / 3) ** 0.5, rel=1e-6)


def test_moments_refuse_what_is_not_finite_and_stay_as_they_were():
    moments = RunningMoments(2, 3.0, 2.0)
    with pytest.raises(ValueError, match="1 of 2"):
        moments.update(torch.tensor([1.0, float("nan")]))
    assert moments == RunningMoments(2, 3.0, 2.0)


def test_scores_are_normalised_first_and_clipped_then():
    scores = torch.tensor([2.0, 4.0, 9.0])
    moments = RunningMoments()
    moments.update(scores)
    assert shape_scores(scores, moments=None, clip=None).tolist() == [2, 4, 9]
    assert shape_scores(scores, moments=None, clip=3.0).tolist() == [2, 3, 3]
    s = 13**0.5
    normal = shape_scores(scores, moments=moments, clip=None)
    assert normal.tolist() == pytest.approx([-3 / s, -1 / s, 4 / s], abs=1e-6)
    # clipped first, the scores would be [0.5, 0.5, 0.5] before the normalisation
    clipped = shape_scores(scores, moments=moments, clip=0.5)
    assert clipped.tolist() == pytest.approx([-0.5, -1 / s, 0.5], abs=1e-6)
    assert clipped.dtype == torch.float32 and shape_scores(scores.double(), moments=moments, clip=None).dtype == F64


def test_scores_without_deviation_become_zero():
    for value in (0.1, 0.7, -3.3):
        moments = RunningMoments()
        for n in (6, 1, 5):  # the means of equal numbers differ from them in the last digit, and so from each other
            moments.update(torch.full((n,), value, dtype=F64))
        assert moments.std > 0
        assert shape_scores(torch.full((3,), value, dtype=F64), moments=moments, clip=None).abs().max() < 1e-6
    one = RunningMoments()
    one.update(torch.tensor([5.0]))
    assert shape_scores(torch.tensor([5.0]), moments=one, clip=None).tolist() == [0]


def test_penalties():
    found = penalties(
        torch.tensor([3, 10, 12, 0]),
        torch.tensor([False, False, True, True]),
        length_penalty=0.25,
        length_penalty_from=10,
        missing_eos_penalty=1.5,
    )
    assert found.tolist() == [0, 0, 2.0, 1.5] and found.dtype == torch.float32
    nothing = penalties(
        torch.tensor([7]), torch.tensor([True]), length_penalty=0.0, length_penalty_from=0, missing_eos_penalty=0.0
    )
    assert nothing.tolist() == [0]


def test_token_rewards_worked_example():
    # Prompt of 2, response of 3 with its second token masked; prompt of 1, response of 2 with its last one masked.
    mask = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0], dtype=torch.bool)
    kl = torch.tensor([9.0, 9.0, 0.5, 9.0, -0.25, 9.0, 2.0, float("nan")])
    rewards = token_rewards(torch.tensor([10.0, -1.0]), kl, mask, torch.tensor([0, 5, 8]), 0.2)
    assert rewards.tolist() == pytest.approx([0, 0, -0.1, 0, 10.05, 0, -1.4, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, st.lists(st.tuples(st.booleans(), st.floats(-10, 10)), max_size=6)), max_size=5))
def test_token_rewards_add_up(samples):
    """The score lands on the last response token, and a sequence's rewards are score - coef * sum of KL."""
    flat = [entry for _, tokens in samples for entry in tokens]
    mask = torch.tensor([m for m, _ in flat], dtype=torch.bool)
    kl = torch.tensor([k for _, k in flat], dtype=F64)
    ends = [sum(len(tokens) for _, tokens in samples[:i]) for i in range(len(samples) + 1)]
    scores = torch.tensor([s for s, _ in samples], dtype=F64)
    rewards = token_rewards(scores, kl, mask, torch.tensor(ends), 0.3).tolist()
    assert len(rewards) == len(flat)
    for i, (score, tokens) in enumerate(samples):
        mine = rewards[ends[i] : ends[i + 1]]
        inside = [t for t, (m, _) in enumerate(tokens) if m]
        assert all(r == 0 for t, r in enumerate(mine) if t not in inside)
        if inside:  # else it gets nothing, and nobody else gets its score
            assert sum(mine) == pytest.approx(score - 0.3 * sum(tokens[t][1] for t in inside), abs=1e-9)
            assert mine[inside[-1]] == pytest.approx(score - 0.3 * tokens[inside[-1]][1], abs=1e-9)


def test_token_rewards_keep_the_type():
    mask, offsets = torch.tensor([False, True]), torch.tensor([0, 2])
    assert token_rewards(torch.ones(1), torch.ones(2), mask, offsets, 0.1).dtype == torch.float32
    assert token_rewards(torch.ones(1), torch.ones(2, dtype=F64), mask, offsets, 0.1).dtype == F64
