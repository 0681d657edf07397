"""Weight buckets that never leave their GPU: each rank of the policy shares its buffers with the receivers on its own GPU.

A receiver opens the sender's two buffers by their CUDA IPC handles, which travel through the group's store, and reads bucket
after bucket where it lies. It finds its sender by the GPU's UUID; so every GPU of an engine must have a rank of the policy.
The buffers are there for the time of a transfer only: when both sides are done with it, `IpcSender.release` gives them back.

All but `CudaMemory` runs on a CPU as well, with a stand-in for it. `CudaMemory` has been written against torch's sources and
has not been run: it needs GPUs. CUDA IPC doesn't work with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in every
version of torch.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Generator, Iterable
from typing import Protocol

import torch
from torch import Tensor

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import wire_bytes
from rayrlhf.weights.control import CONNECTING, LONGEST_PAUSE, SENDER, TIMEOUT_KEY, Address, Control
from rayrlhf.weights.manifest import Manifest
from rayrlhf.weights.transport import Receiver, Sender

__all__ = ["CudaMemory", "IpcReceiver", "IpcSender", "Memory"]

SENDERS_KEY = "senders"
JOINED = 1


class Memory(Protocol):
    """Memory of a device that several processes can see."""

    def device_id(self) -> str:
        """Of the device, the same in all processes."""

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 [nbytes]."""

    def share(self, buffer: Tensor) -> bytes:
        """What another process opens the buffer with. The buffer must be kept until it has let go of it."""

    def open(self, handle: bytes) -> Tensor:
        """Another process's buffer."""

    def synchronize(self) -> None:
        """Until all that has been started on the device is done."""

    def collect(self) -> None:
        """Give memory back that others have let go of."""


class CudaMemory:
    """A GPU's memory, shared by CUDA IPC handles.

    Args:
        device: which GPU of this process.
    """

    def __init__(self, device: torch.device):
        self._index = device.index if device.index is not None else torch.cuda.current_device()

    def device_id(self) -> str:
        return str(torch.cuda.get_device_properties(self._index).uuid)

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", self._index))

    def share(self, buffer: Tensor) -> bytes:
        from torch.multiprocessing.reductions import reduce_tensor

        _, arguments = reduce_tensor(buffer)
        return pickle.dumps(arguments)

    def open(self, handle: bytes) -> Tensor:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = list(pickle.loads(handle))
        arguments[6] = self._index  # the same GPU may have another number in the sender's process
        return rebuild_cuda_tensor(*arguments)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def collect(self) -> None:
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


class IpcSender(Sender):
    """One rank's end. All ranks send at the same time, each to the receivers on its GPU.

    Args:
        control: this side of the group's store.
        rank: of the policy.
        senders: ranks of the policy; given on rank 0.
        memory: of this rank's GPU.
    """

    def __init__(self, control: Control, rank: int, senders: int | None, memory: Memory):
        super().__init__()
        self.control, self._rank, self._memory = control, rank, memory
        self._receivers: list[int] = []
        self._buffers: list[Tensor] = []
        if senders is not None:
            control.put(SENDERS_KEY, str(senders).encode())

    def connect(self) -> None:
        """Say on which GPU this rank is, and hear which receivers are there."""
        self.control.put(f"gpu-of/{self._rank}", self._memory.device_id().encode())
        self.control.report(CONNECTING, JOINED)
        self.control.wait_receivers(CONNECTING, JOINED, f"did not come to the weight group {self.address.group}")
        chosen = {index: int(self.control.get(f"sender-of/{index}")) for index in range(self.address.receivers)}
        self._receivers = [index for index, rank in chosen.items() if rank == self._rank]

    def send(self, manifest: Manifest, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        if self._receivers:
            super().send(manifest, named_tensors)
            return
        for _ in named_tensors:  # no receiver is on this GPU; the other ranks gather with this one
            pass

    def _room(self, manifest: Manifest, number: int) -> Tensor:
        if number == 0:
            largest = max(wire_bytes(bucket, manifest.checksums) for bucket in manifest.buckets)
            count = min(2, len(manifest.buckets))
            self._buffers = [self._memory.allocate(max(1, largest)) for _ in range(count)]
            handles = [self._memory.share(buffer) for buffer in self._buffers]
            self.control.put(f"handles/{self._rank}", pickle.dumps((manifest.serial, handles)))
        if number >= 2:
            self._await(manifest, number - 2)
        return self._buffers[number % 2][: wire_bytes(manifest.buckets[number], manifest.checksums)]

    def _await(self, manifest: Manifest, number: int) -> None:
        what = f"did not take {manifest.place(number)}"
        self.control.wait_receivers(manifest.serial, number + 1, what, self._receivers)

    def _hand_over(self, manifest: Manifest, number: int, buffer: Tensor) -> None:
        self._memory.synchronize()
        self.control.report(manifest.serial, number + 1)

    def _finish(self, manifest: Manifest) -> None:
        self._await(manifest, len(manifest.buckets) - 1)
        self.release()

    def release(self) -> None:
        """Give the buffers back. Receivers hold them until they have loaded, which may be after `send`: the GPU has their
        memory again when this is called once more after that, as the driver does."""
        self._buffers = []
        self._memory.collect()

    def close(self) -> None:
        if self._rank == 0:
            self.control.close()
        self._buffers = []


class IpcReceiver(Receiver):
    """Reads the buffers of the policy's rank on its own GPU.

    Args:
        memory: of this receiver's GPU.
    """

    def __init__(self, address: Address, index: int, memory: Memory):
        super().__init__(address, index)
        self._memory = memory
        self._sender = 0

    def connect(self) -> None:
        super().connect()
        mine = self._memory.device_id()
        places = []
        for rank in range(int(self.control.get(SENDERS_KEY))):
            self._wait_rank(rank)
            places.append(self.control.get(f"gpu-of/{rank}").decode())
        if mine not in places:
            raise RunFailed(
                f"{self.name} is on the GPU {mine}, where no rank of the policy is: rollout.weight_transport=ipc needs one on "
                "each GPU of an engine; auto and gloo need none"
            )
        self._sender = places.index(mine)
        self.control.put(f"sender-of/{self.index}", str(self._sender).encode())
        self.control.report(CONNECTING, JOINED)

    def _wait_rank(self, rank: int) -> None:
        """Until a rank of the policy has come at all; those after the first join the store only now."""
        end = time.monotonic() + self.address.timeout_s
        while not self.control.has(f"at/{SENDER}{rank}"):
            if time.monotonic() > end:
                raise RunFailed(
                    f"policy rank {rank} did not come to the weight group {self.address.group} within "
                    f"{self.address.timeout_s:g} s ({TIMEOUT_KEY})"
                )
            self.control.check(CONNECTING)
            time.sleep(LONGEST_PAUSE)
        self.control.wait_sender(CONNECTING, JOINED, f"the GPU of policy rank {rank}", rank)

    def _buffers(self, manifest: Manifest) -> Generator[Tensor]:
        buffers: list[Tensor] = []
        self.control.report(manifest.serial, 0)
        for number, bucket in enumerate(manifest.buckets):
            self.control.wait_sender(manifest.serial, number + 1, manifest.place(number), self._sender)
            if not buffers:
                serial, handles = pickle.loads(self.control.get(f"handles/{self._sender}"))
                if serial != manifest.serial:
                    raise RunFailed(f"{self.name} was given buffers of another transfer by policy rank {self._sender}")
                buffers = [self._memory.open(handle) for handle in handles]
            yield buffers[number % 2][: wire_bytes(bucket, manifest.checksums)]
            self._memory.synchronize()  # what was copied out of the bucket is copied now
            if number + 1 == len(manifest.buckets):
                buffers.clear()  # what is loading still has a tensor in hand: see `IpcSender.release`
            self.control.report(manifest.serial, number + 1)
