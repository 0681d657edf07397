"""What all models in training share: laying out samples, epochs of minibatches, statistics, state on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rayrlhf.algorithms import aggregation_weights, segment_sum
from rayrlhf.batch import Batch
from rayrlhf.checkpoint import sees
from rayrlhf.config.base import RunConfig
from rayrlhf.config.trainers import TrainedConfig
from rayrlhf.models.engine import StepOutcome, TrainEngine
from rayrlhf.models.layout import ModelInput, micro_batches
from rayrlhf.models.packing import packs
from rayrlhf.models.residence import Level
from rayrlhf.models.world import World

__all__ = [
    "LOSS",
    "SEQUENCES",
    "TOKENS",
    "MinibatchLoss",
    "MinibatchSchedule",
    "StepCounts",
    "TrainerRole",
    "scatter_tokens",
    "token_weights",
]

MinibatchSchedule = Sequence[Sequence[Tensor]]
"""For each optimizer step, for each shard of the ranks (`World.shard`): int64 [n], the samples that it takes."""

MinibatchLoss = Callable[[ModelInput, tuple[Tensor, ...]], tuple[Tensor, dict[str, Tensor]]]
"""(micro-batch, model outputs) -> (share of the loss, statistics to be added up)."""

LOSS = "loss"
"""Of a statistic: a sum that holds the loss's own weights already, so the sum of an optimizer step is its value."""
TOKENS = "tokens"
"""Of a statistic: a sum over the learnt tokens."""
SEQUENCES = "sequences"
"""Of a statistic: a sum over what `StepCounts.sequences` counts."""


@dataclass(frozen=True)
class StepCounts:
    """What an optimizer step is averaged over: all micro-batches and all ranks."""

    tokens: int
    """Learnt tokens."""
    sequences: int
    """Samples with a learnt token; where a trainer learns from pairs, pairs."""


def scatter_tokens(batch: Batch, inputs: Sequence[ModelInput], values: Sequence[Tensor]) -> Tensor:
    """A token column [T], 0 where nothing was computed, from the results of micro-batches."""
    column = torch.zeros(batch.num_tokens, dtype=torch.float32)
    for micro, result in zip(inputs, values, strict=False):
        column[micro.where] = result
    return column


def token_weights(shard: Batch, counts: StepCounts, aggregation: str, denominator: float | None = None) -> Tensor:
    """The weight [T] of each token of a rank's samples; see `aggregation_weights`."""
    return aggregation_weights(
        shard["response_mask"],
        shard.offsets,
        aggregation,
        num_tokens=counts.tokens,
        num_sequences=counts.sequences,
        denominator=denominator,
    )


class TrainerRole:
    """A model in training, on one of the ranks of its group."""

    role = "policy"
    """Its name among the roles of a run, and that of its section in the configuration."""
    training_columns: tuple[str, ...]
    """Columns of a batch that training reads, where the batch has them."""
    statistics: Mapping[str, str]
    """For each statistic of the loss what it is a mean over: `LOSS`, `TOKENS`, `SEQUENCES`, or another statistic, which
    counts."""

    def __init__(self, world: World, config: RunConfig, trained: TrainedConfig, model: nn.Module, total_steps: int):
        self.world, self.config, self.trained = world, config, trained
        self.skipped_in_a_row = 0
        timeout_s = config.cluster.call_timeout_s
        self.trainer = TrainEngine(model, trained, world, total_steps=total_steps, timeout_s=timeout_s, role=self.role)

    # -- what a trainer says of itself ----------------------------------------------------------------------------

    def training_forward(self) -> Callable[[ModelInput], tuple[Tensor, ...]]:
        """How the model is run in training."""
        raise TypeError("a trainer says how its model is run")

    def minibatch_loss(self, shard: Batch, counts: StepCounts) -> MinibatchLoss:
        """The loss of this rank's samples of a minibatch. All ranks call it, with their samples or with none."""
        raise TypeError("a trainer has a loss")

    def count(self, shard: Batch) -> tuple[int, int]:
        """This rank's share of `StepCounts`: tokens, sequences."""
        mask = shard["response_mask"]
        return int(mask.sum()), int((segment_sum(mask.long(), shard.offsets) > 0).sum())

    def lay_out_training(self, shard: Batch) -> list[ModelInput]:
        """The forwards of a minibatch; overridden where samples belong together."""
        return self.lay_out(shard)

    # -- work -----------------------------------------------------------------------------------------------------

    def lay_out(self, batch: Batch) -> list[ModelInput]:
        """The forwards over any samples, each by itself."""
        return micro_batches(batch, self.trained.tokens_per_micro_batch, packs(self.trained))

    def update(self, batch: Batch, schedule: MinibatchSchedule, step: int) -> dict[str, float]:
        """Epochs of minibatches over a batch.

        Args:
            batch: all samples of the step, the same on all ranks.
            schedule: which of them each shard of the ranks takes, for each optimizer step.
            step: number of the step, which names the file of a skipped minibatch.

        Returns:
            Metrics, the same on all ranks: what ``statistics`` names, as means over what it says; losses as they were
            minimised, averaged over the optimizer steps.

        Raises:
            FloatingPointError: after ``optimizer.max_skipped_steps`` skipped optimizer steps, one after the other.
            RunFailed: where the role's states aren't all on the device (`set_residence`).
        """
        self.trainer.residence.require("all", "an update")
        names = [name for name in self.training_columns if name in batch]
        whole = Batch(
            batch.offsets,
            {name: batch[name] for name in names if batch.is_token_column(name)},
            {name: batch[name] for name in names if not batch.is_token_column(name)},
        )
        outcomes: list[StepOutcome] = []
        counted: list[StepCounts] = []
        empty = 0
        for k, parts in enumerate(schedule):
            shard = whole.select(parts[self.world.shard])
            counts = StepCounts(*self.trainer.global_counts(*self.count(shard)))
            if counts.tokens == 0:  # nothing to learn from: neither optimizer nor schedule moves
                empty += 1
                continue
            loss = self.minibatch_loss(shard, counts)
            outcome = self.trainer.optimizer_step(self.lay_out_training(shard), self.training_forward(), loss)
            self._watch(outcome, shard, step, k)
            outcomes.append(outcome)
            counted.append(counts)
        return self._metrics(outcomes, counted, empty)

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
        if self.skipped_in_a_row >= self.trained.optimizer.max_skipped_steps:
            raise FloatingPointError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} optimizer steps one after the other "
                f"(optimizer.max_skipped_steps); the minibatches are kept in {folder}"
            )

    def _metrics(self, outcomes: list[StepOutcome], counted: list[StepCounts], empty: int) -> dict[str, float]:
        applied = [(o, c) for o, c in zip(outcomes, counted, strict=True) if o.applied]
        metrics: dict[str, float] = {
            "optimizer_steps": float(len(applied)),
            "skipped_steps": float(len(outcomes) - len(applied)),
            "empty_minibatches": float(empty),
        }
        if not applied:
            return metrics
        metrics["grad_norm"] = sum(o.grad_norm for o, _ in applied) / len(applied)
        metrics["lr"] = applied[-1][0].lr
        totals = {name: sum(o.sums.get(name, 0.0) for o, _ in applied) for o, _ in applied for name in o.sums}
        over = totals | {
            LOSS: float(len(applied)),
            TOKENS: float(sum(c.tokens for _, c in applied)),
            SEQUENCES: float(sum(c.sequences for _, c in applied)),
        }
        for name, total in totals.items():
            denominator = over[self.statistics[name]]
            if denominator:  # else there was nothing of the kind in these steps
                metrics[name] = total / denominator
        return metrics

    # -- state ----------------------------------------------------------------------------------------------------

    def set_residence(self, level: Level) -> None:
        """What of this rank is on its device from now on; the rest is in host memory. All ranks are called alike.

        Args:
            level: "none"; "weights": enough for forwards, and for publishing the weights; "all": for updates, saving and
                loading too.
        """
        self.trainer.residence.set(level)

    def sees(self, file: str, content: str) -> bool:
        """Whether this rank sees a file, with this content, that the driver has just written into the run's folder."""
        return sees(Path(file), content)

    def save(self, folder: str) -> dict[str, int]:
        """Weights, optimizer and schedule; all ranks write into the same folder.

        Returns:
            What this rank wrote: bytes by the file's name below ``folder``.
        """
        return self.trainer.save(folder)

    def load(self, folder: str) -> None:
        """Go on from what `save` wrote."""
        self.trainer.load(folder)

    def set_lr_scale(self, factor: float) -> None:
        """From now on the learning rate is the schedule's times ``factor``; part of the saved state."""
        self.trainer.lr_scale = factor
