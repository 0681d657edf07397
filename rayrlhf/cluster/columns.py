"""Batches on their way through Ray's object store.

The concrete columns of a batch are put into the store as numpy arrays, and what travels in messages are references: a
process fetches a column when it first touches it. Only what is small travels in the message itself. Arrays in the store
are mapped into each process of the machine without a copy; a column that is touched is copied once, for the store's memory
is shared and must not be written to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from rayrlhf.batch import Batch, Deferred, Rows

__all__ = ["Block", "RayColumns", "WireBatch", "from_wire", "refer", "stage", "to_wire", "to_wire_value"]

SMALL_BYTES = 64 << 10
"""Up to here an object in the store costs more than bytes that nobody reads."""

ENTRY_BYTES = 64
"""What an entry of a list is taken for that is no text."""

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


def _is_small(columns: Iterable[Tensor | list]) -> bool:
    left = SMALL_BYTES
    for column in columns:
        if isinstance(column, list):
            left -= sum(len(entry) if isinstance(entry, str) else ENTRY_BYTES for entry in column)
        else:
            left -= column.nbytes
        if left < 0:
            return False
    return True


def _inline(column: Tensor | list) -> tuple[str, tuple[int, ...], bytes] | list:
    """A column in a message: of the kinds of objects that pickle takes at once."""
    if isinstance(column, list):
        return column
    tensor = column.detach().cpu().contiguous()
    words = tensor.view(_SAME_SIZE[tensor.element_size()])
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), words.numpy().tobytes()


def _outline(inline: tuple[str, tuple[int, ...], bytes] | list) -> Tensor | list:
    """What `_inline` was given."""
    if isinstance(inline, list):
        return inline
    name, shape, data = inline
    dtype = getattr(torch, name)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


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
    """The same batch with its concrete columns in the object store, unless they are small altogether.

    Each token column is an object of its own, so that nobody reads what he doesn't use; the (smaller) sample columns are one.
    Deferred columns stay what they are.
    """
    token, sample = batch.columns()
    whole = {name: column for name, column in token.items() if isinstance(column, Tensor)}
    others = {name: column for name, column in sample.items() if not isinstance(column, Deferred)}
    if _is_small([*whole.values(), *others.values()]):
        return batch
    rows = Rows.whole(len(batch))
    if others:
        block = _put(others)
        sample.update({name: Deferred.whole(RayColumns(block, name), rows, None) for name in others})
    for name, column in whole.items():
        token[name] = Deferred.whole(RayColumns(_put({name: column}), name), rows, batch.offsets)
    return Batch(batch.offsets, token, sample)


# -- what travels -----------------------------------------------------------------------------------------------------


class WireBatch:
    """A batch of references, as few objects as pickle can tell apart: each costs the driver some microseconds.

    Args:
        numbers: all index arrays of the batch (int64), one after the other, each distinct one once; its offsets first.
        lengths: how long each of them is.
        refs: the objects of the store.
        columns: for each column its name, whether it is a token column, for each source the object it is in and the place
            of its offsets among the index arrays (None for a sample column), and the places of piece and local. The last
            two are None for a column whose values are in ``inline`` or travel apart, in the order of the samples.
        inline: small columns, see `_inline`.
    """

    __slots__ = ("columns", "inline", "lengths", "numbers", "refs")

    def __init__(
        self,
        numbers: bytes,
        lengths: list[int],
        refs: list[ray.ObjectRef],
        columns: list[tuple],
        inline: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.numbers, self.lengths, self.refs, self.columns, self.inline = numbers, lengths, refs, columns, inline

    def __reduce__(self) -> tuple:
        return WireBatch, (self.numbers, self.lengths, self.refs, self.columns, dict(self.inline))


class _Distinct:
    """Things in the order in which they first came, each once."""

    def __init__(self) -> None:
        self.things: list[Any] = []
        self._places: dict[int, int] = {}

    def place(self, thing: Any) -> int:
        found = self._places.setdefault(id(thing), len(self.things))
        if found == len(self.things):
            self.things.append(thing)
        return found


def to_wire(batch: Batch) -> tuple[WireBatch, dict[str, Any]]:
    """A batch as a message, and its concrete columns, packed, which travel apart."""
    wire, concrete = _encode(batch)
    return wire, {name: _pack(column) for name, column in concrete.items()}


def _encode(batch: Batch) -> tuple[WireBatch, dict[str, Tensor | list]]:
    arrays, blocks = _Distinct(), _Distinct()
    concrete: dict[str, Tensor | list] = {}
    columns: list[tuple] = []
    arrays.place(batch.offsets)
    token, sample = batch.columns()
    for name, column, is_token in [(n, c, True) for n, c in token.items()] + [(n, c, False) for n, c in sample.items()]:
        if isinstance(column, Deferred):
            sources = [(blocks.place(source.block), source.name) for source in column.sources]  # type: ignore[attr-defined]
            offsets = [None if o is None else arrays.place(o) for o in column.offsets]
            rows = (arrays.place(column.rows.piece), arrays.place(column.rows.local))
            columns.append((name, is_token, sources, offsets, rows))
        else:
            concrete[name] = column
            columns.append((name, is_token, None, None, None))
    numbers = b"".join([np.asarray(array).tobytes() for array in arrays.things])
    refs = [block.ref for block in blocks.things]
    return WireBatch(numbers, [array.shape[0] for array in arrays.things], refs, columns), concrete


def from_wire(wire: WireBatch, apart: Block | None = None) -> Batch:
    """The batch of a message: every column deferred but small ones. ``apart`` holds the columns which travelled apart."""
    numbers, ends = np.frombuffer(bytearray(wire.numbers), np.int64), [0, *itertools.accumulate(wire.lengths)]
    arrays = [numbers[start:end] for start, end in itertools.pairwise(ends)]
    blocks = [Block(ref) for ref in wire.refs]
    tensors = [torch.from_numpy(array) for array in arrays]
    offsets, all_rows = tensors[0], Rows.whole(wire.lengths[0] - 1)
    shared: dict[tuple[int, int], Rows] = {}
    token: dict[str, Any] = {}
    sample: dict[str, Any] = {}
    for name, is_token, sources, places, rows in wire.columns:
        column: Tensor | list | Deferred
        if name in wire.inline:
            column = _outline(wire.inline[name])
        elif sources is None:
            assert apart is not None
            column = Deferred.whole(RayColumns(apart, name), all_rows, offsets if is_token else None)
        else:
            if rows not in shared:
                shared[rows] = Rows(arrays[rows[0]], arrays[rows[1]], len(sources))
            theirs = tuple(None if place is None else tensors[place] for place in places)
            column = Deferred(tuple(RayColumns(blocks[k], source) for k, source in sources), theirs, shared[rows])
        (token if is_token else sample)[name] = column
    return Batch(offsets, token, sample)


def refer(batch: Batch) -> WireBatch:
    """A staged batch as a message."""
    wire, small = _encode(batch)
    wire.inline = {name: _inline(column) for name, column in small.items()}
    return wire


def to_wire_value(value: Any) -> Any:
    """An argument: batches as references, the rest as it is."""
    return refer(stage(value)) if isinstance(value, Batch) else value
