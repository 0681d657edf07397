"""Tokenizers, and what must be known of them before anything starts."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer
from transformers.utils import cached_file

from rayrlhf.config import load_config
from rayrlhf.errors import InputRefused

__all__ = ["Padding", "eos_token_ids", "load_tokenizer", "padding_of", "plain_prompts_are_chats"]


class Padding(NamedTuple):
    """What a reward model's batches are padded with by others than us."""

    id: int
    said: str | None
    """Why it isn't the tokenizer's own padding token; None where it is."""


def load_tokenizer(path: str, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name, with another chat template where one is given.

    Raises:
        InputRefused: where there is none, or the template file can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise InputRefused(f"no tokenizer can be loaded from {path!r}: {type(error).__name__}: {reason}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputRefused(f"policy.chat_template: {chat_template!r} can't be read: {error}") from error
    return tokenizer


def plain_prompts_are_chats(model: str, has_template: bool) -> bool:
    """Whether a model takes a plain string as a user's message: as its run was trained, where ``model`` is ``RUN/model``;
    of other models, where they have a chat template."""
    run = Path(model).parent / "config.yaml"
    if Path(model).name != "model" or not Path(model).is_dir() or not run.is_file():
        return has_template
    try:
        return load_config(run).data.chat_template == "always"
    except InputRefused:  # some other program's
        return has_template


def eos_token_ids(tokenizer: Any, model_path: str) -> list[int]:
    """Every token that ends a response: the model's ``eos_token_id`` (a number or a list) and the tokenizer's.

    Raises:
        InputRefused: where there is none at all: a policy could never learn to stop.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = cached_file(
            model_path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if file is not None:
            stored = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
            found += stored if isinstance(stored, list) else [] if stored is None else [stored]
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if not found:
        raise InputRefused(
            f"the tokenizer of {model_path!r} has no EOS token and its config.json no eos_token_id, so no response "
            "could ever end; add eos_token_id to config.json or point policy.tokenizer at a tokenizer with one"
        )
    return sorted(set(found))


def padding_of(tokenizer: Any, eos: Collection[int]) -> Padding:
    """The token with which sequences that end with EOS can be padded, and still be told from their padding.

    transformers reads a score at the last token that isn't the padding token, so padded with EOS a sequence would be read one
    token too early. Where the tokenizer has no padding token, or it is EOS, another special token that ends no sequence takes
    its place (unknown, beginning, any other); without one, EOS after all.

    Args:
        tokenizer: asked for its special tokens, and not changed.
        eos: the tokens that end a response; at least one.
    """
    own = tokenizer.pad_token_id
    if own is not None and own not in eos:
        return Padding(own, None)
    lack = "the tokenizer has no padding token" if own is None else "the tokenizer pads with its EOS"
    others = [tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    found = next((token for token in others if token is not None and token not in eos), None)
    if found is None:
        said = "and has no other special token: transformers reads the score of a sequence with EOS one token too early"
        return Padding(min(eos), f"{lack}, {said}")
    name = tokenizer.convert_ids_to_tokens(found)
    return Padding(found, f"{lack}; {name} ends no sequence, so it can't be taken for the last token")
