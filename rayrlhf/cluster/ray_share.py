"""A common pile of samples on Ray: a process of its own holds it, as the ranks are busy while they take from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from rayrlhf.cluster.sharing import Pile
from rayrlhf.errors import RunFailed

__all__ = ["PileHolder", "RemoteShare", "WireShare", "lay_out"]

TAKE_SECONDS = 60.0
"""Deadline of one look at the pile, which takes a millisecond."""


class PileHolder:
    """Holds the pile of one call at a time, as a Ray actor."""

    def __init__(self) -> None:
        self._call = -1
        self._pile = Pile([])

    def lay_out(self, call: int, units: Sequence[Sequence[int]]) -> None:
        """From now on samples are handed out to this call alone."""
        self._call, self._pile = call, Pile(units)

    def take(self, call: int, count: int) -> list[int]:
        """See `rayrlhf.cluster.sharing.Share`; what is left of an earlier call gets nothing."""
        return self._pile.take(count) if call == self._call else []


@dataclass(frozen=True)
class WireShare:
    """A share on its way to a rank."""

    holder: Any
    call: int


def lay_out(share: WireShare, units: Sequence[Sequence[int]], timeout_s: float) -> None:
    """Put a pile where the ranks can take from it; once it is there, as a rank that comes earlier finds nothing and ends.

    Raises:
        RunFailed: where the process that is to hold it doesn't come up, or is gone.
    """
    try:
        ray.get(share.holder.lay_out.remote(share.call, [list(unit) for unit in units]), timeout=timeout_s)
    except (RayError, GetTimeoutError) as error:
        raise RunFailed(f"the process that hands out prompts can't be reached: {type(error).__name__}") from error


class RemoteShare:
    """A rank's way to a pile in another process."""

    def __init__(self, wire: WireShare):
        self._wire = wire

    def take(self, count: int) -> list[int]:
        """See `rayrlhf.cluster.sharing.Share`.

        Raises:
            RunFailed: where the process that holds the pile is gone.
        """
        try:
            return ray.get(self._wire.holder.take.remote(self._wire.call, count), timeout=TAKE_SECONDS)
        except (RayError, GetTimeoutError) as error:
            raise RunFailed(f"the process that hands out prompts doesn't answer: {type(error).__name__}") from error
