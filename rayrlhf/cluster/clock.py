"""How long a role is at work, by method: what a run's timings are made of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BusyClock"]


class BusyClock:
    """Seconds inside each method of a role since they were last taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, method: str) -> Iterator[None]:
        """Counts the time within it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[method] = self._seconds.get(method, 0.0) + time.perf_counter() - started

    def take_busy(self) -> dict[str, float]:
        """Seconds of each method; counting begins again at 0."""
        seconds, self._seconds = self._seconds, {}
        return seconds
