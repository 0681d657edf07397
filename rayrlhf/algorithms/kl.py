"""KL divergence from samples, and the controller of its coefficient.

Letters: d = log pi(a|s) - log pi_ref(a|s) for a sampled token a.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LOG_RATIO_BOUND", "adaptive_kl_coef", "kl_estimate"]

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to ± this before they are exponentiated."""

_KL_BOUND = 10.0
_MAX_RELATIVE_ERROR = 0.2


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(pi || pi_ref) for each token that was sampled from pi.

    Schulman 2020, "Approximating KL divergence", with r = exp(-d):
    ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = r - 1 + d``. d is clamped to ±20 and the result to ±10, with gradient 0 beyond.

    Args:
        logprobs: [T], log pi of the tokens.
        reference_logprobs: [T], log pi_ref of the tokens.
        estimator: "k1" (unbiased, any sign), "k2" (its gradient is that of the KL, in expectation under pi) or
            "k3" (unbiased, never negative).

    Returns:
        [T], in nats. Differentiable in both arguments.

    Raises:
        ValueError: for another estimator.
    """
    d = (logprobs - reference_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k1":
        return d.clamp(-_KL_BOUND, _KL_BOUND)
    if estimator == "k2":
        return (d.square() / 2).clamp(max=_KL_BOUND)
    if estimator == "k3":
        # expm1: exp(-d) - 1 would lose all digits of d^2/2 for small d. Never below 0, whatever its last digit is.
        return (torch.expm1(-d) + d).clamp(0.0, _KL_BOUND)
    raise ValueError(f"KL estimator {estimator!r}: expected 'k1', 'k2' or 'k3'")


def adaptive_kl_coef(coef: float, kl: float, target: float, samples: float, horizon: float) -> float:
    """Next KL coefficient of the adaptive controller.

    Ziegler et al. 2019, "Fine-tuning language models from human preferences", section 2.2:
    ``e = clip(kl / target - 1, -0.2, 0.2)``, ``coef <- coef * (1 + e * samples / horizon)``.

    Args:
        coef: coefficient that was used.
        kl: KL to the reference that was measured, in the unit of ``target`` (nats a sequence).
        target: KL that is aimed at, > 0.
        samples: samples since the last call.
        horizon: samples over which the controller acts.

    Raises:
        ValueError: where kl isn't finite, or samples >= 5 * horizon (the coefficient could become zero or negative).
    """
    if not math.isfinite(kl):
        raise ValueError(f"KL of {kl}: the coefficient can follow a finite KL only")
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target {target} and horizon {horizon} of the KL controller must be above 0")
    if samples * _MAX_RELATIVE_ERROR >= horizon:
        raise ValueError(f"{samples} samples with a KL horizon of {horizon}: it must be above {samples * 0.2:g}")
    error = min(max(kl / target - 1.0, -_MAX_RELATIVE_ERROR), _MAX_RELATIVE_ERROR)
    return coef * (1.0 + error * samples / horizon)
