"""A published set of weights: what lies where, and how to tell that it arrived whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import Entry, pack, unpack
from rayrlhf.weights.checksums import checksum, listed
from rayrlhf.weights.transport import Transport

__all__ = ["Manifest", "publish", "receive", "release"]


@dataclass(frozen=True)
class Manifest:
    """One version of the policy's weights. Picklable and small: the bytes lie in the transport."""

    version: int
    """Rises by one with each update of the policy."""
    dtype: str
    """Type in which the floating-point tensors travel."""
    buckets: tuple[Any, ...]
    """The transport's handles; each has ``entries`` and ``nbytes``."""
    checksums: dict[str, int] | None
    """CRC-32 of each tensor's bytes in the travelling type, by Hugging Face name; None where nobody asked."""

    def entries(self) -> Iterator[Entry]:
        """All tensors, in the order in which they were published."""
        for handle in self.buckets:
            yield from handle.entries

    @property
    def nbytes(self) -> int:
        return sum(handle.nbytes for handle in self.buckets)


def publish(
    named_tensors: Iterable[tuple[str, Tensor]],
    *,
    transport: Transport,
    version: int,
    bucket_bytes: int,
    dtype: str,
    with_checksums: bool,
) -> Manifest:
    """Lay out a set of weights for the engines. `release` frees it when they have all received it.

    Args:
        named_tensors: (Hugging Face name, tensor on any device), each parameter once. A tied output layer is left out,
            as in `torch.nn.Module.named_parameters`.
        transport: where the buckets go.
        version: the weight version that these weights are.
        bucket_bytes: size of a bucket; a larger tensor gets one of its own.
        dtype: ``float32`` or ``bfloat16``, the engines' type.
        with_checksums: also compute each tensor's checksum, so that an engine can verify.

    Raises:
        RunFailed: where the transport has no room. Nothing is left behind.
    """
    handles: list[Any] = []
    checksums: dict[str, int] | None = {} if with_checksums else None
    try:
        for bucket in pack(named_tensors, bucket_bytes=bucket_bytes, dtype=dtype):
            handles.append(transport.put(bucket))
            if checksums is not None:
                checksums.update((name, checksum(tensor)) for name, tensor in unpack(bucket))
    except BaseException:
        for handle in handles:
            transport.release(handle)
        raise
    return Manifest(version, dtype, tuple(handles), checksums)


def receive(manifest: Manifest, transport: Transport) -> Iterator[tuple[str, Tensor]]:
    """The published tensors, bucket after bucket. They may be views of shared memory: copy, don't keep.

    Raises:
        RunFailed: where a bucket is gone, or where the manifest has checksums and a tensor's bytes are not those which
            were published; it names the tensors.
    """
    for handle in manifest.buckets:
        bucket = transport.get(handle)
        if manifest.checksums is not None:
            expected = manifest.checksums
            damaged = [name for name, tensor in unpack(bucket) if checksum(tensor) != expected[name]]
            if damaged:
                raise RunFailed(
                    f"weights of version {manifest.version} were damaged on their way ({transport.name}): "
                    f"{listed(damaged)}"
                )
        yield from unpack(bucket)


def release(manifest: Manifest, transport: Transport) -> None:
    """Free the memory of a published set of weights, once no engine needs it."""
    for handle in manifest.buckets:
        transport.release(handle)
