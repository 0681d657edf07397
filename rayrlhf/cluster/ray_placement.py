"""GPUs of a Ray cluster for the roles of a run: checked before any process starts, held together, and given back."""

from __future__ import annotations

import itertools
import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf.cluster import session
from rayrlhf.cluster.nodes import Node, NodeWatch, free_gpus, live_nodes, own_gpu_ids
from rayrlhf.cluster.ray_holders import holders
from rayrlhf.cluster.ray_pending import Deadline, answer, is_failure
from rayrlhf.config.base import ClusterConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.planning.claims import machines_of
from rayrlhf.planning.placement import Claim, Machine, Placement, Seat, Sharing, place

__all__ = ["Reservation", "reserve"]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
ATTEMPT_SECONDS = 5.0
"""After so long with some of the GPUs all are given back: another run may wait for them with the rest in its hands."""
PAUSE_SECONDS = (0.5, 3.0)
"""How long others may take them before the next attempt; not the same time for every run."""

_numbers = itertools.count()


class Reservation:
    """GPUs that a run holds: a placement group on each machine it uses. Nobody else gets them until `release`.

    Attributes:
        placement: which process of which role sits on which of them.
        nodes: the nodes that it uses, by the machine's index in ``placement``.
    """

    def __init__(
        self,
        placement: Placement,
        nodes: Mapping[int, Node],
        groups: Mapping[int, PlacementGroup],
        devices: Mapping[int, Sequence[str]],
    ):
        self.placement, self.nodes = placement, dict(nodes)
        self._groups, self._devices = dict(groups), devices
        self._seats = {(seat.role, seat.rank): seat for seat in placement.seats}

    def strategy(self, role: str, rank: int) -> PlacementGroupSchedulingStrategy:
        """What tells Ray to start a process there."""
        return PlacementGroupSchedulingStrategy(self._groups[self._seat(role, rank).machine])

    def node(self, role: str, rank: int) -> Node:
        """Where a process sits."""
        return self.nodes[self._seat(role, rank).machine]

    def devices(self, role: str, rank: int) -> str:
        """The process's GPUs as CUDA_VISIBLE_DEVICES names them."""
        seat = self._seat(role, rank)
        return ",".join(self._devices[seat.machine][number] for number in seat.gpus)

    def _seat(self, role: str, rank: int) -> Seat:
        return self._seats[role, rank]

    def release(self) -> None:
        """Give the GPUs back. May be called twice."""
        groups, self._groups = self._groups, {}
        _remove(groups.values())


def reserve(
    claims: Sequence[Claim], sharing: Sharing, settings: ClusterConfig, tell: Callable[[str], object] | None = None
) -> Reservation:
    """Find and hold GPUs for all roles.

    Machines that may yet join, and GPUs that others hold, are waited for until cluster.placement_timeout_s.

    Args:
        tell: gets a line about what is waited for, as soon as that is known; by default it goes to the log alone.

    Raises:
        InputRefused: where the cluster is too small for them, whoever holds what: at once where no machine can join.
        RunFailed: where others hold them until the deadline, with what is asked for, what is free and who holds the rest;
            nothing is held then.
    """
    deadline = Deadline(None, settings.placement_timeout_s, "cluster.placement_timeout_s")
    if named := machines_of(settings):
        place(claims, sharing, named)  # raises where the machines that are planned would be too few
    may_grow = not session.is_private() and (settings.address is not None or len(named) > 1)
    tell = tell or (lambda line: log.warning("%s", line))
    chance = random.Random(os.urandom(8))
    enough, told = False, ""
    while True:
        nodes, found = live_nodes(), None
        missing = _missing(claims, sharing, settings, nodes)
        if missing is None:
            enough = True
            found = _assign_free(claims, sharing, settings, nodes)
            groups = None if found is None else _attempt(*found, deadline)
            if found is not None and groups is not None:
                return _reservation(*found, groups, settings)
        elif not (enough or may_grow):
            raise InputRefused(missing)
        if deadline.left() == 0:
            raise _too_late(claims, sharing, settings, nodes, deadline, missing, enough)
        waits_for = "GPUs" if missing is None else "; ".join(missing)
        if waits_for != told:
            told = waits_for
            tell(_waiting(deadline, missing, nodes))
        pause = PAUSE_SECONDS[0] if found is None else chance.uniform(*PAUSE_SECONDS)
        time.sleep(min(pause, deadline.left()))


# -- which machine of the plan is which node --------------------------------------------------------------------------

_Found = tuple[Placement, dict[int, Node]]


def _assign(
    claims: Sequence[Claim], sharing: Sharing, settings: ClusterConfig, nodes: Sequence[Node], gpus: Mapping[str, int]
) -> _Found:
    """A placement, and the nodes of the machines that it uses.

    Machines that the configuration names are placed on as planned, and found in the cluster then.

    Args:
        gpus: of each node, by its id: those that may be used.

    Raises:
        InputRefused: where there is no room.
    """
    named, nodes = machines_of(settings), [node for node in nodes if node.gpus]
    if not named:
        there = [Machine(node.name, gpus[node.id]) for node in nodes]
        try:
            placement = place(claims, sharing, there)
        except InputRefused as error:
            raise InputRefused(
                [f"{problem} (GPUs of the Ray cluster: {_listed(nodes)})" for problem in error.problems]
            ) from None
        used = {machine: nodes[machine] for machine in _used(placement)}
        return replace(placement, machines=tuple(Machine(node.name, node.gpus) for node in nodes)), used
    placement = place(claims, sharing, named)
    matched = _match(_used(placement), named, nodes, gpus)
    whole = _match({m: machine.gpus for m, machine in enumerate(named)}, named, nodes, {n.id: n.gpus for n in nodes})
    if matched is None or whole is None:
        raise InputRefused(
            f"cluster.nodes names {_kinds([m.gpus for m in named])}, the Ray cluster has "
            f"{_kinds([n.gpus for n in nodes])} ({_listed(nodes)}). Add what is missing, or name in cluster.nodes what there is"
        )
    machines = tuple(
        replace(machine, name=matched[m].name) if m in matched else machine for m, machine in enumerate(named)
    )
    return replace(placement, machines=machines), matched


def _missing(
    claims: Sequence[Claim], sharing: Sharing, settings: ClusterConfig, nodes: Sequence[Node]
) -> list[str] | None:
    """What the machines that are there lack, whoever holds what; None: they are enough."""
    try:
        _assign(claims, sharing, settings, nodes, {node.id: node.gpus for node in nodes})
    except InputRefused as refused:
        return refused.problems
    return None


def _assign_free(
    claims: Sequence[Claim], sharing: Sharing, settings: ClusterConfig, nodes: Sequence[Node]
) -> _Found | None:
    """A placement on GPUs that nobody holds; None where there are too few."""
    try:
        return _assign(claims, sharing, settings, nodes, free_gpus(nodes))
    except InputRefused:
        return None


def _used(placement: Placement) -> dict[int, int]:
    """How many GPUs of each machine are used, by the machine's index; machines of which none is, are left out."""
    return dict(sorted(Counter(machine for pool in placement.pools for machine, _ in pool.gpus).items()))


def _match(
    wanted: Mapping[int, int], named: Sequence[Machine], nodes: Sequence[Node], gpus: Mapping[str, int]
) -> dict[int, Node] | None:
    """A node for each machine, with as many GPUs as are wanted of it: rather one of the machine's own size, then the
    smallest that does. None where there aren't enough."""
    left, matched = list(nodes), {}
    for machine in sorted(wanted, key=lambda m: (-wanted[m], -named[m].gpus, m)):
        fitting = [node for node in left if gpus[node.id] >= wanted[machine]]
        if not fitting:
            return None
        size = named[machine].gpus
        matched[machine] = min(fitting, key=lambda node: (node.gpus != size, node.gpus))
        left.remove(matched[machine])
    return dict(sorted(matched.items()))


# -- holding the GPUs -------------------------------------------------------------------------------------------------


def _attempt(placement: Placement, nodes: Mapping[int, Node], deadline: Deadline) -> dict[int, PlacementGroup] | None:
    """Hold what a placement uses; None where others were quicker, with everything given back."""
    groups: dict[int, PlacementGroup] = {}
    end = time.monotonic() + min(ATTEMPT_SECONDS, max(deadline.left(), POLL_SECONDS))
    try:
        for machine, gpus in _used(placement).items():
            # One bundle of several GPUs is on one node by its nature.
            groups[machine] = placement_group(
                [{"GPU": gpus}],
                "STRICT_PACK",
                name=f"rayrlhf {socket.gethostname()} {os.getpid()} {next(_numbers)}",
                bundle_label_selector=[{"ray.io/node-id": nodes[machine].id}],
            )
        while not all(_held(group) for group in groups.values()):
            if time.monotonic() >= end:
                _remove(groups.values())
                return None
            time.sleep(POLL_SECONDS)
    except BaseException:
        _remove(groups.values())
        raise
    return groups


def _held(group: PlacementGroup) -> bool:
    return placement_group_table(group).get("state") == "CREATED"


def _remove(groups: Any) -> None:
    if ray.is_initialized():
        for group in groups:
            remove_placement_group(group)


def _reservation(
    placement: Placement, nodes: Mapping[int, Node], groups: Mapping[int, PlacementGroup], settings: ClusterConfig
) -> Reservation:
    try:
        devices = _devices(placement, nodes, groups, settings)
    except BaseException:
        _remove(groups.values())
        raise
    return Reservation(placement, nodes, groups, devices)


def _devices(
    placement: Placement, nodes: Mapping[int, Node], groups: Mapping[int, PlacementGroup], settings: ClusterConfig
) -> dict[int, list[str]]:
    """The ids of the GPUs that are held, by machine, in ascending order: neighbours are often linked more closely.

    Raises:
        RunFailed: where a node doesn't say.
    """
    task = ray.remote(own_gpu_ids)
    waiting = {
        task.options(
            num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=PlacementGroupSchedulingStrategy(groups[machine])
        ).remote(): machine
        for machine, gpus in _used(placement).items()
    }  # fmt: skip
    found: dict[int, list[str]] = {}
    watch, deadline = NodeWatch(nodes.values()), Deadline(None, settings.start_timeout_s, "cluster.start_timeout_s")
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=min(1.0, deadline.left()))
        for ref in ready:
            machine, value = waiting.pop(ref), answer(ref)
            if is_failure(value):
                raise RunFailed(f"node {nodes[machine].name} can't start processes: {value}")
            found[machine] = sorted(value, key=lambda gpu: (0, int(gpu), "") if gpu.isdigit() else (1, 0, gpu))
        if (gone := watch.lost()) is not None:
            raise RunFailed(f"node {gone.name} left the cluster while the roles were starting: it no longer answers")
        if not ready and deadline.left() == 0:
            silent = ", ".join(nodes[machine].name for machine in waiting.values())
            raise RunFailed(
                f"node {silent} started no process within {deadline.seconds:g} s (deadline {deadline.origin}): "
                "see the logs of its raylet"
            )
    return found


# -- what is said -----------------------------------------------------------------------------------------------------


def _kinds(gpus: Sequence[int]) -> str:
    """``2 machines of 8 GPUs and 1 machine of 4 GPUs``; machines without any aren't counted."""
    counts = sorted(Counter(count for count in gpus if count).items(), reverse=True)
    parts = [f"{n} machine{'s' if n > 1 else ''} of {g} GPU{'s' if g > 1 else ''}" for g, n in counts]
    return " and ".join(parts) or "no GPUs"


def _listed(nodes: Sequence[Node]) -> str:
    return ", ".join(f"{node.name}: {node.gpus}" for node in nodes) or "no node answers"


def _state(nodes: Sequence[Node]) -> list[str]:
    """Each node with GPUs, and what holds some."""
    free = free_gpus(nodes)
    lines = [f"{node.name}: {free[node.id]} of {node.gpus} GPUs free" for node in nodes if node.gpus]
    return [*lines, *holders(nodes, free)]


def _waiting(deadline: Deadline, missing: Sequence[str] | None, nodes: Sequence[Node]) -> str:
    """One line for who sits before the terminal."""
    if missing is None:
        return f"waiting up to {deadline.left():.0f} s for GPUs: {'; '.join(_state(nodes))}"
    return f"waiting up to {deadline.left():.0f} s for machines to join the Ray cluster: {'; '.join(missing)}"


def _too_late(
    claims: Sequence[Claim],
    sharing: Sharing,
    settings: ClusterConfig,
    nodes: Sequence[Node],
    deadline: Deadline,
    missing: Sequence[str] | None,
    enough: bool,
) -> Exception:
    """Why nothing is held at the deadline.

    Args:
        missing: what the machines that are there lack.
        enough: there were enough of them for a while.
    """
    if missing is None:
        return RunFailed(_busy(claims, sharing, settings, nodes, deadline))
    if enough:
        return RunFailed(f"nodes left the cluster while this run waited for GPUs: {'; '.join(missing)}")
    waited = f"no more machines joined within {deadline.seconds:g} s (deadline {deadline.origin})"
    return InputRefused([f"{problem}; {waited}" for problem in missing])


def _busy(
    claims: Sequence[Claim], sharing: Sharing, settings: ClusterConfig, nodes: Sequence[Node], deadline: Deadline
) -> str:
    placement, _ = _assign(claims, sharing, settings, nodes, {node.id: node.gpus for node in nodes})
    each = " + ".join(str(count) for count in _used(placement).values())
    total = sum(_used(placement).values())
    asked = ", ".join(f"{c.role} {c.processes}" + (f" x {c.gpus}" if c.gpus > 1 else "") for c in claims if c.gpus)
    on = f"{each} on so many machines" if "+" in each else "on one machine"
    state = "".join(f"\n  {line}" for line in _state(nodes))
    return (
        f"{total} GPUs ({on}: {asked}) were not free at the same time within {deadline.seconds:g} s (deadline "
        f"{deadline.origin}):{state}\n"
        "Wait until they are given back, end what holds them, or raise cluster.placement_timeout_s"
    )
