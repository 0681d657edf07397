"""Checks of what a run takes in that all algorithms share: its folder, its packages, its model and tokenizer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig

from rayrlhf.config import load_config
from rayrlhf.config.base import JobConfig, RunConfig
from rayrlhf.config.derive import lengths_of
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.errors import InputRefused

__all__ = [
    "Problems",
    "check_length",
    "check_lengths",
    "check_packages",
    "check_run_dir",
    "check_vocabulary",
    "vocabulary",
]

T = TypeVar("T")


class Problems:
    """Runs checks one after the other and keeps what they refuse."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def check(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        try:
            return function(*args, **kwargs)
        except InputRefused as refused:
            self.found += [p for p in refused.problems if p not in self.found]
            return None


RESUME_MAY_CHANGE = (
    "run_dir",
    "cluster",
    "monitoring",
    "checkpoint",
    "evaluation.every_steps",
    "evaluation.samples_shown",
    "ppo.steps",
    "training.epochs",
    "training.max_steps",
    "training.patience",
)
"""Sections and keys that a resumed run may have different: they don't change what the past steps did.

The run's folder is where its configuration was found, whatever that says: it may be named from elsewhere, or have been moved.
"""


def check_run_dir(config: JobConfig, resume: bool) -> None:
    folder = Path(config.run_dir)
    stored = folder / "config.yaml"
    if not resume:
        if stored.exists() or (folder / "metrics.jsonl").exists():
            how = "go on with it (--resume), or choose" if isinstance(config, RunConfig) else "choose"
            raise InputRefused(f"run_dir: {folder} holds a run already; {how} another run_dir")
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputRefused(f"run_dir: {folder} can't be made: {existing} is no folder that can be written")
        return
    if not stored.exists():
        raise InputRefused(f"run_dir: {folder} holds no run that could go on (it has no config.yaml)")
    before, now = (_flat(c.model_dump(mode="json")) for c in (load_config(stored, []), config))
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and not _may_change(k)]
    if changed:
        raise InputRefused(
            f"--resume: {key} is {now.get(key)!r}, but the run in {folder} has {before.get(key)!r}" for key in changed
        )


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in RESUME_MAY_CHANGE)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: value}


def check_packages(config: JobConfig, rollout: SamplerConfig | None) -> None:
    """Refuse what needs a package that isn't installed. Imports nothing."""
    if rollout is not None and rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputRefused(
            "rollout.engine: vllm isn't installed; install it (see the README), or set rollout.engine=transformers"
        )
    if config.cluster.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise InputRefused("cluster.executor: ray isn't installed; pip install ray, or set cluster.executor=inline")


def vocabulary(model: PretrainedConfig) -> int:
    return model.get_text_config().vocab_size


def check_vocabulary(role: str, path: str, model: PretrainedConfig, tokenizer: Any) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary(model):
        raise InputRefused(
            f"{role}: {path} has a vocabulary of {vocabulary(model)} tokens, but the policy's tokenizer gives ids up to "
            f"{largest}; tokenizer and model don't belong together"
        )


def check_length(keys: str, wanted: int, path: str, model: PretrainedConfig) -> None:
    """Refuse samples that are longer than what the model reads."""
    longest = getattr(model.get_text_config(), "max_position_embeddings", None)
    if longest is not None and wanted > longest:
        raise InputRefused(f"{keys} is {wanted}, but {path} reads at most {longest} tokens")


def check_lengths(config: JobConfig, path: str, model: PretrainedConfig, problems: Problems) -> None:
    """Note what of a run's sequences is longer than what the model reads."""
    for keys, wanted in lengths_of(config).items():
        problems.check(check_length, keys, wanted, path, model)
