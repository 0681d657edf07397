"""The ranks of a role as Ray actors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from rayrlhf.batch import Batch
from rayrlhf.cluster.columns import Block, WireBatch, from_wire, refer, stage, to_wire_value
from rayrlhf.cluster.group import Group, Pending
from rayrlhf.cluster.ray_end import end_processes
from rayrlhf.cluster.ray_pending import Deadline, Members, RayPending, RayStream, ask_quietly
from rayrlhf.cluster.ray_share import PileHolder, WireShare, lay_out
from rayrlhf.cluster.split import inverse, split_by_tokens

__all__ = ["ActorGroup"]

CLOSE_SECONDS = 5.0


class ActorGroup(Group):
    """Data-parallel ranks in processes of their own, on any node of the Ray cluster.

    Arguments and results travel by reference: the driver holds no tensor of a batch unless it touches its column.
    """

    def __init__(
        self, members: Members, handles: Sequence[Any], call_timeout_s: float, closes: bool, ranks_per_shard: int = 1
    ):
        self.name, self.size = members.role, len(handles)
        self._ranks_per_shard, self.shards = ranks_per_shard, len(handles) // ranks_per_shard
        self._members, self._handles = members, list(handles)
        self._call_timeout_s, self._closes = call_timeout_s, closes
        self._holder: Any = None
        self._calls = itertools.count()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, each on its own node."""
        return [info.pid for info in self._members.infos if info is not None]

    @property
    def addresses(self) -> list[str]:
        """The machine of each rank."""
        return [info.address for info in self._members.infos if info is not None]

    def submit(self, method: str, batch: Batch, *, timeout_s: float | None = None, **kwargs: Any) -> Pending:
        self._check_usable()
        parts = split_by_tokens(batch.lengths.tolist(), self.shards)
        staged = stage(batch)
        shards = [staged if self.shards == 1 else staged.select(part) for part in parts]
        arguments = {name: to_wire_value(value) for name, value in kwargs.items()}
        refs = [
            handle.run.remote(method, refer(shards[rank // self._ranks_per_shard]), arguments)
            for rank, handle in enumerate(self._handles)
        ]

        def merge(answers: list[Any], blocks: list[Block]) -> Batch:
            first = slice(None, None, self._ranks_per_shard)
            results = [from_wire(wire, block) for wire, block in zip(answers[first], blocks[first], strict=True)]
            filled = [(part, result) for part, result in zip(parts, results, strict=True) if part]
            if len(filled) <= 1:
                return filled[0][1] if filled else results[0]
            merged = Batch.concat([result for _, result in filled])
            return merged.select(inverse([part for part, _ in filled]))

        return RayPending(self._members, method, refs, Deadline(timeout_s, self._call_timeout_s), merge)

    def broadcast_async(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> Pending:
        self._check_usable()
        arguments = {name: to_wire_value(value) for name, value in kwargs.items()}
        refs = [handle.run.remote(method, None, arguments) for handle in self._handles]

        def merge(answers: list[Any], blocks: list[Block]) -> list[Any]:
            pairs = zip(answers, blocks, strict=True)
            return [a[0] if isinstance(a, tuple) else from_wire(a, block) for a, block in pairs]

        return RayPending(self._members, method, refs, Deadline(timeout_s, self._call_timeout_s), merge)

    def stream(
        self, method: str, batches: Sequence[Batch], *, timeout_s: float | None = None, **kwargs: Any
    ) -> Iterator[Batch]:
        self.check_streams(batches)
        self._check_usable()
        return self._stream(method, [refer(stage(batch)) for batch in batches], timeout_s, kwargs)

    def stream_shared(
        self,
        method: str,
        batch: Batch,
        units: Sequence[Sequence[int]],
        *,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Iterator[Batch]:
        self._check_usable()
        if self._holder is None:
            self._holder = ray.remote(PileHolder).options(num_cpus=0, max_restarts=0).remote()
        share = WireShare(self._holder, next(self._calls))
        lay_out(share, units, self._call_timeout_s if timeout_s is None else timeout_s)
        return self._stream(method, [refer(stage(batch))] * self.size, timeout_s, {**kwargs, "share": share})

    def _stream(
        self, method: str, batches: Sequence[WireBatch], timeout_s: float | None, kwargs: Mapping[str, Any]
    ) -> Iterator[Batch]:
        arguments = {name: to_wire_value(value) for name, value in kwargs.items()}
        generators = [
            handle.stream.remote(method, batch, arguments) for handle, batch in zip(self._handles, batches, strict=True)
        ]
        deadlines = [Deadline(timeout_s, self._call_timeout_s) for _ in generators]
        return RayStream(self._members, method, generators, deadlines)

    def _check_usable(self) -> None:
        if not self._handles:
            raise RuntimeError(f"group {self.name} is closed")
        if self._members.broken is not None:
            raise self._members.broken

    def close(self) -> None:
        handles, self._handles = self._handles, []
        if self._holder is not None and ray.is_initialized():
            ray.kill(self._holder)
        self._holder = None
        if self._closes and self._members.broken is None:
            ask_quietly([handle.close.remote() for handle in handles], CLOSE_SECONDS)
        end_processes(list(zip(handles, self._members.infos, strict=False)))
