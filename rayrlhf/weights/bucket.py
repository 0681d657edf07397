"""Buckets: runs of named tensors whose bytes lie one after the other.

A bucket is what travels at once. One message for each tensor would cost a round trip for each of hundreds of
parameters; one message for the whole model would need its memory twice.

Where the receivers verify what arrives, a CRC-32 of each tensor follows the tensors' bytes: uint32 [tensors], little-endian.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ALIGNMENT",
    "Bucket",
    "Entry",
    "as_bytes",
    "damaged_tensors",
    "payload_bytes",
    "plan_buckets",
    "torch_dtype",
    "views",
    "wire_bytes",
    "write_checksums",
    "write_tensor",
]

ALIGNMENT = 64
"""Each tensor begins at a multiple of this many bytes, so that a view of any type is aligned."""
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its bucket."""

    name: str
    """The parameter's name in the Hugging Face checkpoint."""
    shape: tuple[int, ...]
    dtype: str
    """Name of the torch type, such as ``bfloat16``."""
    offset: int
    """First byte in the bucket."""
    nbytes: int


Bucket = tuple[Entry, ...]
"""The tensors of a bucket, in the order of their bytes."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of that name.

    Raises:
        ValueError: where torch has no such type.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a torch type; legal ones are float32 and bfloat16, for example")
    return dtype


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a CPU tensor, uint8 [nbytes]; no copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _round_up(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def plan_buckets(
    layout: Iterable[tuple[str, Sequence[int], torch.dtype]], *, bucket_bytes: int, dtype: str
) -> tuple[Bucket, ...]:
    """Which tensors travel together, and where each of them lies; no tensor is needed for it.

    Args:
        layout: (Hugging Face name, shape, type) of each tensor, in the order in which they are sent. Floating-point tensors
            travel as ``dtype``, others as they are.
        bucket_bytes: a bucket is closed before its tensors would take up more; a larger tensor gets a bucket of its own.
        dtype: name of the torch type.

    Raises:
        ValueError: where a name comes twice, or ``bucket_bytes`` is below one.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    floating = torch_dtype(dtype)
    seen: set[str] = set()
    buckets: list[Bucket] = []
    entries: list[Entry] = []
    for name, shape, own in layout:
        if name in seen:
            raise ValueError(f"the parameter {name!r} is given twice")
        seen.add(name)
        target = floating if own.is_floating_point else own
        nbytes = torch.Size(shape).numel() * target.itemsize
        offset = _round_up(payload_bytes(tuple(entries)))
        if entries and offset + nbytes > bucket_bytes:
            buckets.append(tuple(entries))
            entries, offset = [], 0
        entries.append(Entry(name, tuple(shape), str(target).removeprefix("torch."), offset, nbytes))
    if entries:
        buckets.append(tuple(entries))
    return tuple(buckets)


def payload_bytes(bucket: Sequence[Entry]) -> int:
    """Bytes from the first tensor to the end of the last one, alignment included."""
    return bucket[-1].offset + bucket[-1].nbytes if bucket else 0


def wire_bytes(bucket: Bucket, checksums: bool) -> int:
    """Bytes that travel: the tensors, and their checksums where they come along."""
    payload = payload_bytes(bucket)
    return _round_up(payload) + CHECKSUM_BYTES * len(bucket) if checksums else payload


def write_tensor(buffer: Tensor, entry: Entry, tensor: Tensor) -> None:
    """Copy a tensor, of any type and on any device, to its place in ``buffer``, uint8 [at least the bucket's bytes]."""
    _view(buffer, entry).copy_(tensor.detach())


def _view(buffer: Tensor, entry: Entry) -> Tensor:
    flat = buffer[entry.offset : entry.offset + entry.nbytes]
    return flat.view(torch_dtype(entry.dtype)).reshape(entry.shape)


def views(buffer: Tensor, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a bucket; the tensors look into ``buffer``."""
    for entry in bucket:
        yield entry.name, _view(buffer, entry)


def write_checksums(buffer: Tensor, bucket: Bucket) -> None:
    """Write the CRC-32 of each tensor's bytes behind the tensors of a bucket that is filled."""
    start = _round_up(payload_bytes(bucket))
    end = start + CHECKSUM_BYTES * len(bucket)
    sums = b"".join(value.to_bytes(CHECKSUM_BYTES, "little") for value in _checksums(buffer, bucket))
    if sums:
        buffer[start:end].copy_(torch.frombuffer(bytearray(sums), dtype=torch.uint8))


def damaged_tensors(buffer: Tensor, bucket: Bucket) -> list[str]:
    """Names of the tensors whose bytes are not those of which `write_checksums` wrote the CRC-32."""
    start = _round_up(payload_bytes(bucket))
    stored = bytes(buffer[start : start + CHECKSUM_BYTES * len(bucket)].cpu().numpy())
    expected = [int.from_bytes(stored[i : i + CHECKSUM_BYTES], "little") for i in range(0, len(stored), CHECKSUM_BYTES)]
    found = _checksums(buffer, bucket)
    return [entry.name for entry, a, b in zip(bucket, expected, found, strict=True) if a != b]


def _checksums(buffer: Tensor, bucket: Bucket) -> list[int]:
    host = buffer[: payload_bytes(bucket)].cpu().numpy()
    return [zlib.crc32(host[entry.offset : entry.offset + entry.nbytes]) for entry in bucket]  # type: ignore[arg-type]
