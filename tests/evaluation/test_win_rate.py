"""Win rates by hand; the interval against a bootstrap that draws prompts one by one, and its coverage."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rayrlhf.evaluation.win_rate import judged_win_rate, win_rate


def test_counts_and_rate():
    result = win_rate([1.0, 0.5, 0.0, 2.0, 1.0], [0.0, 0.5, 1.0, 1.5, math.nan])
    assert (result.wins, result.ties, result.losses, result.unjudged, result.judged) == (2, 1, 1, 1, 4)
    assert result.rate == 0.625 and result.disagreements == 0 and result.confidence == 0.95
    # differences up to the tie, itself included
    assert win_rate([1.0, 0.5, 0.0, 2.0], [0.0, 0.5, 1.0, 1.5], tie=0.5).ties == 2
    assert win_rate([1.0, 0.5, 0.0, 2.0], [0.0, 0.5, 1.0, 1.5], tie=1.0).ties == 4


def test_swapped_models_give_the_complement():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 40).round(1), rng.normal(0, 1, 40).round(1)
    one, other = win_rate(a, b, tie=0.1), win_rate(b, a, tie=0.1)
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.rate == pytest.approx(1 - other.rate)
    assert one.low == pytest.approx(1 - other.high, abs=0.02) and one.high == pytest.approx(1 - other.low, abs=0.02)


def test_interval_against_a_bootstrap_of_single_prompts():
    outcomes = [1.0] * 18 + [0.5] * 5 + [0.0] * 9
    draw = random.Random(5)
    rates = sorted(sum(draw.choices(outcomes, k=32)) / 32 for _ in range(10_000))
    result = win_rate([o - 0.5 for o in outcomes], [0.0] * 32, seed=3)
    # a rate moves in steps of 1/64
    assert result.low == pytest.approx(rates[250], abs=1 / 64) and result.high == pytest.approx(rates[9750], abs=1 / 64)
    assert result.low < result.rate < result.high
    narrow = win_rate([o - 0.5 for o in outcomes], [0.0] * 32, seed=3, confidence=0.5)
    assert result.low < narrow.low < narrow.rate < narrow.high < result.high
    assert narrow.low == pytest.approx(rates[2500], abs=1 / 64)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    held = 0
    for i in range(200):
        result = win_rate((rng.random(80) < 0.6).astype(float), np.full(80, 0.5), seed=i, resamples=1000)
        held += result.low <= 0.6 <= result.high
    assert 180 <= held <= 198


def test_the_seed_makes_it_repeatable():
    a, b = np.random.default_rng(1).normal(size=(2, 200))
    assert win_rate(a, b, seed=4) == win_rate(a, b, seed=4)
    bounds = {win_rate(a, b, seed=s, resamples=50).low for s in range(8)}
    assert len(bounds) > 1


def test_nothing_to_judge():
    for result in (win_rate([], []), win_rate([math.nan], [1.0]), judged_win_rate([None], ["a"])):
        assert result.judged == 0 and math.isnan(result.rate) and math.isnan(result.low) and math.isnan(result.high)
    assert win_rate([1.0] * 5, [0.0] * 5).rate == win_rate([1.0] * 5, [0.0] * 5).low == 1


def test_a_judge_in_both_orders():
    first = ["a", "b", "tie", "a", "b", "a", "tie", None, "a"]
    second = ["a", "b", "tie", "b", "a", "tie", "b", "a", None]
    result = judged_win_rate(first, second)
    assert (result.wins, result.ties, result.losses) == (1, 5, 1)
    assert (result.disagreements, result.unjudged, result.judged) == (4, 2, 7)
    assert result.rate == 0.5
    # a judge who always takes the response shown first says nothing
    biased = judged_win_rate(["a"] * 10, ["b"] * 10)
    assert (biased.ties, biased.disagreements, biased.rate) == (10, 10, 0.5)


def test_scores_and_verdicts_have_the_same_interval():
    a, b = [1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0, 0.0]
    verdicts = ["a", "a", "tie", "b", "a"]
    assert judged_win_rate(verdicts, verdicts, seed=2) == win_rate(a, b, seed=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate([1.0], [1.0, 2.0]), r"\(1,\) and \(2,\)"),
        (lambda: win_rate([math.inf], [1.0]), "infinite"),
        (lambda: win_rate([1.0], [1.0], tie=-0.1), "tie of -0.1"),
        (lambda: win_rate([1.0], [1.0], tie=math.nan), "tie of nan"),
        (lambda: win_rate([1.0], [1.0], confidence=1.0), "confidence of 1.0"),
        (lambda: win_rate([1.0], [1.0], resamples=0), "0 resamples"),
        (lambda: judged_win_rate(["a"], []), "1 and 0 verdicts"),
        (lambda: judged_win_rate(["a", "A"], ["a", "a"]), "'A' and 'a' of prompt 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
