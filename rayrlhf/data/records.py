"""From a row to a prompt and its responses: which columns, what is the prompt, and what is wrong with the row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, Literal

from rayrlhf.config.offline import ExamplesConfig, ExampleSource
from rayrlhf.data.candidates import Candidate
from rayrlhf.data.conversation import as_messages, identity, messages_problem, prompt_problem, text_problem
from rayrlhf.data.source import Row, Source, complete_rows, describe

__all__ = ["Kind", "Record", "TEXT_COLUMNS", "read_records", "text_columns"]

Kind = Literal["examples", "pairs", "labelled", "prompts"]

TEXT_COLUMNS = ("prompt_column", "completion_column", "chosen_column", "rejected_column")
_HEADER = "\n\nAssistant:"
"""What stands before an answer in text of the hh-rlhf form."""


@dataclass
class Record(Candidate):
    """A checked row on its way to tokens.

    ``responses`` holds the completion, or the chosen and the rejected response; ``turns`` a whole conversation, of which
    ``messages`` is the beginning. ``response_tokens`` has one list a response, and ``learnt``, for a whole
    conversation, whether an assistant says the token.
    """

    responses: tuple[str, ...] = ()
    turns: list[dict[str, Any]] | None = None
    margin: float | None = None
    desirable: bool | None = None
    response_tokens: list[list[int]] = field(default_factory=list)
    learnt: list[bool] | None = None


def text_columns(entry: ExampleSource) -> list[str]:
    """The columns of a source that hold text."""
    return [getattr(entry, column) for column in TEXT_COLUMNS]


def read_records(source: Source, entry: ExampleSource, data: ExamplesConfig, kind: Kind) -> list[Record]:
    """The usable rows of a source; what is wrong with the others goes to the source's problems.

    Args:
        source: its rows.
        entry: the columns' names.
        data: the chat template's rule and the system prompt.
        kind: what a row must be.
    """
    wanted = {
        "examples": ("prompt_column", "completion_column"),
        "pairs": ("chosen_column", "rejected_column"),
        "labelled": ("prompt_column", "completion_column", "label_column"),
        "prompts": ("prompt_column",),
    }[kind]
    if kind == "examples" and any(row.values.get(entry.messages_column) is not None for row in source.rows):
        with_messages = [row for row in source.rows if row.values.get(entry.messages_column) is not None]
        others = Source(source.name, source.key, source.unit)
        others.rows = [row for row in source.rows if row.values.get(entry.messages_column) is None]
        rest = complete_rows(others, _keys(entry, wanted))
        source.problems += others.problems
        rows = sorted([*with_messages, *rest], key=lambda row: row.number)
    else:
        rows = complete_rows(source, _keys(entry, wanted))
    included = kind == "pairs" and _prompts_included(rows, entry)
    readers: dict[Kind, Callable[[_Reader], Record | None]] = {
        "examples": _Reader.example,
        "pairs": lambda reader: reader.pair(included),
        "labelled": _Reader.labelled,
        "prompts": _Reader.alone,
    }
    read = (readers[kind](_Reader(source, row, entry, data)) for row in rows)
    return [record for record in read if record is not None]


def _keys(entry: ExampleSource, fields: Sequence[str]) -> dict[str, str]:
    return {getattr(entry, name): f"data.{name}" for name in fields}


def _prompts_included(rows: Sequence[Row], entry: ExampleSource) -> bool:
    """Whether the responses of a source repeat the prompt: in most of its rows both begin with it."""
    texts = [
        [row.values.get(column) for column in (entry.prompt_column, entry.chosen_column, entry.rejected_column)]
        for row in rows
    ]
    plain = [row for row in texts if all(isinstance(value, str) and value for value in row)]
    return sum(all(str(text).startswith(str(row[0])) for text in row[1:]) for row in plain) * 2 > len(plain)


class _Reader:
    """Reads one row. Each part that can't be used is a problem of the source, and None."""

    def __init__(self, source: Source, row: Row, entry: ExampleSource, data: ExamplesConfig):
        self.source, self.row, self.entry, self.data = source, row, entry, data

    def refuse(self, kind: str, text: str) -> None:
        self.source.problem(text, self.row.number, kind)

    def record(self, prompt: str | list[Any], responses: tuple[str, ...]) -> Record:
        used = {*text_columns(self.entry), self.entry.messages_column}
        return Record(
            number=self.row.number,
            text=prompt if isinstance(prompt, str) else prompt[-1]["content"],
            identity=identity(prompt),
            messages=as_messages(prompt, self.data.chat_template, self.data.system_prompt),
            written=prompt if isinstance(prompt, str) else "",
            row={name: value for name, value in self.row.values.items() if name not in used},
            responses=responses,
        )

    # -- what a row may be ------------------------------------------------------------------------------------------

    def example(self) -> Record | None:
        conversation = self.row.values.get(self.entry.messages_column)
        if conversation is not None:
            return self.conversation(conversation)
        return self.single()

    def alone(self) -> Record | None:
        """A prompt without a response."""
        prompt = self.prompt(self.row.values[self.entry.prompt_column])
        return None if prompt is None else self.record(prompt, ())

    def single(self) -> Record | None:
        """A prompt with one completion."""
        prompt = self.prompt(self.row.values[self.entry.prompt_column])
        answer = self.answer(self.entry.completion_column, prompt)
        if prompt is None or answer is None:
            return None
        text, prompt = answer
        return self.record(prompt, (text,))

    def labelled(self) -> Record | None:
        label = self.row.values[self.entry.label_column]
        if not isinstance(label, bool):
            column = self.entry.label_column
            self.refuse("label", f"column {column!r} is {describe(label)}, not a boolean (legal: true, false)")
        record = self.single()
        if record is None or not isinstance(label, bool):
            return None
        record.desirable = label
        return record

    def pair(self, included: bool) -> Record | None:
        margin, fine = self.margin()
        if self.row.values.get(self.entry.prompt_column) is None:
            parted = self.implicit()
        else:
            parted = self.explicit(included)
        if parted is None or not fine:
            return None
        prompt, chosen, rejected = parted
        if chosen.strip() == rejected.strip():
            self.refuse("identical", f"chosen and rejected are the same: {describe(chosen)}")
            return None
        record = self.record(prompt, (chosen, rejected))
        record.margin = margin
        return record

    def conversation(self, messages: object) -> Record | None:
        """A whole conversation, whose assistant messages are learnt."""
        column = f"column {self.entry.messages_column!r}"
        if not isinstance(messages, list):
            self.refuse("wrong_type", f"{column} is {describe(messages)}, not a list of messages")
            return None
        problem = self.form(messages, column)
        if problem:
            self.refuse("wrong_type", problem)
            return None
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            self.refuse("role_order", f"the conversation ({', '.join(roles)}) has no assistant's message to learn")
            return None
        if roles[-1] != "assistant":
            self.refuse("role_order", f"the last message is from the {roles[-1]}; it must be from the assistant")
            return None
        first = roles.index("assistant")
        if "user" not in roles[:first]:
            self.refuse("role_order", "the first assistant's message has no user's before it")
            return None
        empty = [i for i, m in enumerate(messages, start=1) if m["role"] != "system" and not m["content"].strip()]
        for number in empty:
            kind = "empty_response" if roles[number - 1] == "assistant" else "empty_prompt"
            self.refuse(kind, f"message {number}, the {roles[number - 1]}'s, is empty")
        if empty:
            return None
        record = self.record(messages[:first], (messages[first]["content"],))
        record.turns = as_messages(messages, self.data.chat_template, self.data.system_prompt)
        return record

    # -- parts of it ------------------------------------------------------------------------------------------------

    def form(self, messages: list[Any], what: str) -> str | None:
        if self.data.chat_template == "never":
            return f"{what} is a list of messages; data.chat_template = never takes strings only (legal: auto, always)"
        return messages_problem(messages, what)

    def prompt(self, value: object) -> str | list[Any] | None:
        problem = prompt_problem(value, self.data.chat_template)
        if problem is None:
            assert isinstance(value, str | list)
            return value
        said = value[-1].get("content") if isinstance(value, list) and value and isinstance(value[-1], dict) else value
        if isinstance(said, str) and not said.strip():
            kind = "empty_prompt"
        else:
            kind = "role_order" if problem.startswith("the last message is from") else "wrong_type"
        self.refuse(kind, problem)
        return None

    def response(self, column: str) -> str | list[Any] | None:
        """A response of the right type: a string, or a list of messages of which the last is the assistant's."""
        value, what = self.row.values[column], f"column {column!r}"
        if isinstance(value, list):
            problem = self.form(value, what)
            if problem:
                self.refuse("wrong_type", problem)
                return None
            last = value[-1]
            if last["role"] != "assistant":
                text = f"{what}: the last message is from the {last['role']}; it must be from the assistant"
                self.refuse("role_order", text)
                return None
            if not last["content"].strip():
                self.refuse("empty_response", f"{what}: the assistant's message is empty")
                return None
            return value
        problem = text_problem(value, what)
        if problem:
            empty = isinstance(value, str) and not value.strip()
            self.refuse("empty_response" if empty else "wrong_type", problem)
            return None
        assert isinstance(value, str)
        return value

    def answer(self, column: str, prompt: str | list[Any] | None) -> tuple[str, str | list[Any]] | None:
        """The text of a response behind a given prompt, and the prompt: one message where the response is messages."""
        value = self.response(column)
        if value is None or prompt is None:
            return None
        if isinstance(value, str):
            return value, prompt
        *before, last = value
        if before and identity(before) != identity(prompt):
            self.refuse(
                "prompt_differs", f"column {column!r} has messages before the last one which aren't the prompt's"
            )
            return None
        if before:
            prompt = before
        elif isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return last["content"], prompt

    def explicit(self, included: bool) -> tuple[str | list[Any], str, str] | None:
        prompt = self.prompt(self.row.values[self.entry.prompt_column])
        columns = (self.entry.chosen_column, self.entry.rejected_column)
        parts = [self.answer(column, prompt) for column in columns]
        if prompt is None or parts[0] is None or parts[1] is None:
            return None
        texts = [text for text, _ in (parts[0], parts[1])]
        if included and isinstance(prompt, str):
            for index, column in enumerate(columns):
                if isinstance(self.row.values[column], str):
                    if not texts[index].startswith(prompt):
                        text = f"column {column!r} doesn't begin with the prompt, as this file's other rows do"
                        self.refuse("prompt_differs", text)
                        return None
                    texts[index] = texts[index][len(prompt) :]
        for text, column in zip(texts, columns, strict=True):
            if not text.strip():
                self.refuse("empty_response", f"column {column!r} has nothing behind the prompt")
                return None
        # the one that has more to say of the prompt: a conversation where either response is messages
        whole = next((found for _, found in (parts[0], parts[1]) if isinstance(found, list)), prompt)
        return whole, texts[0], texts[1]

    def implicit(self) -> tuple[str | list[Any], str, str] | None:
        """Prompt, chosen and rejected of two texts or conversations with a common beginning."""
        chosen, rejected = self.response(self.entry.chosen_column), self.response(self.entry.rejected_column)
        if chosen is None or rejected is None:
            return None
        if isinstance(chosen, str) and isinstance(rejected, str):
            return self.implicit_text(chosen, rejected)
        if isinstance(chosen, str) or isinstance(rejected, str):
            self.refuse("wrong_type", "chosen and rejected must both be strings or both be lists of messages")
            return None
        if len(chosen) != len(rejected) or [_said(m) for m in chosen[:-1]] != [_said(m) for m in rejected[:-1]]:
            pairs = zip(chosen, rejected, strict=False)
            parted = next(
                (i for i, (a, b) in enumerate(pairs) if _said(a) != _said(b)), min(len(chosen), len(rejected))
            )
            found = f"chosen ({len(chosen)} messages) and rejected ({len(rejected)}) part at message {parted + 1}"
            self.refuse("prompt_differs", f"{found}; they must be the same but for the last one")
            return None
        if len(chosen) == 1:
            text = (
                f"there is no column {self.entry.prompt_column!r}, and chosen and rejected have no prompt before them"
            )
            self.refuse("missing_prompt", text)
            return None
        prompt = self.prompt(chosen[:-1])
        return None if prompt is None else (prompt, chosen[-1]["content"], rejected[-1]["content"])

    def implicit_text(self, chosen: str, rejected: str) -> tuple[str, str, str] | None:
        end = commonprefix([chosen, rejected]).rfind(_HEADER)
        if end < 0:
            both = _HEADER in chosen and _HEADER in rejected
            kind = "prompt_differs" if both else "missing_prompt"
            text = f"there is no column {self.entry.prompt_column!r}, and chosen and rejected have no common beginning"
            self.refuse(kind, f"{text} up to {_HEADER!r}")
            return None
        end += len(_HEADER)
        prompt = self.prompt(chosen[:end])
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not text[end:].strip():
                self.refuse("empty_response", f"{name} has nothing behind the prompt")
                return None
        return None if prompt is None else (chosen[:end], chosen[end:], rejected[end:])

    def margin(self) -> tuple[float | None, bool]:
        """The margin, and whether it can be used."""
        value = self.row.values.get(self.entry.margin_column)
        if value is None:
            return None, True
        what = f"column {self.entry.margin_column!r}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse("margin", f"{what} is {describe(value)}, not a number")
        elif not math.isfinite(value) or value < 0:
            self.refuse("margin", f"{what} is {value}; legal: a finite number, 0 or more")
        else:
            return float(value), True
        return None, False


def _said(message: dict[str, Any]) -> tuple[str, str]:
    return message["role"], message["content"]
