"""Health of a run: warnings from nothing but its metric history.

    warnings = check_health(rows, config.health)      # what is wrong now
    if stopping(warnings, config.health): ...
    everything = review_health(rows, config.health)   # what ever was wrong, for a report

Rows are those of metrics.jsonl. A metric that a run doesn't have silences the rules about it, and so do gaps: what is
measured only now and then, such as the KL of preference runs, may stand in some rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rayrlhf.config.health import RULE_NAMES, HealthConfig, RuleName, Severity
from rayrlhf.monitoring.health_history import History, View
from rayrlhf.monitoring.health_preferences import PREFERENCE_RULES
from rayrlhf.monitoring.health_rules import GENERAL_RULES, Finding
from rayrlhf.monitoring.health_words import WORDS, Family

__all__ = ["HealthWarning", "check_health", "review_health", "stopping"]

RULES = {name: (GENERAL_RULES | PREFERENCE_RULES)[name] for name in RULE_NAMES}
_ORDER: tuple[Severity, ...] = ("critical", "warning", "note")


@dataclass(frozen=True)
class HealthWarning:
    """Trouble in a run.

    Attributes:
        rule: the rule that speaks.
        severity: how bad it is.
        step: now (`check_health`), or the last step at which it was seen (`review_health`).
        since: the step at which it was seen first.
        seen: what was seen, with the numbers.
        means: what that usually means.
        turn: which keys of the configuration to turn, and which way.
    """

    rule: RuleName
    severity: Severity
    step: int
    since: int
    seen: str
    means: str
    turn: str

    def line(self) -> str:
        """All of it in one line, for a terminal."""
        when = f"since step {self.since}" if self.since != self.step else f"at step {self.step}"
        return f"{self.severity}: {self.rule} {when}: {self.seen}. It usually means: {self.means}. Try: {self.turn}"


def check_health(history: Sequence[Mapping[str, Any]], config: HealthConfig) -> list[HealthWarning]:
    """What is wrong with a run now.

    A trouble lasts until it hasn't been seen for `HealthConfig.window_steps` rows; of a metric that is measured less
    often, until the next measurement. As long as it lasts, its ``since`` stays.

    Args:
        history: rows of metrics, oldest first, each with its ``step``; None, NaN, infinities, texts and missing metrics
            are gaps (a loss that isn't finite is a finding).
        config: thresholds, and the rules to ignore.

    Returns:
        The most severe first, then by the order of the rules. Empty for a healthy run.
    """
    known, warnings = History(history), []
    for name in _applied(config):
        watch = _Watch(name, known, config)
        last = watch.latest()
        if last is not None:
            since = known.step(watch.rows[watch.begin(last)])
            finding = watch.finding(last)
            assert finding is not None
            warnings.append(_warning(name, finding, known.step(len(known) - 1), since, known))
    return _sorted(warnings)


def review_health(history: Sequence[Mapping[str, Any]], config: HealthConfig) -> list[HealthWarning]:
    """All troubles that a run ever had, one warning for each time that it lasted; arguments as of `check_health`.

    Returns:
        Ordered by their beginning. What was seen is told as it was when it was most severe, and then at its last.
    """
    known = History(history)
    warnings = [warning for name in _applied(config) for warning in _Watch(name, known, config).episodes()]
    return sorted(warnings, key=lambda w: (w.since, _ORDER.index(w.severity), RULE_NAMES.index(w.rule)))


def stopping(warnings: Sequence[HealthWarning], config: HealthConfig) -> list[HealthWarning]:
    """Those of the warnings that end the run, by ``stop_at`` and ``stop_on``; empty: it goes on."""
    severe = () if config.stop_at == "never" else _ORDER[: _ORDER.index(config.stop_at) + 1]
    return [warning for warning in warnings if warning.severity in severe or warning.rule in config.stop_on]


def _applied(config: HealthConfig) -> list[RuleName]:
    return [name for name in RULE_NAMES if name not in config.ignore]


def _sorted(warnings: list[HealthWarning]) -> list[HealthWarning]:
    return sorted(warnings, key=lambda w: (_ORDER.index(w.severity), RULE_NAMES.index(w.rule)))


def _warning(name: RuleName, finding: Finding, step: int, since: int, history: History) -> HealthWarning:
    words = WORDS[name]
    return HealthWarning(name, finding.severity, step, since, finding.seen, words.means, words.turn(_family(history)))


def _family(history: History) -> Family:
    """Which kind of run this is, by its metrics."""
    signs: tuple[tuple[Family, tuple[str, ...]], ...] = (
        ("preferences", ("rewards/margins", "rewards/chosen", "logps/chosen")),
        ("reward_model", ("accuracy", "margin")),
        ("sft", ("loss",)),
    )
    return next((kind for kind, names in signs if any(history.column(name).rows for name in names)), "ppo")


class _Watch:
    """One rule over the rows that it can look at: at which of them it speaks, and since when."""

    def __init__(self, name: RuleName, history: History, config: HealthConfig):
        self.name, self.history, self.config = name, history, config
        rows = {row for column in RULES[name].columns for row in history.column(column).rows}
        if RULES[name].non_finite:
            every = range(len(history))
            rows |= {row for row in every if any(history.non_finite(c, row) for c in RULES[name].columns)}
        self.rows = sorted(rows)
        self.finding = lru_cache(maxsize=None)(self._finding)

    def _finding(self, place: int) -> Finding | None:
        return RULES[self.name].check(View(self.history, self.rows[place], self.config))

    def _within(self, places: Iterator[int], row: int) -> int | None:
        """The first of the places (which go backwards) that the rule speaks at, not further back than a window before
        ``row``; the first place counts however far back it lies."""
        for index, place in enumerate(places):
            if index and self.rows[place] < row - self.config.window_steps:
                return None
            if self.finding(place) is not None:
                return place
        return None

    def latest(self) -> int | None:
        """Where the trouble that lasts now was seen last; None: all is well."""
        return self._within(iter(range(len(self.rows) - 1, -1, -1)), len(self.history))

    def begin(self, place: int) -> int:
        """Where the trouble which is seen at a place was seen first."""
        while (earlier := self._within(iter(range(place - 1, -1, -1)), self.rows[place])) is not None:
            place = earlier
        return place

    def episodes(self) -> Iterator[HealthWarning]:
        """Each time that the trouble lasted, the last one first."""
        place = len(self.rows) - 1
        while place >= 0:
            if self.finding(place) is None:
                place -= 1
                continue
            begin = self.begin(place)
            found = [f for p in range(place, begin - 1, -1) if (f := self.finding(p)) is not None]
            worst = min(found, key=lambda f: _ORDER.index(f.severity))
            step, since = self.history.step(self.rows[place]), self.history.step(self.rows[begin])
            yield _warning(self.name, worst, step, since, self.history)
            place = begin - 1
