"""Losses of policy and critic, for each token, and the weights with which they are added up.

Letters: r = pi(a|s) / pi_old(a|s), A advantage, V value, R return, eps clip range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rayrlhf.algorithms.kl import LOG_RATIO_BOUND
from rayrlhf.algorithms.ragged import segment_ids, segment_sum

__all__ = ["PolicyLoss", "ValueLoss", "aggregation_weights", "importance_weights", "policy_loss", "value_loss"]

_OVERFLOW_BOUND = 80.0


class PolicyLoss(NamedTuple):
    """What `policy_loss` says about each token; only ``loss`` carries a gradient."""

    loss: Tensor
    """[T]."""
    ratio: Tensor
    """[T], r."""
    clipped: Tensor
    """bool [T], where one of the bounds holds, so that the gradient is 0."""


class ValueLoss(NamedTuple):
    """What `value_loss` says about each token; only ``loss`` carries a gradient."""

    loss: Tensor
    """[T]."""
    clipped: Tensor
    """bool [T], where the clipped value has the larger error, so that the gradient is 0."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, as a loss.

    Schulman et al. 2017, "Proximal policy optimization algorithms", eq. 7:
    ``L = max(-A r, -A clip(r, 1 - low, 1 + high))``. With dual clip (Ye et al. 2020, "Mastering complex control in
    MOBA games with deep reinforcement learning", eq. 5) the loss is at most ``-c A`` where A < 0.

    Args:
        logprobs: [T], of the policy that is trained.
        old_logprobs: [T], of the policy at the beginning of the update.
        advantages: [T].
        clip_range: low, in (0, 1).
        clip_range_high: high; None: the same as ``clip_range``.
        dual_clip: c > 1; None for none.

    Returns:
        loss, ratio and clipped, each [T].

    Raises:
        ValueError: for a dual clip of 1 or less.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip of {dual_clip}: it must be above 1")
    high = clip_range if clip_range_high is None else clip_range_high
    # Beyond the bound r would overflow float32, and inf * 0 would be the gradient of a clipped token.
    ratio = torch.exp((logprobs - old_logprobs).clamp(-_OVERFLOW_BOUND, _OVERFLOW_BOUND))
    unbounded = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + high)
    loss = torch.maximum(unbounded, bounded)
    clipped = bounded > unbounded
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > ceiling)
        loss = torch.where(beyond, ceiling, loss)
        clipped = clipped | beyond
    return PolicyLoss(loss, ratio.detach(), clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range_value: float | None) -> ValueLoss:
    """Squared error of the value, with the new value kept near the old one.

    The value loss of Schulman et al. 2017, eq. 9, with the clipping of the authors' program (Engstrom et al. 2020,
    "Implementation matters in deep policy gradients"):
    ``L = 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)``.

    Args:
        values: [T], of the critic that is trained.
        old_values: [T], of the critic at the beginning of the update.
        returns: [T].
        clip_range_value: eps; None: no clipping.

    Returns:
        loss and clipped, each [T].
    """
    unbounded = (values - returns).square()
    if clip_range_value is None:
        return ValueLoss(0.5 * unbounded, torch.zeros_like(unbounded, dtype=torch.bool))
    near = torch.clamp(values, old_values - clip_range_value, old_values + clip_range_value)
    bounded = (near - returns).square()
    return ValueLoss(0.5 * torch.maximum(unbounded, bounded), bounded > unbounded)


@torch.no_grad()
def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights, which correct for the rollout engine's other probabilities.

    ``w_t = min(pi_old(a|s) / pi_rollout(a|s), cap)``: Ionides 2008, "Truncated importance sampling"; for each
    step as in Espeholt et al. 2018, "IMPALA", section 4.1. The log-ratio is clamped to ±20.

    Args:
        old_logprobs: [T], of the trainer's policy at the beginning of the update.
        rollout_logprobs: [T], of the engine that sampled.
        cap: largest weight.

    Returns:
        [T], in (0, cap], without a gradient. 1 where the two agree and cap >= 1.
    """
    log_ratio = (old_logprobs - rollout_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.exp(log_ratio).clamp(max=cap)


@torch.no_grad()
def aggregation_weights(
    response_mask: Tensor,
    offsets: Tensor,
    aggregation: str,
    *,
    num_tokens: int,
    num_sequences: int,
    denominator: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights w such that the loss of an optimizer step is ``sum_t w_t l_t``, over its micro-batches and ranks.

    With n_i response tokens in sample i, N tokens and B samples in the whole optimizer step:

    - ``token_mean``: 1 / N (Yu et al. 2025, "DAPO", section 3.3)
    - ``sequence_mean_token_mean``: 1 / (B n_i) (Shao et al. 2024, "DeepSeekMath", eq. 3)
    - ``sequence_mean_token_sum``: 1 / B (Ahmadian et al. 2024, "Back to basics": a response is one action)
    - ``fixed_denominator``: 1 / denominator (Liu et al. 2025, "Understanding R1-Zero-like training")

    Args:
        response_mask: bool [T], of this micro-batch.
        offsets: int64 [S + 1], of this micro-batch.
        aggregation: one of the four.
        num_tokens: N, response tokens of the whole optimizer step, all ranks.
        num_sequences: B, samples with at least one response token of the whole optimizer step, all ranks.
        denominator: of ``fixed_denominator``, and only of it.
        dtype: type of the weights.

    Returns:
        [T], 0 outside the mask.

    Raises:
        ValueError: for another aggregation; where the denominator is missing, not above 0, or of no use; where this
            micro-batch has more tokens or sequences than the whole step is said to have.
    """
    count = segment_sum(response_mask, offsets)
    found_tokens, found_sequences = int(count.sum()), int((count > 0).sum())
    if found_tokens > num_tokens or found_sequences > num_sequences:
        raise ValueError(
            f"a micro-batch has {found_tokens} response tokens in {found_sequences} sequences, more than the "
            f"{num_tokens} tokens in {num_sequences} sequences of its optimizer step"
        )
    if (aggregation == "fixed_denominator") != (denominator is not None):
        raise ValueError(f"denominator {denominator} with {aggregation!r}: it belongs to 'fixed_denominator'")
    if aggregation == "token_mean":
        divisor = torch.full_like(count, max(num_tokens, 1), dtype=torch.float64)
    elif aggregation == "sequence_mean_token_mean":
        divisor = count.clamp(min=1).to(torch.float64) * max(num_sequences, 1)
    elif aggregation == "sequence_mean_token_sum":
        divisor = torch.full_like(count, max(num_sequences, 1), dtype=torch.float64)
    elif aggregation == "fixed_denominator" and denominator is not None:
        if not denominator > 0:
            raise ValueError(f"denominator {denominator}: it must be above 0")
        divisor = torch.full_like(count, denominator, dtype=torch.float64)
    else:
        raise ValueError(
            f"loss aggregation {aggregation!r}: expected 'token_mean', 'sequence_mean_token_mean', "
            "'sequence_mean_token_sum' or 'fixed_denominator'"
        )
    return torch.where(response_mask, (1.0 / divisor)[segment_ids(offsets)], 0.0).to(dtype)
