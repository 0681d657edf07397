"""Advantages: how much better a token, or a response, was than expected.

Everything is computed in float64 and returned in the type that came in; nothing is differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.ragged import segment_ids, segment_sum

__all__ = ["gae", "group_normalized", "leave_one_out", "per_token", "whiten"]

_VARIANCE_FLOOR = 1e-8


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    offsets: Tensor,
    gamma: float,
    lam: float,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the response tokens.

    Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation", eq. 16, as a
    recursion: ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``. t counts the tokens of
    the mask only: a token that is masked inside a response is no time step, so the next value and the running
    advantage are carried over it.

    Args:
        rewards: [T].
        values: [T], V of the state before each token.
        response_mask: bool [T].
        offsets: int64 [S + 1].
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1].
        final_values: [S], V of the state after the last token; 0 ends an episode, and None ends all.

    Returns:
        advantages and returns (= advantages + values), both [T], 0 outside the mask.
    """
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    flat = response_mask.nonzero().squeeze(1)
    if len(flat) == 0:
        return advantages, returns
    sample = segment_ids(offsets)[flat]
    count = segment_sum(response_mask, offsets)
    # Steps to the end of the response: padded this way all responses end in row 0, and no row needs a mask.
    to_end = torch.cumsum(count, 0)[sample] - 1 - torch.arange(len(flat), device=flat.device)
    padded = torch.zeros(2, int(count.max()), len(count), dtype=torch.float64, device=flat.device)
    padded[0, to_end, sample] = rewards[flat].to(torch.float64)
    padded[1, to_end, sample] = values[flat].to(torch.float64)
    r, v = padded
    a = torch.zeros_like(r)
    next_value = torch.zeros_like(v[0]) if final_values is None else final_values.to(torch.float64)
    running = torch.zeros_like(v[0])
    for t in range(len(r)):
        delta = r[t] + gamma * next_value - v[t]
        running = delta + gamma * lam * running
        a[t], next_value = running, v[t]
    advantages[flat] = a[to_end, sample].to(rewards.dtype)
    returns[flat] = (a + v)[to_end, sample].to(rewards.dtype)
    return advantages, returns


def _groups_of_several(groups: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Position of each sample's group among the different ids, [S], and the size of each group, [G]."""
    ids, group, size = torch.unique(groups, return_inverse=True, return_counts=True)
    alone = ids[size == 1].tolist()
    if alone:
        shown = ", ".join(map(str, alone[:10])) + (", ..." if len(alone) > 10 else "")
        raise ValueError(f"{method} compares the samples of a group; these groups have only one: {shown}")
    return group, size


def _group_sum(x: Tensor, group: Tensor, size: Tensor) -> Tensor:
    return torch.zeros(len(size), dtype=x.dtype, device=x.device).index_add(0, group, x)


@torch.no_grad()
def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """REINFORCE leave-one-out: each score less the mean score of the others of its group.

    Ahmadian et al. 2024, "Back to basics" (RLOO estimator): ``A_i = R_i - 1/(k-1) sum_{j != i} R_j``.

    Args:
        scores: [S].
        groups: int64 [S], samples with the same number are one group; in any order, groups of any size from 2.

    Returns:
        [S].

    Raises:
        ValueError: where a group has one sample only.
    """
    group, size = _groups_of_several(groups, "leave-one-out")
    s = scores.to(torch.float64)
    others = _group_sum(s, group, size)[group] - s
    return (s - others / (size[group] - 1)).to(scores.dtype)


@torch.no_grad()
def group_normalized(scores: Tensor, groups: Tensor) -> Tensor:
    """Scores with mean 0 and deviation 1 within each group.

    Shao et al. 2024, "DeepSeekMath", section 4.1.2 (GRPO): ``A_i = (R_i - mean(R)) / std(R)``, with the unbiased
    variance and a floor: ``(R_i - mean) * rsqrt(var + 1e-8)``.

    Args:
        scores: [S].
        groups: int64 [S], as for `leave_one_out`.

    Returns:
        [S], exactly 0 in a group whose scores are all the same.

    Raises:
        ValueError: where a group has one sample only.
    """
    group, size = _groups_of_several(groups, "group normalisation")
    s = scores.to(torch.float64)
    centred = s - (_group_sum(s, group, size) / size)[group]
    variance = _group_sum(centred.square(), group, size) / (size - 1)
    # Equal scores have a mean which may differ from them in the last digit.
    low = torch.full_like(variance, torch.inf).scatter_reduce(0, group, s, reduce="amin")
    high = torch.full_like(variance, -torch.inf).scatter_reduce(0, group, s, reduce="amax")
    normalized = centred * torch.rsqrt(variance + _VARIANCE_FLOOR)[group]
    return normalized.masked_fill((low == high)[group], 0.0).to(scores.dtype)


def per_token(sample_values: Tensor, response_mask: Tensor, offsets: Tensor) -> Tensor:
    """Each sample's number on each of its response tokens: [T], 0 outside the mask, from sample_values [S]."""
    return torch.where(response_mask, sample_values[segment_ids(offsets)], 0.0)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over the entries of the mask.

    ``(x - mean) * rsqrt(var + 1e-8)`` with the unbiased variance. Mean and variance are those of everything that is
    passed in, so a batch which lies on several ranks is put together first.

    Args:
        x: [T].
        mask: bool [T].
        shift_mean: False gives the mean back after the division: only the deviation changes.

    Returns:
        [T], 0 outside the mask. Without variance (or with one entry) x - mean = 0 stays 0.
    """
    inside = x[mask].to(torch.float64)
    whitened = torch.zeros_like(x)
    if len(inside) == 0:
        return whitened
    mean = inside.mean()
    variance = (inside - mean).square().sum() / max(len(inside) - 1, 1)
    scaled = (inside - mean) * torch.rsqrt(variance + _VARIANCE_FLOOR)
    whitened[mask] = (scaled if shift_mean else scaled + mean).to(x.dtype)
    return whitened
