"""Waiting for the ranks of a group, with a deadline and without waiting for more than the first failure."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from rayrlhf.batch import Batch
from rayrlhf.cluster.columns import Block, WireBatch, from_wire
from rayrlhf.cluster.errors import Failure, RoleFailed
from rayrlhf.cluster.group import Pending
from rayrlhf.cluster.nodes import lost_nodes
from rayrlhf.cluster.ray_logs import cause_of_death, last_lines
from rayrlhf.cluster.ray_process import ProcessInfo

__all__ = ["Deadline", "Members", "RayPending", "RayStream", "root_failure", "wait_any_ray"]

GRACE_SECONDS = 2.0
"""After a first exception in a group of several: a rank that dies takes the others down with it ("connection closed by
peer"), and their errors may arrive before the word of its death, which goes by way of its node and of Ray's head."""


LOOK_SECONDS = 0.05
"""How long a failure of one rank may go unnoticed while others are waited for."""


DEATH_SECONDS = 10.0
"""How long Ray may take to say that a process which it no longer reaches is dead, and how it died; by itself it waits 1 s
for that. Then the process counts as dead all the same."""


TOGETHER_SECONDS = 0.002
"""How long what one rank has streamed may wait for what others stream at about the same time."""


class Deadline:
    """A limit, and where it comes from."""

    def __init__(self, timeout_s: float | None, default_s: float, key: str = "cluster.call_timeout_s"):
        self.seconds = default_s if timeout_s is None else timeout_s
        self.origin = key if timeout_s is None else "of this call"
        self.restart()

    def restart(self) -> None:
        self.end = time.monotonic() + self.seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


class Members:
    """Which processes a group consists of, for error messages, and whether it can still be called."""

    def __init__(self, role: str, size: int):
        self.role = role
        self.infos: list[ProcessInfo | None] = [None] * size
        self.handles: list[Any] = [None] * size
        self.broken: RoleFailed | None = None

    def log(self, rank: int) -> str | None:
        info = self.infos[rank]
        return info.log if info else None

    def failed(self, rank: int, phase: str, problem: Failure | RayError) -> RoleFailed:
        """The error for what a rank answered.

        A group is of no more use once a process is gone, or where ranks may wait for one another.
        """
        if isinstance(problem, Failure):
            error = RoleFailed.raised(self.role, rank, phase, problem, self.log(rank))
            final = len(self.infos) > 1
        elif isinstance(problem, RayActorError | WorkerCrashedError | OutOfMemoryError):
            error, final = self._died(rank, phase, problem), True
        else:
            error = RoleFailed.raised(self.role, rank, phase, Failure.of(problem), self.log(rank))
            final = True
        if final and self.broken is None:
            self.broken = error
        return error

    def _died(self, rank: int, phase: str, problem: RayError) -> RoleFailed:
        info = self.infos[rank]
        lost = {} if info is None else lost_nodes([info.node_id])
        if info is not None and lost:
            cause = f"its node {lost[info.node_id]} left the cluster: it no longer answers"
            return RoleFailed.died(self.role, rank, phase, cause, self.log(rank))
        problem, lines = last_word(self.handles[rank], problem), last_lines(info)
        return RoleFailed.died(self.role, rank, phase, cause_of_death(problem, lines), self.log(rank), lines)

    def late(self, rank: int, phase: str, deadline: Deadline) -> RoleFailed:
        error = RoleFailed.late(
            self.role, rank, phase, deadline.seconds, deadline.origin, self.log(rank), last_lines(self.infos[rank])
        )
        self.broken = self.broken or error
        return error


def last_word(handle: Any, problem: RayError) -> RayError:
    """How a process died, where Ray has so far only said that it doesn't reach it; the same again where that is all."""
    end = time.monotonic() + DEATH_SECONDS
    while isinstance(problem, ActorUnavailableError) and (left := end - time.monotonic()) > 0:
        try:
            ray.get(handle.look.remote(), timeout=left)
        except RayActorError as error:
            problem = error
            time.sleep(LOOK_SECONDS)
        except GetTimeoutError:
            break
        else:
            break
    return problem


def answer(ref: ray.ObjectRef) -> Any:
    """What a reference that is ready holds: the answer, a `Failure`, or Ray's own error as a value."""
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def answers(refs: Sequence[ray.ObjectRef]) -> list[Any]:
    """`answer` of several references, in one go where none of them is an error of Ray."""
    try:
        return ray.get(list(refs))
    except RayError:
        return [answer(ref) for ref in refs]


def is_failure(value: Any) -> bool:
    return isinstance(value, Failure | RayError)


def root_failure(problems: dict[int, Failure | RayError]) -> tuple[int, Failure | RayError]:
    """The rank of several that failed by itself: a dead process before exceptions, the earliest of these."""

    def order(item: tuple[int, Failure | RayError]) -> tuple:
        rank, problem = item
        return (1, problem.time, rank) if isinstance(problem, Failure) else (0, 0.0, rank)

    return min(problems.items(), key=order)


def collect_failures(
    waiting: dict[ray.ObjectRef, int], problems: dict[int, Failure | RayError]
) -> dict[int, Failure | RayError]:
    """Failures of further ranks which follow within the grace period; none after a death, which explains the others."""
    end = time.monotonic() + GRACE_SECONDS
    while waiting and (left := end - time.monotonic()) > 0 and all(isinstance(p, Failure) for p in problems.values()):
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
        for ref in ready:
            rank, value = waiting.pop(ref), answer(ref)
            if is_failure(value):
                problems.setdefault(rank, value)  # what a rank failed at first is why it fails at the rest
    return problems


class RayPending(Pending):
    """The answers of all ranks to one call.

    Args:
        refs: for each rank the references of its answer and of its columns.
        merge: makes the result of the answers (see `RoleProcess.run`) and the blocks of columns.
    """

    def __init__(
        self,
        members: Members,
        method: str,
        refs: Sequence[tuple[ray.ObjectRef, ray.ObjectRef]],
        deadline: Deadline,
        merge: Callable[[list[Any], list[Block]], Any],
    ):
        self._members, self._method, self._merge = members, method, merge
        self.deadline = deadline
        self._waiting = {answer_ref: rank for rank, (answer_ref, _) in enumerate(refs)}
        self._blocks = [Block(columns) for _, columns in refs]
        self._answers: list[Any] = [None] * len(refs)
        self._error: RoleFailed | None = None
        self._value: Any = None
        self._merged = False

    @property
    def waiting(self) -> list[ray.ObjectRef]:
        return list(self._waiting)

    def done(self) -> bool:
        self._advance(0.0)
        return self._error is not None or not self._waiting

    def result(self) -> Any:
        while self._error is None and self._waiting:
            self._advance(self.deadline.left())
        if self._error is not None:
            raise self._error
        if not self._merged:
            self._value, self._merged = self._merge(self._answers, self._blocks), True
        return self._value

    def _advance(self, timeout: float) -> None:
        """Take in what is there; where that is nothing, what comes within ``timeout`` or some of it."""
        if self._error is not None or not self._waiting:
            return
        waiting = list(self._waiting)
        # Ray goes through all of the list each time: many ranks are waited for together, and looked at now and then.
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=min(timeout, LOOK_SECONDS))
        if not ready and self.deadline.left() == 0:
            rank = min(self._waiting.values())
            self._error = self._members.late(rank, self._method, self.deadline)
        problems: dict[int, Failure | RayError] = {}
        for ref, value in zip(ready, answers(ready), strict=True):
            rank = self._waiting.pop(ref)
            self._answers[rank] = value
            if is_failure(value):
                problems[rank] = value
        if problems:
            problems = collect_failures(self._waiting, problems)
            rank, problem = root_failure(problems)
            self._error = self._members.failed(rank, self._method, problem)


def wait_any_ray(pendings: Sequence[Pending], timeout: float | None) -> list[Pending]:
    """`rayrlhf.cluster.group.wait_any` for calls which are not done yet."""
    calls = [p for p in pendings if isinstance(p, RayPending)]
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = min(p.deadline.left() for p in calls)
        if end is not None:
            left = min(left, max(0.0, end - time.monotonic()))
        refs = [ref for p in calls for ref in p.waiting]
        if refs:
            ray.wait(refs, num_returns=1, timeout=left)
        done = [p for p in pendings if p.done()]
        if done or (end is not None and time.monotonic() >= end):
            return done


class RayStream(Iterator[Batch]):
    """The batches of a generator on each rank, as they come."""

    def __init__(self, members: Members, method: str, generators: Sequence[Any], deadlines: Sequence[Deadline]):
        self._members, self._method = members, method
        self._generators = dict(enumerate(generators))
        self._deadlines = deadlines
        self._columns: dict[int, ray.ObjectRef] = {}
        self._batches: deque[Batch] = deque()
        self._error: RoleFailed | None = None

    def __next__(self) -> Batch:
        while not self._batches and self._error is None and self._generators:
            self._advance(self._wait())
        if self._batches:
            return self._batches.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def _wait(self) -> list[int]:
        """Ranks with something to take, in their order; waits for the first of them."""
        generators = self._generators
        waiting = list(generators.values())
        left = min(self._deadlines[rank].left() for rank in generators)
        ready, _ = ray.wait(waiting, num_returns=1, timeout=left, fetch_local=False)
        if not ready:
            rank = min(generators, key=lambda r: self._deadlines[r].end)
            self._end(self._members.late(rank, self._method, self._deadlines[rank]))
            return []
        if (
            len(waiting) > 1
        ):  # Ray goes through all of the list each time: what comes at about this time is taken with it
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=TOGETHER_SECONDS, fetch_local=False)
        found = {id(generator) for generator in ready}
        return [rank for rank, generator in generators.items() if id(generator) in found]

    def _advance(self, ranks: Sequence[int]) -> None:
        """Take the next object of each of these ranks: columns are held until the rest of their batch is there."""
        rests: dict[int, ray.ObjectRef] = {}
        for rank in ranks:
            try:
                ref = next(self._generators[rank])
            except StopIteration:
                del self._generators[rank]
                if rank in self._columns:  # the stream broke off: what came last is an error, not columns
                    rests[rank] = self._columns[rank]
                continue
            if rank in self._columns:
                rests[rank] = ref
            else:
                self._columns[rank] = ref
        for rank, value in zip(rests, answers(list(rests.values())), strict=True):
            if is_failure(value) or not isinstance(value, WireBatch):
                problem = value if is_failure(value) else RayError("the stream broke off")
                self._end(self._members.failed(rank, self._method, problem))
                return
            self._deadlines[rank].restart()
            self._batches.append(from_wire(value, Block(self._columns.pop(rank))))

    def _end(self, error: RoleFailed) -> None:
        """No more is taken; what has been is handed out before the error."""
        self._generators, self._error = {}, error


def ask_quietly(refs: Sequence[ray.ObjectRef], seconds: float) -> None:
    """Wait for calls whose failure makes no difference any more: their processes are about to be ended."""
    try:
        ray.get(list(refs), timeout=seconds)
    except (RayError, GetTimeoutError):
        return
