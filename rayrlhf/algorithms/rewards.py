"""From the score of a response to the rewards of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrlhf.algorithms.ragged import last_true

__all__ = ["RunningMoments", "penalties", "shape_scores", "token_rewards"]


@dataclass
class RunningMoments:
    """Mean and deviation of all numbers so far, in float64.

    Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of the squared distances from the mean."""

    def update(self, x: Tensor) -> None:
        """Take in the numbers x (any shape; may be empty).

        Raises:
            ValueError: where one isn't finite. Nothing is taken in then.
        """
        x = x.detach().to(torch.float64).flatten()
        n = len(x)
        if n == 0:
            return
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{int((~torch.isfinite(x)).sum())} of {n} numbers aren't finite")
        mean = float(x.mean())
        m2 = float((x - mean).square().sum())
        total, delta = self.count + n, mean - self.mean
        self.m2 += m2 + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two numbers."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RunningMoments:
        return cls(int(state["count"]), float(state["mean"]), float(state["m2"]))


def shape_scores(scores: Tensor, *, moments: RunningMoments | None, clip: float | None) -> Tensor:
    """Normalise the scores by their running moments, then clip them.

    ``clip((s - mean) / (std + 1e-8), -c, c)``.

    Args:
        scores: [S], as the rewards gave them.
        moments: those of all scores so far, this batch included; None leaves the scores as they are.
        clip: bound of the result; None for none.

    Returns:
        [S]. All 0 where the scores so far have no deviation.
    """
    shaped = scores
    if moments is not None:
        shaped = ((scores.to(torch.float64) - moments.mean) / (moments.std + 1e-8)).to(scores.dtype)
    return shaped if clip is None else shaped.clamp(-clip, clip)


def penalties(
    response_lengths: Tensor,
    truncated: Tensor,
    *,
    length_penalty: float,
    length_penalty_from: int,
    missing_eos_penalty: float,
) -> Tensor:
    """What is subtracted from the shaped score of each response.

    Args:
        response_lengths: int64 [S], tokens of each response.
        truncated: bool [S], True where a response was cut by the length limit.
        length_penalty: for each token beyond ``length_penalty_from``.
        length_penalty_from: tokens that cost nothing.
        missing_eos_penalty: for a response that was cut.

    Returns:
        float32 [S], never negative where the factors aren't.
    """
    beyond = (response_lengths - length_penalty_from).clamp(min=0)
    penalty = length_penalty * beyond.to(torch.float64) + missing_eos_penalty * truncated.to(torch.float64)
    return penalty.to(torch.float32)


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, offsets: Tensor, kl_coef: float) -> Tensor:
    """Rewards of the tokens: the price of leaving the reference, and the score at the end.

    ``r_t = -kl_coef * KL_t``, and ``+ score`` on the last response token (Ziegler et al. 2019, eq. 2, token by token).

    Args:
        scores: [S].
        kl: [T], estimate for each token; what it is outside the mask doesn't matter.
        response_mask: bool [T].
        offsets: int64 [S + 1].
        kl_coef: factor of the KL.

    Returns:
        [T], in the type of ``kl``, 0 outside the mask. A sample without a response token gets nothing.
    """
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    last = last_true(response_mask, offsets)
    has_response = last >= 0
    return rewards.index_add(0, last[has_response], scores[has_response].to(rewards.dtype))
