"""The packed ragged batch in which samples travel between roles.

Token columns are flat tensors of length T (all samples one after the other), sample columns have one entry for each
of the S samples, and ``offsets`` (int64, [S + 1]) says where each sample begins. There is no padding.

A column may be `Deferred`: its values lie elsewhere (in Ray's object store, say) and are fetched at first use. So a
driver hands batches from role to role without ever holding their tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Batch", "BatchError", "Deferred", "Source"]


class BatchError(ValueError):
    """A column doesn't fit the batch, or is missing."""


class Source(Protocol):
    """Where the values of a deferred column lie. Must be picklable."""

    def fetch(self) -> Any:
        """The column's values: a tensor [T of the source, ...] for tokens, else a tensor or list [S of the source]."""


@dataclass(frozen=True)
class Deferred:
    """A column whose samples lie in one or several sources.

    Sample i of the column is sample ``local[i]`` of source ``sources[piece[i]]``, whose own offsets are
    ``offsets[piece[i]]`` (None for a sample column).
    """

    sources: tuple[Source, ...]
    offsets: tuple[Tensor | None, ...]
    piece: Tensor
    local: Tensor

    @classmethod
    def whole(cls, source: Source, samples: int, offsets: Tensor | None) -> Deferred:
        """A column that is all of one source, in its order."""
        return cls((source,), (offsets,), torch.zeros(samples, dtype=torch.int64), torch.arange(samples))

    def select(self, indices: Tensor) -> Deferred:
        piece, local = self.piece[indices], self.local[indices]
        # A selection of nothing keeps a source, which says what kind of column it is.
        used = torch.unique(piece) if len(piece) else torch.zeros(1, dtype=torch.int64)
        renumbered = torch.zeros(len(self.sources), dtype=torch.int64)
        renumbered[used] = torch.arange(len(used))
        keep = used.tolist()
        return Deferred(
            tuple(self.sources[k] for k in keep), tuple(self.offsets[k] for k in keep), renumbered[piece], local
        )

    @staticmethod
    def concat(columns: Sequence[Deferred]) -> Deferred:
        shifts = [0]
        for column in columns:
            shifts.append(shifts[-1] + len(column.sources))
        return Deferred(
            tuple(s for c in columns for s in c.sources),
            tuple(o for c in columns for o in c.offsets),
            torch.cat([c.piece + shift for c, shift in zip(columns, shifts, strict=False)]),
            torch.cat([c.local for c in columns]),
        )

    def fetch(self) -> Any:
        """The values, in this column's order."""
        values = [source.fetch() for source in self.sources]
        if len(values) == 1 and torch.equal(self.local, torch.arange(len(self.local))):
            first = self.offsets[0]
            if len(self.local) == (len(values[0]) if first is None else len(first) - 1):
                return values[0]
        pairs = list(zip(self.piece.tolist(), self.local.tolist(), strict=True))
        if isinstance(values[0], list):
            return [values[p][k] for p, k in pairs]
        if self.offsets[0] is None:
            return torch.stack([values[p][k] for p, k in pairs]) if pairs else values[0][:0]
        spans = [(p, *self.offsets[p][k : k + 2].tolist()) for p, k in pairs]  # type: ignore[index]
        return torch.cat([values[p][start:end] for p, start, end in spans]) if spans else values[0][:0]


Column = Tensor | list | Deferred


def _gather_spans(offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions of the tokens of samples ``indices``, and the offsets of the selection."""
    starts, lengths = offsets[indices], offsets[indices + 1] - offsets[indices]
    selected = torch.zeros(len(indices) + 1, dtype=torch.int64)
    selected[1:] = torch.cumsum(lengths, 0)
    shift = torch.repeat_interleave(starts - selected[:-1], lengths)
    return torch.arange(int(selected[-1])) + shift, selected


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
                found = len(column.local) if isinstance(column, Deferred) else len(column)
                expected = len(self) if isinstance(column, Deferred) else size
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
        offsets = torch.zeros(len(expected) + 1, dtype=torch.int64)
        offsets[1:] = torch.cumsum(torch.tensor(expected, dtype=torch.int64), 0)
        return cls(offsets, {name: torch.cat(list(column)) for name, column in token.items()}, sample)

    # -- what is in it ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """S, the number of samples."""
        return len(self.offsets) - 1

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
        outside = index[(index < 0) | (index >= len(self))].tolist()
        if outside:
            raise BatchError(f"samples {outside} aren't in a batch of {len(self)}")
        flat, offsets = _gather_spans(self.offsets, index)

        def take(column: Column, where: Tensor) -> Column:
            if isinstance(column, Deferred):
                return column.select(index)
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
        offsets = torch.zeros(sum(len(b) for b in batches) + 1, dtype=torch.int64)
        offsets[1:] = torch.cumsum(torch.cat([b.lengths for b in batches]), 0)
        return Batch(
            offsets,
            {name: _join([b._token[name] for b in batches], batches, name) for name in batches[0]._token},
            {name: _join([b._sample[name] for b in batches], batches, name) for name in batches[0]._sample},
        )


def _join(columns: list[Column], batches: Sequence[Batch], name: str) -> Column:
    if all(isinstance(c, Deferred) for c in columns):
        return Deferred.concat(columns)  # type: ignore[arg-type]
    values = [b[name] for b in batches]
    if isinstance(values[0], list):
        return [entry for column in values for entry in column]
    return torch.cat(values)
