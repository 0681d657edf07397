"""What a prompt may be: a string, or a list of messages that ends with the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rayrlhf.data.source import describe, nearest

__all__ = ["ROLES", "Message", "as_messages", "identity", "messages_problem", "prompt_problem", "text_problem"]

Message = dict[str, Any]
Identity = tuple[tuple[str, str], ...]

ROLES = ("system", "user", "assistant")


def text_problem(value: object, what: str) -> str | None:
    """Why ``value`` can't be text for a tokenizer; None where it can."""
    if not isinstance(value, str):
        return f"{what} is {describe(value)}, not a string"
    if not value.strip():
        return f"{what} is empty" if not value else f"{what} is only white space"
    return _encodable(value, what)


def _encodable(value: str, what: str) -> str | None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{what} has half of a surrogate pair ({value[error.start]!r}) at position {error.start + 1}"
    return None


def prompt_problem(value: object, mode: Literal["auto", "always", "never"]) -> str | None:
    """What is wrong with a prompt under ``data.chat_template = mode``; None where nothing is."""
    if not isinstance(value, list):
        if value is None or isinstance(value, str):
            return text_problem(value, "the prompt")
        return f"the prompt is {describe(value)}, not a string or a list of messages"
    if mode == "never":
        return "the prompt is a list of messages; data.chat_template = never takes strings only (legal: auto, always)"
    problem = messages_problem(value, "the prompt")
    if problem:
        return problem
    last = value[-1]["role"]
    if last != "user":
        return f"the last message is from the {last}; it must be from the user, as the policy answers it"
    return text_problem(value[-1]["content"], "the last message's content")


def messages_problem(value: list[Any], what: str) -> str | None:
    """What is wrong with the form of a list of messages; None where nothing is."""
    if not value:
        return f"{what} is an empty list of messages"
    problems = (_message_problem(message, f"message {index}") for index, message in enumerate(value, start=1))
    return next((problem for problem in problems if problem), None)


def _message_problem(message: object, what: str) -> str | None:
    if not isinstance(message, dict):
        return f"{what} is {describe(message)}, not an object with role and content"
    for key in ("role", "content"):
        if key not in message:
            return f"{what} has no {key!r}; it has {sorted(map(str, message))}"
    role, content = message["role"], message["content"]
    if role not in ROLES:
        close = nearest(role, ROLES) if isinstance(role, str) else ""
        return f"{what} has the role {role!r}; legal are {', '.join(ROLES)}{close}"
    if not isinstance(content, str):
        return f"{what} has content that is {describe(content)}, not a string"
    return _encodable(content, f"{what}'s content")


def as_messages(
    prompt: str | Sequence[Message], mode: Literal["auto", "always", "never"], system_prompt: str | None
) -> list[Message] | None:
    """The conversation that a valid prompt stands for, or None for a plain string that the template isn't applied to.

    Keys of a message that are null (Parquet fills them in) are left out. ``system_prompt`` comes first where the
    conversation has no system message.
    """
    if isinstance(prompt, str):
        if mode != "always":
            return None
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages = [{k: v for k, v in message.items() if v is not None} for message in prompt]
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def identity(prompt: str | Sequence[Message]) -> Identity:
    """What makes two prompts the same: what was said, whatever the system message. A string is a user message."""
    if isinstance(prompt, str):
        return (("user", prompt),)
    return tuple((message["role"], message["content"]) for message in prompt if message["role"] != "system")
