"""One file or dataset: where it is, its rows, and the problems that were found in it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rayrlhf.errors import InputRefused

__all__ = [
    "LISTED",
    "Place",
    "Problem",
    "Row",
    "Source",
    "check_utf8",
    "complete_rows",
    "describe",
    "nearest",
    "raise_problems",
]

LISTED = 20
"""Problems that are spelt out in one message; of the rest only the number is given."""

UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Place:
    """What is to be read: ``name``, a file or dataset, which the configuration's ``key`` gives.

    ``split`` and ``subset`` are for Hugging Face datasets; at most the first ``limit`` rows are read.
    """

    key: str
    name: str
    split: str = "train"
    subset: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Row:
    """One record: its line (or row) number, counted from 1, and its columns."""

    number: int
    values: dict[str, Any]


class Problem(NamedTuple):
    """Why row ``number`` can't be used (0: the source as a whole). ``kind`` is one word for the kind of trouble."""

    number: int
    text: str
    kind: str


@dataclass
class Source:
    """Rows of one file or dataset, in its order.

    ``key`` is the configuration's key that names it, ``unit`` what its numbers count ("line" or "row").
    """

    name: str
    key: str
    unit: str = "line"
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def at(self, number: int) -> str:
        """Where row ``number`` stands, for a message; 0 is the source as a whole."""
        return f"{self.name}, {self.unit} {number}" if number else self.name

    def problem(self, text: str, number: int = 0, kind: str = "malformed") -> None:
        """Note a problem of row ``number``, or of the source as a whole."""
        self.problems.append(Problem(number, text, kind))


def raise_problems(sources: Iterable[Source], further: Sequence[str] = ()) -> None:
    """Raise one `InputRefused` with the problems of all sources in the order of their lines, if there are any."""
    found = list(further)
    for source in sources:
        found += [f"{source.at(p.number)}: {p.text}" for p in sorted(source.problems, key=lambda p: p.number)]
    if len(found) > LISTED:
        found[LISTED:] = [f"... and {len(found) - LISTED} more problems"]
    if found:
        raise InputRefused(found)


def complete_rows(source: Source, keys: Mapping[str, str]) -> list[Row]:
    """The rows that have all columns. A column that no row has is one problem, otherwise it is one of each row.

    Args:
        source: where problems go.
        keys: the columns, each with the configuration's key that names it.
    """
    absent = [column for column in keys if source.rows and all(column not in row.values for row in source.rows)]
    for column in absent:
        names = list(dict.fromkeys(str(name) for row in source.rows[:100] for name in row.values))
        text = f"there is no column {column!r} ({keys[column]}); the columns are {names}{nearest(column, names)}"
        source.problem(text, kind="missing_column")
    complete = []
    for row in source.rows:
        missing = [column for column in keys if column not in row.values and column not in absent]
        for column in missing:
            names = list(row.values)
            text = f"there is no column {column!r}; the columns are {names}{nearest(column, names)}"
            source.problem(text, row.number, "missing_column")
        if not missing and not absent:
            complete.append(row)
    return complete


def describe(value: object) -> str:
    """What a value is, in JSON's words, with the value itself where it is short."""
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (dict, "an object"),
        ((list, tuple), "a list"),
    ]
    if value is None:
        return "null"
    kind = next((name for types, name in kinds if isinstance(value, types)), f"a {type(value).__name__}")
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def nearest(name: str, names: Iterable[str]) -> str:
    """``; the nearest is 'x'`` for the one of ``names`` that looks most like ``name``, or nothing."""
    by_lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; the nearest is {by_lower[close[0]]!r}" if close else ""


def check_utf8(source: Source, raw: bytes, number: int) -> str | None:
    """The text of line ``number``, or None and a problem where its bytes are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        source.problem(f"byte {raw[error.start]:#04x} at position {error.start + 1} is not UTF-8", number)
        return None
