"""From ragged samples to what a transformer takes: micro-batches under a token budget, padded or packed.

Only this module pads. Padding stands on the right, where causal attention can't see it, so no attention mask is needed;
packed rows have position ids that begin again at 0 with each sample, which transformers turns into block-diagonal (or
variable-length) attention. Where two responses share their prompt, a row is prompt, first response, second response, and
has a mask by which the second one doesn't see the first.

Beside the rows there is a `Grid`, by which a model on a CPU computes neither padding nor masked attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrlhf.batch import Batch, BatchError
from rayrlhf.models.unpadded import Grid

__all__ = [
    "ModelInput",
    "PromptSharing",
    "micro_batches",
    "neighbours_together",
    "pair_micro_batches",
    "plan_micro_batches",
]

LITTLE_PADDING = 0.95
"""Up to this share of real tokens, leaving out the padding is worth its price."""


@dataclass(frozen=True)
class ModelInput:
    """One forward of a model over B rows of L positions, and which of its hidden states are wanted.

    Hidden states are numbered flat, row by row: 0 to B * L - 1.
    """

    input_ids: Tensor
    """int64 [B, L]."""
    position_ids: Tensor | None
    """int64 [B, L] in packed rows and where a prompt is shared, else None: 0 to L - 1 in each row."""
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
    attention_mask: Tensor | None = None
    """bool [B, 1, L, L] where a prompt is shared: which position (rows) may attend to which; None: the model's own."""
    grid: Grid | None = None
    """The same tokens without padding, for a CPU; None where there is no padding and no mask."""
    bounds: Tensor | None = None
    """int32 [S + 1], where each sample of a packed row begins, and the row's end; None where rows aren't packed."""
    longest: int = 0
    """Tokens of the longest sample of a packed row."""

    def to(self, device: torch.device | str) -> ModelInput:
        """The same on another device. The grid stays where it is: it is for a CPU."""
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
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


def micro_batches(
    batch: Batch,
    budget: int,
    packing: bool,
    mask: str | None = "response_mask",
    samples: Tensor | None = None,
) -> list[ModelInput]:
    """The forwards that cover all samples of a batch, or some.

    Args:
        batch: with the token columns ``tokens`` and ``mask``.
        budget: tokens of one micro-batch, padding included.
        packing: see `plan_micro_batches`.
        mask: name of the bool column of wanted tokens; None: none are wanted, only each sample's last hidden state.
        samples: int64 [n], those to be covered; None: all.

    Raises:
        BatchError: where a sample has no tokens; where the first token of a sample is wanted: nothing predicts it.
    """
    wanted = _wanted(batch, mask)
    chosen = torch.arange(len(batch)) if samples is None else samples
    plan = plan_micro_batches(batch.lengths[chosen], budget, packing)
    return [_lay_out(batch, chosen[indices], packing, wanted) for indices in plan]


def _wanted(batch: Batch, mask: str | None) -> Tensor:
    empty = torch.nonzero(batch.lengths == 0).flatten().tolist()
    if empty:
        raise BatchError(f"samples {empty} have no tokens, so there is no hidden state to read")
    wanted = batch[mask] if mask is not None else torch.zeros(batch.num_tokens, dtype=torch.bool)
    if bool(wanted[batch.offsets[:-1]].any()):
        raise BatchError("the first token of a sample has no log-probability; response_mask must be false there")
    return wanted


def _lay_out(batch: Batch, indices: Tensor, packing: bool, wanted: Tensor) -> ModelInput:
    lengths = batch.lengths[indices]
    tokens = batch["tokens"]
    count = int(lengths.sum())
    local_start = torch.cumsum(lengths, 0) - lengths
    within = torch.arange(count) - torch.repeat_interleave(local_start, lengths)
    source = torch.repeat_interleave(batch.offsets[indices], lengths) + within
    grid, bounds = None, None
    if packing:
        place, width = torch.arange(count), count
        bounds = torch.cat([local_start, lengths.sum()[None]]).to(torch.int32)
        input_ids, position_ids = tokens[source][None], within[None]
    else:
        width = int(lengths.max())
        place = torch.repeat_interleave(torch.arange(len(indices)) * width, lengths) + within
        # Any id will do as padding: nothing attends to it, and nothing is read from it.
        flat = torch.zeros(len(indices) * width, dtype=torch.int64)
        flat[place] = tokens[source]
        input_ids, position_ids = flat.view(len(indices), width), None
        if count <= LITTLE_PADDING * len(indices) * width:
            token_in = torch.zeros(len(indices) * width, dtype=torch.int64)
            token_in[place] = torch.arange(count)
            none = torch.zeros(0, dtype=torch.int64)
            grid = Grid(tokens[source][None], within[None], width, token_in, place, none, none, token_in)
    chosen = wanted[source]
    ends = torch.cumsum(lengths, 0) - 1
    return ModelInput(
        input_ids,
        position_ids,
        indices,
        place[chosen] - 1,
        tokens[source][chosen],
        source[chosen],
        place[ends],
        grid=grid,
        bounds=bounds,
        longest=int(lengths.max()),
    )


# -- pairs that share their prompt ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSharing:
    """For which pairs a model may compute the prompt once for both responses, and for which that is less work."""

    longest: int
    """Tokens of the longest sample that no window of the model's attention cuts: the mask of a row holds no window."""
    hidden_size: int
    """Width of the model, which says what a token costs against what attention costs."""

    def __call__(self, prompt: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """int64 [P] each, tokens of prompt, first and second response -> bool [P].

        A layer's products take about 24 H^2 operations a token, its attention 4 H for each pair of positions. A shared row
        saves the former for the prompt; but under a mask of its own attention is over all pairs of positions, where
        causal attention takes half of them.
        """
        shared = (prompt + first + second).double().square()
        apart = 0.5 * ((prompt + first).double().square() + (prompt + second).double().square())
        pays = 6.0 * self.hidden_size * prompt > shared - apart
        return pays & (prompt > 0) & (prompt + torch.maximum(first, second) <= self.longest)


def pair_micro_batches(
    batch: Batch,
    budget: int,
    *,
    packing: bool = False,
    sharing: PromptSharing | None = None,
    mask: str | None = "response_mask",
    pairs: Tensor | None = None,
) -> list[ModelInput]:
    """The forwards over pairs of samples, which stand in the same micro-batch, one behind the other.

    Args:
        batch: token columns ``tokens`` and ``mask``, sample column ``prompt_length``.
        budget: tokens of one micro-batch, padding included. A pair that is longer goes alone.
        packing: see `plan_micro_batches`; of pairs whose prompt isn't shared.
        sharing: the pairs whose prompt is computed once; None: no pair's.
        mask: as in `micro_batches`.
        pairs: int64 [P, 2], samples with the same prompt; None: 2i and 2i + 1, all of them.

    Raises:
        BatchError: as in `micro_batches`; where a sample has no partner, or two partners have different prompts, or a
            token of a prompt is wanted.
    """
    wanted = _wanted(batch, mask)
    if pairs is None:
        if len(batch) % 2:
            raise BatchError(f"{len(batch)} samples can't all be members of pairs")
        pairs = torch.arange(len(batch)).view(-1, 2)
    prompt = _common_prompts(batch, wanted, pairs)
    first, second = (batch.lengths[pairs[:, k]] - prompt for k in (0, 1))
    if sharing is None:
        shared = torch.zeros(len(prompt), dtype=torch.bool)
    else:
        shared = sharing(prompt, first, second)
    together, apart = torch.nonzero(shared).flatten(), torch.nonzero(~shared).flatten()
    plan = plan_micro_batches((prompt + first + second)[together], budget, packing=False)
    inputs = [_lay_out_shared(batch, pairs[together[rows]], prompt[together[rows]], wanted) for rows in plan]
    # Two rows of the longer one's width a pair; packed, both in one row.
    size = (2 * prompt + first + second) if packing else 2 * (prompt + torch.maximum(first, second))
    for rows in plan_micro_batches(size[apart], budget, packing):
        inputs.append(_lay_out(batch, pairs[apart[rows]].flatten(), packing, wanted))
    return inputs


def neighbours_together(batch: Batch, budget: int, *, packing: bool, sharing: PromptSharing | None) -> list[ModelInput]:
    """The forwards over any samples; where two neighbours belong to one example, they may share their prompt.

    Args:
        batch: token columns ``tokens`` and ``response_mask``; two neighbours belong together where they have the same
            ``example_id`` and ``prompt_length`` (sample columns that may be missing).
        budget: as in `pair_micro_batches`; so too the others.
    """
    if sharing is None or "example_id" not in batch or "prompt_length" not in batch:
        return micro_batches(batch, budget, packing)
    same = torch.ones(max(len(batch) - 1, 0), dtype=torch.bool)
    for name in ("example_id", "prompt_length"):
        same &= batch[name][1:] == batch[name][:-1]
    starts = same & ~torch.cat([torch.zeros(1, dtype=torch.bool), same])[: len(same)]
    pairs = torch.nonzero(starts).flatten()[:, None] + torch.arange(2)
    alone = torch.ones(len(batch), dtype=torch.bool)
    alone[pairs.flatten()] = False
    single = micro_batches(batch, budget, packing, samples=torch.nonzero(alone).flatten())
    return pair_micro_batches(batch, budget, packing=packing, sharing=sharing, pairs=pairs) + single


def _common_prompts(batch: Batch, wanted: Tensor, pairs: Tensor) -> Tensor:
    """int64 [P], tokens of each pair's prompt."""
    prompt, tokens = batch["prompt_length"][pairs], batch["tokens"]
    uneven = torch.nonzero(prompt[:, 0] != prompt[:, 1]).flatten().tolist()
    if uneven:
        raise BatchError(f"the two samples of pairs {uneven} have prompts of different lengths")
    size = prompt[:, 0]
    starts = batch.offsets[pairs]
    within = torch.arange(int(size.sum())) - torch.repeat_interleave(torch.cumsum(size, 0) - size, size)
    one, other = (torch.repeat_interleave(starts[:, k], size) + within for k in (0, 1))
    if not torch.equal(tokens[one], tokens[other]):
        differs = torch.repeat_interleave(size)[tokens[one] != tokens[other]].unique().tolist()
        raise BatchError(f"the two samples of pairs {differs} have different prompts")
    if bool((wanted[one] | wanted[other]).any()):
        raise BatchError("tokens of a pair's prompt can't be wanted: they are the same for both responses")
    return size


def _lay_out_shared(batch: Batch, pairs: Tensor, prompts: Tensor, wanted: Tensor) -> ModelInput:
    """Rows of prompt, first response, second response. The last two both stand right behind the prompt."""
    width = int((batch.lengths[pairs].sum(1) - prompts).max())
    begins, ends = batch.offsets[pairs].tolist(), batch.offsets[pairs + 1].tolist()
    input_ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    position_ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    attend = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(pairs), 1, 1, 1)
    predict, source, last = [], [], []
    for row, prompt in enumerate(prompts.tolist()):
        fork = ends[row][0] - begins[row][0]  # where the second response begins, in the row
        tokens = torch.cat([torch.arange(begins[row][k] + k * prompt, ends[row][k]) for k in (0, 1)])
        input_ids[row, : len(tokens)] = batch["tokens"][tokens]
        position_ids[row, :fork] = torch.arange(fork)
        position_ids[row, fork : len(tokens)] = torch.arange(prompt, prompt + len(tokens) - fork)
        # Padding, behind it all, attends to what it likes; nothing reads it.
        attend[row, 0, fork:, prompt:fork] = False
        before = torch.arange(len(tokens)) - 1
        before[fork : fork + 1] = prompt - 1
        chosen = wanted[tokens]
        predict.append(row * width + before[chosen])
        source.append(tokens[chosen])
        last += [row * width + fork - 1, row * width + (len(tokens) if len(tokens) > fork else prompt) - 1]
    where = torch.cat(source)
    return ModelInput(
        input_ids,
        position_ids,
        pairs.flatten(),
        torch.cat(predict),
        batch["tokens"][where],
        where,
        torch.tensor(last, dtype=torch.int64),
        attend,
        _shared_grid(batch, pairs, prompts, width),
    )


def _shared_grid(batch: Batch, pairs: Tensor, prompts: Tensor, row_width: int) -> Grid:
    """Two sequences a pair, prompt and response; the prompt's tokens stand in both.

    Args:
        row_width: of the `ModelInput`'s rows of prompt, first response, second response.
    """
    begins, lengths = batch.offsets[pairs], batch.lengths[pairs]
    width = int(lengths.max())
    token_in = torch.zeros(2 * len(pairs) * width, dtype=torch.int64)
    token_at = torch.zeros(len(pairs) * row_width, dtype=torch.int64)
    source, position, cell, twice, second = [], [], [], [], []
    done = 0
    for row, prompt in enumerate(prompts.tolist()):
        (first_begin, second_begin), (first, other) = begins[row].tolist(), lengths[row].tolist()
        total = first + other - prompt
        tokens = done + torch.arange(total)
        source += [first_begin + torch.arange(first), second_begin + torch.arange(prompt, other)]
        position += [torch.arange(first), torch.arange(prompt, other)]
        above, below = 2 * row * width + torch.arange(first), (2 * row + 1) * width + torch.arange(other)
        cell += [above, below[prompt:]]
        twice.append(tokens[:prompt])
        second.append(below[:prompt])
        token_in[above], token_in[below[:prompt]], token_in[below[prompt:]] = (
            tokens[:first],
            tokens[:prompt],
            tokens[first:],
        )
        token_at[row * row_width : row * row_width + total] = tokens
        done += total
    ids = batch["tokens"][torch.cat(source)][None]
    return Grid(
        ids,
        torch.cat(position)[None],
        width,
        token_in,
        torch.cat(cell),
        torch.cat(twice),
        torch.cat(second),
        token_at,
    )
