"""``rayrlhf generate``: text from a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.batch import Batch
from rayrlhf.config.schema import RolloutConfig
from rayrlhf.cores import usable_cores
from rayrlhf.data import Prompt
from rayrlhf.data.tokens import PromptTokenizer
from rayrlhf.drivers.experience import prompt_batch
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import load_config as load_model_config
from rayrlhf.models.tokenizer import eos_token_ids, load_tokenizer, plain_prompts_are_chats
from rayrlhf.models.world import World

__all__ = ["generate"]


def generate(
    model: str, prompts: Sequence[str], *, max_tokens: int, temperature: float, seed: int, chat: bool | None
) -> list[str]:
    """Sample one response to each prompt, with the transformers engine in this process.

    Args:
        model: folder or hub name; ``RUN/model`` knows from the run's configuration whether it was trained on chats.
        prompts: plain strings.
        max_tokens: longest response.
        temperature: sampling temperature.
        seed: the same seed gives the same responses.
        chat: each prompt becomes a user's message; None: as the run was trained, else where there is a chat template.

    Raises:
        InputRefused: where there is no such model, or no chat template where one is asked for.
    """
    config = load_model_config(model)
    tokenizer = load_tokenizer(model)
    eos_token_ids(tokenizer, model)
    encoder = PromptTokenizer(tokenizer)
    if chat is None:
        chat = plain_prompts_are_chats(model, encoder.has_template)
    if chat and not encoder.has_template:
        raise InputRefused(f"--chat: the tokenizer of {model} has no chat template; leave it out, or use --plain")
    if chat:
        rendered = [encoder.render([{"role": "user", "content": text}]) for text in prompts]
        tokens = encoder.encode_rendered(rendered)
    else:
        tokens = encoder.encode_plain(list(prompts))
    for text, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise InputRefused(f"--prompt: {text!r} has no tokens")
    longest = max(len(ids) for ids in tokens)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_tokens > limit:
        raise InputRefused(f"prompt and --max-tokens make {longest + max_tokens} tokens; {model} reads at most {limit}")
    engine = RolloutEngine(
        World(0, 1, "127.0.0.1", 0, "cpu", usable_cores()),
        model_path=model,
        config=RolloutConfig(engine="transformers", max_response_tokens=max_tokens, temperature=temperature),
        dtype="float32",
        max_model_tokens=longest + max_tokens,
    )
    batch = prompt_batch(
        [Prompt(i, torch.tensor(ids), text, {}) for i, (text, ids) in enumerate(zip(prompts, tokens, strict=True))],
        1,
        (seed,),
    )
    done = Batch.concat(list(engine.generate(batch)))
    done = done.select(torch.argsort(done["position"]))
    return [
        tokenizer.decode(done["tokens"][start + length : end].tolist(), skip_special_tokens=True)
        for (start, end), length in zip(done.spans(), done["prompt_length"].tolist(), strict=True)
    ]
