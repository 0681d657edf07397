"""Sequence parallelism: s ranks share each row of a micro-batch, every one of them computes a stretch of its positions.

Only attention needs the others' positions. There each rank changes its stretch of all heads for all positions of 1/s of
the heads, by one all-to-all, and back again by another (Jacobs et al. 2023, "DeepSpeed Ulysses", section 3). All else in a
transformer is done position by position, and a trial makes sure of it.

Results of tokens (log-probabilities, values) are put together again, so that all ranks that share rows compute the same
loss. Its gradient reaches only a rank's own stretch from there, so what the ranks have in their parameters are the parts of
a sum, as those of data-parallel ranks are: nothing else in training changes.

DeepSpeed has a form of this for transformers (`UlyssesSPAttentionHF`). It takes one number of rows for all micro-batches,
and no masks: with torch's attention, samples that are packed into one row would see each other.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from rayrlhf.errors import InputRefused
from rayrlhf.models import cpu  # noqa: F401  (registers sdpa_for_cpu)
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.varlen import VARLEN, bounds_of, refuse_unknown, varlen_attention
from rayrlhf.models.world import World
from rayrlhf.models.zero import callable_in_parts

__all__ = ["SequenceSharing", "Stretch", "share_sequences"]

SHARED = "shared_sequence"
"""The attention's name in transformers."""
CORES = {"sdpa": "sdpa", "sdpa_for_cpu": "sdpa", VARLEN: VARLEN, "flash_attention_2": "flash_attention_2"}
"""By the name that a model has its attention under: how attention is computed once each rank has all positions."""


@dataclass
class Stretch:
    """One rank's positions of a micro-batch's rows, which are lengthened to L', a multiple of s."""

    sharing: SequenceSharing
    input_ids: Tensor
    """int64 [B, L' / s]."""
    position_ids: Tensor
    """int64 [B, L' / s], places in the whole samples."""
    whole: int
    """L'."""
    mask: Tensor | None
    """bool [1 or B, 1, L', L'], who may attend to whom; None: each position to those before it in its row."""
    bounds: Tensor | None
    """int32 [n + 1], where samples begin in the flat rows, for attention of variable lengths; else None."""
    longest: int
    """Tokens of the longest sample."""
    bands: dict[int, Tensor] = field(default_factory=dict)
    """The masks that windows make of ``mask``, by window."""

    def mask_within(self, window: int | None) -> Tensor | None:
        """The mask of a layer whose tokens see ``window`` tokens, themselves included."""
        if window is None or window >= self.longest:
            return self.mask
        if window not in self.bands:
            size, device = self.whole, self.input_ids.device
            band = torch.ones(size, size, dtype=torch.bool, device=device).tril().triu(1 - window)
            self.bands[window] = band[None, None] if self.mask is None else self.mask & band
        return self.bands[window]


class SequenceSharing:
    """The ranks that share rows.

    Args:
        group: their process group.
        index: this rank's place among them; the first one has the first stretch of every row.
        size: s, how many they are.
        core: how attention over whole rows is computed, one of the values of `CORES`.
    """

    def __init__(self, group: Any, index: int, size: int, core: str):
        self.group, self.index, self.size, self.core = group, index, size, core

    def stretch(self, inputs: ModelInput) -> Stretch:
        """This rank's part of a micro-batch. All ranks that share rows have the same micro-batch."""
        rows, length = inputs.input_ids.shape
        whole = math.ceil(length / self.size) * self.size
        mine = slice(self.index * whole // self.size, (self.index + 1) * whole // self.size)
        more = whole - length
        device = inputs.input_ids.device
        if inputs.position_ids is None:
            positions = torch.arange(whole, device=device).expand(rows, whole)
        else:  # what is added is a sample of its own
            positions = torch.cat([inputs.position_ids, torch.arange(more, device=device).expand(rows, more)], 1)
        mask, bounds, longest = self._who_sees_whom(inputs, positions, more)
        input_ids = nn.functional.pad(inputs.input_ids, (0, more))
        return Stretch(self, input_ids[:, mine], positions[:, mine], whole, mask, bounds, longest)

    def _who_sees_whom(
        self, inputs: ModelInput, positions: Tensor, more: int
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """Mask, bounds and longest sample of the lengthened rows."""
        rows, whole = positions.shape
        if inputs.attention_mask is not None:
            mask = nn.functional.pad(inputs.attention_mask, (0, more, 0, more))
            # A position that sees nothing would have no softmax.
            mask = mask | torch.eye(whole, dtype=torch.bool, device=mask.device)
            if self.core != "sdpa":
                raise ValueError(f"rows with a mask of their own can't be computed with the attention {self.core}")
            # No window cuts these samples (see `PromptSharing`), though their rows may be longer than one.
            return mask, None, 0
        if inputs.position_ids is None:
            bounds = torch.arange(rows + 1, dtype=torch.int32, device=positions.device) * whole
            return None, bounds, whole
        bounds, longest = bounds_of(positions)
        if self.core != "sdpa":
            return None, bounds, longest
        sample = torch.cumsum(positions == 0, 1)
        same = sample[:, None, :, None] == sample[:, None, None, :]
        return same & torch.ones(whole, whole, dtype=torch.bool, device=same.device).tril(), bounds, longest

    def hidden_states(self, backbone: Any, stretch: Stretch) -> Tensor:
        """Last hidden states [B, L' / s, H] of this rank's positions."""
        # A mask of four dimensions is passed on as it is, so that none is made; `_attention` doesn't look at it.
        none = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=stretch.input_ids.device)
        how = {"position_ids": stretch.position_ids, "attention_mask": none, "stretch": stretch}
        return backbone(input_ids=stretch.input_ids, use_cache=False, **how).last_hidden_state

    def states_at(self, backbone: Any, inputs: ModelInput, places: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the wanted hidden states that are this rank's.

        Args:
            places: int64 [N], positions in the flat rows of the input.

        Returns:
            [n, H], and int64 [n], which of the ``places`` they stand at.
        """
        stretch = self.stretch(inputs)
        hidden = self.hidden_states(backbone, stretch)
        own = stretch.whole // self.size
        row, position = places // inputs.input_ids.shape[1], places % inputs.input_ids.shape[1]
        which = torch.nonzero(position // own == self.index).flatten()
        at = row[which] * own + position[which] % own
        return hidden.flatten(0, 1).index_select(0, at), which

    def put_together(self, values: Tensor, which: Tensor, count: int) -> Tensor:
        """Results [n] of this rank's places -> [N], those of all places, the same on all ranks that share rows.

        The gradient of an entry reaches the rank that computed it, as this rank's own loss has it: no sum is taken over the
        ranks, each of which computes the same loss.

        Args:
            which: int64 [n], the places of ``values``.
            count: N.
        """
        return _PutTogether.apply(values, which, count, self.group)  # type: ignore[return-value]

    # -- what attention needs -----------------------------------------------------------------------------------

    def to_heads(self, values: Tensor) -> Tensor:
        """All heads of a stretch [B, H, L' / s, D] -> some heads of whole rows [B, H / s, L', D]."""
        rows, heads, own, size = values.shape
        parts = values.view(rows, self.size, heads // self.size, own, size).transpose(0, 1)
        parts = _AllToAll.apply(parts, self.group)  # [s stretches, B, H / s, L' / s, D]
        return parts.permute(1, 2, 0, 3, 4).reshape(rows, heads // self.size, self.size * own, size)

    def to_stretch(self, values: Tensor) -> Tensor:
        """The way back: [B, H / s, L', D] -> [B, H, L' / s, D]."""
        rows, heads, whole, size = values.shape
        parts = values.reshape(rows, heads, self.size, whole // self.size, size).permute(2, 0, 1, 3, 4)
        parts = _AllToAll.apply(parts, self.group)  # [s parts of the heads, B, H / s, L' / s, D]
        return parts.transpose(0, 1).reshape(rows, heads * self.size, whole // self.size, size)


class _AllToAll(torch.autograd.Function):
    """Part i of rank r's tensor becomes part r of rank i's; so do the gradients on their way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _exchanged(grad, ctx.group), None


def _exchanged(parts: Tensor, group: Any) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


class _PutTogether(torch.autograd.Function):
    """See `SequenceSharing.put_together`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, which: Tensor, count: int, group: Any) -> Tensor:
        ctx.save_for_backward(which)
        whole = values.new_zeros(count)
        whole[which] = values
        # Each entry is one rank's number and otherwise zeros, so the sum is that number on every rank.
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (which,) = ctx.saved_tensors
        return grad.index_select(0, which), None, None, None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    stretch: Stretch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, H, L' / s, D], key and value [B, G, L' / s, D] -> [B, L' / s, H, D]."""
    sharing = stretch.sharing
    if softcap is not None:
        how["softcap"] = softcap
    refuse_unknown(module, how, known=("softcap",) if sharing.core == "flash_attention_2" else ())
    copies = _copies_of_keys(query.shape[1], key.shape[1], sharing.size)
    if copies > 1:
        key, value = (part.repeat_interleave(copies, dim=1) for part in (key, value))
    query, key, value = (sharing.to_heads(part) for part in (query, key, value))
    if sharing.core == "sdpa":
        # Told how many queries share a key here, which isn't what the layer itself says.
        layer: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
        mask = stretch.mask_within(sliding_window)
        output, _ = AttentionInterface()["sdpa_for_cpu"](layer, query, key, value, mask, scaling=scaling)
    else:
        output = _without_mask(stretch, query, key, value, scaling, sliding_window, softcap)
    return sharing.to_stretch(output.transpose(1, 2)).transpose(1, 2), None


def _without_mask(
    stretch: Stretch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of variable lengths over whole rows: [B, H, L', D] -> [B, L', H, D]."""
    rows, heads, length, _ = query.shape
    bounds, longest = stretch.bounds, stretch.longest
    assert bounds is not None
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if stretch.sharing.core == VARLEN:
        q, k, v = (part.flatten(0, 1) for part in (query, key, value))
        return varlen_attention(q, k, v, bounds, longest, scale=scale, window=window).view(rows, length, heads, -1)
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    return _flash_attention_forward(
        query,
        key,
        value,
        None,
        query_length=length,
        is_causal=True,
        softmax_scale=scale,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=bounds,  # type: ignore[arg-type]  # int32, as the kernel wants it
        cu_seq_lens_k=bounds,  # type: ignore[arg-type]
        max_length_q=longest,
        max_length_k=longest,
        attn_implementation=stretch.sharing.core,
    )


AttentionInterface.register(SHARED, _attention)


def _copies_of_keys(heads: int, keys: int, size: int) -> int:
    """How often each key and value is repeated so that every rank gets as many as the others.

    Args:
        heads: of the queries, a multiple of ``size`` and of ``keys``.
    """
    groups = heads // keys
    return next(r for r in range(1, groups + 1) if groups % r == 0 and keys * r % size == 0)


# -- setting it up --------------------------------------------------------------------------------------------------


def share_sequences(model: Any, world: World, size: int, *, key: str, timeout_s: float) -> None:
    """Let ``size`` neighbouring ranks share the rows of a model's micro-batches. All ranks call it, in the same order.

    Args:
        model: `PolicyModel` or `ScalarModel`, before DeepSpeed has wrapped it.
        world: this process's place in its group, which it has joined.
        size: s, divides the number of ranks and the model's attention heads (`rayrlhf.models.parallel.check_sharing`).
        key: of the configuration, for messages.
        timeout_s: deadline of the ranks' collective operations.

    Raises:
        InputRefused: where the model isn't one in which only attention looks at other positions.
    """
    backbone = model.transformer
    core = CORES[backbone.config._attn_implementation]
    with callable_in_parts(backbone):
        by_position = _is_done_by_position(backbone, core)
    if not by_position:
        raise InputRefused(
            f"{key}: found {size}, but {type(backbone).__name__} doesn't work position by position outside of its attention, "
            "or doesn't take an attention from outside; legal: 1"
        )
    mine = None
    for first in range(0, world.size, size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout_s))
        if world.rank in ranks:
            mine = group
    backbone.set_attn_implementation(SHARED)
    model.sharing = SequenceSharing(mine, world.rank % size, size, core)


class _Shuffled(SequenceSharing):
    """One rank alone, whose positions stand in another order; only attention puts them right."""

    def __init__(self, order: Tensor):
        super().__init__(None, 0, 1, "sdpa")
        self.order = order

    def to_heads(self, values: Tensor) -> Tensor:
        return values[:, :, torch.argsort(self.order)]

    def to_stretch(self, values: Tensor) -> Tensor:
        return values[:, :, self.order]


@torch.no_grad()
def _is_done_by_position(backbone: Any, core: str) -> bool:
    """A trial: where only attention looks at other positions, their order outside of it makes no difference.

    Flash attention, which needs a GPU, isn't tried itself: torch's attention takes its place.
    """
    text = backbone.config.get_text_config()
    device = next(backbone.parameters()).device
    ids = (torch.arange(2, 12, device=device) % text.vocab_size)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]], device=device)
    none = torch.zeros(0, dtype=torch.int64)
    name = backbone.config._attn_implementation
    expected = None
    if core != "flash_attention_2":
        expected = backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    backbone.set_attn_implementation(SHARED)
    try:
        found = []
        for order in (torch.arange(10, device=device), torch.tensor([7, 2, 9, 0, 5, 1, 8, 3, 6, 4], device=device)):
            sharing = _Shuffled(order)
            stretch = sharing.stretch(ModelInput(ids, positions, none, none, none, none, none))
            stretch.input_ids, stretch.position_ids = ids[:, order], positions[:, order]
            found.append(sharing.hidden_states(backbone, stretch)[:, torch.argsort(order)])
    except (TypeError, ValueError, RuntimeError, IndexError):  # a model that takes no such arguments
        return False
    finally:
        backbone.set_attn_implementation(name)
    expected = found[0] if expected is None else expected
    tolerance = 1e-4 if backbone.dtype == torch.float32 else 5e-2
    scale = float(expected.float().abs().max())
    return all(torch.allclose(f, expected, rtol=tolerance, atol=tolerance * scale) for f in found)
