"""Tiny random models, made on the spot, and what a plain Hugging Face forward says of their samples."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rayrlhf.batch import Batch
from rayrlhf.models.world import World

SPECIAL = ["<pad>", "<eos>", "<end>"]
EOS_OF_GENERATION = list(range(40, 50))
"""EOS tokens that only generation_config.json names."""
KINDS: dict[str, tuple[type, dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "mistral": (MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "gemma2": (Gemma2Config, {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    ),
}
"""Configuration of each family of models, and what it has beside what all have."""
CPU = World(0, 1, "127.0.0.1", 0, "cpu", 2)


def make_tokenizer(path: Path, characters: list[str]) -> None:
    vocab = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(token_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=["<end>"]
    )
    fast.save_pretrained(path)


def make_model(path: Path, *, kind: str = "llama", tied: bool = False, characters: list[str] | None = None) -> Path:
    """A model of two layers, 2 query heads and 1 key-value head, with a vocabulary that is no multiple of 64."""
    characters = characters or sorted(pre_tokenizers.ByteLevel.alphabet())
    made, own = KINDS[kind]
    config = made(
        vocab_size=len(SPECIAL) + len(characters) + (1 if len(characters) > 20 else 0),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=128,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **own,
    )
    new_weights(config, seed=0).save_pretrained(path)
    make_tokenizer(path, characters)
    if len(characters) > 20:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, *EOS_OF_GENERATION]}))
    return path


def new_weights(config: object, seed: int) -> torch.nn.Module:
    """A model with other random weights, biases and norms included."""
    if isinstance(config, str | Path):
        config = AutoConfig.from_pretrained(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # "eager" is the only attention that keeps Gemma 2's soft caps.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def prompts(lengths: list[int], *, seed: int = 0, samples: int = 1, vocab: int = 259) -> Batch:
    """Random prompts, ``samples`` of each, with the columns that a driver gives."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(50, vocab, (n,), generator=generator)
        if vocab > 50
        else torch.randint(3, vocab, (n,), generator=generator)
        for n in lengths
    ]
    total = len(lengths) * samples
    return Batch.from_samples(
        {"tokens": [row for row in rows for _ in range(samples)]},
        {
            "prompt_id": torch.arange(len(lengths)).repeat_interleave(samples),
            "sample_index": torch.arange(samples).repeat(len(lengths)),
            "seed": torch.arange(total) + 1000 * (seed + 1),
            "note": [f"note {index}" for index in range(total)],
        },
    )


@torch.no_grad()
def plain_logprobs(model: torch.nn.Module, batch: Batch, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """For each sample: the model's log-probabilities [N, V] at its N response tokens, in float64, and those tokens.

    One sample at a time, no cache, no padding.
    """
    found = []
    for (start, end), prompt in zip(batch.spans(), batch["prompt_length"].tolist(), strict=True):
        tokens = batch["tokens"][start:end]
        logits = model(input_ids=tokens[None]).logits[0].double() / temperature
        found.append((torch.log_softmax(logits, -1)[prompt - 1 : -1], tokens[prompt:]))
    return found


def largest_difference(model: torch.nn.Module, batch: Batch, temperature: float) -> float:
    """Largest difference of the batch's rollout log-probabilities to the model's."""
    worst = 0.0
    spans = zip(batch.spans(), batch["prompt_length"].tolist(), strict=True)
    for ((start, end), prompt), (logprobs, tokens) in zip(
        spans, plain_logprobs(model, batch, temperature), strict=True
    ):
        expected = logprobs.gather(-1, tokens[:, None])[:, 0]
        worst = max(worst, float((batch["rollout_logprobs"][start + prompt : end] - expected).abs().max()))
    return worst


def responses(batch: Batch) -> dict[tuple[int, int], list[int]]:
    """Response tokens by (prompt_id, sample_index)."""
    keys = zip(batch["prompt_id"].tolist(), batch["sample_index"].tolist(), strict=True)
    spans = zip(batch.spans(), batch["prompt_length"].tolist(), strict=True)
    return {k: batch["tokens"][s + p : e].tolist() for k, ((s, e), p) in zip(keys, spans, strict=True)}
