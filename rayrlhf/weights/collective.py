"""Weight buckets by broadcast: from rank 0 of the policy to all receivers at once, over the network.

``gloo`` carries them from host memory to host memory, ``nccl`` from GPU to GPU; all else is the same code. The process group
is one of its own beside the process's default group. Who comes too late for the rendezvous, or to a bucket, is named; a
broadcast only begins when all have said that they are ready for it, so that a process which has died before costs a
deadline and nothing else. A group in which a broadcast has broken off is of no use any more: it is opened anew, under
another name.

``nccl`` has been written against torch's sources and has not been run: it needs GPUs.
"""

from __future__ import annotations

import datetime
import socket
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import wire_bytes
from rayrlhf.weights.control import CONNECTING, FIRST_PAUSE, LONGEST_PAUSE, TIMEOUT_KEY, Address, Control
from rayrlhf.weights.manifest import Manifest
from rayrlhf.weights.transport import Receiver, Sender

__all__ = ["CollectiveReceiver", "CollectiveSender"]

Backend = Literal["gloo", "nccl"]
GPU_KEY = "gpu"
JOINED = 1
"""How far a receiver is, before the first transfer, that is about to meet the others."""


class _Broadcasts:
    """A process group of the sender (rank 0) and all receivers.

    Args:
        rank: in the group.
        backend: ``gloo`` or ``nccl``.
        control: this side of the store.
        device: the buckets': a GPU for ``nccl``, else the CPU.
    """

    def __init__(self, backend: Backend, rank: int, control: Control, device: torch.device):
        self._control, self._device, self._timeout_s = control, device, control.address.timeout_s
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = control.address.receivers + 1
        store = dist.PrefixStore(f"{control.address.group}/{backend}", control.store.clone())
        timeout = datetime.timedelta(seconds=self._timeout_s)
        try:
            if backend == "gloo":
                # By default gloo announces whatever address the host's name stands for, which may be 127.0.0.1.
                gloo: Any = dist.ProcessGroupGloo
                options = gloo._Options()
                options._devices = [gloo.create_device(hostname=_own_address(control))]
                options._timeout = timeout
                self._group: Any = gloo(store, rank, size, options)
            else:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = 2 * timeout  # its watchdog ends the whole process; our own deadline comes first
                self._group = dist.ProcessGroupNCCL(store, rank, size, options)
                # The communicator is made by the first call: now, so that what is wrong with it is known at the start.
                self.run(torch.zeros(1, dtype=torch.uint8, device=device), CONNECTING)
        except RuntimeError as error:
            raise RunFailed(f"{control.name} could not meet the others of {control.address.group}: {error}") from error

    def run(self, buffer: Tensor, serial: int, filled: Any = None) -> None:
        """Broadcast a bucket; returns when it is there, or has left.

        Args:
            filled: event after which the sender's bucket is filled, on a GPU.

        Raises:
            RunFailed: where the connection breaks, or after the deadline.
            PeerFailed: where the transfer has been ended elsewhere.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        end = time.monotonic() + self._timeout_s
        if self._stream is not None and filled is None:
            # An empty buffer's memory may have been given back by work that the other stream has yet to do.
            self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if filled is not None:
                filled.wait()
            work = self._group.broadcast([buffer], options)
            pause = 1e-4
            while not work.is_completed():
                if time.monotonic() > end:
                    raise RunFailed(f"it did not end within {self._timeout_s:g} s ({TIMEOUT_KEY})")
                self._control.check(serial)
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST_PAUSE)
            try:
                work.wait()
            except RuntimeError as error:
                raise RunFailed(f"the connection broke: {str(error).strip().splitlines()[0]}") from error

    def close(self) -> None:
        """End the group, whatever is under way in it."""
        with suppress(RuntimeError):  # it may be broken already
            self._group.abort()


def _own_address(control: Control) -> str:
    """The address of this machine under which the sender's machine, or for the sender the others, see it."""
    host, _, port = control.address.place.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # nothing is sent
        return probe.getsockname()[0]


def _gpu_of(device: torch.device) -> str:
    """A GPU's UUID; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


class CollectiveSender(Sender):
    """Two flat buffers: one is filled while the other is under way in a thread of its own.

    Args:
        control: this side of the group's store.
        backend: ``gloo`` or ``nccl``.
        device: of the weights.
    """

    def __init__(self, control: Control, backend: Backend, device: torch.device):
        super().__init__()
        self.control, self._backend = control, backend
        self._device = device if backend == "nccl" else torch.device("cpu")
        self._broadcasts: _Broadcasts | None = None
        self._thread = ThreadPoolExecutor(1, "weights")
        self._buffers: list[Tensor] = []
        self._under_way: list[Future[None]] = []
        control.put(GPU_KEY, _gpu_of(self._device).encode())

    def connect(self) -> None:
        self.control.wait_receivers(CONNECTING, JOINED, f"did not come to the weight group {self.address.group}")
        self.control.report(CONNECTING, JOINED)
        self._broadcasts = _Broadcasts(self._backend, 0, self.control, self._device)

    def _room(self, manifest: Manifest, number: int) -> Tensor:
        if number == 0:
            largest = max(wire_bytes(bucket, manifest.checksums) for bucket in manifest.buckets)
            count = min(2, len(manifest.buckets))
            self._buffers = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(count)]
            self._under_way = []
        if number >= 2:
            self._under_way[number - 2].result()
        size = wire_bytes(manifest.buckets[number], manifest.checksums)
        return self._buffers[number % 2][:size]

    def _hand_over(self, manifest: Manifest, number: int, buffer: Tensor) -> None:
        filled = None
        if buffer.device.type == "cuda":
            filled = torch.cuda.Event()
            filled.record()
        self._under_way.append(self._thread.submit(self._broadcast, manifest, number, buffer, filled))

    def _broadcast(self, manifest: Manifest, number: int, buffer: Tensor, filled: Any) -> None:
        if self._broadcasts is None:
            raise RuntimeError(f"the weight group {self.address.group} has not been connected")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self.control.wait_receivers(manifest.serial, number, f"did not get ready for {manifest.place(number)}")
        self.control.report(manifest.serial, number + 1)
        try:
            self._broadcasts.run(buffer, manifest.serial, filled)
        except RunFailed as error:
            self._broken = f"the broadcast of {manifest.place(number)} broke off: {error}"
            self._broadcasts.close()  # so that nothing of it goes on behind our back
            raise type(error)(f"{self._backend}: {self._broken}") from error

    def _finish(self, manifest: Manifest) -> None:
        for future in self._under_way:
            future.result()
        last = len(manifest.buckets)
        self.control.wait_receivers(manifest.serial, last + 1, f"did not take {manifest.place(last - 1)}")
        self.release()

    def _give_up(self, manifest: Manifest) -> None:
        # What is under way ends soon, as all sides have been told; then nobody reads the buffers any more.
        for future in self._under_way:
            future.cancel()
        for future in self._under_way:
            if not future.cancelled():
                future.exception()
        self.release()

    def release(self) -> None:
        self._buffers, self._under_way = [], []

    def close(self) -> None:
        self.control.close()
        if self._broadcasts is not None:
            self._broadcasts.close()
            self._broadcasts = None
        self._thread.shutdown(wait=True, cancel_futures=True)


class _Lent:
    """A bucket that has been handed out.

    Attributes:
        passed: set when the bucket after it has been taken too.
    """

    def __init__(self, buffer: Tensor):
        self._storage = StorageWeakRef(buffer.untyped_storage())
        self.passed = threading.Event()

    def wait(self, control: Control, serial: int) -> None:
        """Until nobody looks into it any more. Who keeps it for longer has its memory beside that of two others."""
        pause = FIRST_PAUSE
        while not self._storage.expired() and not self.passed.wait(pause):
            control.check(serial)
            pause = min(pause * 1.5, LONGEST_PAUSE)


class CollectiveReceiver(Receiver):
    """Takes a bucket from the wire while the one before is loaded.

    Whoever loads has the last tensor of a bucket in hand until the first one of the next is given to him. So the bucket
    after that waits for this moment: three would lie there otherwise.
    """

    def __init__(self, address: Address, index: int, backend: Backend, device: torch.device):
        super().__init__(address, index)
        self._backend, self._device = backend, device if backend == "nccl" else torch.device("cpu")
        self._broadcasts: _Broadcasts | None = None

    def connect(self) -> None:
        super().connect()
        gpu = _gpu_of(self._device)
        if gpu and self.control.get(GPU_KEY).decode() == gpu:
            reason = (
                f"{self.name} is on the GPU {gpu}, where rank 0 of the policy is: NCCL has no two processes on one GPU; "
                "rollout.weight_transport must be gloo, or ipc where each GPU of an engine has a rank of the policy"
            )
            self.control.fail(CONNECTING, reason)
            raise RunFailed(reason)
        # Whoever has said so goes on to make the communicator once all have, and can't be told anything there.
        self.control.report(CONNECTING, JOINED)
        self.control.wait_sender(CONNECTING, JOINED, f"the call to meet in the weight group {self.address.group}")
        self._broadcasts = _Broadcasts(self._backend, self.index + 1, self.control, self._device)

    def _buffers(self, manifest: Manifest) -> Generator[Tensor]:
        count = len(manifest.buckets)
        with ThreadPoolExecutor(1, "weights") as thread:
            coming = thread.submit(self._fetch, manifest, 0, None)
            lent: _Lent | None = None
            for number in range(count):
                buffer = coming.result()
                if number + 1 < count:
                    coming = thread.submit(self._fetch, manifest, number + 1, lent)
                before, lent = lent, _Lent(buffer)
                yield buffer
                if before is not None:
                    before.passed.set()
                if self._device.type == "cuda":
                    # What was copied out of it is copied now: its memory is taken for a later bucket, on another stream.
                    torch.cuda.current_stream(self._device).synchronize()
                del buffer
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.control.report(manifest.serial, count + 1)

    def _fetch(self, manifest: Manifest, number: int, after: _Lent | None) -> Tensor:
        if self._broadcasts is None:
            raise RuntimeError(f"{self.name} has not been connected to the weight group {self.address.group}")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        if after is not None:
            after.wait(self.control, manifest.serial)
        size = wire_bytes(manifest.buckets[number], manifest.checksums)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        self.control.report(manifest.serial, number)
        self.control.wait_sender(manifest.serial, number + 1, manifest.place(number))
        try:
            self._broadcasts.run(buffer, manifest.serial)
        except RunFailed as error:
            self._broken = f"the broadcast of {manifest.place(number)} broke off: {error}"
            self._broadcasts.close()  # so that nothing of it goes on behind our back
            raise type(error)(f"{self._backend}: {self._broken}") from error
        return buffer

    def close(self) -> None:
        if self._broadcasts is not None:
            self._broadcasts.close()
            self._broadcasts = None
        super().close()
