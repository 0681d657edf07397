"""Preference optimisation: DPO and its kin on pairs, KTO on single responses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.language_model import LanguageModelTrainer, load_trained_lm
from rayrlhf.actors.trainer import LOSS, SEQUENCES, MinibatchLoss, MinibatchSchedule, StepCounts
from rayrlhf.algorithms import REFERENCE_FREE_LOSSES, kto_loss, pair_loss, segment_ids, segment_sum
from rayrlhf.batch import Batch
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.models.layout import ModelInput, micro_batches, neighbours_together, pair_micro_batches
from rayrlhf.models.loading import prompt_sharing
from rayrlhf.models.packing import packs
from rayrlhf.models.world import World

__all__ = ["PreferenceTrainer"]


class PreferenceTrainer(LanguageModelTrainer):
    """A language model that learns which response is preferred.

    Args:
        world: this process's place in the group.
        config: the whole run.
        model_path: folder or hub name of the model.
        total_steps: optimizer steps of the whole run.
    """

    config: PreferenceConfig
    training_columns = (
        "tokens",
        "response_mask",
        "reference_logprobs",
        "prompt_length",
        "desirable",
        "mismatched",
    )
    statistics = {
        "loss": LOSS,
        "nll_loss": SEQUENCES,
        "rewards/chosen": "chosen_count",
        "rewards/rejected": "rejected_count",
        "rewards/accuracies": SEQUENCES,
        "logps/chosen": "chosen_count",
        "logps/rejected": "rejected_count",
        "chosen_count": LOSS,
        "rejected_count": LOSS,
        "kl": LOSS,
    }

    def __init__(self, world: World, config: PreferenceConfig, model_path: str, total_steps: int):
        lm = load_trained_lm(model_path, config, config.policy, world)
        self.sharing = prompt_sharing(lm.base_model, config.policy)
        self.paired, self.beta = config.dpo.loss != "kto", config.dpo.beta
        super().__init__(world, config, config.policy, lm, total_steps, rollout=config.rollout)

    def update(
        self, batch: Batch, schedule: MinibatchSchedule, step: int, beta: float | None = None
    ) -> dict[str, float]:
        """Optimizer steps over pairs (or, for ``kto``, single samples), as `TrainerRole.update`.

        Args:
            batch: neighbouring samples 2i and 2i + 1 are a pair: the chosen and the rejected response to one prompt. For
                ``kto`` samples ``desirable`` or not, and besides them ``mismatched`` ones, whose log-ratio gives z_0.
            schedule: counts samples; keeps the two of a pair together, in their order.
            step: number of the step.
            beta: the loss's; None: the configured one.

        Returns:
            ``loss``, ``rewards/{chosen,rejected,margins,accuracies}``, ``logps/{chosen,rejected}`` (sums over a response's
            tokens), the mean over the pairs; for ``orpo`` also ``nll_loss``. For ``kto`` chosen and rejected are the
            desirable and the undesirable samples, accuracy is the share on the right side of z_0 (`kto_loss`), and ``kl`` is
            z_0.
        """
        self.beta = self.config.dpo.beta if beta is None else beta
        metrics = super().update(batch, schedule, step)
        for name in ("chosen_count", "rejected_count"):
            metrics.pop(name, None)
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    def training_forward(self) -> Callable[[ModelInput], tuple[Tensor, ...]]:
        return partial(self._forward, temperature=1.0)

    def count(self, shard: Batch) -> tuple[int, int]:
        tokens = segment_sum(shard["response_mask"], shard.offsets)
        if self.paired:
            return int(tokens.sum()), len(shard) // 2
        own = ~shard["mismatched"]
        return int(tokens[own].sum()), int(own.sum())

    def lay_out(self, batch: Batch) -> list[ModelInput]:
        budget, packing = self.trained.tokens_per_micro_batch, packs(self.trained)
        return neighbours_together(batch, budget, packing=packing, sharing=self.sharing)

    def lay_out_training(self, shard: Batch) -> list[ModelInput]:
        budget, packing = self.trained.tokens_per_micro_batch, packs(self.trained)
        if self.paired:
            return pair_micro_batches(shard, budget, packing=packing, sharing=self.sharing)
        own = torch.nonzero(~shard["mismatched"]).flatten()
        return micro_batches(shard, budget, packing, samples=own)

    def minibatch_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        """The configured loss, the mean over the pairs (or samples) of the optimizer step."""
        return self._pair_loss(shard, counts) if self.paired else self._kto_loss(shard, counts)

    def _pair_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        dpo = self.config.dpo
        owner, tokens = segment_ids(shard.offsets), segment_sum(shard["response_mask"], shard.offsets)
        reference = None if dpo.loss in REFERENCE_FREE_LOSSES else reference_sums(shard)

        def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            chosen, rejected = inputs.samples.cpu()[0::2], inputs.samples.cpu()[1::2]
            logps = sample_sums(outputs[0], inputs, owner, len(shard))
            device = logps.device
            found = pair_loss(
                dpo.loss,
                logps[chosen],
                logps[rejected],
                None if reference is None else reference[chosen].to(device),
                None if reference is None else reference[rejected].to(device),
                tokens[chosen].to(device),
                tokens[rejected].to(device),
                beta=self.beta,
                label_smoothing=dpo.label_smoothing,
                simpo_margin=dpo.simpo_margin,
            )
            total = found.loss.sum() / counts.sequences
            stats = {
                "loss": total,
                "rewards/chosen": found.chosen_rewards.sum(),
                "rewards/rejected": found.rejected_rewards.sum(),
                "rewards/accuracies": (found.chosen_rewards > found.rejected_rewards).sum(),
                "logps/chosen": logps[chosen].sum(),
                "logps/rejected": logps[rejected].sum(),
                "chosen_count": torch.tensor(len(chosen)),
                "rejected_count": torch.tensor(len(rejected)),
            }
            if dpo.loss == "orpo":
                stats["nll_loss"] = (-logps[chosen] / tokens[chosen].to(device)).sum()
            return total.float(), stats

        return loss

    def _kto_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        dpo = self.config.dpo
        owner, reference = segment_ids(shard.offsets), reference_sums(shard)
        z_0 = self._mismatched_kl(shard, reference)

        def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            samples = inputs.samples.cpu()
            logps = sample_sums(outputs[0], inputs, owner, len(shard))[inputs.samples]
            device = logps.device
            liked = shard["desirable"][samples].to(device)
            found = kto_loss(
                logps,
                reference[samples].to(device),
                liked,
                z_0,
                beta=self.beta,
                desirable_weight=dpo.desirable_weight,
                undesirable_weight=dpo.undesirable_weight,
            )
            total = found.loss.sum() / counts.sequences
            stats = {
                "loss": total,
                "rewards/chosen": found.rewards[liked].sum(),
                "rewards/rejected": found.rewards[~liked].sum(),
                "rewards/accuracies": found.correct.sum(),
                "logps/chosen": logps[liked].sum(),
                "logps/rejected": logps[~liked].sum(),
                "chosen_count": liked.sum(),
                "rejected_count": (~liked).sum(),
                # Each micro-batch's share, so that it is z_0 in all.
                "kl": torch.tensor(z_0 * len(samples) / counts.sequences),
            }
            return total.float(), stats

        return loss

    def _mismatched_kl(self, shard: Batch, reference: Tensor) -> float:
        """z_0 (Ethayarajh et al. 2024, section 4.1): the mean log-ratio of the optimizer step's mismatched samples, over
        all ranks, at least 0, without a gradient."""
        others = torch.nonzero(shard["mismatched"]).flatten()
        inputs = micro_batches(shard, self.trained.tokens_per_micro_batch, packs(self.trained), samples=others)
        outputs = self.trainer.infer(inputs, self.training_forward())
        owner = segment_ids(shard.offsets)
        logps = torch.zeros(len(shard), dtype=torch.float64)
        for micro, output in zip(inputs, outputs, strict=False):
            logps += sample_sums(output[0], micro, owner, len(shard))
        ratio = (logps - reference)[others].sum()
        total, count = self.trainer.global_sums(float(ratio), float(len(others)))
        if not count:
            raise ValueError("an optimizer step of KTO has no mismatched samples, which its z_0 is made of")
        return max(0.0, total / count)


def reference_sums(shard: Batch) -> Tensor:
    """Sums [S] of the reference's log-probabilities over each response, in float64."""
    masked: Any = torch.where(shard["response_mask"], shard["reference_logprobs"].double(), 0.0)
    return segment_sum(masked, shard.offsets)


def sample_sums(values: Tensor, inputs: ModelInput, owner: Tensor, samples: int) -> Tensor:
    """Sums of a micro-batch's token values [N] over each sample, in float64: [S], 0 for samples of other micro-batches."""
    place = owner[inputs.where.cpu()].to(values.device)
    return torch.zeros(samples, dtype=torch.float64, device=values.device).index_add(0, place, values.double())
