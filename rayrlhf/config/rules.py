"""What must hold between the keys of a configuration.

A rule is a function that yields a `Violation` for each thing that is wrong; its docstring stands in the reference of
the configuration. Where a key which a rule reads is itself illegal, the rule says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rayrlhf.config import (
    rules_evaluation,
    rules_jobs,
    rules_offline,
    rules_placement,
    rules_ppo,
    rules_preference,
    rules_roles,
)  # they fill RULES
from rayrlhf.config.base import JobConfig
from rayrlhf.config.rulebook import RULES, Rule, Violation
from rayrlhf.config.rules_roles import source_name
from rayrlhf.config.trainers import Section

__all__ = [
    "RULES",
    "Rule",
    "Violation",
    "broken_rules",
    "rules_evaluation",
    "rules_jobs",
    "rules_offline",
    "rules_placement",
    "rules_ppo",
    "rules_preference",
    "rules_roles",
    "source_name",
]

Path = tuple[str, ...]


class _UndecidableError(Exception):
    """The rule reads a key whose value is illegal."""


class _Views(Sequence[Any]):
    """A list whose illegal elements can't be read."""

    def __init__(self, items: list[Any], path: Path, bad: Collection[Path]):
        self._items, self._path, self._bad = items, path, bad

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return _view(self._items[index], (*self._path, str(index)), self._bad)


class _View:
    """A section whose illegal keys can't be read."""

    def __init__(self, section: Section, path: Path, bad: Collection[Path]):
        self._section, self._path, self._bad = section, path, bad

    def __getattr__(self, name: str) -> Any:
        return _view(getattr(self._section, name), (*self._path, name), self._bad)


def _view(value: Any, path: Path, bad: Collection[Path]) -> Any:
    if path in bad:
        raise _UndecidableError
    if isinstance(value, Section):
        return _View(value, path, bad)
    return _Views(value, path, bad) if isinstance(value, list) else value


def broken_rules(config: JobConfig, bad: Collection[Path] = ()) -> list[Violation]:
    """All violations, of the rules for its class which don't read one of the keys ``bad``."""
    view = _View(config, (), bad)
    violations: list[Violation] = []
    for rule in RULES:
        try:
            calls = rule.arguments(view, type(config))
        except _UndecidableError:
            continue
        for arguments in calls:
            try:
                violations.extend(rule.check(*arguments))
            except _UndecidableError:
                continue
    return violations
