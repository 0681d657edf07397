"""The policy of PPO and its kin: the clipped surrogate over a language model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.language_model import LanguageModelTrainer, load_trained_lm
from rayrlhf.actors.trainer import LOSS, TOKENS, MinibatchLoss, StepCounts, token_weights
from rayrlhf.algorithms import approximate_kl, importance_weights, kl_estimate, policy_loss
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.world import World

__all__ = ["PolicyTrainer"]


class PolicyTrainer(LanguageModelTrainer):
    """The trained model under DeepSpeed ZeRO.

    Args:
        world: this process's place in the group.
        config: the whole run.
        model_path: folder or hub name of the model.
        total_steps: optimizer steps of the whole run.
    """

    config: Config
    training_columns = (
        "tokens",
        "response_mask",
        "old_logprobs",
        "rollout_logprobs",
        "reference_logprobs",
        "advantages",
    )
    statistics = {"policy_loss": LOSS, "kl_loss": LOSS, "clipfrac": TOKENS, "ppo_kl": TOKENS, "entropy": TOKENS}

    def __init__(self, world: World, config: Config, model_path: str, total_steps: int):
        lm = load_trained_lm(model_path, config, config.policy, world)
        super().__init__(world, config, config.policy, lm, total_steps, rollout=config.rollout)

    def training_forward(self) -> Any:
        return partial(self._forward, with_entropy=True)

    def minibatch_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        """The clipped surrogate (Schulman et al. 2017, eq. 7), corrected for the rollout engine's own probabilities."""
        ppo = self.config.ppo
        weights = token_weights(shard, counts, ppo.loss_aggregation, ppo.loss_denominator)
        old = shard["old_logprobs"]
        if ppo.importance_sampling_cap is not None:
            correction = importance_weights(old, shard["rollout_logprobs"], ppo.importance_sampling_cap)
        else:
            correction = torch.ones_like(old)

        def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs, entropy = outputs
            where, device = inputs.where.cpu(), logprobs.device
            w, old_logprobs = weights[where].to(device), old[where].to(device)
            surrogate = policy_loss(
                logprobs,
                old_logprobs,
                shard["advantages"][where].to(device),
                clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high,
                dual_clip=ppo.dual_clip,
            )
            objective = (w * correction[where].to(device) * surrogate.loss).sum()
            stats = {
                "policy_loss": objective,
                "clipfrac": surrogate.clipped.sum(),
                "ppo_kl": approximate_kl(logprobs, old_logprobs).sum(),
                "entropy": entropy.sum(),
            }
            total = objective
            if ppo.entropy_coef:
                total = total - ppo.entropy_coef * (w * entropy).sum()
            if ppo.kl_loss_coef:
                reference = shard["reference_logprobs"][where].to(device)
                stats["kl_loss"] = (w * kl_estimate(logprobs, reference, ppo.kl_loss_estimator)).sum()
                total = total + ppo.kl_loss_coef * stats["kl_loss"]
            return total, stats

        return loss
