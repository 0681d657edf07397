"""Which samples form which optimizer step, and which rank takes which of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayrlhf.cluster.split import split_by_tokens

__all__ = ["minibatch_schedule"]


def minibatch_schedule(
    lengths: Tensor, minibatch_samples: int, epochs: int, ranks: int, seed: Sequence[int]
) -> list[list[Tensor]]:
    """Shuffle the samples anew in each epoch and cut them into minibatches, spread over the ranks by tokens.

    Which samples a minibatch has depends on ``seed`` alone, so the number of ranks makes no difference to training.

    Args:
        lengths: int64 [S], tokens of each sample.
        minibatch_samples: samples of one optimizer step, over all ranks; divides S.
        epochs: passes over the samples.
        ranks: data-parallel ranks.
        seed: whole numbers such as (run seed, step).

    Returns:
        For each optimizer step, for each rank, the samples: int64 [n].
    """
    schedule = []
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng([*seed, epoch]).permutation(len(lengths)))
        for minibatch in order.split(minibatch_samples):
            parts = split_by_tokens(lengths[minibatch].tolist(), ranks)
            schedule.append([minibatch[part] for part in parts])
    return schedule
