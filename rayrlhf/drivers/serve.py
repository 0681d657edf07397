"""``rayrlhf serve-reward``: a reward model behind an address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayrlhf.actors.reward import as_trained
from rayrlhf.batch import Batch
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.data.tokens import PromptTokenizer
from rayrlhf.http_json import token_from
from rayrlhf.models.layout import micro_batches
from rayrlhf.models.loading import load_reward_model
from rayrlhf.models.packing import packs
from rayrlhf.models.tokenizer import load_tokenizer, plain_prompts_are_chats
from rayrlhf.serving import RewardServer

__all__ = ["scorer", "serve_reward_model"]


def scorer(path: str) -> Callable[[list[Any], list[str]], list[float]]:
    """Scores of responses by a reward model, which reads a prompt and its response as it was trained to.

    Args:
        path: the model's folder, with its tokenizer. A prompt is a text or a list of messages, for the chat template. A
            text is taken as a user's message where the model was trained so (`plain_prompts_are_chats`); else response and
            EOS stand right behind it.
    """
    settings = ModelConfig(dtype="float32")
    encoder = PromptTokenizer(load_tokenizer(path))
    chats = plain_prompts_are_chats(path, encoder.has_template)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reward_model(path, settings, dtype=torch.float32).to(device).eval()

    def tokens(prompt: Any, response: str) -> torch.Tensor:
        if chats and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        elif not encoder.has_template and not isinstance(prompt, str):
            prompt = "\n".join(message["content"] for message in prompt)
        return as_trained(encoder, prompt, response)

    @torch.no_grad()
    def score(prompts: list[Any], responses: list[str]) -> list[float]:
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
