"""What only the model's tokenizer can tell: lengths, ends of responses, special tokens in texts, the template."""

from __future__ import annotations

from collections.abc import Iterator

from rayrlhf.config.offline import ExamplesConfig
from rayrlhf.data.findings import CheckedFile, Finding
from rayrlhf.data.lengths import excess, is_overlong
from rayrlhf.data.records import Record
from rayrlhf.data.tokens import PromptTokenizer

__all__ = ["endings", "lengths"]


def lengths(file: CheckedFile, data: ExamplesConfig) -> Iterator[Finding]:
    """Rows that are longer than the configured lengths, and pairs that are alike once cut."""
    done = {"drop": "it is dropped", "truncate": "it is cut", "refuse": "legal with data.overlong = drop or truncate"}
    left = 0
    for record in file.records:
        overlong = is_overlong(record, data)
        if overlong:
            text = f"{excess(record, data)}; {done[data.overlong]}"
            yield file.finding("error" if data.overlong == "refuse" else "warning", record.number, "overlong", text)
        if overlong and data.overlong != "truncate":
            continue
        room = data.max_tokens - min(len(record.tokens), data.max_prompt_tokens)
        responses = [tokens[:room] for tokens in record.response_tokens]
        if len(responses) == 2 and responses[0] == responses[1]:
            yield file.warning(record.number, "same_tokens", "both responses have the same tokens; it is left out")
        else:
            left += 1
    if file.records and not left:
        text = f"none of its {len(file.records)} rows is left, as all are overlong or have two equal responses"
        yield file.finding("error", 0, "overlong", text)


def endings(file: CheckedFile, encoder: PromptTokenizer) -> Iterator[Finding]:
    """Responses without the EOS that the others have, special tokens inside texts, templates that end no turn."""
    eos = encoder.tokenizer.eos_token
    plain = [record for record in file.records if record.messages is None]
    ended = {record.number for record in plain if eos and all(r.rstrip().endswith(eos) for r in record.responses)}
    for record in file.records:
        if record.messages is None and record.number not in ended and len(ended) * 2 > len(plain):
            text = f"a response doesn't end with {eos!r}, as this file's other ones do; it is added"
            yield file.warning(record.number, "missing_eos", text)
        for what, text in _said(record):
            inside = text.rstrip().removesuffix(eos) if what == "response" and eos else text
            token = next((token for token in encoder.special if token in inside), None)
            if token is not None:
                found = f"the {what} has {token!r} in its text, which becomes the special token"
                yield file.warning(record.number, "special_token", found)
    talked = next((record for record in file.records if record.messages is not None and record.responses), None)
    if talked is not None and not _ends_turns(talked, encoder):
        text = f"the chat template writes no end of turn behind an answer; {eos!r} is added to the last one"
        yield file.warning(0, "missing_eos", text)


def _said(record: Record) -> Iterator[tuple[str, str]]:
    if record.turns is not None:
        for message in record.turns:
            yield "response" if message["role"] == "assistant" else "prompt", message["content"]
        return
    if record.messages is None:
        yield "prompt", record.written
    for message in record.messages or []:
        yield "prompt", message["content"]
    for response in record.responses:
        yield "response", response


def _ends_turns(record: Record, encoder: PromptTokenizer) -> bool:
    """Whether the template itself writes the token that a response ends with."""
    messages = record.messages or []
    answer = {"role": "assistant", "content": record.responses[0]}
    ending = encoder.response(record.written, messages, record.responses[0])
    tail = encoder.render([*messages, answer], answer=False).rpartition(record.responses[0].strip())[2]
    eos = encoder.tokenizer.eos_token
    return not (eos and ending.endswith(eos)) or eos in tail
