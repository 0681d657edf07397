"""A set of weights that is about to travel: names, places and versions, without a byte of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import Bucket, Entry, torch_dtype, wire_bytes
from rayrlhf.weights.control import Address

__all__ = ["Manifest", "matched"]


@dataclass(frozen=True)
class Manifest:
    """One version of the policy's weights. Picklable and small: all that both sides must know before the bytes come."""

    version: int
    """Rises by one with each update of the policy."""
    dtype: str
    """Type in which the floating-point tensors travel."""
    buckets: tuple[Bucket, ...]
    """The tensors, in the order in which they travel."""
    checksums: bool
    """Whether each bucket comes with CRC-32s of its tensors; they are then compared on arrival."""
    kind: Literal["weights", "adapter"] = "weights"
    """``weights``: the whole model. ``adapter``: the tensors of a LoRA adapter, under peft's names."""
    adapter: Mapping[str, Any] | None = None
    """peft's LoraConfig as a dictionary. With ``weights`` it says that they are the base of an adapter, which comes next."""
    serial: int = 0
    """Which transfer of its group this is, from 1 on: a transfer that is tried again has another number."""
    address: Address | None = None
    """The group in which it travels."""

    def entries(self) -> Iterator[Entry]:
        """All tensors, in the order in which they travel."""
        for bucket in self.buckets:
            yield from bucket

    @property
    def nbytes(self) -> int:
        """Bytes that travel to each receiver."""
        return sum(wire_bytes(bucket, self.checksums) for bucket in self.buckets)

    def place(self, number: int) -> str:
        """A bucket, for messages: its number from 1 on, and its first tensor."""
        bucket = self.buckets[number]
        more = f" and {len(bucket) - 1} more" if len(bucket) > 1 else ""
        return f"bucket {number + 1} of {len(self.buckets)} ({bucket[0].name}{more})"


def matched(manifest: Manifest, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Entry, Tensor]]:
    """The tensors, each with its entry; exhausted, it has found all of them.

    Raises:
        RunFailed: at the first tensor that isn't what the manifest says, with both.
    """
    what = f"the weights of version {manifest.version} are not what their manifest says"
    given = iter(named_tensors)
    for number, entry in enumerate(manifest.entries()):
        name, tensor = next(given, (None, None))
        if name is None or tensor is None:
            raise RunFailed(f"{what}: they end after {number} tensors, before {entry.name}")
        if name != entry.name:
            raise RunFailed(f"{what}: tensor {number} is {name}, the manifest has {entry.name}")
        if tuple(tensor.shape) != entry.shape:
            raise RunFailed(f"{what}: {name} has the shape {list(tensor.shape)}, the manifest has {list(entry.shape)}")
        if tensor.dtype != torch_dtype(entry.dtype) and not tensor.is_floating_point():
            raise RunFailed(f"{what}: {name} is of type {tensor.dtype}, the manifest has {entry.dtype}")
        yield entry, tensor
    extra = next(given, None)
    if extra is not None:
        raise RunFailed(f"{what}: there is one tensor more, {extra[0]}")
