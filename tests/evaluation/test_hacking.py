"""Histories whose course is known: parting, stalling, going together; correlations by hand and by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.evaluation.hacking import HackingAnalysis, analyze_reward_hacking

SEEDS = range(20)


def course(points: list[tuple[float, float]], n: int, noise: float, seed: int) -> np.ndarray:
    """A line through (share of the run, value), with normal noise."""
    x, y = zip(*points, strict=True)
    return np.interp(np.linspace(0, 1, n), x, y) + noise * np.random.default_rng(seed).normal(size=n)


def analyse(points, n=100, noise=0.1, seed=0, proxy=((0.0, 0.0), (1.0, 2.0)), **options) -> HackingAnalysis:
    return analyze_reward_hacking(course(list(proxy), n, noise, seed + 1000), course(points, n, noise, seed), **options)


TENT = [(0.0, 0.0), (0.4, 1.0), (1.0, 0.0)]


def test_the_step_where_they_part():
    even = analyse([(0.0, 0.0), (0.4, 1.0), (0.8, 0.0)], n=101, noise=0.0)
    assert even.outcome == "hacking" and even.parted_at == 40
    assert "part at step 40" in even.verdict and "Reward hacking" in even.verdict
    # a mean over a peak leans towards its flatter side
    assert analyse(TENT, n=101, noise=0.0).parted_at in (40, 41)
    for seed in SEEDS:
        noisy = analyse(TENT, n=101, seed=seed)
        assert noisy.outcome == "hacking" and abs(noisy.parted_at - 40) <= 6, seed


def test_a_fall_after_a_plateau_begins_at_its_end():
    found = analyse([(0.0, 0.0), (0.2, 1.0), (0.6, 1.0), (1.0, 0.0)], n=101, noise=0.0)
    # the smoothed plateau ends half of half a window before the true one
    assert found.outcome == "hacking" and 54 <= found.parted_at <= 60


def test_over_optimisation_as_gao_et_al_have_it():
    """Gold d (alpha - beta d) with d the root of the KL, eq. 1 of their paper; its peak is at d = alpha / (2 beta)."""
    d = np.linspace(0, 10, 201)
    proxy, gold = d * (1.0 - 0.03 * d), d * (1.0 - 0.08 * d)
    found = analyze_reward_hacking(proxy, gold)
    assert found.outcome == "hacking" and abs(d[found.parted_at] - 6.25) < 0.1
    # before the peak nothing is wrong
    early = analyze_reward_hacking(proxy[:100], gold[:100])
    assert early.outcome == "together" and early.parted_at is None


@pytest.mark.parametrize(
    ("points", "outcome"),
    [
        ([(0.0, 0.0), (1.0, 1.0)], "together"),
        ([(0.0, 0.0), (0.3, 1.0), (1.0, 1.0)], "together"),
        # down by half and up again: not for good
        ([(0.0, 0.0), (0.3, 1.0), (0.5, 0.4), (1.0, 0.95)], "together"),
        # deep down, and most of the way up again
        ([(0.0, 0.0), (0.3, 2.0), (0.5, 0.4), (1.0, 1.5)], "together"),
        ([(0.0, 0.0), (1.0, 0.0)], "stalled"),
    ],
)
def test_histories_that_do_not_part(points, outcome):
    for seed in SEEDS:
        found = analyse(points, seed=seed)
        assert found.parted_at is None and found.outcome == outcome, seed


def test_a_proxy_that_falls_too_is_no_hacking():
    for seed in SEEDS:
        found = analyse(TENT, seed=seed, proxy=TENT)
        assert found.parted_at is None and found.outcome == "no_gain", seed
        assert analyse([(0.0, 1.0), (1.0, 0.0)], seed=seed, proxy=[(0.0, 0.0), (1.0, 0.0)]).outcome == "no_gain"


def test_quality_that_falls_from_the_beginning():
    found = analyse([(0.0, 1.0), (1.0, 0.0)], noise=0.0)
    assert found.outcome == "hacking" and found.parted_at < 10 and found.pearson == pytest.approx(-1)


def test_noise_alone_seldom_looks_like_parting():
    parted = sum(analyse([(0.0, 0.0), (1.0, 0.0)], n=40, noise=0.3, seed=s).parted_at is not None for s in range(200))
    assert parted <= 8


def test_correlations_by_window():
    found = analyse(TENT, n=101, noise=0.0, window=20)
    assert [(w.first_step, w.last_step) for w in found.windows] == [(0, 19), (20, 39), (40, 59), (60, 79), (80, 100)]
    assert [w.pearson for w in found.windows] == pytest.approx([1, 1, -1, -1, -1])
    assert [w.spearman for w in found.windows] == pytest.approx([1, 1, -1, -1, -1])
    named = analyse(TENT, n=101, noise=0.0, window=20, steps=list(range(10, 1020, 10)))
    assert found.parted_at in (40, 41) and named.parted_at == 10 * found.parted_at + 10
    assert named.windows[-1].last_step == 1010 and f"step {named.parted_at}" in named.verdict


def test_correlations_by_hand():
    proxy, quality = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 1.0, 1.0, 2.0, 30.0, 4.0]
    found = analyze_reward_hacking(proxy, quality)
    assert found.pearson == pytest.approx(np.corrcoef(proxy, quality)[0, 1])
    # ranks 1 to 6, and 1, 2.5, 2.5, 4, 6, 5: their deviations' products add up to 16, the squares to 17.5 and 17
    assert found.spearman == pytest.approx(16 / math.sqrt(17.5 * 17))


values = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=40)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(values, st.data())
def test_whatever_the_history(proxy, data):
    """It never fails, and depends neither on the quality's unit nor on its zero."""
    quality = data.draw(st.lists(st.integers(-20, 20), min_size=len(proxy), max_size=len(proxy)))
    found = analyze_reward_hacking(proxy, quality)
    assert (found.parted_at is not None) == (found.outcome == "hacking") and found.verdict.endswith(".")
    assert all(math.isnan(c) or -1 <= c <= 1 for c in (found.pearson, found.spearman))
    scaled = analyze_reward_hacking(proxy, [8 * q + 16 for q in quality])
    assert scaled.parted_at == found.parted_at and scaled.outcome == found.outcome
    assert scaled.pearson == pytest.approx(found.pearson, nan_ok=True, abs=1e-9)


def test_rounding_is_no_fall():
    quality = [0.1 + 0.2] * 15 + [0.3] * 15
    assert analyze_reward_hacking(range(30), quality).outcome == "stalled" and quality[0] > quality[-1]


def test_nothing_moves_or_too_short():
    still = analyze_reward_hacking([1.0] * 10, [2.0] * 10)
    assert still.outcome == "no_gain" and math.isnan(still.pearson) and math.isnan(still.windows[0].spearman)
    short = analyze_reward_hacking([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert short.outcome == "too_short" and short.pearson == pytest.approx(-1) and "3 steps" in short.verdict
    assert analyze_reward_hacking([], []).outcome == "too_short"


@pytest.mark.parametrize(
    ("proxy", "quality", "options", "message"),
    [
        ([1.0] * 6, [1.0] * 7, {}, "6 proxy rewards and 7 qualities"),
        ([1.0, math.nan] * 3, [1.0] * 6, {}, "proxy_rewards: entry 1"),
        ([[1.0]], [1.0], {}, "shape"),
        ([1.0] * 6, [1.0] * 6, {"window": 2}, "window of 2 steps: expected 3 to 6"),
        ([1.0] * 6, [1.0] * 6, {"window": 7}, "window of 7"),
        ([1.0] * 6, [1.0] * 6, {"steps": [1, 2, 3]}, "expected 6 numbers"),
        ([1.0] * 6, [1.0] * 6, {"steps": [1, 2, 3, 3, 4, 5]}, "above the one before"),
    ],
)
def test_refusals(proxy, quality, options, message):
    with pytest.raises(ValueError, match=message):
        analyze_reward_hacking(proxy, quality, **options)
