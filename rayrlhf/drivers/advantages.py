"""From scores to advantages: the configured mathematics over one step's batch."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from rayrlhf.algorithms import (
    RunningMoments,
    adaptive_kl_coef,
    explained_variance,
    gae,
    group_normalized,
    kl_estimate,
    leave_one_out,
    penalties,
    per_token,
    rollout_mismatch,
    segment_sum,
    shape_scores,
    token_rewards,
    whiten,
)
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.errors import RunFailed

__all__ = ["add_advantages", "next_kl_coef", "rollout_metrics", "scores_to_learn_from", "sequence_kl", "variety"]


def sequence_kl(batch: Batch) -> Tensor:
    """k1 estimate of each sample's KL to the reference, in nats: float32 [S]."""
    difference = kl_estimate(batch["old_logprobs"], batch["reference_logprobs"], "k1")
    return segment_sum(difference * batch["response_mask"], batch.offsets)


def response_lengths(batch: Batch) -> Tensor:
    """Response tokens of each sample, EOS included: int64 [S]."""
    return batch.lengths - batch["prompt_length"]


def truncated(batch: Batch) -> Tensor:
    """bool [S]: cut by the length limit."""
    return torch.tensor([reason == "length" for reason in batch["finish_reason"]], dtype=torch.bool)


def shaped_scores(config: Config, batch: Batch, moments: RunningMoments | None) -> Tensor:
    """The score of each sample, normalised, clipped, then less its penalties: float32 [S]."""
    reward = config.reward
    scores = shape_scores(batch["score"], moments=moments, clip=reward.clip)
    return scores - penalties(
        response_lengths(batch),
        truncated(batch),
        length_penalty=reward.length_penalty,
        length_penalty_from=reward.length_penalty_from,
        missing_eos_penalty=reward.missing_eos_penalty,
    ).to(scores.dtype)


def scores_to_learn_from(config: Config, batch: Batch) -> Tensor:
    """The scores that count for the running moments: masked samples leave no trace."""
    return batch["score"][~truncated(batch)] if config.ppo.truncated_responses == "mask" else batch["score"]


def next_kl_coef(config: Config, coef: float, kl: float, samples: int) -> float:
    """The KL coefficient after a step in which the KL to the reference was ``kl`` nats a sequence.

    Raises:
        RunFailed: where the KL isn't finite: the policy has come apart, and no coefficient would help.
    """
    if config.ppo.kl_controller == "fixed":
        return coef
    if not math.isfinite(kl):
        raise RunFailed(
            f"the KL to the reference is {kl}: the policy has diverged; a lower policy.optimizer.lr may help"
        )
    assert config.ppo.target_kl is not None
    return adaptive_kl_coef(coef, kl, config.ppo.target_kl, samples, config.ppo.kl_horizon)


def add_advantages(config: Config, batch: Batch, kl_coef: float, moments: RunningMoments | None) -> Batch:
    """Rewards with the KL penalty, advantages and returns.

    Args:
        config: the whole run.
        batch: as `rayrlhf.drivers.experience.collect` makes it.
        kl_coef: present factor of the KL penalty.
        moments: running moments of the scores, this batch's included; None where scores aren't normalised.

    Returns:
        The batch with the columns rewards and advantages, and returns where there is a critic. Where truncated responses are
        masked, ``response_mask`` no longer has them.
    """
    ppo, offsets = config.ppo, batch.offsets
    mask, cut = batch["response_mask"], truncated(batch)
    scores = shaped_scores(config, batch, moments)
    if ppo.truncated_responses == "mask":
        mask = mask & ~torch.repeat_interleave(cut, batch.lengths)
    kl = torch.zeros(batch.num_tokens)
    if "reference_logprobs" in batch and kl_coef:
        kl = kl_estimate(batch["old_logprobs"], batch["reference_logprobs"], ppo.kl_estimator)
    rewards = token_rewards(scores, kl, mask, offsets, kl_coef)
    columns = {"response_mask": mask, "rewards": rewards}
    if ppo.advantage_estimator == "gae":
        final = batch["final_values"] * cut if ppo.truncated_responses == "bootstrap" else None
        advantages, columns["returns"] = gae(rewards, batch["values"], mask, offsets, ppo.gamma, ppo.lam, final)
    else:
        # A masked sample takes part in its group's baseline all the same: its score is as real as the others'.
        total = scores - kl_coef * segment_sum(kl * batch["response_mask"], offsets)
        compare = leave_one_out if ppo.advantage_estimator == "rloo" else group_normalized
        advantages = per_token(compare(total, batch["position"] // config.rollout.samples_per_prompt), mask, offsets)
    whitened = ppo.advantage_estimator == "gae" if ppo.whiten_advantages is None else ppo.whiten_advantages
    columns["advantages"] = whiten(advantages, mask) if whitened else advantages
    return batch.with_columns(columns)


def variety(batch: Batch) -> dict[str, float]:
    """How much the responses of a batch differ, on their tokens, EOS included.

    Returns:
        ``distinct_2``, different bigrams over all bigrams, those of all responses together (Li et al. 2016, section 5.1), 0
        where there are none; ``repeated_fraction``, the share of responses that are equal to another one, to whichever prompt.
    """
    tokens, sample = batch["tokens"], torch.repeat_interleave(torch.arange(len(batch)), batch.lengths)
    place = torch.arange(batch.num_tokens) - batch.offsets[sample]
    response = place >= batch["prompt_length"][sample]
    both = response[:-1] & (sample[:-1] == sample[1:])
    first, second = tokens[:-1][both], tokens[1:][both]
    size = int(tokens.max()) + 1 if batch.num_tokens else 1
    responses = [
        tuple(tokens[start + prompt : end].tolist())
        for (start, end), prompt in zip(batch.spans(), batch["prompt_length"].tolist(), strict=True)
    ]
    counts = Counter(responses)
    return {
        "distinct_2": len(torch.unique(first * size + second)) / len(first) if len(first) else 0.0,
        "repeated_fraction": sum(counts[r] > 1 for r in responses) / max(1, len(responses)),
    }


def rollout_metrics(batch: Batch, version: int) -> dict[str, float]:
    """What a step's samples look like, before the update.

    Args:
        batch: with rewards and advantages.
        version: the trainer's weight version; staleness is counted from it.
    """
    mask, lengths = batch["response_mask"], response_lengths(batch).float()
    scores, sequences = batch["score"], segment_sum(batch["rewards"], batch.offsets)
    metrics = {
        "score/mean": float(scores.mean()),
        "score/std": float(scores.std()) if len(scores) > 1 else 0.0,
        "score/min": float(scores.min()),
        "score/max": float(scores.max()),
        "reward/mean": float(sequences.mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "truncated_fraction": float(truncated(batch).float().mean()),
        "staleness": float((version - batch["weight_version"]).max()),
        "samples": float(len(batch)),
        "tokens": float(batch.num_tokens),
        "response_tokens": float(mask.sum()),
    }
    metrics |= variety(batch)
    metrics |= {
        f"{name}/mean": float(batch[name].mean())
        for name in batch.keys()
        if name.startswith("score/") or name == "gold"
    }
    mismatch = rollout_mismatch(batch["old_logprobs"], batch["rollout_logprobs"], mask)
    metrics |= {f"rollout_mismatch/{name}": float(value) for name, value in mismatch.items()}
    if "reference_logprobs" in batch:
        kl = sequence_kl(batch)
        metrics["kl"] = float(kl.mean())
        metrics["kl_per_token"] = float(kl.sum() / max(1, int(mask.sum())))
    if "returns" in batch:
        metrics["explained_variance"] = float(explained_variance(batch["values"], batch["returns"], mask))
        metrics["values/mean"] = float(batch["values"][mask].mean()) if bool(mask.any()) else math.nan
        metrics["returns/mean"] = float(batch["returns"][mask].mean()) if bool(mask.any()) else math.nan
    return metrics
