"""Tokenizers, and what must be known of them before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from rayrlhf.errors import InputRefused

__all__ = ["eos_token_ids", "load_tokenizer"]


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
