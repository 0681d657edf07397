"""Warnings about what rows say: odd characters, order of roles, copies, contradictions, leaks, balance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rayrlhf.data.conversation import identity
from rayrlhf.data.findings import CheckedFile, Finding
from rayrlhf.data.records import Record, text_columns

__all__ = ["balance", "characters", "duplicates", "leaks", "repeats", "role_order"]

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_LATIN = "".join(bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xC0))
_MOJIBAKE = re.compile(f"[\u00c2\u00c3][{_LATIN}]|\u00e2[\u20ac\u201e\u201a\u2020][{_LATIN}]|\u00f0\u0178[{_LATIN}]")
"""UTF-8 that was read as Windows-1252: an accented letter, a curly quote or dash, an emoji."""
_LEAST_REPEATED = 12
"""Characters of a prompt below which a response may well begin with it by chance."""
_LEAST_SHARE = 0.1


def characters(file: CheckedFile) -> Iterator[Finding]:
    """Control characters, replacement characters and text that was decoded wrongly."""
    for row in file.source.rows:
        for column, text in _texts(file, row.values):
            odd = _CONTROL.search(text)
            if odd:
                name = f"U+{ord(odd[0]):04X}"
                said = "the replacement character" if odd[0] == "\ufffd" else "the control character"
                yield file.warning(row.number, "characters", f"column {column!r} has {said} {name}")
            wrong = _MOJIBAKE.search(text)
            if wrong:
                said = f"{wrong[0]!r}, which looks like UTF-8 that was read as Windows-1252"
                yield file.warning(row.number, "characters", f"column {column!r} has {said}")


def _columns(file: CheckedFile) -> list[str]:
    return [*text_columns(file.entry.source), file.entry.source.messages_column]


def _texts(file: CheckedFile, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """All texts of a row's columns, a list of messages as one text."""
    for column in _columns(file):
        value = values.get(column)
        if isinstance(value, str):
            yield column, value
        elif isinstance(value, list):
            said = [message.get("content") for message in value if isinstance(message, dict)]
            yield column, "\n".join(text for text in said if isinstance(text, str))


def role_order(file: CheckedFile) -> Iterator[Finding]:
    """Conversations in which nobody answers, or the system speaks up late."""
    for row in file.source.rows:
        for column in _columns(file):
            value = row.values.get(column)
            messages = value if isinstance(value, list) else []
            roles = [message.get("role") for message in messages if isinstance(message, dict)]
            for index, (one, other) in enumerate(zip(roles, roles[1:], strict=False), start=2):
                if other == "system":
                    text = f"message {index} of column {column!r} is from the system, which speaks first if at all"
                    yield file.warning(row.number, "role_order", text)
                elif one == other and one is not None:
                    text = f"messages {index - 1} and {index} of column {column!r} are both from the {one}"
                    yield file.warning(row.number, "role_order", text)


def repeats(file: CheckedFile) -> Iterator[Finding]:
    """Responses that repeat their prompt or go on with another turn."""
    for record in file.records:
        if record.messages is not None:
            continue
        prompt = record.written
        if len(prompt) >= _LEAST_REPEATED and record.responses and all(r.startswith(prompt) for r in record.responses):
            text = "the response begins with the whole prompt, which stands before it already"
            yield file.warning(record.number, "prompt_repeated", text)
        turns = [mark for mark in ("\n\nHuman:", "\n\nAssistant:") if any(mark in r for r in record.responses)]
        if turns:
            text = f"a response goes on with another turn ({turns[0]!r}), so the prompts of its last answers differ"
            yield file.warning(record.number, "prompt_differs", text)


def _content(record: Record) -> tuple[Any, tuple[str, ...]]:
    """What makes two rows the same: the prompt with its system message, and what is said behind it."""
    system = tuple(message["content"] for message in record.messages or [] if message["role"] == "system")
    if record.turns is not None:
        return (system, identity(record.turns)), ()
    return (system, record.identity), tuple(response.strip() for response in record.responses)


def duplicates(files: Sequence[CheckedFile]) -> Iterator[Finding]:
    """Rows that say the same, and rows that say the opposite. The files are of one side of the split."""
    first: dict[Any, tuple[CheckedFile, Record]] = {}
    for file in files:
        for record in file.records:
            prompt, said = _content(record)
            key = (file.kind, prompt, said, record.desirable)
            if key in first:
                there, other = first[key]
                text = f"it says the same as {there.at(other.number)}"
                yield file.warning(record.number, "duplicate", text)
                continue
            first[key] = (file, record)
            opposite: tuple[Any, ...]
            if file.kind == "pairs":
                opposite = (file.kind, prompt, said[::-1], None)
            elif record.desirable is not None:
                opposite = (file.kind, prompt, said, not record.desirable)
            else:
                continue
            if opposite in first:
                there, other = first[opposite]
                what = "a pair the other way round" if file.kind == "pairs" else "the same with the other label"
                yield file.warning(record.number, "contradiction", f"{there.at(other.number)} is {what}")
                yield there.warning(other.number, "contradiction", f"{file.at(record.number)} is {what}")


def leaks(files: Sequence[CheckedFile]) -> Iterator[Finding]:
    """Prompts to train on which are held out too."""
    held_out = {
        record.identity: file.at(record.number) for file in files if file.entry.held_out for record in file.records
    }
    for file in files:
        for record in file.records:
            if not file.entry.held_out and record.identity in held_out:
                text = f"its prompt is that of {held_out[record.identity]}, which is held out; it isn't trained on"
                yield file.warning(record.number, "leak", text)


def balance(files: Sequence[CheckedFile]) -> Iterator[Finding]:
    """Labels of which nearly all are the same."""
    labelled = [(file, record) for file in files for record in file.records if record.desirable is not None]
    desirable = sum(bool(record.desirable) for _, record in labelled)
    few = min(desirable, len(labelled) - desirable)
    if labelled and few < _LEAST_SHARE * len(labelled):
        text = f"{desirable} of {len(labelled)} examples are desirable; the rarer label has less than a tenth. "
        text += "dpo.desirable_weight and dpo.undesirable_weight can make up for it"
        yield labelled[0][0].warning(0, "unbalanced", text)
