"""Tokens of records, and the rule for those that are too long."""

from __future__ import annotations

from rayrlhf.config.offline import ExamplesConfig
from rayrlhf.data.candidates import encode, write
from rayrlhf.data.records import Record
from rayrlhf.data.report import LengthReport
from rayrlhf.data.source import Source
from rayrlhf.data.tokens import PromptTokenizer

__all__ = ["excess", "fit", "is_overlong", "tokenize"]


def tokenize(source: Source, records: list[Record], data: ExamplesConfig, encoder: PromptTokenizer) -> list[Record]:
    """Give the records their tokens; those that can't have any are problems, and left out.

    A prompt is tokenised alone, and so is each response, whose last token is an EOS (or the template's end of turn).
    """
    records = write(source, records, data, encoder)
    encode(source, [record for record in records if record.turns is None], encoder)
    texts: list[str] = []
    told: list[tuple[Record, int]] = []
    for record in records:
        try:
            parts = _parts(record, encoder)
        # a template is a program, and can raise anything
        except Exception as error:
            source.problem(f"the chat template can't write the response: {error}", record.number, "template")
            continue
        texts += parts
        told.append((record, len(parts)))
    tokens = iter(encoder.encode_rendered(texts))
    complete = []
    for record, count in told:
        parts_of_it = [next(tokens) for _ in range(count)]
        if record.turns is not None:
            _join(record, parts_of_it)
            if not record.tokens:
                text = "the chat template writes nothing before the first answer"
                source.problem(text, record.number, "template")
        elif record.messages is None:
            if not all(parts_of_it):
                source.problem("the tokenizer makes no tokens of a response", record.number, "empty_response")
                continue
            try:
                record.response_tokens = [encoder.with_eos(part) for part in parts_of_it]
            except ValueError as error:
                source.problem(str(error), kind="missing_eos")
                return []
        else:
            record.response_tokens = parts_of_it
        if record.tokens:
            complete.append(record)
    return complete


def _parts(record: Record, encoder: PromptTokenizer) -> list[str]:
    if record.turns is not None:
        return [text for text, _ in encoder.segments(record.turns)]
    return [encoder.response(record.written, record.messages, text) for text in record.responses]


def _join(record: Record, parts: list[list[int]]) -> None:
    """A conversation's pieces are an assistant's at every odd place; the first piece is the prompt."""
    record.tokens = parts[0]
    record.response_tokens = [[token for part in parts[1:] for token in part]]
    record.learnt = [index % 2 == 0 for index, part in enumerate(parts[1:]) for _ in part]


def fit(
    source: Source, records: list[Record], data: ExamplesConfig, encoder: PromptTokenizer, what: str
) -> tuple[list[Record], LengthReport]:
    """Apply the rule for overlong ones.

    Args:
        source: where a refusal goes.
        records: with their tokens, at least one.
        data: the lengths and the rule.
        encoder: it knows which token at a prompt's beginning must stay.
        what: the word for one of them: "example" or "pair".
    """
    longest = max(records, key=_length)
    overlong = [record for record in records if is_overlong(record, data)]
    usable = records
    if data.overlong == "refuse":
        for record in overlong:
            source.problem(excess(record, data), record.number, "overlong")
    elif data.overlong == "drop":
        too_long = {id(record) for record in overlong}
        usable = [record for record in records if id(record) not in too_long]
    else:
        for record in overlong:
            _cut(record, data, encoder)
    same = [r for r in usable if len(r.response_tokens) == 2 and r.response_tokens[0] == r.response_tokens[1]]
    alike = {id(record) for record in same}
    usable = [record for record in usable if id(record) not in alike]
    if not usable and not source.problems:
        reason = f"{len(overlong)} are longer than data.max_prompt_tokens = {data.max_prompt_tokens} or data.max_tokens"
        text = f"none of its {len(records)} {what}s is left: {reason} = {data.max_tokens}"
        source.problem(text + (f", {len(same)} have equal tokens in both responses" if same else ""), kind="overlong")
    report = LengthReport(
        name=source.name,
        what=what,
        rows=len(records),
        conversations=sum(record.messages is not None for record in records),
        longest=_length(longest),
        longest_at=f"{source.unit} {longest.number}",
        max_prompt_tokens=data.max_prompt_tokens,
        max_tokens=data.max_tokens,
        dropped=len(overlong) if data.overlong == "drop" else 0,
        truncated=len(overlong) if data.overlong == "truncate" else 0,
        same_tokens=len(same),
    )
    return usable, report


def _length(record: Record) -> int:
    return len(record.tokens) + max(map(len, record.response_tokens), default=0)


def is_overlong(record: Record, data: ExamplesConfig) -> bool:
    """Whether a record is longer than the configuration allows."""
    return len(record.tokens) > data.max_prompt_tokens or _length(record) > data.max_tokens


def excess(record: Record, data: ExamplesConfig) -> str:
    """What is too long in an overlong record."""
    found = []
    if len(record.tokens) > data.max_prompt_tokens:
        found.append(f"the prompt has {len(record.tokens)} tokens, more than data.max_prompt_tokens = ")
        found[-1] += str(data.max_prompt_tokens)
    if _length(record) > data.max_tokens:
        found.append(
            f"prompt and response have {_length(record)} tokens, more than data.max_tokens = {data.max_tokens}"
        )
    return "; ".join(found)


def _cut(record: Record, data: ExamplesConfig, encoder: PromptTokenizer) -> None:
    record.tokens = encoder.cut_left(record.tokens, data.max_prompt_tokens)
    room = data.max_tokens - len(record.tokens)
    record.response_tokens = [tokens[:room] for tokens in record.response_tokens]
    if record.learnt is not None:
        record.learnt = record.learnt[:room]
