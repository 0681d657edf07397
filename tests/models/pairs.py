"""Pairs, labelled responses and runs for the tests of reward models, preferences and fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rayrlhf.batch import Batch

PROMPTS = (3, 4, 2, 5, 3, 6)
CHOSEN = (4, 9, 3, 7, 1, 5)
REJECTED = (6, 2, 8, 7, 4, 1)
MARGINS = (0.5, float("nan"), 0.0, 1.5, float("nan"), 0.25)
DESIRABLE = (True, False, True, True, False, False)


def pair_batch(seed: int = 0, reference: bool = True) -> Batch:
    """Six ragged pairs; the reference's log-probabilities are made up."""
    generator = torch.Generator().manual_seed(seed)
    tokens, masks, lengths, references = [], [], [], []
    for prompt, *responses in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        start = torch.randint(3, 64, (prompt,), generator=generator)
        for size in responses:
            tokens.append(torch.cat([start, torch.randint(3, 64, (size,), generator=generator)]))
            masks.append(torch.arange(prompt + size) >= prompt)
            references.append((-4.0 + 0.3 * torch.randn(prompt + size, generator=generator)) * masks[-1])
            lengths.append(prompt)
    columns = {"tokens": tokens, "response_mask": masks}
    if reference:
        columns["reference_logprobs"] = references
    samples = {
        "prompt_length": torch.tensor(lengths),
        "margin": torch.tensor(MARGINS).repeat_interleave(2),
        "example_id": torch.arange(len(PROMPTS)).repeat_interleave(2),
    }
    return Batch.from_samples(columns, samples)


def labelled_batch(seed: int = 0) -> Batch:
    """Six labelled responses, and behind them each prompt with the next one's response."""
    pairs = pair_batch(seed).select(torch.arange(0, 12, 2))
    starts, lengths = pairs.offsets[:-1].tolist(), pairs["prompt_length"].tolist()
    ends = pairs.offsets[1:].tolist()
    tokens = [pairs["tokens"][a:b] for a, b in zip(starts, ends, strict=True)]
    count = len(tokens)
    for i in range(count):
        j = (i + 1) % count
        tokens.append(torch.cat([tokens[i][: lengths[i]], tokens[j][lengths[j] :]]))
    prompts = lengths * 2
    generator = torch.Generator().manual_seed(seed + 1)
    masks = [torch.arange(len(t)) >= p for t, p in zip(tokens, prompts, strict=True)]
    references = [
        (-4.6 + 0.3 * torch.randn(len(t), generator=generator)) * m for t, m in zip(tokens, masks, strict=True)
    ]
    samples = {
        "prompt_length": torch.tensor(prompts),
        "desirable": torch.tensor(DESIRABLE * 2),
        "mismatched": torch.arange(2 * count) >= count,
        "example_id": torch.arange(count).repeat(2),
    }
    return Batch.from_samples({"tokens": tokens, "response_mask": masks, "reference_logprobs": references}, samples)


def offline_settings(algorithm: str, path: Path | str, run_dir: Path | str, **sections: Any) -> dict[str, Any]:
    """A configuration as a dictionary; ``sections`` override what is here, key by key."""
    found: dict[str, Any] = {
        "algorithm": algorithm,
        "run_dir": str(run_dir),
        "policy": {"path": str(path), "dtype": "float32", "tokens_per_micro_batch": 10_000},
        "data": {"train": "nowhere.jsonl"},
        "cluster": {"call_timeout_s": 100.0},
    }
    for name, section in sections.items():
        found[name] = section if section is None else {**found.get(name, {}), **section}
    return found
