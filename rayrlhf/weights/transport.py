"""Transports: how a bucket gets from the trainer's process to an engine's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import Bucket, Entry
from rayrlhf.weights.shared_memory import SharedMemory

__all__ = ["Handle", "ObjectStore", "Transport", "make_transport"]


class Transport(Protocol):
    """Carries buckets between processes. ``put`` and ``release`` are called by the trainer, ``get`` by each engine."""

    name: str

    def put(self, bucket: Bucket) -> Any:
        """Lay the bucket out for others. The handle is picklable and has ``entries`` and ``nbytes``.

        Raises:
            RunFailed: where there is no room for it.
        """

    def get(self, handle: Any) -> Bucket:
        """The bucket of a handle; its tensors may be views of shared memory and are not to be written to.

        Raises:
            RunFailed: where it is no longer there.
        """

    def release(self, handle: Any) -> None:
        """Free the bucket's memory. Releasing twice does nothing."""

    def close(self) -> None:
        """Release whatever this process put and did not release."""


@dataclass(frozen=True)
class Handle:
    """A bucket in Ray's object store."""

    reference: Any
    """Ray's reference to the bytes, an array uint8 [nbytes]."""
    entries: tuple[Entry, ...]
    nbytes: int
    key: str = field(default="")


class ObjectStore:
    """Buckets in Ray's object store: any number of machines, one copy on each."""

    name = "object_store"

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def put(self, bucket: Bucket) -> Handle:
        import ray

        flat = torch.empty(bucket.nbytes, dtype=torch.uint8)
        bucket.write(flat)
        try:
            reference = ray.put(flat.numpy())
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise RunFailed(
                f"Ray's object store has no room for a weight bucket of {bucket.nbytes / 2**20:.1f} MiB: {error}. "
                "Give Ray a larger object store, or take a smaller rollout.weight_bucket_mib."
            ) from error
        key = reference.hex()
        # The manifest may outlive its journey in the driver; the bytes live until the trainer releases them.
        self._kept[key] = reference
        return Handle(reference, bucket.entries, bucket.nbytes, key)

    def get(self, handle: Handle) -> Bucket:
        import ray

        try:
            array = ray.get(handle.reference)
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError) as error:
            raise RunFailed(
                f"a weight bucket of {len(handle.entries)} tensors is gone from Ray's object store: {error}"
            ) from error
        with warnings.catch_warnings():
            # Ray hands out read-only memory, which torch can't express; receivers only read.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            flat = torch.from_numpy(array)
        return Bucket.read(handle.entries, flat)

    def release(self, handle: Handle) -> None:
        self._kept.pop(handle.key, None)

    def close(self) -> None:
        self._kept.clear()


def make_transport(name: str, *, run: str = "run") -> Transport:
    """The transport of that name.

    Args:
        name: ``shared_memory`` or ``object_store`` (``auto`` is decided by who places the roles).
        run: name of the run; it becomes part of the shared-memory files' names.
    """
    if name == "shared_memory":
        return SharedMemory(run=run)
    if name == "object_store":
        return ObjectStore()
    raise ValueError(f"there is no weight transport {name!r}; legal ones are shared_memory and object_store")
