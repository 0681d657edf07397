"""A small role that takes its samples from a common pile."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from toy_roles import wait_for

from rayrlhf.batch import Batch


class Taker:
    """Works on so many samples at a time."""

    def __init__(self, *, world):
        self.world = world

    def work(
        self,
        batch: Batch,
        *,
        share,
        places: int,
        wait: float = 0.0,
        fail_rank: int | None = None,
        held: Sequence[int] = (),
        mark: str = "",
    ):
        """The ranks in ``held`` take no more after their first samples until the file ``mark`` is there."""
        time.sleep(wait)
        while taken := share.take(places):
            if fail_rank == self.world.rank:
                raise FloatingPointError("the response is nan")
            part = batch.select(taken)
            ranks = torch.full((len(part),), self.world.rank)
            yield Batch(part.offsets, {"tokens": part["tokens"] * 2}, {"index": part["index"], "rank": ranks})
            if self.world.rank in held:
                wait_for(mark)

    def hoard(self, batch: Batch, *, share):
        """Takes one and keeps its way to the pile."""
        self.share = share
        yield batch.select(share.take(1)).only(["index"])

    def late(self) -> list[int]:
        """Takes more, long after."""
        return self.share.take(100)
