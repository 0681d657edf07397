"""How often model A beats model B on the same prompts, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Verdict", "WinRate", "judged_win_rate", "win_rate"]

Verdict = Literal["a", "b", "tie"]
"""Which model's response is better, whatever the order in which they were shown."""

_LEGAL_VERDICTS = ("a", "b", "tie", None)


@dataclass(frozen=True)
class WinRate:
    """A against B, one comparison a prompt."""

    wins: int
    """Prompts where A is better."""
    ties: int
    losses: int
    unjudged: int
    """Prompts without a comparison, for want of a score or a verdict. They count nowhere else."""
    disagreements: int
    """Those of the ties where a judge's verdict changed with the order of the responses; 0 for scores."""
    rate: float
    """(wins + ties / 2) / (wins + ties + losses), in [0, 1]; NaN where nothing was judged."""
    low: float
    """Lower end of the interval of ``rate``, by the bootstrap."""
    high: float
    """Upper end."""
    confidence: float
    """Of the interval, 0.95 for 95 %."""

    @property
    def judged(self) -> int:
        """Prompts with a comparison."""
        return self.wins + self.ties + self.losses


def win_rate(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    tie: float = 0.0,
    seed: int = 0,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> WinRate:
    """Win rate of A over B by scores of a reward model or a function, one response each a prompt.

    The interval is Efron's percentile bootstrap (Efron and Tibshirani 1993, "An introduction to the bootstrap", section
    13.3) over the prompts. Where all prompts agree it has no width, however few they are.

    Args:
        scores_a: [P], of A's responses. NaN: there is no score, and the prompt is counted as unjudged.
        scores_b: [P], of B's responses to the same prompts.
        tie: largest difference of scores that is a tie, >= 0.
        seed: of the bootstrap. The same seed, the same interval.
        resamples: of the bootstrap.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: for infinite scores, numbers of them that differ, or an argument outside its range.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"scores of shapes {a.shape} and {b.shape}: expected one of each a prompt, for the same prompts"
        )
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("infinite scores can't be compared")
    if not tie >= 0:
        raise ValueError(f"a tie of {tie}: it must be 0 or more")
    difference = (a - b)[~(np.isnan(a) | np.isnan(b))]
    wins, losses = int((difference > tie).sum()), int((difference < -tie).sum())
    ties = len(difference) - wins - losses
    return _with_interval(wins, ties, losses, len(a) - len(difference), 0, seed, resamples, confidence)


def judged_win_rate(
    verdicts_first: Sequence[Verdict | None],
    verdicts_second: Sequence[Verdict | None],
    seed: int = 0,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> WinRate:
    """Win rate of A over B by a judge who saw each two responses in both orders.

    Judges prefer the response that they see first. As Zheng et al. 2023, "Judging LLM-as-a-judge with MT-bench and Chatbot
    arena", section 3.4, have it, a model wins only if it does in both orders; two verdicts that differ make a tie.

    Args:
        verdicts_first: [P], with A's response shown first: the *model* whose response is better, or "tie". None: the judge
            gave no verdict, and the prompt is counted as unjudged.
        verdicts_second: [P], with B's response shown first; "a" is model A here too.
        seed, resamples, confidence: as in `win_rate`.

    Raises:
        ValueError: for another verdict, or numbers of them that differ.
    """
    if len(verdicts_first) != len(verdicts_second):
        raise ValueError(
            f"{len(verdicts_first)} and {len(verdicts_second)} verdicts: there must be one of each a prompt"
        )
    counts = {"a": 0, "b": 0, "tie": 0}
    unjudged = disagreements = 0
    for i, (first, second) in enumerate(zip(verdicts_first, verdicts_second, strict=True)):
        if first not in _LEGAL_VERDICTS or second not in _LEGAL_VERDICTS:
            raise ValueError(f"verdicts {first!r} and {second!r} of prompt {i}: expected 'a', 'b', 'tie' or None")
        if first is None or second is None:
            unjudged += 1
        elif first == second:
            counts[first] += 1
        else:
            counts["tie"] += 1
            disagreements += 1
    return _with_interval(counts["a"], counts["tie"], counts["b"], unjudged, disagreements, seed, resamples, confidence)


def _with_interval(
    wins: int, ties: int, losses: int, unjudged: int, disagreements: int, seed: int, resamples: int, confidence: float
) -> WinRate:
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"{resamples} resamples at a confidence of {confidence}: expected at least 1, and one in (0, 1)"
        )
    judged = wins + ties + losses
    rate = low = high = float("nan")
    if judged:
        rate = (wins + ties / 2) / judged
        # A resample of prompts with outcomes 1, 1/2 and 0 is a multinomial draw of how many there are of each.
        shares = np.array([wins, ties, losses]) / judged
        drawn = np.random.default_rng(seed).multinomial(judged, shares, size=resamples)
        rates = (drawn[:, 0] + drawn[:, 1] / 2) / judged
        low, high = (float(q) for q in np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return WinRate(wins, ties, losses, unjudged, disagreements, rate, low, high, confidence)
