"""Whether a reward model's confidence is earned: how often the preferred response wins where it says 70 %."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ReliabilityBin", "expected_calibration_error", "pair_probabilities", "reliability_table"]


@dataclass(frozen=True)
class ReliabilityBin:
    """The predictions with a probability in [low, high), or [low, 1] for the last bin."""

    low: float
    high: float
    count: int
    """Predictions in the bin."""
    mean_probability: float
    """What was predicted, on average; NaN in an empty bin."""
    frequency: float
    """Share that came true; NaN in an empty bin."""


def pair_probabilities(chosen_scores: ArrayLike, rejected_scores: ArrayLike) -> tuple[NDArray, NDArray]:
    """P(the first response is the better one) of each pair, in both orders, and whether it is.

    Bradley and Terry 1952: ``sigma(s_first - s_second)``. Of the pairs as they stand each outcome is 1, and a reliability
    table of them says nothing about probabilities below 1/2; with both orders it is symmetrical.

    Args:
        chosen_scores: [P].
        rejected_scores: [P].

    Returns:
        probabilities float64 [2P] and outcomes float64 [2P]: first all pairs with the chosen response first (outcome 1),
        then all with the rejected one first (outcome 0).

    Raises:
        ValueError: for scores that aren't finite, or numbers of them that differ.
    """
    chosen, rejected = _column("chosen_scores", chosen_scores), _column("rejected_scores", rejected_scores)
    _check_lengths("chosen_scores", chosen, "rejected_scores", rejected)
    difference = np.concatenate([chosen - rejected, rejected - chosen])
    # exp of a negative number alone, which never overflows
    tail = np.exp(-np.abs(difference))
    probabilities = np.where(difference >= 0, 1.0, tail) / (1.0 + tail)
    return probabilities, np.concatenate([np.ones(len(chosen)), np.zeros(len(chosen))])


def reliability_table(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> list[ReliabilityBin]:
    """Predicted probabilities against observed frequencies, in bins of the same width.

    DeGroot and Fienberg 1983, "The comparison and evaluation of forecasters".

    Args:
        probabilities: [N], in [0, 1].
        outcomes: [N], 1 where it came true, else 0 (or booleans).
        bins: number of bins, >= 1.

    Returns:
        All bins, from 0 to 1, empty ones too.

    Raises:
        ValueError: for probabilities outside [0, 1], other outcomes, numbers of them that differ, or no bins.
    """
    p, y = _checked(probabilities, outcomes, bins)
    edges = np.linspace(0.0, 1.0, bins + 1)
    # By the edges themselves: int(p * bins) would put 0.3 into the bin below it with some numbers of bins.
    place = np.minimum(np.searchsorted(edges, p, side="right") - 1, bins - 1)
    table = []
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        predicted = float(p[inside].mean()) if count else float("nan")
        observed = float(y[inside].mean()) if count else float("nan")
        table.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), count, predicted, observed))
    return table


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> float:
    """Mean distance between prediction and frequency over the bins, each with the weight of its predictions.

    Naeini, Cooper and Hauskrecht 2015, "Obtaining well calibrated probabilities using Bayesian binning":
    ``ECE = sum_b n_b / N |frequency_b - mean probability_b|``. 0 is perfect. With the arguments of `pair_probabilities`
    the probabilities are those that the first response is better, over both orders.

    Args, errors: as in `reliability_table`.

    Returns:
        In [0, 1]; NaN without predictions.
    """
    table = reliability_table(probabilities, outcomes, bins)
    total = sum(b.count for b in table)
    if not total:
        return float("nan")
    return sum(b.count * abs(b.frequency - b.mean_probability) for b in table if b.count) / total


def _checked(probabilities: ArrayLike, outcomes: ArrayLike, bins: int) -> tuple[NDArray, NDArray]:
    p, y = _column("probabilities", probabilities), _column("outcomes", outcomes)
    _check_lengths("probabilities", p, "outcomes", y)
    if bins < 1:
        raise ValueError(f"{bins} bins: at least one is needed")
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"probabilities from {p.min()} to {p.max()}: they must be in [0, 1]")
    if ((y != 0) & (y != 1)).any():
        raise ValueError("outcomes must be 0 or 1")
    return p, y


def _column(name: str, values: ArrayLike) -> NDArray:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} of shape {column.shape}: expected one dimension")
    if not np.isfinite(column).all():
        raise ValueError(f"{name}: entry {int(np.flatnonzero(~np.isfinite(column))[0])} isn't finite")
    return column


def _check_lengths(name: str, values: NDArray, other: str, others: NDArray) -> None:
    if len(values) != len(others):
        raise ValueError(f"{len(values)} {name} and {len(others)} {other}: there must be as many")
