"""Real processes at the other end of a weight transfer, and what they do there."""

from __future__ import annotations

import dataclasses
import mmap
import os
import secrets
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.weights import Address, Manifest, Receiver, Sender, collective, open_receiver, open_sender, plan_buckets
from rayrlhf.weights.control import Control
from rayrlhf.weights.ipc import IpcReceiver, IpcSender
from rayrlhf.weights.shared_memory import SharedMemorySender
from tests.support.forked import fork_context

Arrived = list[tuple[str, str, tuple[int, ...], bytes]]
"""Name, type, shape and bytes of each tensor."""


def some_tensors(seed: int = 0) -> list[tuple[str, Tensor]]:
    """Eight tensors of all sorts: a scalar, an empty one, integers, one that isn't contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": (1, 1), "d": (64, 9), "e": (), "f": (0, 4)}
    tensors = [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]
    return [*tensors, ("counts", torch.tensor([1, 2, 3])), ("strided", torch.randn(6, 4, generator=generator).t())]


def as_arrived(tensors: Sequence[tuple[str, Tensor]], dtype: str) -> Arrived:
    """What must arrive, by plain torch."""
    found = []
    for name, tensor in tensors:
        moved = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        flat = moved.contiguous().reshape(-1).view(torch.uint8)
        found.append((name, str(moved.dtype), tuple(tensor.shape), bytes(flat.tolist())))
    return found


def manifest_of(
    tensors: Sequence[tuple[str, Tensor]],
    sender: Sender,
    *,
    serial: int = 1,
    bucket_bytes: int = 1,
    dtype: str = "float32",
    checksums: bool = True,
) -> Manifest:
    layout = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    buckets = plan_buckets(layout, bucket_bytes=bucket_bytes, dtype=dtype)
    return Manifest(serial, dtype, buckets, checksums, serial=serial, address=sender.address)


class HostMemory:
    """A device's memory that is none: files which several processes map.

    Args:
        device: what it calls itself.
        folder: of the files.
    """

    def __init__(self, device: str, folder: str):
        self._device, self._folder, self._count = device, folder, 0
        self._paths: dict[int, str] = {}

    def device_id(self) -> str:
        return self._device

    def allocate(self, nbytes: int) -> Tensor:
        self._count += 1
        path = f"{self._folder}/{self._device}-{os.getpid()}-{self._count}"
        Path(path).write_bytes(bytes(nbytes))
        buffer = self._map(path)
        self._paths[buffer.data_ptr()] = path
        return buffer

    def share(self, buffer: Tensor) -> bytes:
        return self._paths[buffer.data_ptr()].encode()

    def open(self, handle: bytes) -> Tensor:
        return self._map(handle.decode())

    def _map(self, path: str) -> Tensor:
        with open(path, "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)

    def synchronize(self) -> None:
        """Nothing is started behind anybody's back."""

    def collect(self) -> None:
        for path in self._paths.values():
            Path(path).unlink()
        self._paths.clear()


def sender_of(transport: str, receivers: int, *, timeout_s: float = 20.0, folder: str = "", **more: Any) -> Sender:
    """A sender in this process; for ``ipc`` one whose GPU is called gpu-0, of as many ranks as ``senders`` says."""
    run, version = more.pop("run", "test"), more.pop("version", 1)
    if transport != "ipc":
        return open_sender(
            transport, run=run, receivers=receivers, version=version, device="cpu", timeout_s=timeout_s, **more
        )
    control = Control.host(transport, f"{run}-{version}", receivers, timeout_s, "127.0.0.1", more.get("per_engine", 1))
    return IpcSender(control, 0, more.get("senders", 1), HostMemory("gpu-0", folder))


def set_deadline(sender: Sender, timeout_s: float) -> None:
    """From now on this is what the sender allows for each bucket."""
    control = sender.control
    control.address = dataclasses.replace(control.address, timeout_s=timeout_s)


def own_name(run: str) -> str:
    """A run's name that no other process of this machine has."""
    return f"{run}_{secrets.token_hex(8)}"


def sender_in(directory: str | Path, run: str = "test", **more: Any) -> Sender:
    """A sender of shared memory, for one receiver, whose files lie where no other process cleans up."""
    control = Control.host("shared_memory", f"{run}-1", 1, 20.0, "127.0.0.1", 1)
    return SharedMemorySender(control, run=run, directory=str(directory), **more)


def receiver_of(address: Address, index: int, folder: str = "", gpu: str = "gpu-0") -> Receiver:
    if address.transport == "ipc":
        return IpcReceiver(address, index, HostMemory(gpu, folder))
    return open_receiver(address, index, "cpu")


class Other:
    """A process that runs ``function(*arguments)``, forked from one that has imported everything already."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        context = fork_context()
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def said(self, timeout_s: float = 60.0) -> Any:
        """What the function told with ``tell``, or returned in the end.

        Raises:
            AssertionError: with its traceback, where it failed or says nothing.
        """
        assert self._pipe.poll(timeout_s), "the other process says nothing"
        kind, value = self._pipe.recv()
        assert kind == "said", value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


_pipe: Connection | None = None


def tell(value: Any) -> None:
    """Tell the test something before the function returns."""
    assert _pipe is not None
    _pipe.send(("said", value))


def _run(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _pipe
    _pipe = pipe
    torch.set_num_threads(1)
    try:
        tell(function(*arguments))
    except BaseException:  # noqa: B036  (goes to the test)
        pipe.send(("failed", traceback.format_exc()))


# -- what the others do ----------------------------------------------------------------------------------------------


def take_all(
    address: Address, index: int, manifests: Sequence[Manifest], folder: str = "", gpu: str = "gpu-0"
) -> list[Arrived]:
    """Receive one transfer after the other."""
    receiver = receiver_of(address, index, folder, gpu)
    receiver.connect()
    tell("connected")
    taken = []
    for manifest in manifests:
        arrived = []
        for name, tensor in receiver.receive(manifest):
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            arrived.append((name, str(tensor.dtype), tuple(tensor.shape), bytes(flat.tolist())))
        taken.append(arrived)
    receiver.close()
    return taken


def take_late(address: Address, index: int, manifest: Manifest, seconds: float) -> list[Arrived]:
    """The same, but only after a while."""
    receiver = receiver_of(address, index)
    receiver.connect()
    time.sleep(seconds)
    return [[(name, str(t.dtype), tuple(t.shape), b"") for name, t in receiver.receive(manifest)]]


def die_after(address: Address, index: int, manifest: Manifest, tensors: int) -> None:
    """Die in the middle of a transfer."""
    receiver = receiver_of(address, index)
    receiver.connect()
    tell("connected")
    if tensors:
        for number, _ in enumerate(receiver.receive(manifest), 1):
            if number == tensors:
                os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_broadcast(address: Address, index: int, manifest: Manifest, number: int) -> None:
    """Die when a broadcast has begun, for which this receiver has said that it is ready."""
    receiver = receiver_of(address, index)
    receiver.connect()
    tell("connected")
    run, begun = collective._Broadcasts.run, []

    def run_or_die(*given: Any) -> None:
        begun.append(given)
        if len(begun) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        run(*given)

    collective._Broadcasts.run = run_or_die  # type: ignore[method-assign]
    for _ in receiver.receive(manifest):
        pass


def failure_of(address: Address, index: int, manifest: Manifest) -> tuple[str, str]:
    """Type and message of what `receive` raises."""
    receiver = receiver_of(address, index)
    receiver.connect()
    tell("connected")
    try:
        for _ in receiver.receive(manifest):
            pass
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def stop_loading(address: Address, index: int, manifest: Manifest, tensors: int) -> None:
    """Take some tensors and fail at the next one, as an engine may."""
    receiver = receiver_of(address, index)
    receiver.connect()
    tell("connected")
    named = receiver.receive(manifest)
    for _ in range(tensors):
        next(named)
    named.close()
    time.sleep(60)


def send_and_hang(transport: str, receivers: int, directory: str) -> None:
    """Send two tensors of three; the test kills this process while it thinks about the third."""
    sender = sender_in(directory, "dying") if transport == "shared_memory" else sender_of(transport, receivers)
    tensors = some_tensors()[:3]

    def thinking() -> Any:
        yield from tensors[:2]
        time.sleep(60)

    tell((sender.address, manifest_of(tensors, sender)))
    sender.connect()
    sender.send(manifest_of(tensors, sender), thinking())
