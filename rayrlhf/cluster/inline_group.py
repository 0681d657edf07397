"""A role in the driver's own process: breakpoints work, and tracebacks are whole."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rayrlhf.batch import Batch
from rayrlhf.cluster.check import check_role
from rayrlhf.cluster.clock import BusyClock
from rayrlhf.cluster.errors import START, Failure, RoleFailed
from rayrlhf.cluster.group import Group, Pending, check_chunk, check_new_columns
from rayrlhf.cluster.sharing import Pile
from rayrlhf.cluster.spec import RoleSpec, load_class, process_env, thread_count
from rayrlhf.config.base import ClusterConfig
from rayrlhf.errors import InputRefused
from rayrlhf.importing import release_closed
from rayrlhf.models.world import World

__all__ = ["InlineGroup", "start_inline"]


class DonePending(Pending):
    """A call that has already been made; its error is raised when the result is asked for, as it is with Ray."""

    def __init__(self, value: Any = None, error: RoleFailed | None = None):
        self._value, self._error = value, error

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


class InlineGroup(Group):
    """The one rank of a role, in this process. Deadlines don't apply."""

    size = shards = 1

    def __init__(self, name: str, role: Any):
        self.name = name
        self._role: Any = role
        self._clock = BusyClock()

    @property
    def addresses(self) -> list[str]:
        return [socket.gethostname()]

    def submit(self, method: str, batch: Batch, *, timeout_s: float | None = None, **kwargs: Any) -> Pending:
        def run() -> Batch:
            with self._clock.timed(method):
                return check_new_columns(getattr(self._alive(), method)(batch, **kwargs), batch, method)

        return self._now(method, run)

    def broadcast_async(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> Pending:
        def run() -> list[Any]:
            if method == "take_busy":
                return [self._clock.take_busy()]
            with self._clock.timed(method):
                return [getattr(self._alive(), method)(**kwargs)]

        return self._now(method, run)

    def stream(
        self, method: str, batches: Sequence[Batch], *, timeout_s: float | None = None, **kwargs: Any
    ) -> Iterator[Batch]:
        self.check_streams(batches)
        return self._stream(method, batches[0], kwargs)

    def stream_shared(
        self,
        method: str,
        batch: Batch,
        units: Sequence[Sequence[int]],
        *,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Iterator[Batch]:
        return self._stream(method, batch, {**kwargs, "share": Pile(units)})

    def _stream(self, method: str, batch: Batch, kwargs: Mapping[str, Any]) -> Iterator[Batch]:
        chunks = None
        while True:
            try:
                with self._clock.timed(method):
                    chunks = iter(getattr(self._alive(), method)(batch, **kwargs)) if chunks is None else chunks
                    chunk = next(chunks)
                check_chunk(chunk, method)
            except StopIteration:
                return
            except Exception as error:
                raise RoleFailed.raised(self.name, 0, method, Failure.of(error)) from error
            yield chunk

    def _now(self, method: str, run: Any) -> Pending:
        self._alive()
        try:
            return DonePending(run())
        except Exception as error:
            failed = RoleFailed.raised(self.name, 0, method, Failure.of(error))
            failed.__cause__ = error
            return DonePending(error=failed)

    def _alive(self) -> Any:
        if self._role is None:
            raise RuntimeError(f"group {self.name} is closed")
        return self._role

    def close(self) -> None:
        role, self._role = self._role, None
        if hasattr(role, "close"):
            role.close()
        release_closed()


def start_inline(specs: Sequence[RoleSpec], settings: ClusterConfig) -> dict[str, Group]:
    """Build every role in this process, in the order given.

    Raises:
        InputRefused: where a role has several ranks, or several GPUs for one; or where roles refuse what they were given.
        RoleFailed: where a role's check, which all pass before any is built, or its constructor raises anything else; chained
            to its exception.
    """
    several = [
        f"{spec.name}: {spec.ranks} ranks; cluster.executor=inline has one process, so ranks must be 1"
        for spec in specs
        if spec.ranks > 1
    ]
    several += [
        f"{spec.name}: {spec.gpus_per_rank} GPUs for one process; cluster.executor=inline has one process, with one GPU"
        for spec in specs
        if spec.gpus_per_rank > 1
    ]
    if several:
        raise InputRefused(several)
    for spec in specs:
        for name, value in process_env(spec, settings, thread_count(settings)).items():
            os.environ.setdefault(name, value)
    groups: dict[str, Group] = {}
    try:
        _check(specs)
        for spec in specs:
            groups[spec.name] = InlineGroup(spec.name, _build(spec, settings))
    except BaseException:
        for group in groups.values():
            group.close()
        raise
    return groups


def _check(specs: Sequence[RoleSpec]) -> None:
    refused: list[str] = []
    for spec in specs:
        try:
            with _told(spec):
                check_role(spec.build, spec.kwargs)
        except InputRefused as error:
            refused += error.problems
    if refused:
        raise InputRefused(refused)


def _build(spec: RoleSpec, settings: ClusterConfig) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = World(0, 1, "127.0.0.1", port, settings.device, thread_count(settings))
    with _told(spec):
        return load_class(spec.build)(world=world, **spec.kwargs)


@contextmanager
def _told(spec: RoleSpec) -> Iterator[None]:
    """Within it an exception is told as that of the role's start."""
    try:
        yield
    except InputRefused as refused:
        raise InputRefused(f"{spec.name}: {problem}" for problem in refused.problems) from refused
    except Exception as error:
        raise RoleFailed.raised(spec.name, 0, START, Failure.of(error)) from error
