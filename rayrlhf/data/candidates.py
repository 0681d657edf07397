"""From the rows of one source to prompts with tokens: columns, templates, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rayrlhf.config.offline import ExamplesConfig
from rayrlhf.config.schema import PromptsConfig
from rayrlhf.data.conversation import Identity, Message, as_messages, identity, prompt_problem, text_problem
from rayrlhf.data.report import SourceReport
from rayrlhf.data.source import Row, Source, complete_rows
from rayrlhf.data.tokens import PromptTokenizer

__all__ = ["Candidate", "encode", "prepare", "unused_system_prompt", "write"]

C = TypeVar("C", bound="Candidate")


@dataclass
class Candidate:
    """A checked prompt on its way: ``written`` is the plain string, or the conversation as the template writes it."""

    number: int
    text: str
    identity: Identity
    messages: list[Message] | None
    row: dict[str, Any]
    written: str = ""
    tokens: list[int] = field(default_factory=list)


def prepare(
    source: Source, data: PromptsConfig, completion_column: str | None, encoder: PromptTokenizer
) -> tuple[list[Candidate], SourceReport | None]:
    """The usable prompts of a source, and the report on it; what is wrong goes to the source's problems."""
    keys = {data.prompt_column: "data.prompt_column"}
    if completion_column:
        keys[completion_column] = "data.completion_column"
    rows = complete_rows(source, keys)
    candidates = [c for row in rows if (c := _check(source, row, data, completion_column)) is not None]
    candidates = write(source, candidates, data, encoder)
    encode(source, candidates, encoder)
    candidates = [candidate for candidate in candidates if candidate.tokens]
    if not candidates:
        if not source.problems:
            source.problem("it has no prompts")
        return [], None
    return _fit(source, candidates, data, encoder)


def _check(source: Source, row: Row, data: PromptsConfig, completion_column: str | None) -> Candidate | None:
    prompt = row.values[data.prompt_column]
    problems = [prompt_problem(prompt, data.chat_template)]
    if completion_column:
        problems.append(text_problem(row.values[completion_column], f"column {completion_column!r}"))
    for problem in problems:
        if problem:
            source.problem(problem, row.number)
    if any(problems):
        return None
    return Candidate(
        number=row.number,
        text=prompt if isinstance(prompt, str) else prompt[-1]["content"],
        identity=identity(prompt),
        messages=as_messages(prompt, data.chat_template, data.system_prompt),
        written=prompt if isinstance(prompt, str) else "",
        row={name: value for name, value in row.values.items() if name != data.prompt_column},
    )


def write(
    source: Source, candidates: list[C], data: PromptsConfig | ExamplesConfig, encoder: PromptTokenizer
) -> list[C]:
    """Apply the chat template; those that it can't be applied to are problems."""
    conversations = [candidate for candidate in candidates if candidate.messages is not None]
    if conversations and not encoder.has_template:
        why = "data.chat_template = always" if data.chat_template == "always" else "they are lists of messages"
        first = source.at(conversations[0].number)
        source.problem(
            f"{len(conversations)} of {len(candidates)} prompts need a chat template ({why}; the first is {first}), "
            "and the tokenizer has none. Give a file with a Jinja template in policy.chat_template",
            kind="template",
        )
        return [candidate for candidate in candidates if candidate.messages is None]
    written = []
    for candidate in candidates:
        try:
            if candidate.messages is not None:
                candidate.written = encoder.render(candidate.messages)
        # a template is a program, and can raise anything
        except Exception as error:
            source.problem(
                f"the chat template refuses it: {type(error).__name__}: {error}", candidate.number, "template"
            )
            continue
        written.append(candidate)
    _check_system_prompt(source, conversations, data, encoder)
    return written


def _check_system_prompt(
    source: Source, conversations: Sequence[Candidate], data: PromptsConfig | ExamplesConfig, encoder: PromptTokenizer
) -> None:
    """A template may leave system messages out in silence: then the configured one would do nothing."""
    if not data.system_prompt:
        return
    ours = {"role": "system", "content": data.system_prompt}
    for candidate in conversations:
        messages = candidate.messages or []
        if messages[0] != ours or not candidate.written:
            continue
        other = [{"role": "system", "content": f"{data.system_prompt} (another)"}, *messages[1:]]
        if encoder.render(other) == candidate.written:
            text = "the chat template leaves system messages out, so data.system_prompt would do nothing"
            source.problem(text, kind="template")
        return


def unused_system_prompt(data: PromptsConfig | ExamplesConfig, candidates: Sequence[Candidate]) -> list[str]:
    """The problem that there is where a configured system prompt goes nowhere."""
    if data.system_prompt is None or any(candidate.messages is not None for candidate in candidates):
        return []
    return [
        f"data.system_prompt is given, but no prompt is a conversation, and data.chat_template = {data.chat_template} "
        "makes none of plain strings (data.chat_template = always does)"
    ]


def encode(source: Source, candidates: Sequence[Candidate], encoder: PromptTokenizer) -> None:
    """Give the candidates their tokens; a text that has none is a problem."""
    plain = [candidate for candidate in candidates if candidate.messages is None]
    rendered = [candidate for candidate in candidates if candidate.messages is not None]
    for group, tokens_of in ((plain, encoder.encode_plain), (rendered, encoder.encode_rendered)):
        for candidate, tokens in zip(group, tokens_of([c.written for c in group]), strict=True):
            candidate.tokens = tokens
            if not tokens:
                source.problem("the tokenizer makes no tokens of it", candidate.number, "empty_prompt")


def _fit(
    source: Source, candidates: list[Candidate], data: PromptsConfig, encoder: PromptTokenizer
) -> tuple[list[Candidate], SourceReport]:
    """Apply the rule for overlong prompts."""
    most = data.max_prompt_tokens
    longest = max(candidates, key=lambda candidate: len(candidate.tokens))
    shortest = min(len(candidate.tokens) for candidate in candidates)
    length = len(longest.tokens)
    overlong = [candidate for candidate in candidates if len(candidate.tokens) > most]
    if data.overlong_prompts == "refuse":
        for candidate in overlong:
            found = f"the prompt has {len(candidate.tokens)} tokens, more than data.max_prompt_tokens = {most}"
            source.problem(f"{found} (the longest has {length})", candidate.number)
    if data.overlong_prompts == "drop":
        usable = [candidate for candidate in candidates if len(candidate.tokens) <= most]
        if not usable:
            source.problem(
                f"all {len(candidates)} prompts were dropped: they have {shortest} to {length} tokens, more than "
                f"data.max_prompt_tokens = {most}"
            )
    else:
        usable = candidates
    report = SourceReport(
        name=source.name,
        rows=len(candidates),
        conversations=sum(candidate.messages is not None for candidate in candidates),
        shortest=shortest,
        longest=length,
        longest_at=f"{source.unit} {longest.number}",
        max_prompt_tokens=most,
        dropped=len(overlong) if data.overlong_prompts == "drop" else 0,
        truncated=len(overlong) if data.overlong_prompts == "truncate_left" else 0,
    )
    if data.overlong_prompts == "truncate_left":
        for candidate in overlong:
            candidate.tokens = encoder.cut_left(candidate.tokens, most)
    return usable, report
