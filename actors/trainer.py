"""What policy and critic share: laying out samples, epochs of minibatches, state on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.algorithms import aggregation_weights
from rayrlhf.algorithms.ragged import segment_sum
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.config.trainers import TrainedConfig
from rayrlhf.models.engine import StepOutcome, TrainEngine
from rayrlhf.models.layout import ModelInput, micro_batches
from rayrlhf.models.packing import packs
from rayrlhf.models.world import World

__all__ = ["MinibatchLoss", "MinibatchSchedule", "TrainerRole", "scatter_tokens"]

MinibatchSchedule = Sequence[Sequence[Tensor]]
"""For each optimizer step, for each rank: int64 [n], the samples that it takes."""

MinibatchLoss = Callable[[ModelInput, tuple[Tensor, ...]], tuple[Tensor, dict[str, Tensor]]]
"""(micro-batch, model outputs) -> (share of the loss, statistics to be added up)."""

LOSS_SUMS = ("policy_loss", "value_loss", "kl_loss")
"""Statistics that are sums with the loss's own weights; all others are sums over response tokens."""


def scatter_tokens(batch: Batch, inputs: Sequence[ModelInput], values: Sequence[Tensor]) -> Tensor:
    """A token column [T], 0 where nothing was computed, from the results of micro-batches."""
    column = torch.zeros(batch.num_tokens, dtype=torch.float32)
    for micro, result in zip(inputs, values, strict=False):
        column[micro.where] = result
    return column


class TrainerRole:
    """A model in training, on one of the ranks of its group."""

    training_columns: tuple[str, ...]

    def __init__(self, world: World, config: Config, trained: TrainedConfig, model: nn.Module, total_steps: int):
        self.world, self.config, self.trained = world, config, trained
        self.skipped_in_a_row = 0
        self.trainer = TrainEngine(
            model, trained, world, total_steps=total_steps, timeout_s=config.cluster.call_timeout_s
        )

    # -- what policy and critic say of themselves -----------------------------------------------------------------

    def training_forward(self) -> Callable[[ModelInput], tuple[Tensor, ...]]:
        """How the model is run in training."""
        raise TypeError("a trainer says how its model is run")

    def loss_aggregation(self) -> tuple[str, float | None]:
        """How token losses are put together, and the fixed denominator if there is one."""
        raise TypeError("a trainer says how its loss is put together")

    def minibatch_loss(self, shard: Batch, weights: Tensor) -> MinibatchLoss:
        """The loss of this rank's samples of a minibatch, with the weight [T] of each token."""
        raise TypeError("a trainer has a loss")

    # -- work -----------------------------------------------------------------------------------------------------

    def lay_out(self, batch: Batch) -> list[ModelInput]:
        return micro_batches(batch, self.trained.tokens_per_micro_batch, packs(self.trained))

    def update(self, batch: Batch, schedule: MinibatchSchedule, step: int) -> dict[str, float]:
        """Epochs of minibatches over a batch.

        Args:
            batch: all samples of the step, the same on all ranks.
            schedule: which of them each rank takes, for each optimizer step.
            step: number of the step, which names the file of a skipped minibatch.

        Returns:
            Metrics, the same on all ranks: means over the response tokens, and losses as they were minimised, averaged
            over the optimizer steps.

        Raises:
            FloatingPointError: after ``ppo.max_skipped_steps`` skipped optimizer steps, one after the other.
        """
        token_columns = {name: batch[name] for name in self.training_columns if name in batch}
        whole = Batch(batch.offsets, token_columns)
        outcomes: list[StepOutcome] = []
        tokens: list[int] = []
        empty = 0
        for k, parts in enumerate(schedule):
            shard = whole.select(parts[self.world.rank])
            mask = shard["response_mask"]
            sequences = int((segment_sum(mask.long(), shard.offsets) > 0).sum())
            num_tokens, num_sequences = self.trainer.global_counts(int(mask.sum()), sequences)
            if num_tokens == 0:  # nothing to learn from: neither optimizer nor schedule moves
                empty += 1
                continue
            aggregation, denominator = self.loss_aggregation()
            weights = aggregation_weights(
                mask,
                shard.offsets,
                aggregation,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                denominator=denominator,
            )
            outcome = self.trainer.optimizer_step(
                self.lay_out(shard), self.training_forward(), self.minibatch_loss(shard, weights)
            )
            self._watch(outcome, shard, step, k)
            outcomes.append(outcome)
            tokens.append(num_tokens)
        return self._metrics(outcomes, tokens, empty)

    def _watch(self, outcome: StepOutcome, shard: Batch, step: int, minibatch: int) -> None:
        """Keep a minibatch whose gradient wasn't finite, and stop after too many."""
        if outcome.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        folder = Path(self.config.run_dir) / "skipped"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{type(self).__name__}-step-{step}-minibatch-{minibatch}-rank-{self.world.rank}.pt"
        torch.save({"offsets": shard.offsets, **{name: shard[name] for name in shard.keys()}}, file)
        if self.skipped_in_a_row >= self.config.ppo.max_skipped_steps:
            raise FloatingPointError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} optimizer steps one after the other "
                f"(ppo.max_skipped_steps); the minibatches are kept in {folder}"
            )

    def _metrics(self, outcomes: list[StepOutcome], tokens: list[int], empty: int) -> dict[str, float]:
        applied = [o for o in outcomes if o.applied]
        learned_from = sum(n for n, o in zip(tokens, outcomes, strict=True) if o.applied)
        metrics: dict[str, float] = {
            "optimizer_steps": float(len(applied)),
            "skipped_steps": float(len(outcomes) - len(applied)),
            "empty_minibatches": float(empty),
        }
        if applied:
            metrics["grad_norm"] = sum(o.grad_norm for o in applied) / len(applied)
            metrics["lr"] = applied[-1].lr
        for name in applied[0].sums if applied else ():
            total = sum(o.sums[name] for o in applied)
            metrics[name] = total / (len(applied) if name in LOSS_SUMS else learned_from)
        return metrics

    # -- state ----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Weights, optimizer and schedule; all ranks write into the same folder."""
        self.trainer.save(folder)

    def load(self, folder: str) -> None:
        """Go on from what `save` wrote."""
        self.trainer.load(folder)

    def describe(self) -> dict[str, Any]:
        """Sizes for the log: all parameters and those that are trained, on this rank."""
        parameters = list(self.trainer.module.parameters())
        count = lambda ps: sum(getattr(p, "ds_numel", p.numel()) for p in ps)  # noqa: E731
        return {"parameters": count(parameters), "trained": count(p for p in parameters if p.requires_grad)}
