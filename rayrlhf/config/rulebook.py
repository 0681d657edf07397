"""What a rule across keys is, and the book in which they all stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rayrlhf.config.base import RunConfig
from rayrlhf.config.roots import Root

__all__ = ["RULES", "Rule", "Violation", "rule"]


class Violation(NamedTuple):
    """A broken rule: the keys that it is about, the one to mend first, and what was found and is legal."""

    keys: tuple[str, ...]
    message: str


Check = Callable[..., Iterator[Violation]]


class Rule(NamedTuple):
    """A check, called with the configuration and, where the rule is about several, with each role or source's index."""

    check: Check
    of: tuple[Root, ...]
    """The root classes for which it holds."""
    roles: tuple[str, ...]
    sources: bool

    @property
    def doc(self) -> str:
        return " ".join((self.check.__doc__ or "").split())

    def arguments(self, config: Any, root: type[RunConfig]) -> list[tuple[Any, ...]]:
        """The arguments of all calls: none where the rule doesn't hold for the root class."""
        if not issubclass(root, self.of):
            return []
        if self.sources:
            return [(config, index) for index in range(len(config.reward.sources))]
        return [(config, role) for role in self.roles if role in root.model_fields] if self.roles else [(config,)]


RULES: list[Rule] = []


def rule(*roles: str, of: Sequence[Root], sources: bool = False) -> Callable[[Check], Check]:
    """Put a check into the book.

    Args:
        roles: the check is called for each of these sections that the configuration's class has.
        of: the root classes for which it holds.
        sources: the check is called for each source of reward.
    """

    def register(check: Check) -> Check:
        RULES.append(Rule(check, tuple(of), roles, sources))
        return check

    return register
