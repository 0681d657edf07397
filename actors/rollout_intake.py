"""Which requests an engine takes in, and when."""

from __future__ import annotations

from collections.abc import Sequence

from rayrlhf.actors.rollout_common import Request
from rayrlhf.cluster.sharing import Share

__all__ = ["Intake"]


class Intake:
    """The requests of one call.

    Args:
        requests: all that there are, each at the place that its ``index`` says.
        share: None: all of them are this engine's, and it gets them at once. Else engines share them, and this one takes some
            whenever it has room.
        places: with ``share``, how many unfinished ones it has room for.
    """

    def __init__(self, requests: Sequence[Request], share: Share | None = None, places: int = 0):
        self._requests, self._share, self._places = requests, share, places
        self._over = False

    def take(self, unfinished: int) -> list[Request]:
        """What the engine is to begin with now.

        Args:
            unfinished: how many it is at work on. With none at all, an empty answer says that everything is done.
        """
        if self._over:
            return []
        if self._share is None:
            self._over = True
            return list(self._requests)
        room = self._places - unfinished
        if room <= 0:
            return []
        taken = self._share.take(room)
        self._over = not taken
        return [self._requests[index] for index in taken]
