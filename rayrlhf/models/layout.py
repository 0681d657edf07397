"""From ragged samples to what a transformer takes: micro-batches under a token budget, padded or packed.

Only this module pads. Padding stands on the right, where causal attention can't see it, so no attention mask is needed;
packed rows have position ids that begin again at 0 with each sample, which transformers turns into block-diagonal (or
variable-length) attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayrlhf.batch import Batch, BatchError

__all__ = ["ModelInput", "micro_batches", "plan_micro_batches"]


@dataclass(frozen=True)
class ModelInput:
    """One forward of a model over B rows of L positions, and which of its hidden states are wanted.

    Hidden states are numbered flat, row by row: 0 to B * L - 1.
    """

    input_ids: Tensor
    """int64 [B, L]."""
    position_ids: Tensor | None
    """int64 [B, L] in packed rows, else None: 0 to L - 1 in each row."""
    samples: Tensor
    """int64 [S], which samples of the batch these are."""
    predict: Tensor
    """int64 [N], the hidden states that predict the wanted tokens: the position before each."""
    targets: Tensor
    """int64 [N], the wanted tokens' ids."""
    where: Tensor
    """int64 [N], where the wanted tokens stand in the batch's token columns."""
    last: Tensor
    """int64 [S], the hidden state of each sample's last token."""

    def to(self, device: torch.device | str) -> ModelInput:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return ModelInput(**moved)


def plan_micro_batches(lengths: Tensor, budget: int, packing: bool) -> list[list[int]]:
    """Deal samples into micro-batches: longest first, so that neighbours have like lengths.

    Args:
        lengths: int64 [S], tokens of each sample.
        budget: tokens that one micro-batch may have, padding included. A sample longer than it goes alone.
        packing: samples stand one behind the other in one row, and nothing is padded.

    Returns:
        The samples' indices of each micro-batch; none where there are no samples.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    plan: list[list[int]] = []
    used = 0
    for i in order:
        length = int(lengths[i])
        width = length if packing or not plan else int(lengths[plan[-1][0]])
        if not plan or used + width > budget:
            plan.append([])
            used, width = 0, length
        plan[-1].append(i)
        used += width
    return plan


def micro_batches(batch: Batch, budget: int, packing: bool, mask: str | None = "response_mask") -> list[ModelInput]:
    """The forwards that cover all samples of a batch.

    Args:
        batch: with the token columns ``tokens`` and ``mask``.
        budget: tokens of one micro-batch, padding included.
        packing: see `plan_micro_batches`.
        mask: name of the bool column of wanted tokens; None: none are wanted, only each sample's last hidden state.

    Raises:
        BatchError: where a sample has no tokens; where the first token of a sample is wanted: nothing predicts it.
    """
    empty = torch.nonzero(batch.lengths == 0).flatten().tolist()
    if empty:
        raise BatchError(f"samples {empty} have no tokens, so there is no hidden state to read")
    wanted = batch[mask] if mask is not None else torch.zeros(batch.num_tokens, dtype=torch.bool)
    if bool(wanted[batch.offsets[:-1]].any()):
        raise BatchError("the first token of a sample has no log-probability; response_mask must be false there")
    plan = plan_micro_batches(batch.lengths, budget, packing)
    return [_lay_out(batch, torch.tensor(indices, dtype=torch.int64), packing, wanted) for indices in plan]


def _lay_out(batch: Batch, indices: Tensor, packing: bool, wanted: Tensor) -> ModelInput:
    lengths = batch.lengths[indices]
    tokens = batch["tokens"]
    count = int(lengths.sum())
    local_start = torch.cumsum(lengths, 0) - lengths
    within = torch.arange(count) - torch.repeat_interleave(local_start, lengths)
    source = torch.repeat_interleave(batch.offsets[indices], lengths) + within
    if packing:
        place, width = torch.arange(count), count
        input_ids, position_ids = tokens[source][None], within[None]
    else:
        width = int(lengths.max())
        place = torch.repeat_interleave(torch.arange(len(indices)) * width, lengths) + within
        # Any id will do as padding: nothing attends to it, and nothing is read from it.
        flat = torch.zeros(len(indices) * width, dtype=torch.int64)
        flat[place] = tokens[source]
        input_ids, position_ids = flat.view(len(indices), width), None
    chosen = wanted[source]
    ends = torch.cumsum(lengths, 0) - 1
    return ModelInput(
        input_ids, position_ids, indices, place[chosen] - 1, tokens[source][chosen], source[chosen], place[ends]
    )
