"""Buckets: runs of named tensors whose bytes lie one after the other.

A bucket is what travels at once. One message for each tensor would cost a round trip for each of hundreds of
parameters; one message for the whole model would need its memory twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Bucket", "Entry", "as_bytes", "pack", "torch_dtype", "unpack"]

ALIGNMENT = 64
"""Each tensor begins at a multiple of this many bytes, so that a view of any type is aligned."""


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


@dataclass(frozen=True)
class Bucket:
    """Some tensors on the CPU, in the types in which they travel, and their places."""

    entries: tuple[Entry, ...]
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last tensor's end, alignment included."""
        return self.entries[-1].offset + self.entries[-1].nbytes if self.entries else 0

    def write(self, buffer: Tensor) -> None:
        """Copy all tensors into ``buffer``, uint8 [nbytes]."""
        for entry, tensor in zip(self.entries, self.tensors, strict=True):
            buffer[entry.offset : entry.offset + entry.nbytes].copy_(as_bytes(tensor))

    @classmethod
    def read(cls, entries: tuple[Entry, ...], buffer: Tensor) -> Bucket:
        """The tensors as views of ``buffer``, uint8 [nbytes]."""
        views = (buffer[e.offset : e.offset + e.nbytes].view(torch_dtype(e.dtype)).reshape(e.shape) for e in entries)
        return cls(entries, tuple(views))


def _round_up(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def pack(named_tensors: Iterable[tuple[str, Tensor]], *, bucket_bytes: int, dtype: str) -> Iterator[Bucket]:
    """Buckets of the tensors, in their order; every tensor is copied as soon as it is yielded.

    The copy at once matters: under ZeRO-3 a gathered parameter is freed when the iterator moves on.

    Args:
        named_tensors: (Hugging Face name, tensor on any device). Floating-point tensors travel as ``dtype``, others as
            they are.
        bucket_bytes: a bucket is closed before it would become larger; a larger tensor gets a bucket of its own.
        dtype: name of the torch type.

    Raises:
        ValueError: where a name comes twice, or ``bucket_bytes`` is below one.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    floating = torch_dtype(dtype)
    seen: set[str] = set()
    entries: list[Entry] = []
    tensors: list[Tensor] = []
    end = 0
    for name, tensor in named_tensors:
        if name in seen:
            raise ValueError(f"the parameter {name!r} is given twice")
        seen.add(name)
        target = floating if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to(device="cpu", dtype=target, copy=True).contiguous()
        nbytes = copied.numel() * copied.element_size()
        offset = _round_up(end)
        if entries and offset + nbytes > bucket_bytes:
            yield Bucket(tuple(entries), tuple(tensors))
            entries, tensors, offset = [], [], 0
        entries.append(Entry(name, tuple(copied.shape), str(target).removeprefix("torch."), offset, nbytes))
        tensors.append(copied)
        end = offset + nbytes
    if entries:
        yield Bucket(tuple(entries), tuple(tensors))


def unpack(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The bucket's names and tensors, in the order in which they were packed."""
    for entry, tensor in zip(bucket.entries, bucket.tensors, strict=True):
        yield entry.name, tensor
