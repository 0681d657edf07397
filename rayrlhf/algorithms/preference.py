"""Losses of pairs of responses, of which one was preferred, and of single responses that were liked or not.

Letters: P pairs, y_w the chosen response, y_l the rejected one, both to the prompt x; pi the policy, pi_ref the frozen
reference; ``logp`` the log-probability of a response, *summed* over its response tokens (EOS included), |y| their number;
r_w = logp_w - logp_ref,w the log-ratio of the chosen response, r_l that of the rejected one; sigma the logistic function.

Each function takes sums and divides by |y| itself where its paper averages. A sum over some hundred tokens has an error of
about 1e-5 in float32; take float64 sums where that matters. Nothing is reduced: a loss has one entry a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "KTOLoss",
    "PairLoss",
    "REFERENCE_FREE_LOSSES",
    "adapted_beta",
    "conservative_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "length_normalized_loss",
    "orpo_loss",
    "pair_loss",
    "robust_loss",
    "sigmoid_loss",
    "simpo_loss",
]

REFERENCE_FREE_LOSSES = frozenset({"simpo", "orpo"})
"""Names of the pair losses that need no reference."""

_SMOOTHED_LOSSES = frozenset({"conservative", "robust"})
_PAIR_LOSSES = ("sigmoid", "conservative", "robust", "hinge", "ipo", "length_normalized", "simpo", "orpo")


@dataclass(frozen=True)
class PairLoss:
    """What a preference loss says about each pair; only ``loss`` carries a gradient."""

    loss: Tensor
    """[P]."""
    chosen_rewards: Tensor
    """[P], the reward that the policy implies for the chosen response, up to a term of the prompt alone."""
    rejected_rewards: Tensor
    """[P], the same for the rejected response."""


@dataclass(frozen=True)
class KTOLoss:
    """What `kto_loss` says about each example; only ``loss`` carries a gradient."""

    loss: Tensor
    """[S]."""
    rewards: Tensor
    """[S], the reward that the policy implies, up to a term of the prompt alone."""
    correct: Tensor
    """bool [S], whether the log-ratio lies on its label's side of z_0: above it of a desirable, below it of an undesirable
    response. At z_0 itself it lies on neither."""


def sigmoid_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> PairLoss:
    """Direct preference optimisation, with summed log-probabilities.

    Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward model", eq. 7:
    ``L = -log sigma(beta r_w - beta r_l)``; the rewards are ``beta r`` (section 4). ln 2 where policy and reference agree.

    Args:
        chosen_logps: [P], log pi(y_w|x).
        rejected_logps: [P], log pi(y_l|x).
        reference_chosen_logps: [P], log pi_ref(y_w|x).
        reference_rejected_logps: [P], log pi_ref(y_l|x).
        beta: strength of the reference's pull, > 0.

    Raises:
        ValueError: where beta isn't above 0 (as in each function here).
    """
    chosen, rejected = _implied_rewards(
        chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    return _result(-F.logsigmoid(chosen - rejected), chosen, rejected)


def conservative_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> PairLoss:
    """DPO where a share eps of the pairs is labelled the wrong way round (cDPO), with summed log-probabilities.

    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", eq. 3, with h = beta r_w - beta r_l:
    ``L = -(1 - eps) log sigma(h) - eps log sigma(-h)``, least at sigma(h) = 1 - eps. The rewards are DPO's, ``beta r``.

    Args:
        label_smoothing: eps, in [0, 0.5). The others as in `sigmoid_loss`.

    Raises:
        ValueError: for an eps outside its range.
    """
    _check_label_smoothing(label_smoothing)
    chosen, rejected = _implied_rewards(
        chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    h = chosen - rejected
    loss = -(1.0 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return _result(loss, chosen, rejected)


def robust_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> PairLoss:
    """DPO made unbiased under labels that are flipped with probability eps (rDPO), with summed log-probabilities.

    Chowdhury, Kini and Natarajan 2024, "Provably robust DPO: aligning language models with noisy feedback", section 3, with
    h = beta r_w - beta r_l: ``L = (-(1 - eps) log sigma(h) + eps log sigma(-h)) / (1 - 2 eps)``. Its mean over the flips is
    DPO's loss of the true labels. It isn't bounded below: it goes to minus infinity with h. The rewards are DPO's.

    Args:
        label_smoothing: eps, in [0, 0.5). The others as in `sigmoid_loss`.

    Raises:
        ValueError: for an eps outside its range.
    """
    _check_label_smoothing(label_smoothing)
    chosen, rejected = _implied_rewards(
        chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    h = chosen - rejected
    loss = -(1.0 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
    return _result(loss / (1.0 - 2.0 * label_smoothing), chosen, rejected)


def hinge_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> PairLoss:
    """A support vector machine in DPO's place, with summed log-probabilities.

    The rank calibration of Zhao et al. 2023, "SLiC-HF: sequence likelihood calibration with human feedback", eq. 1,
    ``max(0, delta - logp_w + logp_l)``, as Liu et al. 2023, "Statistical rejection sampling improves preference
    optimization", normalise it by the reference ("hinge-norm"; their gamma is our beta):
    ``L = max(0, 1 - (beta r_w - beta r_l))``. 1 where policy and reference agree. The rewards are ``beta r``.

    Args: as in `sigmoid_loss`.
    """
    chosen, rejected = _implied_rewards(
        chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    return _result(torch.relu(1.0 - (chosen - rejected)), chosen, rejected)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
) -> PairLoss:
    """Identity preference optimisation, with log-ratios *averaged* over the tokens.

    Azar et al. 2023, "A general theoretical paradigm to understand learning from human preferences", eq. 17, with tau = beta.
    As printed, with sums: ``L = (r_w - r_l - 1 / (2 tau))^2``. The authors said later that their experiments average, as
    a response's sum has no fixed scale, and the field follows them; so does this:
    ``L = (r_w / |y_w| - r_l / |y_l| - 1 / (2 tau))^2``. The rewards are ``tau r / |y|``, whose margin aims at 1/2.

    Args:
        chosen_tokens: int [P], |y_w|.
        rejected_tokens: int [P], |y_l|.
        beta: tau, > 0. The others as in `sigmoid_loss`.

    Raises:
        ValueError: for a response without tokens.
    """
    _check_beta(beta)
    chosen = _token_mean(chosen_logps - reference_chosen_logps, chosen_tokens)
    rejected = _token_mean(rejected_logps - reference_rejected_logps, rejected_tokens)
    return _result((chosen - rejected - 0.5 / beta).square(), beta * chosen, beta * rejected)


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    margin: float,
) -> PairLoss:
    """Simple preference optimisation: no reference, log-probabilities *averaged* over the tokens.

    Meng, Xia and Chen 2024, "SimPO: simple preference optimization with a reference-free reward", eq. 6:
    ``L = -log sigma(beta logp_w / |y_w| - beta logp_l / |y_l| - gamma)``; the rewards are ``beta logp / |y|`` (eq. 4).

    Args:
        chosen_logps: [P], log pi(y_w|x).
        rejected_logps: [P], log pi(y_l|x).
        chosen_tokens: int [P], |y_w|.
        rejected_tokens: int [P], |y_l|.
        beta: scale of the reward, > 0.
        margin: gamma, the target margin in units of the reward, >= 0. (Some programs configure gamma / beta.)

    Raises:
        ValueError: for a margin below 0, or a response without tokens.
    """
    _check_beta(beta)
    if not margin >= 0:
        raise ValueError(f"SimPO's margin of {margin}: it must be 0 or more")
    chosen = beta * _token_mean(chosen_logps, chosen_tokens)
    rejected = beta * _token_mean(rejected_logps, rejected_tokens)
    return _result(-F.logsigmoid(chosen - rejected - margin), chosen, rejected)


def orpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, *, beta: float
) -> PairLoss:
    """Odds-ratio preference optimisation: no reference, log-probabilities *averaged* over the tokens.

    Hong, Lee and Thorne 2024, "ORPO: monolithic preference optimization without reference model". With the average
    ``a = logp / |y|`` (eq. 3), ``odds(y) = exp(a) / (1 - exp(a))`` (eq. 4) and lambda = beta, eq. 6 and 7:
    ``L = -a_w - lambda log sigma(log(odds(y_w) / odds(y_l)))``, the first term being the usual loss of fine-tuning on y_w.
    The paper names no reward; ours are ``lambda a``, as is usual. a is kept one rounding step below 0, where the odds
    are still finite; there the odds' gradient is 0.

    Args:
        beta: lambda, weight of the odds ratio, > 0. The others as in `simpo_loss`.

    Raises:
        ValueError: for a response without tokens.
    """
    _check_beta(beta)
    chosen = _token_mean(chosen_logps, chosen_tokens)
    rejected = _token_mean(rejected_logps, rejected_tokens)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return _result(-chosen - beta * F.logsigmoid(log_odds_ratio), beta * chosen, beta * rejected)


def length_normalized_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
) -> PairLoss:
    """DPO with log-ratios *averaged* over the tokens, which takes away the profit of length.

    Lambert et al. 2024, "Tülu 3: pushing frontiers in open language model post-training", section 5 (length-normalized DPO):
    ``L = -log sigma(beta r_w / |y_w| - beta r_l / |y_l|)``. The rewards are ``beta r / |y|``. Its beta is larger than DPO's
    by about the length of a response (they take 5).

    Args: as in `ipo_loss`.

    Raises:
        ValueError: for a response without tokens.
    """
    _check_beta(beta)
    chosen = beta * _token_mean(chosen_logps - reference_chosen_logps, chosen_tokens)
    rejected = beta * _token_mean(rejected_logps - reference_rejected_logps, rejected_tokens)
    return _result(-F.logsigmoid(chosen - rejected), chosen, rejected)


def pair_loss(
    kind: str,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_margin: float | None = None,
) -> PairLoss:
    """The pair loss of a name, as the configuration's ``dpo.loss`` has it.

    Args:
        kind: "sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo" or "length_normalized".
        chosen_logps: [P]; this and the next five as in `ipo_loss`. Always sums over response tokens.
        reference_chosen_logps: [P]; not looked at by ``simpo`` and ``orpo``, where it may be None. So too the rejected ones.
        beta: as in the loss (tau of ``ipo``, lambda of ``orpo``).
        label_smoothing: of ``conservative`` and ``robust``, 0 for all others.
        simpo_margin: gamma; not looked at but by ``simpo``, which needs it.

    Raises:
        ValueError: for another kind (``kto`` has no pairs: `kto_loss`), and where a reference or a margin is missing.
    """
    if kind not in _PAIR_LOSSES:
        raise ValueError(f"pair loss {kind!r}: expected one of {', '.join(map(repr, _PAIR_LOSSES))}")
    if label_smoothing != 0 and kind not in _SMOOTHED_LOSSES:
        raise ValueError(f"label smoothing of {label_smoothing} with the loss {kind!r}, which has none")
    policy, tokens = (chosen_logps, rejected_logps), (chosen_tokens, rejected_tokens)
    if kind == "orpo":
        return orpo_loss(*policy, *tokens, beta=beta)
    if kind == "simpo":
        if simpo_margin is None:
            raise ValueError("the loss 'simpo' needs its margin")
        return simpo_loss(*policy, *tokens, beta=beta, margin=simpo_margin)
    if reference_chosen_logps is None or reference_rejected_logps is None:
        raise ValueError(f"the loss {kind!r} needs the reference's log-probabilities")
    reference = (reference_chosen_logps, reference_rejected_logps)
    if kind == "conservative":
        return conservative_loss(*policy, *reference, beta=beta, label_smoothing=label_smoothing)
    if kind == "robust":
        return robust_loss(*policy, *reference, beta=beta, label_smoothing=label_smoothing)
    if kind == "hinge":
        return hinge_loss(*policy, *reference, beta=beta)
    if kind == "ipo":
        return ipo_loss(*policy, *reference, *tokens, beta=beta)
    if kind == "length_normalized":
        return length_normalized_loss(*policy, *reference, *tokens, beta=beta)
    return sigmoid_loss(*policy, *reference, beta=beta)


def kto_loss(
    logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """Kahneman-Tversky optimisation: unpaired responses that were liked or not, with summed log-probabilities.

    Ethayarajh et al. 2024, "KTO: model alignment as prospect theoretic optimization", eq. 7-8, with r = logp - logp_ref:
    ``L = lambda_y - v``, where ``v = lambda_D sigma(beta (r - z_0))`` of a desirable and ``lambda_U sigma(beta (z_0 - r))`` of
    an undesirable response. So ``L = lambda_D sigma(beta (z_0 - r))`` and ``lambda_U sigma(beta (r - z_0))``, which keep
    their digits where sigma is near 1. The rewards are ``beta r``.

    The paper has no accuracy. Here an example is ``correct`` where the policy has it on the right side of the paper's
    reference point z_0: where a desirable response is a gain (``v > lambda_D / 2``), or an undesirable one, seen from the
    other side, is. It needs no second example, unlike the share of pairs in order, so it is the same in a minibatch as
    over held-out examples.

    Args:
        logps: [S], log pi(y|x).
        reference_logps: [S], log pi_ref(y|x).
        desirable: bool [S].
        kl: z_0, one number for the whole optimizer step: the mean log-ratio of prompts with other prompts' responses
            (section 4.1). Taken as it is, without a gradient; below 0 it counts as 0.
        beta: > 0.
        desirable_weight: lambda_D, > 0.
        undesirable_weight: lambda_U, > 0.

    Raises:
        ValueError: where beta or a weight isn't above 0, ``desirable`` isn't bool, or ``kl`` isn't one number.
    """
    _check_beta(beta)
    if not (desirable_weight > 0 and undesirable_weight > 0):
        raise ValueError(f"weights {desirable_weight} and {undesirable_weight} of KTO's examples must be above 0")
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable is {desirable.dtype}: expected bool")
    z_0 = torch.as_tensor(kl, dtype=logps.dtype, device=logps.device).detach()
    if z_0.ndim:
        raise ValueError(f"a KL of shape {tuple(z_0.shape)}: expected one number for the whole optimizer step")
    log_ratio = logps - reference_logps
    distance = beta * (log_ratio - z_0.clamp(min=0.0))
    loss = torch.where(
        desirable, desirable_weight * torch.sigmoid(-distance), undesirable_weight * torch.sigmoid(distance)
    )
    correct = torch.where(desirable, distance > 0, distance < 0)
    return KTOLoss(loss, (beta * log_ratio).detach(), correct)


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """Next beta where the KL to the reference is to stay near a target.

    ``1.1 beta`` where kl > target, ``0.9 beta`` where kl < target / 2, else beta: the two-sided rule of Schulman et al. 2017,
    "Proximal policy optimization algorithms", section 4, with smaller steps.

    Args:
        beta: the beta that was used, > 0.
        kl: the KL that was measured, in the unit of ``target`` (nats a response token). An estimate may be below 0.
        target: the KL that is aimed at, > 0.

    Raises:
        ValueError: where kl isn't finite, or beta or target isn't above 0.
    """
    _check_beta(beta)
    if not target > 0:
        raise ValueError(f"a KL target of {target}: it must be above 0")
    if not math.isfinite(kl):
        raise ValueError(f"KL of {kl}: beta can follow a finite KL only")
    if kl > target:
        return 1.1 * beta
    return 0.9 * beta if kl < target / 2 else beta


def _implied_rewards(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """beta r_w and beta r_l [P]. Each ratio is taken by itself: exactly 0 where policy and reference agree."""
    _check_beta(beta)
    return beta * (chosen_logps - reference_chosen_logps), beta * (rejected_logps - reference_rejected_logps)


def _token_mean(sums: Tensor, tokens: Tensor) -> Tensor:
    """Average over the tokens [P], of sums [P] and numbers of tokens int [P]."""
    if bool((tokens < 1).any()):
        raise ValueError(f"responses of {tokens.tolist()} tokens: one without tokens has no average")
    return sums / tokens.to(sums.dtype)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0. log(1 - p) as in Mächler 2012, "Accurately computing log(1 - exp(-|a|))"."""
    a = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    near = torch.log(-torch.expm1(a))
    # Clamped to its own side, or its infinite gradient near 0 would come through as NaN.
    far = torch.log1p(-torch.exp(a.clamp(max=-math.log(2.0))))
    return a - torch.where(a > -math.log(2.0), near, far)


def _result(loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PairLoss:
    return PairLoss(loss, chosen_rewards.detach(), rejected_rewards.detach())


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta of {beta}: it must be above 0")


def _check_label_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label smoothing of {label_smoothing}: it must be at least 0 and below 0.5")
