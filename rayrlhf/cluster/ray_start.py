"""Bringing up the processes of all roles on Ray."""

from __future__ import annotations

import itertools
import os
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrlhf.cluster import session
from rayrlhf.cluster.errors import START, Failure, RoleFailed
from rayrlhf.cluster.group import Group
from rayrlhf.cluster.nodes import Node, NodeWatch, live_nodes
from rayrlhf.cluster.ray_end import end_processes
from rayrlhf.cluster.ray_group import ActorGroup
from rayrlhf.cluster.ray_logs import last_lines
from rayrlhf.cluster.ray_pending import Deadline, Members, answer, collect_failures, is_failure, root_failure
from rayrlhf.cluster.ray_placement import Reservation
from rayrlhf.cluster.ray_process import RoleProcess
from rayrlhf.cluster.spec import THREADS_VARIABLE, RoleSpec, process_env, thread_count, wanted_threads
from rayrlhf.config.base import ClusterConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.world import World

__all__ = ["check_session", "start_on_ray"]

LOOK_SECONDS = 1.0
"""Pause between two looks at processes that have nothing to do."""


@dataclass
class _Process:
    spec: RoleSpec
    rank: int
    members: Members
    handle: Any
    node: Node
    state: str = "waiting for its process"
    closes: bool = False


@dataclass
class _Start:
    """The state of a start: which references are awaited, and what they are."""

    settings: ClusterConfig
    processes: list[_Process]
    watch: NodeWatch
    queues: list[list[str]] = field(default_factory=list)
    """Roles that share GPUs, in the order in which they are built."""
    waiting: dict[ray.ObjectRef, int] = field(default_factory=dict)
    building: set[ray.ObjectRef] = field(default_factory=set)
    leaving: set[ray.ObjectRef] = field(default_factory=set)
    looks: set[ray.ObjectRef] = field(default_factory=set)
    """Those whose answers say nothing but that a process lives, and that its role finds nothing wrong (`check_role`)."""
    next_look: float = 0.0
    ready: dict[str, _Process] = field(default_factory=dict)
    """Rank 0 of each role which has yet to be built."""

    def run(self) -> None:
        """Until everything is up.

        Raises:
            InputRefused: where roles refuse what they were given, with all that those say which have found it by then.
            RoleFailed: at the first other failure, or when time is over.
        """
        deadline = Deadline(None, self.settings.start_timeout_s, "cluster.start_timeout_s")
        for number, process in enumerate(self.processes):
            self.waiting[process.handle.describe.remote()] = number
            self._await_look(number, process.handle.prepare.remote(process.spec.build, dict(process.spec.kwargs)))
        while self.waiting.keys() - self.looks:
            ready, _ = ray.wait(list(self.waiting), num_returns=1, timeout=min(1.0, deadline.left()))
            for ref in ready:
                self._take(ref)
            self._look_at_idle()
            if (gone := self.watch.lost()) is not None:
                raise self._left(gone)
            if not ready and deadline.left() == 0:
                raise self._late(deadline)

    def _take(self, ref: ray.ObjectRef) -> None:
        number, value = self.waiting.pop(ref), answer(ref)
        process = self.processes[number]
        if is_failure(value):
            problems = collect_failures(self.waiting, {number: value})
            number, problem = root_failure(problems)
            if isinstance(problem, Failure) and problem.problems:
                raise self._refused(problems)
            raise self._failed(self.processes[number], problem)
        if ref in self.looks:
            self.looks.discard(ref)
            return
        if ref in self.building:
            process.state, process.closes = "up", value
            self._leave(process.spec.name)
            return
        if ref in self.leaving:
            process.state = "at rest"
            self._build_ready()
            return
        process.members.infos[process.rank] = value
        if process.rank == 0:
            self.ready[process.spec.name] = process
            self._build_ready()

    def _await_look(self, number: int, ref: ray.ObjectRef) -> None:
        self.waiting[ref] = number
        self.looks.add(ref)

    def _look_at_idle(self) -> None:
        """Ask the processes of which nothing is awaited whether they live: those before their turn, and those that are up. Their
        death would be noticed when they are called, long after."""
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_SECONDS
        for number in set(range(len(self.processes))) - set(self.waiting.values()):
            self._await_look(number, self.processes[number].handle.look.remote())

    def _ranks(self, role: str) -> list[tuple[int, _Process]]:
        return [(number, process) for number, process in enumerate(self.processes) if process.spec.name == role]

    def _leave(self, role: str) -> None:
        """Let a role, once it is up, leave its GPUs to the one that is built next."""
        ranks = self._ranks(role)
        if not any(role in queue for queue in self.queues) or any(p.state != "up" for _, p in ranks):
            return
        if not self.settings.offload_idle:  # all of it stays
            self._build_ready()
            return
        for number, process in ranks:
            assert process.spec.rest is not None
            method, kwargs = process.spec.rest
            process.state = "leaving its GPUs"
            answer_ref, _ = process.handle.run.remote(method, None, dict(kwargs))
            self.waiting[answer_ref] = number
            self.leaving.add(answer_ref)

    def _build_ready(self) -> None:
        """Build all roles whose rank 0 is there and whose turn it is."""
        for role in list(self.ready):
            if not self._before(role):
                self._build(self.ready.pop(role))

    def _before(self, role: str) -> list[str]:
        """The roles that are built on its GPUs before it, and haven't left them yet."""
        queue = next((queue for queue in self.queues if role in queue), [role])
        done = "at rest" if self.settings.offload_idle else "up"
        return [one for one in queue[: queue.index(role)] if any(p.state != done for _, p in self._ranks(one))]

    def _build(self, first: _Process) -> None:
        """Rank 0 is there: its group knows now where to meet."""
        info = first.members.infos[0]
        assert info is not None
        threads = _threads(self.settings)
        for number, process in enumerate(self.processes):
            if process.members is not first.members:
                continue
            spec = process.spec
            world = World(
                process.rank, spec.ranks, info.address, info.port, self.settings.device, threads, spec.ranks_per_shard
            )
            ref = process.handle.build.remote(spec.build, world, dict(spec.kwargs))
            self.waiting[ref] = number
            self.building.add(ref)

    def _left(self, node: Node) -> RoleFailed:
        """The error for a node that doesn't answer any more."""
        process = next(p for p in self.processes if p.node == node)
        cause = f"its node {node.name} left the cluster: it no longer answers"
        return RoleFailed.died(process.spec.name, process.rank, START, cause, process.members.log(process.rank))

    def _refused(self, problems: dict[int, Failure | RayError]) -> InputRefused:
        """One line for each thing that a role refuses, with the first of its ranks on each node that does."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for number, problem in sorted(problems.items()):
            process = self.processes[number]
            for line in problem.problems if isinstance(problem, Failure) else ():
                found.setdefault((process.spec.name, line), {}).setdefault(process.node.name, process.rank)
        lines = [
            f"{role} {', '.join(f'rank {rank} on {node}' for node, rank in ranks.items())}: {line}"
            for (role, line), ranks in found.items()
        ]
        return InputRefused(lines, started=True)

    @staticmethod
    def _failed(process: _Process, problem: Failure | RayError) -> RoleFailed:
        if isinstance(problem, RuntimeEnvSetupError | ActorUnschedulableError) or "creation task" in str(problem):
            # The process never came as far as our own code: all there is, is Ray's text.
            text = [line for line in str(problem).splitlines() if line.strip()]
            problem = Failure(text[-1].strip() if text else type(problem).__name__, tuple(text[-12:-1]))
        return process.members.failed(process.rank, START, problem)

    def _late(self, deadline: Deadline) -> RoleFailed:
        missing = [p for p in self.processes if p.state not in ("up", "at rest")]
        lines: list[str] = []
        for p in missing:
            info = p.members.infos[p.rank]
            lines.append(f"{p.spec.name} rank {p.rank}: {self._doing(p)}" + (f", log: {info.log}" if info else ""))
            lines += [f"    {line}" for line in last_lines(info)]
        first = next((p for p in missing if p.spec.name not in self.ready), missing[0])
        message = (
            f"{len(missing)} of {len(self.processes)} processes were not up within {deadline.seconds:g} s (deadline "
            f"{deadline.origin}):\n" + "\n".join(f"  {line}" for line in lines)
        )
        cause = f"not up within {deadline.seconds:g} s"
        return RoleFailed(first.spec.name, first.rank, START, cause, message, first.members.log(first.rank))

    def _doing(self, process: _Process) -> str:
        """What a process is at that isn't up."""
        infos = process.members.infos
        if infos[process.rank] is None or process.state == "leaving its GPUs":
            return process.state
        if process.spec.name in self.ready:
            return f"waiting until {' and '.join(self._before(process.spec.name))} has left its GPUs"
        return "waiting for rank 0" if infos[0] is None else "in its constructor"


def _make(
    specs: Sequence[RoleSpec], settings: ClusterConfig, reservation: Reservation | None, beside: Sequence[ActorGroup]
) -> list[_Process]:
    """An actor for each rank of each role: those with GPUs where these are, the others by turns on the nodes there are."""
    live = live_nodes()
    turns = itertools.cycle([node for node in live if node.cpus] or live)
    placed = [
        (spec, rank, reservation.node(spec.name, rank) if spec.gpus_per_rank and reservation else next(turns))
        for spec in specs
        for rank in range(spec.ranks)
    ]
    threads = _threads(settings)
    # Several nodes at one address are one machine.
    sharers = Counter(node.address for *_, node in placed) + Counter(a for group in beside for a in group.addresses)
    members = {spec.name: Members(spec.name, spec.ranks) for spec in specs}
    processes = []
    for spec, rank, node in placed:
        env = process_env(spec, settings, threads)
        if session.is_private():
            env.setdefault("PYTHONPATH", _own_path())
        where: Any = NodeAffinitySchedulingStrategy(node.id, soft=False)
        if spec.gpus_per_rank and reservation is not None:
            env |= _visible(reservation.devices(spec.name, rank))
            where = reservation.strategy(spec.name, rank)
        elif settings.device == "cuda":
            env |= _visible("")
        handle = _actor(where, env, None if THREADS_VARIABLE in env else sharers[node.address])
        members[spec.name].handles[rank] = handle
        processes.append(_Process(spec, rank, members[spec.name], handle, node))
    return processes


def _threads(settings: ClusterConfig) -> int | None:
    """Threads of each process; None where each finds out by its own machine's cores."""
    return thread_count(settings) if session.is_private() else wanted_threads(settings)


def _visible(devices: str) -> dict[str, str]:
    """What lets a process see these GPUs alone, and keeps Ray from changing it."""
    return {"CUDA_VISIBLE_DEVICES": devices, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def _actor(where: Any, env: dict[str, str], sharers: int | None) -> Any:
    """A process of which Ray counts no GPU: several roles may sit on one, and the run holds it for all of them.

    Its GPUs are named in the environment with which it begins, so that they are its own before any library looks.

    Args:
        sharers: see `RoleProcess`.
    """
    options = ray.remote(RoleProcess).options(
        num_cpus=0,
        num_gpus=0,
        max_restarts=0,
        max_task_retries=0,
        runtime_env={"env_vars": env},
        scheduling_strategy=where,
    )
    return options.remote(sharers)


def _own_path() -> str:
    """What this process can import and a fresh Python can't: a role's module is found in its process as it is here."""
    usual = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found = [os.path.abspath(entry) for entry in sys.path]
    paths = [p for p in found if os.path.isdir(p) and not any(os.path.realpath(p).startswith(u) for u in usual)]
    return os.pathsep.join(dict.fromkeys(paths))


def check_session() -> None:
    """Raises RuntimeError where no Ray is there to start anything on."""
    if not ray.is_initialized():
        raise RuntimeError("start_groups needs a Ray session: with ray_session(settings): ...")


def _queues(specs: Sequence[RoleSpec], reservation: Reservation | None) -> list[list[str]]:
    """Roles on the same GPUs, by pool; the last of the specs first: engines measure the memory that is free."""
    if reservation is None:
        return []
    last_first = [spec.name for spec in reversed(specs) if spec.rest is not None and spec.gpus_per_rank]
    pools = [[name for name in last_first if name in pool.roles] for pool in reservation.placement.pools]
    return [pool for pool in pools if len(pool) > 1]


def start_on_ray(
    specs: Sequence[RoleSpec],
    settings: ClusterConfig,
    reservation: Reservation | None,
    beside: Iterable[Group] = (),
) -> dict[str, Group]:
    """See `rayrlhf.cluster.start.start_groups`; roles with GPUs sit where they are reserved.

    Args:
        beside: groups of the same run that are up already.
    """
    processes = _make(specs, settings, reservation, [group for group in beside if isinstance(group, ActorGroup)])
    try:
        queues = _queues(specs, reservation)
        _Start(settings, processes, NodeWatch(p.node for p in processes), queues).run()
    except BaseException:
        end_processes([(p.handle, p.members.infos[p.rank]) for p in processes])
        raise
    groups: dict[str, Group] = {}
    for spec in specs:
        mine = [p for p in processes if p.spec is spec]
        closes = any(p.closes for p in mine)
        groups[spec.name] = ActorGroup(
            mine[0].members, [p.handle for p in mine], settings.call_timeout_s, closes, spec.ranks_per_shard
        )
    return groups
