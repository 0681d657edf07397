"""The job that every contender does: one model, one reward model, one set of prompts, the same numbers.

Everything is made from the seed, so that no download is needed. Two things are made on purpose:

- Words are ``t3`` to ``t4095`` and a prompt is exactly ``prompt_tokens`` of them.
- The special tokens can't be sampled (`_keep_special_tokens_away`), so that every response has exactly
  ``response_tokens`` tokens without any contender having to be told so, and none of them ever sees padding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 4096
SPECIAL = ("<pad>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Workload:
    """Sizes of a PPO step, and where its files lie."""

    folder: str
    seed: int = 0
    threads: int = 2
    rollouts: int = 64
    prompt_tokens: int = 64
    response_tokens: int = 64
    epochs: int = 4
    minibatches: int = 4
    prompts: int = 512
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    key_value_heads: int = 2
    feed_forward: int = 768
    learning_rate: float = 1e-6

    @property
    def tokens(self) -> int:
        """Tokens of all samples of a step."""
        return self.rollouts * (self.prompt_tokens + self.response_tokens)

    @property
    def minibatch(self) -> int:
        """Samples of one optimizer step."""
        return self.rollouts // self.minibatches

    @property
    def policy(self) -> Path:
        """Hugging Face folder of the model that is trained, which is the reference too."""
        return Path(self.folder, "policy")

    @property
    def scorer(self) -> Path:
        """Hugging Face folder of the reward model, from which the critic starts too."""
        return Path(self.folder, "scorer")

    @property
    def tokenizer(self) -> Path:
        return Path(self.folder, "tokenizer")

    @property
    def prompt_file(self) -> Path:
        return Path(self.folder, "prompts.jsonl")

    def prompt_ids(self) -> list[list[int]]:
        """Token ids of all prompts."""
        rows = (json.loads(line)["prompt"] for line in self.prompt_file.read_text().splitlines())
        return [[int(word[1:]) for word in row.split()] for row in rows]

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Workload:
        return Workload(**json.loads(text))


def make(workload: Workload) -> int:
    """Write the models, the tokenizer and the prompts; returns the number of the policy's parameters."""
    import torch
    from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

    folder = Path(workload.folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(workload.seed)
    policy = Qwen2ForCausalLM(model_config(workload))
    _keep_special_tokens_away(policy)
    policy.generation_config.do_sample = True
    policy.save_pretrained(workload.policy)
    scorer = Qwen2ForSequenceClassification(model_config(workload, num_labels=1))
    scorer.save_pretrained(workload.scorer)
    # In a folder of its own: beside a Qwen2 model transformers reads it as a Qwen2 tokenizer, with the same vocabulary
    # but without the splitting at spaces. Of the reward model's tokenizer the vocabulary alone is looked at.
    for place in (workload.tokenizer, workload.scorer):
        word_tokenizer().save_pretrained(place)

    words = torch.randint(len(SPECIAL), VOCABULARY, (workload.prompts, workload.prompt_tokens)).tolist()
    lines = [json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) for row in words]
    workload.prompt_file.write_text("\n".join(lines) + "\n")
    return sum(p.numel() for p in policy.parameters())


def model_config(workload: Workload, **more: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=workload.hidden,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.key_value_heads,
        intermediate_size=workload.feed_forward,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<eos>"),
        pad_token_id=SPECIAL.index("<pad>"),
        **more,
    )


def _keep_special_tokens_away(policy: Any) -> None:
    """Make one coordinate of the residual stream a constant, and let the special tokens' logits fall with it.

    All words have 1 there and no layer writes to it, so after the last norm it is positive whatever the text; the
    special tokens' rows of the tied embedding are large and negative there. Their logits lie tens of nats below all
    others, which neither bfloat16 nor a small learning rate changes; the words' own probabilities are as they were.
    """
    import torch

    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        weight = policy.get_input_embeddings().weight
        weight[:, 0] = 1.0
        weight[: len(SPECIAL)] = 0.0
        weight[: len(SPECIAL), 0] = -10.0


def word_tokenizer() -> Any:
    """Words by their numbers, split at spaces; the special tokens come first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    vocabulary |= {f"t{i}": i for i in range(len(SPECIAL), VOCABULARY)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512
    )
