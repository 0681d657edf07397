"""A file of JSON lines, each about one step of a run, which a resumed run cuts back to where it starts again."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayrlhf.errors import InputRefused, RunFailed

__all__ = ["JsonlFile", "keep_before", "read_rows", "restored", "storable"]

logger = logging.getLogger(__name__)


def storable(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as JSON can hold it: numbers that aren't finite are null, and ``non_finite`` says what they were:
    ``{"kl": null, "non_finite": {"kl": "nan"}}``. Inside lists and objects they are null alone."""
    strange = {name: str(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    kept = {name: _nulls(value) for name, value in row.items()}
    return kept | {"non_finite": strange} if strange else kept


def _nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _nulls(inner) for key, inner in value.items()}
    return [_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `storable` was given, with the numbers that ``non_finite`` tells of: what is null then was never measured."""
    strange = row.get("non_finite", {})
    return {
        name: float(strange[name]) if name in strange else value for name, value in row.items() if name != "non_finite"
    }


class JsonlFile:
    """Appends one JSON object a line; every line is in the operating system's hands when ``write`` returns.

    ``resume_step=None`` starts a new file, and a file with content is never overwritten (`InputRefused`). Else every
    line whose ``step`` is ``resume_step`` or more is removed first: these steps are made again.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None):
        self.path = path
        if resume_step is not None:
            if path.exists():
                keep_before(path, resume_step)
        elif path.exists() and path.stat().st_size > 0:
            raise InputRefused(
                f"{path}: holds the lines of an earlier run. Go on with that run (--resume), or choose another run_dir."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate has no UTF-8; backslashreplace writes it as \udXXX, which JSON reads back.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends ``row``. Raises `RunFailed` where the file can't be written (a full disk), ValueError on NaN."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise RunFailed(f"{self.path}: can't be written: {error.strerror or error}") from error

    def close(self) -> None:
        """May be called more than once."""
        self._file.close()


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(line number, bytes with one newline at the end, row); the row is None where the line is no object with step."""
    # Binary: a str would also be split at U+2028 and the like, which may stand in a response.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:  # JSONDecodeError and UnicodeDecodeError: a torn line may end inside a character
                row = None
            usable = isinstance(row, dict) and type(row.get("step")) is int
            yield number, line.rstrip(b"\r\n") + b"\n", row if usable else None


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl or samples.jsonl that can be read; none where there is no file."""
    path = Path(path)
    return [row for _, _, row in _lines(path) if row is not None] if path.exists() else []


def keep_before(path: Path, step: int) -> None:
    """Removes the lines of ``step`` and later ones, and lines that can't be read: a killed run leaves a torn last line.

    The new file takes the old one's place in one move, so that a crash in between loses nothing.
    """
    kept, repeated, unreadable = 0, 0, []
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as out:
        for number, line, row in _lines(path):
            if row is None:
                unreadable.append(number)
            elif row["step"] >= step:
                repeated += 1
            else:
                out.write(line)
                kept += 1
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    if unreadable:
        logger.warning("%s: removed lines that can't be read: %s", path, ", ".join(map(str, unreadable)))
    logger.info("%s: goes on at step %d; %d lines kept, %d removed", path, step, kept, repeated)
