"""A small role that takes its samples from a common pile."""

from __future__ import annotations

import time

import torch

from rayrlhf.batch import Batch


class Taker:
    """Works on so many samples at a time; one rank can be slow."""

    def __init__(self, *, world, slow_rank: int | None = None, pause: float = 0.0):
        self.world, self.slow_rank, self.pause = world, slow_rank, pause

    def work(self, batch: Batch, *, share, places: int, wait: float = 0.0, fail_rank: int | None = None):
        time.sleep(wait)
        while taken := share.take(places):
            if fail_rank == self.world.rank:
                raise FloatingPointError("the response is nan")
            if self.slow_rank == self.world.rank:
                time.sleep(self.pause)
            part = batch.select(taken)
            ranks = torch.full((len(part),), self.world.rank)
            yield Batch(part.offsets, {"tokens": part["tokens"] * 2}, {"index": part["index"], "rank": ranks})

    def hoard(self, batch: Batch, *, share):
        """Takes one and keeps its way to the pile."""
        self.share = share
        yield batch.select(share.take(1)).only(["index"])

    def late(self) -> list[int]:
        """Takes more, long after."""
        return self.share.take(100)
