"""A run's progress across a log: a job has no terminal, but who watches it from afar may have one.

Behind each line of progress that a job writes stands a mark, and after it, as JSON, what the line says. Who reads the log as
it is sees the line; `rayrlhf submit` draws the table from the JSON, to the size of its own terminal.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["RELAY_VARIABLE", "JobClock", "event_of", "event_text", "is_relayed"]

RELAY_VARIABLE = "RAYRLHF_RELAY_PROGRESS"
"""Environment variable of the job: ``1`` adds the events to its lines."""
MARK = "\x1e"
"""ASCII's record separator, which no line of ours has."""
_DIGITS = 6


def is_relayed() -> bool:
    """Whether this process is a job whose log somebody draws a table from."""
    return os.environ.get(RELAY_VARIABLE) == "1"


def event_text(elapsed: float, event: Mapping[str, Any]) -> str:
    """What is put behind a line: the mark and the event; ``elapsed`` are the run's seconds so far."""
    content = _plain({"at": elapsed, **event})
    return f" {MARK}" + json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def event_of(line: str) -> dict[str, Any] | None:
    """The event that a line carries; None of all other lines, and of those that were cut off."""
    _, mark, rest = line.partition(MARK)
    if not mark:
        return None
    try:
        event, _ = json.JSONDecoder().raw_decode(rest)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("at"), int | float) else None


class JobClock:
    """The job's clock as its last event had it, running on at the speed of ours; in seconds since the run's start."""

    def __init__(self) -> None:
        self._offset = -time.monotonic()

    def set(self, at: float) -> None:
        """It is ``at`` now."""
        self._offset = at - time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() + self._offset


def _plain(value: Any) -> Any:
    """For JSON: floats of few digits; what JSON has no numbers for as a text, which ``float`` reads again."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)
    return value
