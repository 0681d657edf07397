"""What a driver does with samples in a step of a run: rounds of calls whose columns stay where they are."""

from __future__ import annotations

import torch

from rayrlhf.batch import Batch
from rayrlhf.cluster.group import Group
from tests.cluster.toy_setup import samples


def one_step(group: Group, count: int, step: int) -> tuple[int, int]:
    """Send samples through three calls, with their columns deferred, put together, shuffled and cut as a run does.

    Returns:
        How many samples came back, and the sum of their numbers: each exactly once.
    """
    half = count // 2
    chunks = [samples([2 + i % 3 for i in range(half)], start=step * count + k * half) for k in range(2)]
    pending = [(chunk, group.submit("columns", chunk)) for chunk in chunks]
    batch = Batch.concat([chunk.merge(call.result()) for chunk, call in pending])
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(step))
    shuffled = batch.select(order)
    more = group.call("second", shuffled)
    scored = shuffled.merge(more)
    minibatches = [scored.select(part) for part in torch.arange(len(scored)).chunk(4)]
    done = [minibatch.merge(group.call("where", minibatch.only(["index", "word"]))) for minibatch in minibatches]
    numbers = torch.cat([minibatch["index"] for minibatch in done])
    return len(numbers), int(numbers.sum())


def check(count: int, step: int, found: tuple[int, int]) -> None:
    """Raise where samples were lost or doubled."""
    first = step * count
    if found != (count, sum(range(first, first + count))):
        raise AssertionError(f"step {step}: {found} came back of {count} samples")
