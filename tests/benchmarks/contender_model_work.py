"""The model work of a PPO step and nothing else: plain Hugging Face models, forwards and backwards.

The no-grad forwards of policy, reference, critic and reward model over all samples, then forward and backward of policy
and critic over epochs of minibatches. No generation, optimizer, masks, advantages, entropy or statistics. In bfloat16
the weights are bfloat16 too, which is faster than autocast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from protocol import Channel, arguments, serve
from torch import Tensor
from workload import VOCABULARY, Workload


class ModelWork:
    def __init__(self, workload: Workload, dtype: torch.dtype):
        self.workload = workload
        causal, scoring = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
        self.policy, self.reference = (causal.from_pretrained(workload.policy, dtype=dtype) for _ in range(2))
        self.critic, self.reward = (scoring.from_pretrained(workload.scorer, dtype=dtype) for _ in range(2))
        self.generator = torch.Generator().manual_seed(workload.seed)
        self.seconds: dict[str, float] = {}

    def logprobs(self, model: Any, tokens: Tensor) -> Tensor:
        start = self.workload.prompt_tokens
        logits = model(input_ids=tokens, use_cache=False).logits[:, start - 1 : -1]
        return torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, start:, None])

    def values(self, model: Any, tokens: Tensor) -> Tensor:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return model.score(hidden)[:, self.workload.prompt_tokens - 1 : -1, 0].float()

    def score(self, model: Any, tokens: Tensor) -> Tensor:
        return model.score(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)[:, -1, 0].float()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def step(self) -> dict[str, Any]:
        work = self.workload
        length = work.prompt_tokens + work.response_tokens
        tokens = torch.randint(3, VOCABULARY, (work.rollouts, length), generator=self.generator)
        self.seconds = {}
        start = time.perf_counter()
        forwards: list[tuple[str, Callable[[Any, Tensor], Tensor], Any]] = [
            ("logprobs", self.logprobs, self.policy),
            ("reference", self.logprobs, self.reference),
            ("values", self.values, self.critic),
            ("score", self.score, self.reward),
        ]
        for phase, run, model in forwards:
            with self.timed(phase), torch.no_grad():
                for rows in tokens.split(work.minibatch):
                    run(model, rows)
        for phase, run, model in (("update", *forwards[0][1:]), ("critic_update", *forwards[2][1:])):
            with self.timed(phase):
                for _ in range(work.epochs):
                    for rows in tokens.split(work.minibatch):
                        run(model, rows).mean().backward()
                        model.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - start, **self.seconds}


def main() -> None:
    channel = Channel()
    workload, options = arguments(Workload.parse)
    torch.set_num_threads(workload.threads)
    work = ModelWork(workload, getattr(torch, options["dtype"]))
    serve(channel, work.step, torch=torch.__version__, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
