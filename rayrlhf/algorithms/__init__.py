"""The mathematics of reinforcement learning from human feedback: pure functions of tensors.

Letters: S samples, T tokens of all samples together (prompts and responses), ``offsets`` int64 [S + 1] where sample i
has the tokens ``offsets[i]:offsets[i + 1]`` of each flat column, ``response_mask`` bool [T], True on the response
tokens that are learned from. Floats are float32 or float64, and the result has the type of what came in; sums over many
tokens are taken in float64.
"""

from __future__ import annotations

from rayrlhf.algorithms.advantages import gae, group_normalized, leave_one_out, per_token, whiten
from rayrlhf.algorithms.kl import adaptive_kl_coef, kl_estimate
from rayrlhf.algorithms.losses import (
    PolicyLoss,
    ValueLoss,
    aggregation_weights,
    importance_weights,
    policy_loss,
    value_loss,
)
from rayrlhf.algorithms.preference import (
    REFERENCE_FREE_LOSSES,
    KTOLoss,
    PairLoss,
    adapted_beta,
    conservative_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    length_normalized_loss,
    orpo_loss,
    pair_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from rayrlhf.algorithms.ragged import last_true, segment_ids, segment_sum
from rayrlhf.algorithms.reward_model import bradley_terry_loss
from rayrlhf.algorithms.rewards import RunningMoments, penalties, shape_scores, token_rewards
from rayrlhf.algorithms.statistics import approximate_kl, explained_variance, masked_mean, rollout_mismatch

__all__ = [
    "KTOLoss",
    "PairLoss",
    "PolicyLoss",
    "REFERENCE_FREE_LOSSES",
    "RunningMoments",
    "ValueLoss",
    "adapted_beta",
    "adaptive_kl_coef",
    "aggregation_weights",
    "approximate_kl",
    "bradley_terry_loss",
    "conservative_loss",
    "explained_variance",
    "gae",
    "group_normalized",
    "hinge_loss",
    "importance_weights",
    "ipo_loss",
    "kl_estimate",
    "kto_loss",
    "last_true",
    "leave_one_out",
    "length_normalized_loss",
    "masked_mean",
    "orpo_loss",
    "pair_loss",
    "penalties",
    "per_token",
    "policy_loss",
    "robust_loss",
    "rollout_mismatch",
    "segment_ids",
    "segment_sum",
    "shape_scores",
    "sigmoid_loss",
    "simpo_loss",
    "token_rewards",
    "value_loss",
    "whiten",
]
