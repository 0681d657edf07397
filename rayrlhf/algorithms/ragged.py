"""Sums and positions in flat columns of ragged samples."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["last_true", "segment_ids", "segment_sum"]


def segment_ids(offsets: Tensor) -> Tensor:
    """The sample that each token belongs to: int64 [T], from offsets int64 [S + 1]."""
    return torch.repeat_interleave(offsets[1:] - offsets[:-1])


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """Sum over the tokens of each sample.

    Args:
        x: [T]. Floats are added in float64; booleans and integers are counted exactly.
        offsets: int64 [S + 1].

    Returns:
        [S], in the type of x; int64 for booleans and integers. 0 for a sample without tokens. Differentiable.
    """
    wide = torch.float64 if x.is_floating_point() else torch.int64
    total = torch.zeros(len(offsets) - 1, dtype=wide, device=x.device).index_add(0, segment_ids(offsets), x.to(wide))
    return total.to(x.dtype) if x.is_floating_point() else total


def last_true(mask: Tensor, offsets: Tensor) -> Tensor:
    """Flat index of the last True of each sample: int64 [S], -1 for a sample without one.

    Args:
        mask: bool [T].
        offsets: int64 [S + 1].
    """
    position = torch.arange(len(mask), device=mask.device).masked_fill(~mask, -1)
    none = torch.full((len(offsets) - 1,), -1, dtype=torch.int64, device=mask.device)
    return none.scatter_reduce(0, segment_ids(offsets), position, reduce="amax")
