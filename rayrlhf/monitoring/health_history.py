"""A metric history as the health rules look at it: columns with gaps, windows of steps, robust statistics."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import Any

from rayrlhf.config.health import HealthConfig
from rayrlhf.monitoring.text import finite, number_or_none

__all__ = ["History", "View", "spread"]

_LARGEST = 1e100  # larger values count as this: sums and squares of them are finite
_NOISE_VALUES = 30  # neighbouring differences that the noise is estimated from
_NORMAL_MAD = 0.6745  # median |x| of a standard normal x
_NORMAL_MEAN = 0.6573  # mean |x| of a standard normal x without its largest tenth
_MEDIAN_ERROR = 1.2533  # standard error of a median of normal values, in that of their mean: sqrt(pi / 2)


def spread(values: Sequence[float]) -> float:
    """Deviation from the median absolute deviation (Huber 1981, section 5.1): a few wild values don't move it."""
    center = median(values)
    return median([abs(x - center) for x in values]) / _NORMAL_MAD


class Column:
    """The finite values of one metric, and the rows that they stand in. Rows without a value don't count."""

    def __init__(self, rows: list[int], values: list[float]):
        self.rows, self.values = rows, values

    def between(self, first: int, last: int) -> list[float]:
        """Values of the rows ``first`` to ``last``, both included."""
        return self.values[bisect_left(self.rows, first) : bisect_right(self.rows, last)]

    def until(self, last: int) -> list[float]:
        """Values of all rows up to ``last``, included."""
        return self.values[: bisect_right(self.rows, last)]


class History:
    """All rows of a run, oldest first; a metric that a row lacks, or has as NaN or infinity, is a gap in its column.

    A row without ``kl_per_token`` that has ``kl`` and ``response_length/mean`` tells it all the same.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.raw = rows
        self.column = lru_cache(maxsize=None)(self._column)

    def __len__(self) -> int:
        return len(self.raw)

    def step(self, row: int) -> int:
        """The step of a row; its place, counted from 1, where it says none."""
        step = finite(self.raw[row].get("step"))
        return row + 1 if step is None else int(step)

    def non_finite(self, name: str, row: int) -> str | None:
        """What a metric was that is no finite number ("nan", "inf", "-inf"); None where it is one, or missing."""
        raw = self.raw[row].get(name)
        value = raw if type(raw) is float else number_or_none(raw)
        if value is not None:
            return None if math.isfinite(value) else str(value)
        # metrics.jsonl has null for these, and says beside it what they were.
        noted = self.raw[row].get("non_finite")
        return str(noted[name]) if isinstance(noted, Mapping) and name in noted else None

    def _column(self, name: str) -> Column:
        known = [(row, value) for row in range(len(self)) if (value := self._value(name, row)) is not None]
        return Column([row for row, _ in known], [value for _, value in known])

    def _value(self, name: str, row: int) -> float | None:
        raw = self.raw[row].get(name)
        # A long run has a million of them, nearly all plain floats.
        value = raw if type(raw) is float and math.isfinite(raw) else finite(raw)
        if value is None and name == "kl_per_token":
            kl, length = (finite(self.raw[row].get(other)) for other in ("kl", "response_length/mean"))
            return kl / length if kl is not None and length is not None and length > 0 else None
        return None if value is None else min(max(value, -_LARGEST), _LARGEST)


class View:
    """A history as it was at one of its rows: nothing later is looked at.

    Medians are over `HealthConfig.window_steps` rows (times ``windows``). Where a metric has no value in a window, the last
    one before it counts: what is measured now and then stays known.
    """

    def __init__(self, history: History, row: int, config: HealthConfig):
        self.history, self.row, self.config = history, row, config

    def age(self, name: str) -> int:
        """Rows from the metric's first value to this one; 0 where there is none yet."""
        rows = self.history.column(name).rows
        return max(0, self.row - rows[0] + 1) if rows else 0

    def first_of(self, *names: str) -> str | None:
        """The first of these metrics that has a value by now."""
        return next((name for name in names if self.age(name)), None)

    def warm(self, name: str, steps: int = 0) -> bool:
        """Whether a rule may speak of the metric: it is there since ``warmup_steps``, and since ``steps``."""
        return self.age(name) >= max(self.config.warmup_steps, steps)

    def window(self, name: str, windows: int = 1) -> list[float]:
        """The latest values: those of the last window, or the last one before it."""
        column = self.history.column(name)
        return (
            column.between(self.row - windows * self.config.window_steps + 1, self.row) or column.until(self.row)[-1:]
        )

    def before(self, name: str, windows: int) -> list[float]:
        """Values of the rows before this one."""
        return self.history.column(name).between(self.row - windows * self.config.window_steps, self.row - 1)

    def now(self, name: str, windows: int = 1) -> float:
        """Median of the last window. The metric must have a value."""
        return median(self.window(name, windows))

    def beginning(self, name: str, windows: int = 1) -> float:
        """Median of the metric's first window."""
        column = self.history.column(name)
        return median(
            column.between(column.rows[0], min(self.row, column.rows[0] + windows * self.config.window_steps - 1))
        )

    def middle(self, name: str) -> float:
        """Median of the window that ends half way between the metric's first value and now."""
        column = self.history.column(name)
        half = (column.rows[0] + self.row) // 2
        return median(column.between(half - self.config.window_steps + 1, half) or column.until(half)[-1:])

    def error(self, name: str, windows: int = 1) -> float:
        """Standard error of the difference between two windows' medians.

        From the differences between neighbouring values, so that a trend isn't taken for noise, without the largest tenth
        of them, so that a jump isn't.
        """
        values = self.history.column(name).until(self.row)[-_NOISE_VALUES:]
        steps = sorted(abs(b - a) for a, b in pairwise(values))
        kept = steps[: len(steps) - len(steps) // 10]
        deviation = sum(kept) / len(kept) / _NORMAL_MEAN / math.sqrt(2) if kept else 0.0
        return _MEDIAN_ERROR * deviation * math.sqrt(2 / len(self.window(name, windows)))

    def clear(self, change: float, name: str, windows: int = 1) -> bool:
        """Whether a change between two windows' medians is positive and beyond the noise."""
        return change > self.config.noise * self.error(name, windows)

    def rising(self, name: str) -> bool:
        """Whether the metric has clearly risen since the middle of the run."""
        return self.clear(self.now(name) - self.middle(name), name)
