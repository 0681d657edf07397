"""Configurations, batches and roles for these tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.models.world import World
from tests.support.ports import free_port
from tests.support.tiny import save_tiny_model

LENGTHS = (5, 17, 9, 12, 7, 21, 10, 6)
PROMPTS = (3, 4, 2, 5, 3, 6, 4, 3)
MASKED_SAMPLE = 3
"""Nothing of this sample is trained on; in sample 5 there is a hole in the response."""
GRADIENT_SCALE = 1e3
LINEAR_ADAM = {"lr": 1e6 * GRADIENT_SCALE, "eps": 1e6, "max_grad_norm": 1e9}
"""With so large an eps, Adam's first step is -lr / eps times the gradient, to 1e-6."""


@functools.cache
def _port() -> int:
    return free_port()


def alone() -> World:
    """The only rank of a group in this process."""
    return World(0, 1, "127.0.0.1", _port(), "cpu", 1)


def base_model(folder: Path) -> Path:
    return save_tiny_model(folder, kind="llama", tied=True, seed=1)


def settings(path: Path | str, run_dir: Path | str, **sections: dict[str, Any] | None) -> dict[str, Any]:
    """A configuration as a dictionary; ``sections`` override what is here, key by key."""
    found: dict[str, Any] = {
        "run_dir": str(run_dir),
        "policy": {"path": str(path), "dtype": "float32", "tokens_per_micro_batch": 10_000},
        "critic": {"dtype": "float32", "tokens_per_micro_batch": 10_000},
        "reference": {"dtype": "float32"},
        "reward": {"sources": [{"function": "nowhere:nothing"}]},
        "data": {"prompts": "nowhere.jsonl"},
        "cluster": {"call_timeout_s": 100.0},
        "rollout": {"temperature": 0.7},
        "ppo": {"steps": 1, "prompts_per_step": 8, "minibatch_samples": 8, "importance_sampling_cap": None},
    }
    for name, section in sections.items():
        found[name] = section if section is None else {**found.get(name, {}), **section}
    return found


def config_of(path: Path | str, run_dir: Path | str, **sections: dict[str, Any] | None) -> Config:
    return Config.model_validate(settings(path, run_dir, **sections))


def ragged_tokens(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and response masks of eight samples."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 64, (n,), generator=generator) for n in LENGTHS]
    masks = [torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)]
    masks[MASKED_SAMPLE][:] = False
    masks[5][10:13] = False
    return tokens, masks


def training_batch(seed: int = 0, logprobs: list[Tensor] | None = None) -> Batch:
    """Eight ragged samples with everything that policy and critic train on; only response tokens carry anything.

    Args:
        seed: of the numbers.
        logprobs: the policy's own, near which the old, rollout and reference ones lie.
    """
    tokens, masks = ragged_tokens(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    near = [p.float() for p in logprobs] if logprobs is not None else [torch.full((n,), -4.0) for n in LENGTHS]

    def noise(size: float) -> list[Tensor]:
        return [size * torch.randn(n, generator=generator) * m for n, m in zip(LENGTHS, masks, strict=True)]

    def beside(column: list[Tensor], size: float) -> list[Tensor]:
        return [(c + d) * m for c, d, m in zip(column, noise(size), masks, strict=True)]

    old = beside(near, 0.35)
    columns = {
        "tokens": tokens,
        "response_mask": masks,
        "old_logprobs": old,
        "rollout_logprobs": beside(old, 0.3),
        "reference_logprobs": beside(near, 0.4),
        "advantages": noise(1.0),
        "values": noise(0.3),
        "returns": noise(1.0),
    }
    return Batch.from_samples(columns)


def parts_of(*ranks: list[int]) -> list[list[Tensor]]:
    """One optimizer step: the samples that each rank takes."""
    return [[torch.tensor(indices, dtype=torch.int64) for indices in ranks]]
