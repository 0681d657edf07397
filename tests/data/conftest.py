"""Tiny tokenizers, made here, and short ways to write prompt files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rayrlhf.config.offline import ExamplesConfig
from rayrlhf.config.schema import DataConfig
from rayrlhf.data import ExampleData, PromptData, load_examples, load_labelled, load_pairs, load_prompts

WORDS = [
    "<unk>", "<s>", "</s>", "<pad>", "[system]", "[user]", "[assistant]", "[end]",
    "hello", "there", "how", "are", "you", "fine", "thanks", "be", "kind", "one", "two", "three", "four", "five",
]  # fmt: skip
"""Token i is WORDS[i]."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_word_tokenizer(*, template: str | None = TEMPLATE, add_eos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word of `WORDS`; BOS before each plain text, and EOS behind it where asked for."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "<s> $A </s>" if add_eos else "<s> $A"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["[system]", "[user]", "[assistant]", "[end]"],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_byte_tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the one merge "l" + "o", and no special token but the EOS ``<|end|>`` (0). No BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{symbol: i for i, symbol in enumerate(alphabet, start=1)}}
    vocabulary["lo"] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("l", "o")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return make_word_tokenizer()


@pytest.fixture
def word_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_word_tokenizer


@pytest.fixture
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_byte_tokenizer


@pytest.fixture
def ids() -> Callable[[str], list[int]]:
    """The tokens of words as `WORDS` has them: ``ids("<s> hello")`` is [1, 8]."""
    return lambda text: [WORDS.index(word) for word in text.split()]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a file of raw bytes, a string, or JSON lines (a list), and give its path."""

    def write_file(content: Any, name: str = "prompts.jsonl") -> str:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture
def load(words: PreTrainedTokenizerFast, write: Callable[..., str]) -> Callable[..., PromptData]:
    """``load_prompts`` of a file, or of rows or bytes for one, with keys of the section ``data``."""

    def load_file(
        content: Any = None, *, tokenizer: Any = None, seed: int = 0, held_out: int = 0, **keys: Any
    ) -> PromptData:
        if content is not None:
            keys["prompts"] = write(content)
        return load_prompts(DataConfig(**keys), tokenizer or words, seed=seed, held_out=held_out)

    return load_file


@pytest.fixture
def load_fixed(words: PreTrainedTokenizerFast, write: Callable[..., str]) -> Callable[..., ExampleData[Any]]:
    """``load_fixed("pairs", rows, **keys)``: the loader of a kind, of rows or the content of a file, with keys of the
    section ``data``. Nothing is held out where nothing else is said."""

    def load_file(
        kind: str,
        content: Any = None,
        *,
        name: str = "data.jsonl",
        tokenizer: Any = None,
        seed: int = 0,
        loss_on: Any = None,
        **keys: Any,
    ) -> ExampleData[Any]:
        if content is not None:
            keys["train"] = write(content, name)
        keys.setdefault("validation_fraction", 0.0)
        more = {"loss_on": loss_on} if loss_on else {}
        loader: Callable[..., Any] = {"examples": load_examples, "pairs": load_pairs, "labelled": load_labelled}[kind]
        return loader(ExamplesConfig(**keys), tokenizer or words, seed=seed, **more)

    return load_file
