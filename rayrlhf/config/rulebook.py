"""What a rule across keys is, and the book in which they all stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rayrlhf.config.base import JobConfig
from rayrlhf.config.roots import Root

__all__ = ["RULES", "Rule", "Violation", "rule"]


class Violation(NamedTuple):
    """A broken rule: the keys that it is about, the one to mend first, and what was found and is legal."""

    keys: tuple[str, ...]
    message: str


Check = Callable[..., Iterator[Violation]]


class Rule(NamedTuple):
    """A check, called with the configuration and, where the rule is about several, with each role, or each source of
    scores and its key."""

    check: Check
    of: tuple[Root, ...]
    """The root classes for which it holds."""
    roles: tuple[str, ...]
    sources: bool

    @property
    def doc(self) -> str:
        return " ".join((self.check.__doc__ or "").split())

    def arguments(self, config: Any, root: type[JobConfig]) -> list[tuple[Any, ...]]:
        """The arguments of all calls: none where the rule doesn't hold for the root class."""
        if not issubclass(root, self.of):
            return []
        if self.sources:
            return score_sources(config, root)
        return [(config, role) for role in self.roles if role in root.model_fields] if self.roles else [(config,)]


RULES: list[Rule] = []


def score_sources(config: Any, root: type[JobConfig]) -> list[tuple[Any, str]]:
    """All that scores responses in a configuration, each with its key."""
    found: list[tuple[Any, str]] = []
    if "reward" in root.model_fields:
        found += [(config.reward.sources[i], f"reward.sources.{i}") for i in range(len(config.reward.sources))]
        if getattr(config.reward, "gold", None) is not None:
            found.append((config.reward.gold, "reward.gold"))
    if "scores" in root.model_fields:
        named = ((name, getattr(config.scores, name)) for name in ("reward", "safety", "helpfulness"))
        found += [(source, f"scores.{name}") for name, source in named if source is not None]
    return found


def rule(*roles: str, of: Sequence[Root], sources: bool = False) -> Callable[[Check], Check]:
    """Put a check into the book.

    Args:
        roles: the check is called for each of these sections that the configuration's class has.
        of: the root classes for which it holds.
        sources: the check is called for each source of scores and its key, and not with the configuration.
    """

    def register(check: Check) -> Check:
        RULES.append(Rule(check, tuple(of), roles, sources))
        return check

    return register
