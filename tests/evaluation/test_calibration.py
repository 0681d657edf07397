"""Reliability tables and calibration error against worked numbers and a definition in fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.evaluation.calibration import expected_calibration_error, pair_probabilities, reliability_table


def test_worked_table():
    table = reliability_table([0.1, 0.2, 0.5, 0.75, 0.8, 1.0], [0, 1, 1, 1, 0, 1], bins=4)
    assert [(b.low, b.high, b.count) for b in table] == [(0, 0.25, 2), (0.25, 0.5, 0), (0.5, 0.75, 1), (0.75, 1, 3)]
    assert [b.mean_probability for b in table] == pytest.approx([0.15, math.nan, 0.5, 0.85], nan_ok=True)
    assert [b.frequency for b in table] == pytest.approx([0.5, math.nan, 1.0, 2 / 3], nan_ok=True)
    # (2 * 0.35 + 1 * 0.5 + 3 * (0.85 - 2/3)) / 6
    expected = (0.7 + 0.5 + 0.55) / 6
    assert expected_calibration_error([0.1, 0.2, 0.5, 0.75, 0.8, 1.0], [0, 1, 1, 1, 0, 1], 4) == pytest.approx(expected)


def test_sure_and_right_or_wrong():
    assert expected_calibration_error([1.0, 0.0, 1.0], [True, False, True]) == 0
    assert expected_calibration_error([1.0, 0.0, 1.0], [False, True, False]) == 1
    # half of them come true where 1/2 is said
    assert expected_calibration_error([0.5] * 4, [1, 0, 0, 1]) == 0
    assert math.isnan(expected_calibration_error([], []))
    assert [b.count for b in reliability_table([], [])] == [0] * 10


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 64), st.booleans()), min_size=1, max_size=30), st.sampled_from([1, 2, 8, 16]))
def test_by_definition(predictions, bins):
    """Probabilities in 64ths and bins of powers of two, so that Fractions place them without any rounding."""
    groups: dict[int, list[tuple[Fraction, int]]] = {}
    for k, outcome in predictions:
        p = Fraction(k, 64)
        groups.setdefault(min(int(p * bins), bins - 1), []).append((p, int(outcome)))
    gap = sum(abs(sum(y for _, y in g) - sum((p for p, _ in g), Fraction(0))) for g in groups.values())
    p, y = [k / 64 for k, _ in predictions], [o for _, o in predictions]
    assert expected_calibration_error(p, y, bins) == pytest.approx(float(gap / len(predictions)), abs=1e-12)
    assert {i: b.count for i, b in enumerate(reliability_table(p, y, bins)) if b.count} == {
        i: len(g) for i, g in groups.items()
    }


def test_edges_belong_to_the_bin_above():
    for bins in (3, 5, 10, 20):
        for i, edge in enumerate(np.linspace(0, 1, bins + 1)):
            counts = [b.count for b in reliability_table([edge], [1], bins)]
            assert counts.index(1) == min(i, bins - 1), (bins, edge)


def test_pairs_in_both_orders():
    p, y = pair_probabilities([math.log(4), 0.0, -800.0], [0.0, 0.0, 800.0])
    assert p.tolist() == pytest.approx([0.8, 0.5, 0, 0.2, 0.5, 1], abs=1e-15)
    assert y.tolist() == [1, 1, 1, 0, 0, 0]
    # what is said of one order is said of the other: the table is symmetrical
    rng = np.random.default_rng(0)
    table = reliability_table(*pair_probabilities(rng.normal(0.5, 1, 300), rng.normal(0, 1, 300)))
    for low, high in zip(table, reversed(table), strict=True):
        assert low.count == high.count and low.frequency == pytest.approx(1 - high.frequency, nan_ok=True)


def test_a_model_that_means_its_probabilities_is_calibrated():
    """Labels drawn with the model's own probabilities: an error near 0; with scores too large by 4: a large one."""
    rng = np.random.default_rng(1)
    difference = rng.normal(0, 1.5, 20_000)
    preferred = rng.random(20_000) < 1 / (1 + np.exp(-difference))
    chosen = np.where(preferred, difference, -difference)
    assert expected_calibration_error(*pair_probabilities(chosen, np.zeros(20_000))) < 0.01
    assert expected_calibration_error(*pair_probabilities(4 * chosen, np.zeros(20_000))) > 0.1


@pytest.mark.parametrize(
    ("p", "y", "bins", "message"),
    [
        ([0.5, 1.2], [1, 0], 10, "in \\[0, 1\\]"),
        ([0.5], [2], 10, "0 or 1"),
        ([0.5], [1, 0], 10, "1 probabilities and 2 outcomes"),
        ([0.5], [1], 0, "0 bins"),
        ([0.5, math.nan], [1, 1], 10, "probabilities: entry 1"),
        ([[0.5]], [1], 10, "shape"),
    ],
)
def test_refusals(p, y, bins, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(p, y, bins)
    with pytest.raises(ValueError, match="chosen_scores: entry 0"):
        pair_probabilities([math.inf], [0.0])
