"""Bringing up the processes of all roles on Ray."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RuntimeEnvSetupError

from rayrlhf.cluster import session
from rayrlhf.cluster.errors import START, Failure, RoleFailed
from rayrlhf.cluster.group import Group
from rayrlhf.cluster.ray_group import ActorGroup, end_processes
from rayrlhf.cluster.ray_logs import last_lines
from rayrlhf.cluster.ray_pending import Deadline, Members, answer, collect_failures, is_failure, root_failure
from rayrlhf.cluster.ray_process import RoleProcess
from rayrlhf.cluster.spec import RoleSpec, process_env, thread_count
from rayrlhf.config.base import ClusterConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.world import World

__all__ = ["check_gpus", "fits", "start_on_ray"]


def fits(wanted: Sequence[float], gpus: Sequence[int]) -> bool:
    """Whether processes which want so many GPUs each (a fraction: a share of one) find room on nodes with so many.

    Largest first, each on the fullest node or GPU that still takes it (best fit decreasing).
    """
    free = [[1.0] * count for count in gpus]
    for want in sorted(wanted, reverse=True):
        if want <= 0:
            continue
        if want >= 1:
            node = min((n for n in free if n.count(1.0) >= want), key=lambda n: n.count(1.0), default=None)
            if node is None:
                return False
            for _ in range(int(want)):
                node.remove(1.0)
                node.append(0.0)
            continue
        shares = [(left, n, i) for n, node in enumerate(free) for i, left in enumerate(node) if left >= want - 1e-9]
        if not shares:
            return False
        _, n, i = min(shares)
        free[n][i] -= want
    return True


def check_gpus(specs: Sequence[RoleSpec], gpus: Sequence[int]) -> None:
    """Refuse roles for which the nodes, with so many GPUs each, have no room.

    Raises:
        InputRefused: with what each role asks for, and what there is.
    """
    wanted = [spec.gpus_per_rank for spec in specs for _ in range(spec.ranks)]
    if not any(wanted) or fits(wanted, gpus):
        return
    asked = ", ".join(f"{s.name} {s.ranks} x {s.gpus_per_rank:g}" for s in specs if s.gpus_per_rank > 0)
    there = " + ".join(str(count) for count in gpus if count) or "0"
    raise InputRefused(
        f"the roles ask for {sum(wanted):g} GPUs ({asked}); the Ray cluster has {sum(gpus)} ({there} on its nodes). "
        "Lower the ranks, or add nodes"
    )


@dataclass
class _Process:
    spec: RoleSpec
    rank: int
    members: Members
    handle: Any
    state: str = "waiting for its process"
    closes: bool = False


@dataclass
class _Start:
    """The state of a start: which references are awaited, and what they are."""

    settings: ClusterConfig
    processes: list[_Process]
    waiting: dict[ray.ObjectRef, int] = field(default_factory=dict)
    building: set[ray.ObjectRef] = field(default_factory=set)

    def run(self) -> None:
        """Until everything is up.

        Raises:
            RoleFailed: at the first failure, or when time is over.
        """
        deadline = Deadline(None, self.settings.start_timeout_s, "cluster.start_timeout_s")
        for number, process in enumerate(self.processes):
            self.waiting[process.handle.describe.remote()] = number
        while self.waiting:
            ready, _ = ray.wait(list(self.waiting), num_returns=1, timeout=min(1.0, deadline.left()))
            for ref in ready:
                self._take(ref)
            if not ready and deadline.left() == 0:
                raise self._late(deadline)

    def _take(self, ref: ray.ObjectRef) -> None:
        number, value = self.waiting.pop(ref), answer(ref)
        process = self.processes[number]
        if is_failure(value):
            problems = collect_failures(self.waiting, {number: value})
            number, problem = root_failure(problems)
            raise self._failed(self.processes[number], problem)
        if ref in self.building:
            process.state, process.closes = "up", value
            return
        process.members.infos[process.rank] = value
        process.state = "waiting for rank 0"
        if process.rank == 0:
            self._build(process)

    def _build(self, first: _Process) -> None:
        """Rank 0 is there: its group knows now where to meet."""
        info = first.members.infos[0]
        assert info is not None
        threads = thread_count(self.settings)
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

    @staticmethod
    def _failed(process: _Process, problem: Failure | RayError) -> RoleFailed:
        if isinstance(problem, RuntimeEnvSetupError | ActorUnschedulableError) or "creation task" in str(problem):
            # The process never came as far as our own code: all there is, is Ray's text.
            text = [line for line in str(problem).splitlines() if line.strip()]
            problem = Failure(text[-1].strip() if text else type(problem).__name__, tuple(text[-12:-1]))
        return process.members.failed(process.rank, START, problem)

    def _late(self, deadline: Deadline) -> RoleFailed:
        missing = [p for p in self.processes if p.state != "up"]
        lines: list[str] = []
        for p in missing:
            info = p.members.infos[p.rank]
            doing = "in its constructor" if info is not None and p.members.infos[0] is not None else p.state
            lines.append(f"{p.spec.name} rank {p.rank}: {doing}" + (f", log: {info.log}" if info else ""))
            lines += [f"    {line}" for line in last_lines(info)]
        first = missing[0]
        message = (
            f"{len(missing)} of {len(self.processes)} processes were not up within {deadline.seconds:g} s (deadline "
            f"{deadline.origin}):\n" + "\n".join(f"  {line}" for line in lines)
        )
        free = ray.available_resources().get("GPU", 0)
        wanted = sum(p.spec.gpus_per_rank for p in missing if p.members.infos[p.rank] is None)
        if wanted:
            message += f"\n  {wanted:g} GPUs are still waited for, {free:g} are free: other programs may hold the rest"
        cause = f"not up within {deadline.seconds:g} s"
        return RoleFailed(first.spec.name, first.rank, START, cause, message, first.members.log(first.rank))


def _make(spec: RoleSpec, settings: ClusterConfig) -> list[_Process]:
    env = process_env(spec, settings)
    if session.is_private():
        env.setdefault("PYTHONPATH", _own_path())
    options = ray.remote(RoleProcess).options(
        num_cpus=0, num_gpus=spec.gpus_per_rank, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": env}
    )
    members = Members(spec.name, spec.ranks)
    return [_Process(spec, rank, members, options.remote()) for rank in range(spec.ranks)]


def _own_path() -> str:
    """What this process can import and a fresh Python can't: a role's module is found in its process as it is here."""
    usual = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    found = [os.path.abspath(entry) for entry in sys.path]
    paths = [p for p in found if os.path.isdir(p) and not any(os.path.realpath(p).startswith(u) for u in usual)]
    return os.pathsep.join(dict.fromkeys(paths))


def start_on_ray(specs: Sequence[RoleSpec], settings: ClusterConfig) -> dict[str, Group]:
    """See `rayrlhf.cluster.start.start_groups`."""
    if not ray.is_initialized():
        raise RuntimeError("start_groups needs a Ray session: with ray_session(settings): ...")
    check_gpus(specs, [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]])
    processes = [process for spec in specs for process in _make(spec, settings)]
    try:
        _Start(settings, processes).run()
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
