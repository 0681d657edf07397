"""What a rule across keys is, and the book in which they all stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["RULES", "Rule", "Violation", "rule"]


class Violation(NamedTuple):
    """A broken rule: the keys that it is about, the one to mend first, and what was found and is legal."""

    keys: tuple[str, ...]
    message: str


Check = Callable[..., Iterator[Violation]]


class Rule(NamedTuple):
    """A check, called with the configuration and, where the rule is about several, with each role or source's index."""

    check: Check
    roles: tuple[str, ...]
    sources: bool

    @property
    def doc(self) -> str:
        return " ".join((self.check.__doc__ or "").split())

    def arguments(self, config: Any) -> list[tuple[Any, ...]]:
        """The arguments of all calls."""
        if self.sources:
            return [(config, index) for index in range(len(config.reward.sources))]
        return [(config, role) for role in self.roles] if self.roles else [(config,)]


RULES: list[Rule] = []


def rule(*roles: str, sources: bool = False) -> Callable[[Check], Check]:
    """Put a check into the book; with roles, or for the sources of reward, one that is called for each of them."""

    def register(check: Check) -> Check:
        RULES.append(Rule(check, roles, sources))
        return check

    return register
