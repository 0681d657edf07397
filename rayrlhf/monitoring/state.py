"""What is known of a run under way: the last steps, the trends, the notes, and the clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayrlhf.monitoring.text import duration, finite

__all__ = ["STEPS_KEPT", "TREND_METRICS", "Note", "RunState"]

STEPS_KEPT, NOTES_KEPT = 10, 4
TREND_METRICS = ("score/mean", "kl", "loss", "rewards/margins")


class Note(NamedTuple):
    at: float
    """Seconds since the start."""
    message: str
    warning: bool


@dataclass
class RunState:
    """What is known of the run."""

    run_dir: str | None
    total_steps: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    phase: str | None = None
    outcome: str | None = None
    """None while it runs, else ``done``, ``interrupted`` or ``failed``."""
    rows: deque[tuple[int, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    trends: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in TREND_METRICS})
    notes: deque[Note] = field(default_factory=lambda: deque(maxlen=NOTES_KEPT))
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_KEPT))
    _started: float | None = None
    _ended: float | None = None
    _phase_began: float = 0.0
    _last_step_at: float | None = None

    def start(self) -> None:
        """Starts the clock."""
        self._started = self.clock()

    def elapsed(self) -> float:
        """Seconds since the start; stands still after the end."""
        if self._started is None:
            return 0.0
        return (self._ended if self._ended is not None else self.clock()) - self._started

    def begin_phase(self, name: str) -> None:
        """Another phase has begun; the same name again lets its clock run on."""
        if name != self.phase:
            self.phase, self._phase_began = name, self.clock()

    def phase_seconds(self) -> float:
        """Since the phase began."""
        return self.clock() - self._phase_began

    def add(self, step: int, metrics: Mapping[str, Any], *, timed: bool) -> None:
        """Step ``step`` is done; ``timed`` if it was made just now."""
        self.done = step
        self.rows.append((step, dict(metrics)))
        for name, values in self.trends.items():
            values.append(finite(metrics.get(name)))
        if not timed:
            return
        now = self.clock()
        if self._last_step_at is not None:
            # The time between two steps, and not timing/total_s: there may be checkpoints and evaluations in it.
            self._durations.append(now - self._last_step_at)
        elif (spent := finite(metrics.get("timing/total_s"))) is not None:
            self._durations.append(spent)  # before the first step there is the start-up, which doesn't come again
        self._last_step_at, self.phase = now, None

    def seconds_left(self) -> float | None:
        """By the mean of the last steps, less what the current one has taken already; None before the first."""
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        since = 0.0 if self._last_step_at is None else self.clock() - self._last_step_at
        return max(0.0, mean * (self.total_steps - self.done) - min(since, mean))

    def finish(self, exception_type: type[BaseException] | None) -> None:
        """The run is over, by this exception or by itself."""
        self._ended = self.clock()
        if exception_type is None:
            self.outcome = "done"
        else:
            self.outcome = "interrupted" if issubclass(exception_type, KeyboardInterrupt) else "failed"

    def summary(self) -> str:
        """The outcome in a line."""
        return f"{self.outcome}: {self.done} of {self.total_steps} steps, {duration(self.elapsed())}"
