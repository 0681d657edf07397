"""A model's dimensions from the header of a .gguf file (github.com/ggml-org/ggml, docs/gguf.md)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["gguf_config"]

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def gguf_config(path: Path) -> dict[str, Any]:
    """What config.json would say of the model in a .gguf file.

    Raises:
        ValueError: where the file isn't of this format.
        KeyError: naming the fact that its header lacks.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no .gguf file")
        _number(file, "I")
        tensors, pairs = _number(file, "Q"), _number(file, "Q")
        facts: dict[str, Any] = {}
        for _ in range(pairs):
            key = _text(file)
            facts[key] = _value(file, _number(file, "I"))
        names = {_tensor_name(file) for _ in range(tensors)}
    kind = facts["general.architecture"]
    experts = facts.get(f"{kind}.expert_count", 0)
    config = {
        "model_type": "mixtral" if kind == "llama" and experts else kind,
        "hidden_size": facts[f"{kind}.embedding_length"],
        "intermediate_size": facts[f"{kind}.feed_forward_length"],
        "num_hidden_layers": facts[f"{kind}.block_count"],
        "num_attention_heads": facts[f"{kind}.attention.head_count"],
        "num_key_value_heads": facts.get(f"{kind}.attention.head_count_kv"),
        "head_dim": facts.get(f"{kind}.attention.key_length"),
        "vocab_size": facts["tokenizer.ggml.tokens"],
        "max_position_embeddings": facts.get(f"{kind}.context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "num_local_experts": experts,
    }
    return config


def _number(file: BinaryIO, form: str) -> Any:
    size = struct.calcsize(form)
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the .gguf file ends in its header")
    return struct.unpack(f"<{form}", data)[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """A value; of an array its length, which is all that is wanted of a vocabulary."""
    if kind == _TEXT:
        return _text(file)
    if kind == _ARRAY:
        of, count = _number(file, "I"), _number(file, "Q")
        for _ in range(count):
            _value(file, of)
        return count
    if kind not in _NUMBERS:
        raise ValueError(f"the .gguf file has a value of the unknown kind {kind}")
    return _number(file, _NUMBERS[kind])


def _tensor_name(file: BinaryIO) -> str:
    name = _text(file)
    dimensions = _number(file, "I")
    file.seek(8 * dimensions + 4 + 8, 1)
    return name
