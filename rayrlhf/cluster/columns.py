"""Batches on their way through Ray's object store.

The concrete columns of a batch are put into the store as numpy arrays, and what travels in messages are references: a
process fetches a column when it first touches it. Arrays in the store are mapped into each process of the machine
without a copy; a column that is touched is copied once, for the store's memory is shared and must not be written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from rayrlhf.batch import Batch, Deferred

__all__ = ["Block", "RayColumns", "WireBatch", "from_wire", "refer", "stage", "to_wire", "to_wire_value"]

SMALL_BYTES = 64 << 10
"""Up to here one more object in the store costs more than bytes that nobody reads."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Array:
    """A tensor as numpy holds it; ``view`` names the torch type where numpy has none (bfloat16, float8)."""

    values: np.ndarray
    view: str | None


def _pack(column: Tensor | list) -> _Array | list:
    if isinstance(column, list):
        return column
    tensor = column.detach().cpu().contiguous()
    try:
        return _Array(tensor.numpy(), None)
    except TypeError:
        return _Array(tensor.view(_SAME_SIZE[tensor.element_size()]).numpy(), str(tensor.dtype).removeprefix("torch."))


def _unpack(packed: _Array | list) -> Tensor | list:
    if isinstance(packed, list):
        return list(packed)
    tensor = torch.from_numpy(packed.values.copy())
    return tensor if packed.view is None else tensor.view(getattr(torch, packed.view))


class Block:
    """Columns which lie in one object of the store: read at most once by whoever holds it, and let go with it."""

    __slots__ = ("_columns", "ref")

    def __init__(self, ref: ray.ObjectRef):
        self.ref = ref
        self._columns: Mapping[str, _Array | list] | None = None

    def column(self, name: str) -> Tensor | list:
        if self._columns is None:
            self._columns = ray.get(self.ref)
        return _unpack(self._columns[name])

    def __reduce__(self) -> tuple:
        return Block, (self.ref,)


@dataclass(frozen=True)
class RayColumns:
    """Source of the column ``name`` of a block (`rayrlhf.batch.Source`)."""

    block: Block
    name: str

    def fetch(self) -> Tensor | list:
        return self.block.column(self.name)


# -- what the driver does ---------------------------------------------------------------------------------------------


def _put(columns: Mapping[str, Any]) -> Block:
    return Block(ray.put({name: _pack(column) for name, column in columns.items()}))


def stage(batch: Batch) -> Batch:
    """The same batch with all concrete columns in the object store.

    Each token column is an object of its own, so that nobody reads what he doesn't use; the (small) sample columns are one,
    with the token columns where these are small too. Deferred columns stay what they are.
    """
    token, sample = batch.columns()
    whole = {name: column for name, column in token.items() if isinstance(column, Tensor)}
    small: dict[str, Any] = {name: column for name, column in sample.items() if not isinstance(column, Deferred)}
    if sum(column.nbytes for column in whole.values()) <= SMALL_BYTES:
        small, whole = small | whole, {}
    if small:
        block = _put(small)
        sample.update({n: Deferred.whole(RayColumns(block, n), len(batch), None) for n in small if n in sample})
        token.update({n: Deferred.whole(RayColumns(block, n), len(batch), batch.offsets) for n in small if n in token})
    for name, column in whole.items():
        token[name] = Deferred.whole(RayColumns(_put({name: column}), name), len(batch), batch.offsets)
    return Batch(batch.offsets, token, sample)


# -- what travels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _WireColumn:
    sources: tuple
    offsets: tuple[int | None, ...]  # where each array stands in the pool
    piece: int
    local: int


@dataclass(frozen=True)
class WireBatch:
    """A batch of references as numpy arrays, each distinct one once: columns mostly share their indices.

    ``token`` and ``sample`` hold None for a column whose values travel apart, in the order of the samples.
    """

    offsets: np.ndarray
    pool: list[np.ndarray]
    token: dict[str, _WireColumn | None]
    sample: dict[str, _WireColumn | None]


def to_wire(batch: Batch) -> tuple[WireBatch, dict[str, Any]]:
    """A batch as a message, and its concrete columns, packed, which travel apart."""
    pool: list[np.ndarray] = []
    place: dict[bytes, int] = {}
    apart: dict[str, Any] = {}

    def pooled(tensor: Tensor) -> int:
        array = tensor.numpy()
        key = array.tobytes()
        if key not in place:
            place[key] = len(pool)
            pool.append(array)
        return place[key]

    def encode(columns: Mapping[str, Any]) -> dict[str, _WireColumn | None]:
        encoded: dict[str, _WireColumn | None] = {}
        for name, column in columns.items():
            if isinstance(column, Deferred):
                offsets = tuple(None if o is None else pooled(o) for o in column.offsets)
                encoded[name] = _WireColumn(column.sources, offsets, pooled(column.piece), pooled(column.local))
            else:
                encoded[name], apart[name] = None, _pack(column)
        return encoded

    token, sample = batch.columns()
    return WireBatch(batch.offsets.numpy(), pool, encode(token), encode(sample)), apart


def from_wire(wire: WireBatch, apart: Block | None = None) -> Batch:
    """The batch of a message: every column deferred. ``apart`` holds the columns which travelled apart."""
    offsets = torch.from_numpy(wire.offsets.copy())
    pool = [torch.from_numpy(array.copy()) for array in wire.pool]

    def decode(columns: Mapping[str, _WireColumn | None], own_offsets: Tensor | None) -> dict[str, Deferred]:
        decoded = {}
        for name, column in columns.items():
            if column is None:
                assert apart is not None
                decoded[name] = Deferred.whole(RayColumns(apart, name), len(offsets) - 1, own_offsets)
            else:
                theirs = tuple(None if o is None else pool[o] for o in column.offsets)
                decoded[name] = Deferred(column.sources, theirs, pool[column.piece], pool[column.local])
        return decoded

    return Batch(offsets, decode(wire.token, offsets), decode(wire.sample, None))


def refer(batch: Batch) -> WireBatch:
    """A staged batch as a message."""
    return to_wire(batch)[0]


def to_wire_value(value: Any) -> Any:
    """An argument: batches as references, the rest as it is."""
    return refer(stage(value)) if isinstance(value, Batch) else value
