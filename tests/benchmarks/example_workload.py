"""The job of the contenders which learn from examples: one model, one reward model, the same pairs in the same order.

Examples come in blocks of one optimizer step each, in turns: all prompts and responses of full length, then lengths drawn
evenly from ``shortest`` up to it. So one process of a contender does both kinds of step. Words are ``t3`` to ``t4095``; the
last token of a response is the EOS, which all contenders put there.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workload import SPECIAL, VOCABULARY, Workload, model_config, word_tokenizer

KINDS = ("equal", "ragged")
"""The kinds of step, in their order."""

JOBS = ("sft", "reward_model", "dpo")


@dataclass(frozen=True)
class ExampleWorkload:
    """Sizes of the job, and where its files lie."""

    folder: str
    seed: int = 0
    threads: int = 2
    batch: int = 16
    prompt_tokens: int = 64
    response_tokens: int = 64
    shortest: int = 16
    steps: int = 16
    layers: int = 8
    hidden: int = 256
    learning_rate: float = 1e-5
    beta: float = 0.1

    @property
    def model(self) -> Path:
        """Hugging Face folder of the language model that is trained, which is the reference too."""
        return Path(self.folder, "model")

    @property
    def scorer(self) -> Path:
        """Hugging Face folder of the model that the reward model starts from; its head is random."""
        return Path(self.folder, "scorer")

    @property
    def tokenizer(self) -> Path:
        return Path(self.folder, "tokenizer")

    @property
    def pairs(self) -> Path:
        """JSON lines of prompt, chosen and rejected."""
        return Path(self.folder, "pairs.jsonl")

    @property
    def completions(self) -> Path:
        """JSON lines of prompt and completion: the pairs' chosen ones."""
        return Path(self.folder, "completions.jsonl")

    def rows(self, job: str) -> list[dict[str, str]]:
        """The examples of a job."""
        file = self.completions if job == "sft" else self.pairs
        return [json.loads(line) for line in file.read_text().splitlines()]

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> ExampleWorkload:
        return ExampleWorkload(**json.loads(text))


def make(workload: ExampleWorkload) -> int:
    """Write the models, the tokenizer and the examples; returns the number of the language model's parameters."""
    import torch
    from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

    Path(workload.folder).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(workload.seed)
    shape = Workload(folder=workload.folder, layers=workload.layers, hidden=workload.hidden)
    model = Qwen2ForCausalLM(model_config(shape))
    model.save_pretrained(workload.model)
    Qwen2ForSequenceClassification(model_config(shape, num_labels=1)).save_pretrained(workload.scorer)
    for place in (workload.tokenizer, workload.scorer):
        word_tokenizer().save_pretrained(place)
    pairs = _pairs(workload)
    workload.pairs.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    completions = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs)
    workload.completions.write_text("".join(json.dumps(row) + "\n" for row in completions))
    return sum(p.numel() for p in model.parameters())


def _pairs(workload: ExampleWorkload) -> list[dict[str, Any]]:
    chance = random.Random(workload.seed)

    def words(longest: int, ragged: bool, end: int = 0) -> str:
        count = chance.randint(workload.shortest, longest) if ragged else longest
        return " ".join(f"t{chance.randrange(len(SPECIAL), VOCABULARY)}" for _ in range(count - end))

    rows = []
    for step in range(workload.steps):
        ragged = KINDS[step % len(KINDS)] == "ragged"
        for _ in range(workload.batch):
            chosen, rejected = (" " + words(workload.response_tokens, ragged, end=1) for _ in range(2))
            rows.append({"prompt": words(workload.prompt_tokens, ragged), "chosen": chosen, "rejected": rejected})
    return rows
