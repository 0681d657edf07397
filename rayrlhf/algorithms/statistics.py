"""Numbers that say how a step went. None of them carries a gradient, and none is NaN where nothing was counted."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.kl import LOG_RATIO_BOUND, kl_estimate

__all__ = ["approximate_kl", "explained_variance", "masked_mean", "rollout_mismatch"]


@torch.no_grad()
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [T] over the entries of the mask (bool [T]): a tensor without dimensions, 0 where there are none."""
    inside = x[mask].to(torch.float64)
    return (inside.sum() / max(len(inside), 1)).to(x.dtype)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values foretell: ``1 - var(R - V) / var(R)``.

    Args:
        values: [T].
        returns: [T].
        mask: bool [T].

    Returns:
        A tensor without dimensions; 1 is perfect, below 0 worse than a constant. Where the returns are all the same the
        ratio has no meaning: 1 if the values are off by a constant, else 0. 0 where the mask is empty.
    """
    r = returns[mask].to(torch.float64)
    error = r - values[mask].to(torch.float64)
    if len(r) == 0:
        return values.new_tensor(0.0)
    if bool((r == r[0]).all()):
        return values.new_tensor(1.0 if bool((error == error[0]).all()) else 0.0)
    return (1.0 - error.var(unbiased=False) / r.var(unbiased=False)).to(values.dtype)


@torch.no_grad()
def approximate_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Estimate of KL(pi_old || pi) for each token that was sampled from pi_old.

    Schulman 2020, "Approximating KL divergence", k3: ``(r - 1) - log r`` with r = pi / pi_old, clamped as in
    `kl_estimate`.

    Args:
        logprobs: [T], of the policy now.
        old_logprobs: [T], of the policy that the tokens stand for.

    Returns:
        [T], never negative.
    """
    return kl_estimate(old_logprobs, logprobs, "k3")


@torch.no_grad()
def rollout_mismatch(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far the trainer's log-probabilities are from those with which the rollout engine sampled.

    With delta = old - rollout, over the tokens of the mask:

    - ``mean_abs``, ``max_abs``: of abs(delta), in nats
    - ``k3``: mean estimate of KL(pi_rollout || pi_old), Schulman 2020
    - ``mean_exp_abs``: mean of exp(abs(delta)), with abs(delta) clamped to 20; 1 where the two agree

    Args:
        old_logprobs: [T].
        rollout_logprobs: [T].
        mask: bool [T].

    Returns:
        Tensors without dimensions; 0, 0, 0 and 1 where the mask is empty.
    """
    distance = (old_logprobs - rollout_logprobs).abs()
    return {
        "mean_abs": masked_mean(distance, mask),
        "max_abs": torch.where(mask, distance, 0.0).max() if len(mask) else distance.new_tensor(0.0),
        "k3": masked_mean(kl_estimate(rollout_logprobs, old_logprobs, "k3"), mask),
        "mean_exp_abs": 1.0 + masked_mean(torch.expm1(distance.clamp(max=LOG_RATIO_BOUND)), mask),
    }
