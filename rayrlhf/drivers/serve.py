"""``rayrlhf serve-reward``: a reward model behind an address."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rayrlhf.batch import Batch
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.http_json import token_from
from rayrlhf.models.layout import micro_batches
from rayrlhf.models.loading import load_reward_model
from rayrlhf.models.packing import packs
from rayrlhf.models.tokenizer import load_tokenizer
from rayrlhf.serving import RewardServer

__all__ = ["scorer", "serve_reward_model"]


def scorer(path: str) -> Callable[[list[str], list[str]], list[float]]:
    """Scores of responses by a reward model, which reads a prompt and its response as it was trained to.

    Args:
        path: the model's folder, with its tokenizer. With a chat template a prompt is one user message and the response
            the answer; without one the two texts stand one behind the other, EOS at the end.
    """
    settings = ModelConfig(dtype="float32")
    tokenizer = load_tokenizer(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reward_model(path, settings, dtype=torch.float32).to(device).eval()

    def tokens(prompt: str, response: str) -> torch.Tensor:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        else:
            ids = [*tokenizer(prompt)["input_ids"], *tokenizer(response, add_special_tokens=False)["input_ids"]]
            ids.append(tokenizer.eos_token_id)
        return torch.tensor(ids, dtype=torch.int64)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        batch = Batch.from_samples({"tokens": [tokens(p, r) for p, r in zip(prompts, responses, strict=True)]})
        found = torch.zeros(len(batch))
        for micro in micro_batches(batch, settings.tokens_per_micro_batch, packs(settings), mask=None):
            found[micro.samples] = model(micro.to(device))[1].float().cpu()
        return found.tolist()

    return score


def serve_reward_model(path: str, *, host: str, port: int, token_env: str | None) -> None:
    """Serve until interrupted.

    Raises:
        InputRefused: where the model, the address or the token isn't legal.
    """
    server = RewardServer(scorer(path), name=path, host=host, port=port, token=token_from(token_env))
    print(f"{path} is served at {server.url}/score; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended")
    finally:
        server.close()
