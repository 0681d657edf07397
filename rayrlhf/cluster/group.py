"""The interface of a group of processes which play one role. Drivers see nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rayrlhf.batch import Batch, BatchError

__all__ = ["Group", "Pending", "check_chunk", "check_new_columns", "wait_any"]


class Pending(ABC):
    """A call under way."""

    @abstractmethod
    def done(self) -> bool:
        """Whether `result` returns, or raises, at once."""

    @abstractmethod
    def result(self) -> Any:
        """Wait for the call.

        Raises:
            RoleFailed: at the first failure of any rank; the other ranks are not waited for.
        """


class Group(ABC):
    """The ranks of one role.

    Columns that a role receives may be shared with other processes: a role never writes into them.
    """

    name: str
    size: int
    """Ranks."""
    shards: int
    """Parts into which samples are split: ranks that work on the same samples count once."""

    @property
    @abstractmethod
    def addresses(self) -> list[str]:
        """The machine of each rank."""

    @abstractmethod
    def submit(self, method: str, batch: Batch, *, timeout_s: float | None = None, **kwargs: Any) -> Pending:
        """Run ``role.method(shard, **kwargs)`` on each rank, the samples split over the ranks by token count.

        Every rank is called, also one whose shard is empty; ranks that share samples get the same shard. The method
        returns a Batch with the new columns alone, over the samples of its shard; the result of the whole is a Batch
        with the new columns over the samples of ``batch`` in their order.

        Args:
            timeout_s: deadline for the answer, from now on: time behind earlier calls counts. By default
                cluster.call_timeout_s. Calls in this process (inline) have none: a debugger would run into it.
        """

    def call(self, method: str, batch: Batch, *, timeout_s: float | None = None, **kwargs: Any) -> Batch:
        """`submit`, and wait for the result."""
        return self.submit(method, batch, timeout_s=timeout_s, **kwargs).result()

    @abstractmethod
    def broadcast_async(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> Pending:
        """Run ``role.method(**kwargs)`` on each rank. The result is a list with one entry a rank."""

    def broadcast(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> list:
        """`broadcast_async`, and wait for the results."""
        return self.broadcast_async(method, timeout_s=timeout_s, **kwargs).result()

    @abstractmethod
    def stream(
        self, method: str, batches: Sequence[Batch], *, timeout_s: float | None = None, **kwargs: Any
    ) -> Iterator[Batch]:
        """Run the generator ``role.method(batches[rank], **kwargs)`` on each rank, and yield its batches as they come.

        The batches of one rank come in its order; those of different ranks as they finish.

        Args:
            batches: one a rank.
            timeout_s: deadline for the next batch of each rank. By default cluster.call_timeout_s.
        """

    @abstractmethod
    def stream_shared(
        self,
        method: str,
        batch: Batch,
        units: Sequence[Sequence[int]],
        *,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Iterator[Batch]:
        """Run the generator ``role.method(batch, share=share, **kwargs)`` on each rank, and yield its batches as they come.

        Each rank takes samples from the common pile through ``share`` (`rayrlhf.cluster.sharing.Share`) whenever it has room
        for some, until there are none left. So who is faster does more.

        Args:
            batch: all samples.
            units: the places of samples which go to one rank together, in the order in which they are handed out.
            timeout_s: deadline for the next batch of each rank. By default cluster.call_timeout_s.
        """

    def take_busy(self) -> dict[str, float]:
        """Seconds that the role was at work in each of its methods since this was last asked, on its slowest rank."""
        slowest: dict[str, float] = {}
        for seconds in self.broadcast("take_busy"):
            for method, spent in seconds.items():
                slowest[method] = max(slowest.get(method, 0.0), spent)
        return slowest

    @abstractmethod
    def close(self) -> None:
        """End the role: its ``close()`` where it has one, then its processes. May be called twice."""

    def check_streams(self, batches: Sequence[Batch]) -> None:
        if len(batches) != self.size:
            raise ValueError(f"{self.name} has {self.size} ranks, found {len(batches)} batches to stream")


def check_new_columns(result: Any, shard: Batch, method: str) -> Batch:
    """The result of a role's method, which must be a Batch over the samples of its shard.

    Raises:
        TypeError: where it isn't a Batch.
        BatchError: where it is over other samples.
    """
    if not isinstance(result, Batch):
        raise TypeError(f"{method} must return a Batch with its new columns, it returned {type(result).__name__}")
    if not torch.equal(result.offsets, shard.offsets):
        raise BatchError(
            f"{method} must return columns over its {len(shard)} samples ({shard.num_tokens} tokens), in their order; "
            f"it returned {len(result)} samples ({result.num_tokens} tokens)"
        )
    return result


def check_chunk(chunk: Any, method: str) -> Batch:
    """What a streaming method yields, which must be a Batch.

    Raises:
        TypeError: where it isn't one.
    """
    if not isinstance(chunk, Batch):
        raise TypeError(f"{method} must yield batches, it yielded {type(chunk).__name__}")
    return chunk


def wait_any(pendings: Sequence[Pending], timeout: float | None = None) -> list[Pending]:
    """Wait until at least one of several calls is done: its result is there, or it has failed, or its deadline is over.

    Args:
        timeout: seconds; None: as long as the calls' own deadlines allow.

    Returns:
        Those which are done, in the order given; none after the timeout.
    """
    done = [p for p in pendings if p.done()]
    if done or not pendings:
        return done
    # Calls in this process are always done, so that all of these are Ray's.
    from rayrlhf.cluster.ray_pending import wait_any_ray

    return wait_any_ray(pendings, timeout)
