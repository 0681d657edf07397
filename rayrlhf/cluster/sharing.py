"""Samples which the ranks of a group take from a common pile, whoever has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Pile", "Share"]


class Share(Protocol):
    """A rank's way to the pile."""

    def take(self, count: int) -> list[int]:
        """The next samples.

        Args:
            count: how many there is room for. Samples that belong together come together, so that it may be some more.

        Returns:
            Their places in the batch. None at all: the pile is used up, and stays so.
        """


class Pile:
    """What nobody has taken yet.

    Args:
        units: the places of samples that belong together, in the order in which they are handed out.
    """

    def __init__(self, units: Sequence[Sequence[int]]):
        self._units = deque(units)

    def take(self, count: int) -> list[int]:
        """See `Share`."""
        taken: list[int] = []
        while self._units and len(taken) < count:
            taken += self._units.popleft()
        return taken
