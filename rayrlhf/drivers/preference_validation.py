"""Measuring a policy in preference training: loss and margins on held-out examples, KL on sampled responses."""

from __future__ import annotations

import math
from typing import Any

import torch

from rayrlhf.algorithms import pair_loss, segment_sum
from rayrlhf.batch import Batch
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.data import Pair, Prompt
from rayrlhf.drivers.dispatch import responses
from rayrlhf.drivers.evaluation import EVALUATION
from rayrlhf.drivers.experience import prompt_batch
from rayrlhf.drivers.offline import OfflineRun
from rayrlhf.drivers.preference_data import PreferenceData
from rayrlhf.drivers.transfer import transfer_weights
from rayrlhf.evaluation import mean_and_stderr

__all__ = ["measure"]


def measure(run: OfflineRun, data: PreferenceData) -> dict[str, Any]:
    """Validate the present policy.

    Returns:
        examples, loss, rewards/{chosen,rejected,margins,accuracies}, rewards/margins/stderr, logps/{chosen,rejected},
        and what `sampled_kl` returns. Rewards are those of the configured beta, so that validations compare when beta moves.
    """
    batch = data.validation()
    run.turns.take({"policy": "weights"})
    logprobs = run.policy.call("token_logprobs", batch, temperature=1.0)["old_logprobs"]
    logps = segment_sum((logprobs * batch["response_mask"]).double(), batch.offsets)
    reference = None
    if "reference_logprobs" in batch:
        reference = segment_sum(batch["reference_logprobs"].double(), batch.offsets)
    tokens = segment_sum(batch["response_mask"].long(), batch.offsets)
    result = of_pairs(run, logps, reference, tokens) if data.paired else of_labelled(run, batch, logps, reference)
    return result | sampled_kl(run, data)


def of_pairs(run: OfflineRun, logps: Any, reference: Any, tokens: Any) -> dict[str, Any]:
    """Of pairs: columns over samples, two a pair."""
    dpo = run.config.dpo  # type: ignore[union-attr]
    chosen, rejected = logps[0::2], logps[1::2]
    zero = torch.zeros_like(chosen)
    found = pair_loss(
        dpo.loss,
        chosen,
        rejected,
        zero if reference is None else reference[0::2],
        zero if reference is None else reference[1::2],
        tokens[0::2],
        tokens[1::2],
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        simpo_margin=dpo.simpo_margin,
    )
    margins = found.chosen_rewards - found.rejected_rewards
    mean, stderr = mean_and_stderr(margins.tolist())
    return {
        "examples": len(chosen),
        "loss": float(found.loss.mean()),
        "rewards/chosen": float(found.chosen_rewards.mean()),
        "rewards/rejected": float(found.rejected_rewards.mean()),
        "rewards/margins": mean,
        "rewards/margins/stderr": stderr,
        "rewards/accuracies": float((margins > 0).double().mean()),
        "logps/chosen": float(chosen.mean()),
        "logps/rejected": float(rejected.mean()),
    }


def of_labelled(run: OfflineRun, batch: Batch, logps: Any, reference: Any) -> dict[str, Any]:
    """Of labelled completions: the margin is the desirable ones' mean reward less the undesirable ones'.

    The loss is KTO's with z_0 from the mismatched samples (Ethayarajh et al. 2024, eq. 7), and the accuracy, as in training,
    the share of examples on the right side of z_0 (`kto_loss`).
    """
    from rayrlhf.algorithms import kto_loss

    dpo = run.config.dpo  # type: ignore[union-attr]
    own = ~batch["mismatched"]
    desirable = batch["desirable"][own]
    ratios = logps - reference
    found = kto_loss(
        logps[own],
        reference[own],
        desirable,
        ratios[~own].mean().clamp(min=0.0),
        beta=dpo.beta,
        desirable_weight=dpo.desirable_weight,
        undesirable_weight=dpo.undesirable_weight,
    )
    rewards = dpo.beta * ratios[own]
    good, bad = rewards[desirable], rewards[~desirable]
    (better, better_error), (worse, worse_error) = mean_and_stderr(good.tolist()), mean_and_stderr(bad.tolist())
    return {
        "examples": int(own.sum()),
        "loss": float(found.loss.mean()),
        "rewards/chosen": better,
        "rewards/rejected": worse,
        "rewards/margins": better - worse,
        "rewards/margins/stderr": math.hypot(better_error, worse_error),
        "rewards/accuracies": float(found.correct.double().mean()),
        "logps/chosen": float(logps[own][desirable].mean()),
        "logps/rejected": float(logps[own][~desirable].mean()),
    }


def sampled_kl(run: OfflineRun, data: PreferenceData) -> dict[str, Any]:
    """The KL on responses that the policy samples to held-out prompts.

    Returns:
        kl_per_token: mean of log p_policy - log p_reference over the tokens of the responses (k1, in nats); None without
        rollouts. With rollouts, sync/* of the weights' transfer, see `transfer_weights`.
    """
    assert isinstance(run.config, PreferenceConfig)
    if run.rollout is None:
        return {"kl_per_token": None}
    run.turns.take({"policy": "weights", "rollout": "weights"})
    verify = run.config.rollout.verify_weights == "always" or not data.weights_verified
    transferred = transfer_weights(run.policy, run.rollout, run.state.weight_version + 1, verify)
    data.weights_verified = True
    run.state.weight_version += 1
    examples = run.data.validation[: run.config.guard.kl_prompts]
    prompts = prompt_batch([as_prompt(k, e) for k, e in enumerate(examples)], 1, (run.config.seed, EVALUATION))
    run.turns.take({"rollout": "all"})
    samples = Batch.concat(list(responses(run.rollout, prompts, run.config.rollout, run.config.cluster)))
    samples = samples.select(torch.argsort(samples["position"]))
    run.turns.take({"policy": "weights"})
    own = run.policy.call("token_logprobs", samples, temperature=1.0)["old_logprobs"]
    difference = (own - data.reference_logprobs(samples))[samples["response_mask"]]
    return {"kl_per_token": float(difference.double().mean())} | transferred


def as_prompt(number: int, example: Any) -> Prompt:
    """The prompt of a pair or of a labelled completion."""
    if isinstance(example, Pair):
        tokens = example.prompt
    else:
        tokens = example.tokens[: int(example.mask.long().argmax())]
    return Prompt(id=number, tokens=tokens, text=example.prompt_text, row=example.row)
