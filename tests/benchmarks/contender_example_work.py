"""The model work of a step on examples and nothing else: plain Hugging Face models, forwards and backwards.

Rows padded on the right without an attention mask, the output layer over response tokens only, no optimizer and no
metrics. For ``dpo`` both responses with their prompt, and the reference's forward where it is live. In bfloat16 the weights
are bfloat16 too.
"""

from __future__ import annotations

import time
from itertools import cycle
from typing import Any

import torch
import transformers
from example_workload import ExampleWorkload
from protocol import Channel, arguments, serve
from torch import Tensor
from workload import SPECIAL

EOS = SPECIAL.index("<eos>")


def rows(example: dict[str, str]) -> list[tuple[list[int], int]]:
    """Tokens of each response with its prompt, and the prompt's number of tokens."""
    prompt = [int(word[1:]) for word in example["prompt"].split()]
    responses = [example[name] for name in ("completion", "chosen", "rejected") if name in example]
    return [(prompt + [int(word[1:]) for word in text.split()] + [EOS], len(prompt)) for text in responses]


def padded(examples: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], and bool [B, L - 1]: where the next token is a response's."""
    found = [row for example in examples for row in rows(example)]
    width = max(len(tokens) for tokens, _ in found)
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in found])
    place = torch.arange(1, width)
    first, last = (torch.tensor(at)[:, None] for at in ([n for _, n in found], [len(t) for t, _ in found]))
    return ids, (place >= first) & (place < last)


class ExampleWork:
    def __init__(self, workload: ExampleWorkload, options: dict[str, Any]):
        self.job, self.live = options["job"], options.get("reference") == "live"
        dtype = getattr(torch, options["dtype"])
        if self.job == "reward_model":
            self.model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
                workload.scorer, dtype=dtype
            )
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype)
        data = workload.rows(self.job)
        self.batches = cycle([data[i : i + workload.batch] for i in range(0, len(data), workload.batch)])

    def loss(self, ids: Tensor, wanted: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if self.job == "reward_model":
            return self.model.score(hidden)[:, -1].float().mean()
        logits = self.model.lm_head(hidden[:, :-1][wanted]).float()
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted])

    def step(self) -> dict[str, Any]:
        ids, wanted = padded(next(self.batches))
        start = time.perf_counter()
        if self.live:
            with torch.no_grad():
                self.loss(ids, wanted)
        self.loss(ids, wanted).backward()
        self.model.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - start}


def main() -> None:
    channel = Channel()
    workload, options = arguments(ExampleWorkload.parse)
    torch.set_num_threads(workload.threads)
    work = ExampleWork(workload, options)
    serve(channel, work.step, torch=torch.__version__, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
