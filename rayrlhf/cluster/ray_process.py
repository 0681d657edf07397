"""What runs in a role's process. It is light: the role's own module is imported when the role is built."""

from __future__ import annotations

import glob
import os
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from rayrlhf.cluster.check import check_role
from rayrlhf.cluster.clock import BusyClock
from rayrlhf.cluster.errors import Failure
from rayrlhf.cluster.ray_share import RemoteShare, WireShare
from rayrlhf.cluster.spec import THREADS_VARIABLE, load_class
from rayrlhf.cores import usable_cores
from rayrlhf.importing import quick_imports, take_over_process

with quick_imports():
    import torch

    from rayrlhf.batch import Batch
    from rayrlhf.cluster.columns import WireBatch, from_wire, to_wire
    from rayrlhf.cluster.group import check_chunk, check_new_columns
    from rayrlhf.models.world import World

__all__ = ["ProcessInfo", "RoleProcess"]

_END = object()
SIOCGIFADDR = 0x8915
"""Asks for an interface's address (Linux, netdevice(7))."""


@dataclass(frozen=True)
class ProcessInfo:
    """Where a role's process is."""

    pid: int
    node_id: str
    address: str
    """IP address of its node."""
    port: int
    """A port that is free there."""
    log: str | None
    """Its log file on that node."""


class RoleProcess:
    """Runs one rank of a role as a Ray actor. Exceptions are handed back as data (`Failure`).

    Args:
        sharers: processes of the run on this machine, this one included, that divide its cores; None: its threads are set.
    """

    def __init__(self, sharers: int | None = None) -> None:
        take_over_process()
        self._threads = None if sharers is None else max(1, usable_cores() // sharers)
        if self._threads is not None:
            # Torch came with this class and has read the variable. What the role's module loads and starts reads it later.
            os.environ[THREADS_VARIABLE] = str(self._threads)
            torch.set_num_threads(self._threads)
        self._role: Any = None
        self._clock = BusyClock()
        self._reserved: socket.socket | None = None

    def describe(self) -> ProcessInfo:
        """Where this process is. The port stays reserved until the role is built."""
        self._reserved = socket.socket()
        self._reserved.bind(("", 0))
        context = ray.get_runtime_context()
        return ProcessInfo(
            pid=os.getpid(),
            node_id=context.get_node_id(),
            address=ray.util.get_node_ip_address(),
            port=self._reserved.getsockname()[1],
            log=_own_log(),
        )

    def prepare(self, build: str, kwargs: Mapping[str, Any]) -> Failure | None:
        """Check a role and its arguments while another one may be built on the same GPUs; what is wrong with them."""
        try:
            check_role(build, kwargs)
        except (Exception, SystemExit) as error:
            return _failure(error)
        return None

    def look(self) -> None:
        """Nothing: that it answers says that the process lives."""

    def build(self, build: str, world: World, kwargs: Mapping[str, Any]) -> bool | Failure:
        """Import and construct the role; returns whether it has a ``close``.

        Args:
            world: its place; without a number of threads it gets that of this process.
        """
        if world.threads is None:
            world = replace(world, threads=self._threads)
        interface = interface_of(ray.util.get_node_ip_address())
        if interface is not None:
            # gloo would ask for the address of the host's name, which many hosts say is 127.0.0.1.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        try:
            role = load_class(build)
            if self._reserved is not None:
                self._reserved.close()  # not before the import, which takes seconds: others look for ports too
            self._role = role(world=world, **kwargs)
            return hasattr(self._role, "close")
        except (Exception, SystemExit) as error:
            return _failure(error)

    @ray.method(num_returns=2)
    def run(
        self, method: str, shard: WireBatch | None, kwargs: Mapping[str, Any]
    ) -> tuple[WireBatch | Failure | tuple[Any], dict[str, Any] | None]:
        """Call the role.

        Returns:
            A small answer (a batch of references, or any other value in a tuple), and apart from it the columns that
            the role computed.
        """
        try:
            if method == "take_busy":
                return (self._clock.take_busy(),), None
            with self._clock.timed(method):
                arguments = _arguments(kwargs)
                if shard is None:
                    value = getattr(self._role, method)(**arguments)
                    if not isinstance(value, Batch):
                        return (value,), None
                    return to_wire(value)
                batch = from_wire(shard)
                result = getattr(self._role, method)(batch, **arguments)
                return to_wire(check_new_columns(result, batch, method))
        except (Exception, SystemExit) as error:
            return _failure(error), None

    @ray.method(num_returns="streaming")
    def stream(self, method: str, shard: WireBatch, kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """Call a generator of the role.

        Yields:
            Two objects for each of its batches: first the columns, then the small rest, so that the columns are there
            once the rest is.
        """
        try:
            chunks = iter(getattr(self._role, method)(from_wire(shard), **_arguments(kwargs)))
            while True:
                with self._clock.timed(method):
                    chunk = next(chunks, _END)
                if chunk is _END:
                    return
                wire, columns = to_wire(check_chunk(chunk, method))
                yield columns
                yield wire
        except (Exception, SystemExit) as error:
            yield None
            yield _failure(error)

    def close(self) -> None:
        if hasattr(self._role, "close"):
            self._role.close()


def _arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _argument(value) for name, value in kwargs.items()}


def _argument(value: Any) -> Any:
    if isinstance(value, WireBatch):
        return from_wire(value)
    return RemoteShare(value) if isinstance(value, WireShare) else value


def _failure(error: BaseException) -> Failure:
    failure = Failure.of(error)  # at once: of several ranks the one that failed first is told
    sys.stdout.flush()
    print(time.strftime("%Y-%m-%d %H:%M:%S"), "the role raised:", file=sys.stderr)
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    return failure


def interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address; None where there is none, or on other systems than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def _own_log() -> str | None:
    """The file to which Ray writes this process's stderr."""
    node = ray._private.worker.global_worker.node
    if node is None:
        return None
    folder = node.get_logs_dir_path()
    found = glob.glob(os.path.join(folder, f"worker-*-{os.getpid()}.err"))
    return found[0] if found else None
