"""Whose turn it is: roles that share GPUs keep their states in host memory while others work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Literal

from rayrlhf.cluster import Group, Groups, Pending
from rayrlhf.config.base import ClusterConfig
from rayrlhf.planning.placement import Placement

__all__ = ["Level", "Turns"]

Level = Literal["none", "weights", "all"]
"""What a role has on its GPUs. ``none``: nothing. ``weights``: enough for forwards, for publishing and for receiving weights.
``all``: a trainer's optimizer and gradients too, or an engine's KV cache."""

_HEIGHT: dict[Level, int] = {"none": 0, "weights": 1, "all": 2}
ROLLOUT = "rollout"
"""The role whose engines sleep and wake up; all others are told where their states belong."""


class Turns:
    """Who is on the GPUs that roles share.

    Roles without GPUs, and those whose GPUs nobody else has, are always there: they are never called, and without shared
    GPUs nobody is.

    Args:
        groups: by role. What they have on their GPUs at first isn't known: whoever shares GPUs goes once before the first
            turn there.
        placement: who shares GPUs; None: nobody.
        offload_idle: false: everything stays where it is.
    """

    def __init__(self, groups: Mapping[str, Group], placement: Placement | None, offload_idle: bool = True):
        self._groups = groups
        self._sharing: dict[str, frozenset[str]] = {}
        if placement is not None and offload_idle:
            others = {role: placement.sharing(role) & groups.keys() for role in groups}
            self._sharing = {role: shared for role, shared in others.items() if shared}
        # None: nobody knows, as nobody has asked yet, or a move has failed.
        self._levels: dict[str, Level | None] = dict.fromkeys(self._sharing)
        self._seconds = 0.0

    @classmethod
    def of(cls, groups: Groups, cluster: ClusterConfig) -> Turns:
        """Of roles as they were placed when they were started."""
        return cls(groups, groups.placement, cluster.offload_idle)

    @property
    def any(self) -> bool:
        """Whether anybody takes turns."""
        return bool(self._sharing)

    def together(self, one: str, other: str) -> bool:
        """Whether two roles can work at the same time."""
        return other not in self._sharing.get(one, ())

    def take(self, wanted: Mapping[str, Level]) -> None:
        """See to it that roles have on their GPUs what they need, after everybody else there has gone.

        Where somebody has to come in, those who share its GPUs keep what they are named with, and nothing if they aren't.
        They go first, all at the same time (but for an engine whose KV cache is away: it goes after the others), and are waited
        for: the states of two that take turns never need room at once.
        Where all have what they need nothing is called.

        Args:
            wanted: by role. Roles that the run doesn't have, and those that share with nobody, are passed over.

        Raises:
            RunFailed: a role failed. Nothing was brought in that waits for its going.
        """
        begun = time.monotonic()
        try:
            coming = {role for role, level in wanted.items() if role in self._levels and self._lacks(role, level)}
            touched = coming.union(*(self._sharing[role] for role in coming))
            targets = {role: wanted.get(role, "none") for role in self._levels if role in touched}
            self._leave(targets)
            self._move(targets)
        finally:
            self._seconds += time.monotonic() - begun

    def send_away(self, roles: Iterable[str]) -> None:
        """Let roles that share GPUs leave them; where an engine has its weights alone there, all others go too."""
        self._leave({role: "none" for role in roles if role in self._levels})

    def clear_for(self, roles: Iterable[str]) -> None:
        """After a failure: end all other roles on the GPUs of these.

        They aren't sent away: whoever is dead, or busy for long, would be waited for. They can't be called any more.
        """
        kept = set(roles)
        others = frozenset().union(*(self._sharing.get(role, frozenset()) for role in kept)) - kept
        for other in sorted(others):
            self._groups[other].close()
            del self._sharing[other], self._levels[other]
        self._sharing = {role: others & self._sharing.keys() for role, others in self._sharing.items()}

    def take_seconds(self) -> float:
        """Seconds that `take` took since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # -- inside -------------------------------------------------------------------------------------------------

    def _lacks(self, role: str, level: Level) -> bool:
        present = self._levels[role]
        return present is None or _HEIGHT[present] < _HEIGHT[level]

    def _leave(self, targets: Mapping[str, Level]) -> None:
        """Let roles go, as far as they do before anybody comes in."""
        falls_asleep = ROLLOUT in targets and self._before(ROLLOUT, targets[ROLLOUT]) == "none"
        if falls_asleep and self._levels[ROLLOUT] in ("weights", None):
            # It falls asleep as a whole, for which it takes its KV cache first: the others must have gone.
            self._move({role: "none" for role in self._sharing[ROLLOUT]})
        self._move({role: self._before(role, level) for role, level in targets.items()})

    def _before(self, role: str, target: Level) -> Level:
        """Where a role goes before anybody comes in: never above its present level."""
        present = self._levels[role]
        if present is not None and _HEIGHT[present] <= _HEIGHT[target]:
            return present
        # Engines fall asleep as a whole. Of whom nothing is known, nothing may be left.
        return "none" if role == ROLLOUT or present is None else target

    def _move(self, targets: Mapping[str, Level]) -> None:
        calls: list[tuple[str, Level, Pending]] = []
        for role, target in targets.items():
            present = self._levels[role]
            if present == target:
                continue
            self._levels[role] = None
            calls.append((role, target, self._call(role, present, target)))
        for role, target, call in calls:
            call.result()
            self._levels[role] = target

    def _call(self, role: str, present: Level | None, target: Level) -> Pending:
        group = self._groups[role]
        if role != ROLLOUT:
            return group.broadcast_async("set_residence", level=target)
        if target == "none":
            return group.broadcast_async("sleep", level=1)
        return group.broadcast_async("wake", part="kv_cache" if present == "weights" else target)
