"""The packed ragged batch in which samples travel between roles.

Token columns are flat tensors of length T (all samples one after the other), sample columns have one entry for each
of the S samples, and ``offsets`` (int64, [S + 1]) says where each sample begins. There is no padding.

A column may be `Deferred`: its values lie elsewhere (in Ray's object store, say) and are fetched at first use. So a
driver hands batches from role to role without ever holding their tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "BatchError", "Deferred", "Rows", "Source"]


class BatchError(ValueError):
    """A column doesn't fit the batch, or is missing."""


class Source(Protocol):
    """Where the values of a deferred column lie. Must be picklable."""

    def fetch(self) -> Any:
        """The column's values: a tensor [T of the source, ...] for tokens, else a tensor or list [S of the source]."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which samples of which sources a column has: sample i is ``local[i]`` of source ``piece[i]`` (both int64 [S]).

    Columns that came together share one of these, so that a selection is worked out once for all of them. They are arrays
    of numpy: a driver works on few numbers at a time, and there torch takes several times as long.
    """

    piece: np.ndarray
    local: np.ndarray
    sources: int

    @classmethod
    def whole(cls, samples: int) -> Rows:
        """All samples of one source, in its order."""
        return cls(np.zeros(samples, np.int64), np.arange(samples), 1)

    def select(self, indices: np.ndarray) -> tuple[Rows, list[int]]:
        """The samples ``indices`` of these, and the sources that they still need."""
        piece, local = self.piece[indices], self.local[indices]
        # A selection of nothing keeps a source, which says what kind of column it is.
        if self.sources == 1 or not len(indices):
            return Rows(piece, local, 1), [0]
        used, piece = np.unique(piece, return_inverse=True)
        needed = used.tolist()
        return Rows(piece, local, len(needed)), needed

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        """The rows of several columns one after the other, and their sources likewise."""
        shifts = [0, *itertools.accumulate(part.sources for part in parts)]
        piece = np.concatenate([part.piece + shift for part, shift in zip(parts, shifts, strict=False)])
        return Rows(piece, np.concatenate([part.local for part in parts]), shifts[-1])

    def is_whole(self) -> bool:
        return self.sources == 1 and np.array_equal(self.local, np.arange(len(self.local)))


@dataclass(frozen=True, eq=False)
class Deferred:
    """A column whose samples lie in one or several sources; source k's own offsets are ``offsets[k]`` (None for a sample
    column)."""

    sources: tuple[Source, ...]
    offsets: tuple[Tensor | None, ...]
    rows: Rows

    @classmethod
    def whole(cls, source: Source, rows: Rows, offsets: Tensor | None) -> Deferred:
        """A column that lies in one source."""
        return cls((source,), (offsets,), rows)

    def keep(self, sources: Sequence[int], rows: Rows) -> Deferred:
        """Other rows of those of the sources that they need."""
        return Deferred(tuple(self.sources[k] for k in sources), tuple(self.offsets[k] for k in sources), rows)

    def fetch(self) -> Any:
        """The values, in this column's order."""
        values = [source.fetch() for source in self.sources]
        first = self.offsets[0]
        if self.rows.is_whole() and len(self.rows.local) == (len(values[0]) if first is None else len(first) - 1):
            return values[0]
        pairs = list(zip(self.rows.piece.tolist(), self.rows.local.tolist(), strict=True))
        if isinstance(values[0], list):
            return [values[p][k] for p, k in pairs]
        if self.offsets[0] is None:
            return torch.stack([values[p][k] for p, k in pairs]) if pairs else values[0][:0]
        spans = [(p, *self.offsets[p][k : k + 2].tolist()) for p, k in pairs]  # type: ignore[index]
        return torch.cat([values[p][start:end] for p, start, end in spans]) if spans else values[0][:0]


Column = Tensor | list | Deferred


def _offsets(lengths: np.ndarray) -> Tensor:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return torch.from_numpy(offsets)


def _flat(offsets: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
    """Flat positions of the tokens of samples ``indices``, whose offsets in the selection are ``selected``."""
    shift = torch.repeat_interleave(offsets[indices] - selected[:-1], selected[1:] - selected[:-1])
    return torch.arange(int(selected[-1])) + shift


class Batch:
    """Named columns over S samples and T tokens.

    Args:
        offsets: int64 [S + 1]; sample i has the tokens ``offsets[i]:offsets[i + 1]`` of each token column.
        token: columns with one entry for each token, tensors [T, ...].
        sample: columns with one entry for each sample, tensors [S, ...] or lists of length S.

    Raises:
        BatchError: where a column's length doesn't fit, or a name stands for two columns.
    """

    def __init__(self, offsets: Tensor, token: Mapping[str, Column], sample: Mapping[str, Column] | None = None):
        self.offsets = offsets
        self._token = dict(token)
        self._sample = dict(sample or {})
        both = self._token.keys() & self._sample.keys()
        if both:
            raise BatchError(f"columns {sorted(both)} are given both for tokens and for samples")
        for columns, size, kind in ((self._token, self.num_tokens, "tokens"), (self._sample, len(self), "samples")):
            for name, column in columns.items():
                if isinstance(column, Deferred):
                    found, expected = len(column.rows.local), len(self)
                else:
                    found, expected = len(column), size
                if found != expected:
                    raise BatchError(f"column {name!r} has {found} entries where the batch has {size} {kind}")

    @classmethod
    def from_samples(cls, token: Mapping[str, Sequence[Tensor]], sample: Mapping[str, Column] | None = None) -> Batch:
        """Pack columns that are given as one tensor a sample."""
        lengths = {name: [len(entry) for entry in column] for name, column in token.items()}
        if not lengths or not all(lengths.values()):
            raise BatchError("a batch is packed from at least one token column with at least one sample")
        first, expected = next(iter(lengths.items()))
        for name, found in lengths.items():
            if found != expected:
                raise BatchError(f"the samples of column {name!r} have {found} tokens, those of {first!r} {expected}")
        offsets = _offsets(np.array(expected))
        return cls(offsets, {name: torch.cat(list(column)) for name, column in token.items()}, sample)

    # -- what is in it ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """S, the number of samples."""
        return self.offsets.shape[0] - 1

    def keys(self) -> list[str]:
        return [*self._token, *self._sample]

    def __contains__(self, name: object) -> bool:
        return name in self._token or name in self._sample

    def __getitem__(self, name: str) -> Any:
        for columns in (self._token, self._sample):
            if name in columns:
                column = columns[name]
                if isinstance(column, Deferred):
                    column = column.fetch()
                    size = self.num_tokens if columns is self._token else len(self)
                    if len(column) != size:
                        raise BatchError(f"column {name!r} was fetched with {len(column)} entries instead of {size}")
                    columns[name] = column
                return column
        raise BatchError(f"the batch has no column {name!r}; it has {sorted(self.keys())}")

    def is_token_column(self, name: str) -> bool:
        return name in self._token

    def columns(self) -> tuple[dict[str, Column], dict[str, Column]]:
        """The token and the sample columns as they are: deferred ones are not fetched."""
        return dict(self._token), dict(self._sample)

    @property
    def num_tokens(self) -> int:
        """T, prompts and responses together."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> Tensor:
        """int64 [S], tokens of each sample."""
        return self.offsets[1:] - self.offsets[:-1]

    def spans(self) -> list[tuple[int, int]]:
        """Where each sample's tokens begin and end."""
        ends = self.offsets.tolist()
        return list(zip(ends[:-1], ends[1:], strict=True))

    # -- new batches --------------------------------------------------------------------------------------------

    def with_columns(
        self, token: Mapping[str, Column] | None = None, sample: Mapping[str, Column] | None = None
    ) -> Batch:
        """The same samples with columns added or replaced."""
        return Batch(self.offsets, {**self._token, **(token or {})}, {**self._sample, **(sample or {})})

    def merge(self, *others: Batch) -> Batch:
        """The same samples with all columns of batches over these very samples."""
        token, sample = self.columns()
        for other in others:
            if not torch.equal(other.offsets, self.offsets):
                raise BatchError("batches over different samples can't be merged")
            token.update(other._token)
            sample.update(other._sample)
        return Batch(self.offsets, token, sample)

    def only(self, names: Iterable[str]) -> Batch:
        """The same samples with those of the columns ``names`` which it has."""
        wanted = set(names)
        return Batch(
            self.offsets,
            {k: v for k, v in self._token.items() if k in wanted},
            {k: v for k, v in self._sample.items() if k in wanted},
        )

    def select(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples ``indices`` (from 0), in that order; a sample may be taken more than once.

        Raises:
            BatchError: where an index isn't a sample of the batch, or a mask was given.
        """
        index = torch.as_tensor(indices)
        if len(index) and (index.dtype == torch.bool or index.is_floating_point()):
            raise BatchError(f"select takes the positions of samples as integers, not {index.dtype}")
        index = index.to(torch.int64)
        chosen, ends = index.numpy(), self.offsets.numpy()
        outside = (chosen < 0) | (chosen >= len(self))
        if outside.any():
            raise BatchError(f"samples {chosen[outside].tolist()} aren't in a batch of {len(self)}")
        offsets = _offsets(ends[chosen + 1] - ends[chosen])
        concrete = any(not isinstance(column, Deferred) for column in self._token.values())
        flat = _flat(self.offsets, index, offsets) if concrete else index
        selected: dict[int, tuple[Rows, list[int]]] = {}

        def take(column: Column, where: Tensor) -> Column:
            if isinstance(column, Deferred):
                if id(column.rows) not in selected:
                    selected[id(column.rows)] = column.rows.select(chosen)
                rows, sources = selected[id(column.rows)]
                return column.keep(sources, rows)
            return [column[i] for i in where.tolist()] if isinstance(column, list) else column[where]

        return Batch(
            offsets,
            {name: take(column, flat) for name, column in self._token.items()},
            {name: take(column, index) for name, column in self._sample.items()},
        )

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """The samples of all batches, one batch after the other.

        Raises:
            BatchError: where the batches don't have the same columns.
        """
        if not batches:
            raise BatchError("there is nothing to concatenate")
        names = {(name, batches[0].is_token_column(name)) for name in batches[0].keys()}
        for batch in batches[1:]:
            differing = names ^ {(name, batch.is_token_column(name)) for name in batch.keys()}
            if differing:
                raise BatchError(f"batches differ in the columns {sorted({name for name, _ in differing})}")
        joined: dict[tuple[int, ...], Rows] = {}
        return Batch(
            _offsets(np.concatenate([np.diff(b.offsets.numpy()) for b in batches])),
            {name: _join([b._token[name] for b in batches], batches, name, joined) for name in batches[0]._token},
            {name: _join([b._sample[name] for b in batches], batches, name, joined) for name in batches[0]._sample},
        )


def _join(columns: list[Column], batches: Sequence[Batch], name: str, joined: dict[tuple[int, ...], Rows]) -> Column:
    deferred = [column for column in columns if isinstance(column, Deferred)]
    if len(deferred) == len(columns):
        key = tuple(id(column.rows) for column in deferred)
        if key not in joined:
            joined[key] = Rows.concat([column.rows for column in deferred])
        sources, offsets = [c.sources for c in deferred], [c.offsets for c in deferred]
        return Deferred(tuple(itertools.chain(*sources)), tuple(itertools.chain(*offsets)), joined[key])
    values = [b[name] for b in batches]
    if isinstance(values[0], list):
        return [entry for column in values for entry in column]
    return torch.cat(values)
