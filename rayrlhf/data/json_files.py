"""JSON Lines and JSON files, read so that each problem has its line number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayrlhf.data.source import UTF8_BOM, Row, Source, check_utf8, describe

__all__ = ["read_json", "read_jsonl"]

_SPACE = " \t\r\n"


def read_jsonl(source: Source, path: Path, limit: int | None) -> None:
    """Add the objects of a JSON Lines file, one a line, to ``source``; at most the first ``limit``.

    Lines end with ``\\n`` or ``\\r\\n`` and nothing else, so a U+2028 inside a string is text. Empty lines are
    problems, but for those at the end of the file.
    """
    empty: list[int] = []
    seen = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(UTF8_BOM)
            if not raw.strip():
                empty.append(number)
                continue
            if seen == limit:
                break
            seen += 1
            for line in empty:
                source.problem("the line is empty", line)
            empty.clear()
            text = check_utf8(source, raw.rstrip(b"\r\n"), number)
            if text is not None:
                _add_line(source, text, number)
    if not seen:
        source.problem("the file is empty")


def _add_line(source: Source, text: str, number: int) -> None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        source.problem(_malformed(error, text), number)
        return
    _add_object(source, value, number, "the line")


def _add_object(source: Source, value: Any, number: int, what: str) -> None:
    if isinstance(value, dict):
        source.rows.append(Row(number, value))
    else:
        source.problem(f"{what} is {describe(value)}, not an object with columns", number)


def _malformed(error: Exception, text: str) -> str:
    """What is wrong with JSON, and what stands at that place."""
    if not isinstance(error, json.JSONDecodeError):
        return f"malformed JSON: {type(error).__name__}: {error}"
    rest = text[error.pos :].split("\n", 1)[0].strip()
    found = f"found {rest[:30]!r}" if rest else "found the end"
    return f"malformed JSON: {error.msg} at column {error.colno}, {found}"


def read_json(source: Source, path: Path, limit: int | None) -> None:
    """Add the objects of a .json file to ``source``: one list of objects, or one object a line."""
    raw = path.read_bytes().removeprefix(UTF8_BOM)
    start = raw.lstrip()[:1]
    if start == b"[":
        texts = [check_utf8(source, line, number) for number, line in enumerate(raw.split(b"\n"), start=1)]
        if None not in texts:
            _read_list(source, raw.decode("utf-8"), limit)
        return
    if start == b"{" and b"\n" in raw.strip():
        try:
            whole = json.loads(raw)
        except (ValueError, RecursionError):
            whole = None  # not one object: so it is one object a line, and that reader says what is wrong with which
        if isinstance(whole, dict):
            source.problem(
                f"the file is one object with the keys {sorted(whole)}; legal: a list of objects, or one object a line"
            )
            return
    read_jsonl(source, path, limit)


def _read_list(source: Source, text: str, limit: int | None) -> None:
    """Add the elements of the JSON list ``text``. A syntax error ends the reading: what follows can't be trusted.

    Elements have the number of their line; where all of them stand in one, they are numbered themselves.
    """
    decoder = json.JSONDecoder()
    counted, line = 0, 1
    seen = 0
    element = 1
    in_one_line = "\n" not in text.strip() and text.rstrip().endswith("]")
    if in_one_line:
        source.unit = "row"

    def skip(position: int) -> int:
        while position < len(text) and text[position] in _SPACE:
            position += 1
        return position

    def line_of(position: int) -> int:
        nonlocal counted, line
        if in_one_line:
            return element
        line += text.count("\n", counted, position)
        counted = position
        return line

    def unexpected(position: int, wanted: str) -> None:
        rest = text[position:].split("\n", 1)[0].strip()
        found = f"found {rest[:30]!r}" if rest else "found the end of the file"
        source.problem(f"malformed JSON: {wanted}, {found}", line_of(position))

    position = skip(skip(0) + 1)
    if text[position : position + 1] == "]":
        source.problem("the list is empty")
        return
    while limit is None or seen < limit:
        element = seen + 1
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            unexpected(error.pos, error.msg)
            return
        except (ValueError, RecursionError) as error:
            source.problem(_malformed(error, text), line_of(position))
            return
        seen += 1
        _add_object(source, value, line_of(position), "an element of the list")
        position = skip(end)
        if text[position : position + 1] == "]":
            if skip(position + 1) < len(text):
                unexpected(skip(position + 1), "something stands behind the list")
            return
        if text[position : position + 1] != ",":
            unexpected(position, "expecting ',' or ']'")
            return
        position = skip(position + 1)
