"""Everything that can be known to be wrong before the first actor starts: models, tokenizers, rewards, data, folders."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig

from rayrlhf.actors.reward import check_signature, import_function
from rayrlhf.config import Config, load_config
from rayrlhf.data import PromptData, load_prompts
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import load_config as load_model_config
from rayrlhf.models.loading import to_model_folder
from rayrlhf.models.tokenizer import eos_token_ids, load_tokenizer
from rayrlhf.monitoring import check_tensorboard, check_wandb

__all__ = ["Prepared", "prepare"]

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A run's inputs, all checked."""

    config: Config
    policy_path: str
    critic_path: str | None
    reference_path: str | None
    """None where the policy with its adapters off is the reference, or there is none."""
    tokenizer_path: str
    tokenizer: Any
    prompts: PromptData


class _Problems:
    """Runs checks one after the other and keeps what they refuse."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def check(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        try:
            return function(*args, **kwargs)
        except InputRefused as refused:
            self.found += [p for p in refused.problems if p not in self.found]
            return None


def prepare(config: Config, *, resume: bool) -> Prepared:
    """Check everything that a run takes in, and load its prompts.

    Args:
        config: the resolved configuration.
        resume: whether an interrupted run in ``config.run_dir`` is to go on.

    Raises:
        InputRefused: with every problem that was found.
    """
    problems = _Problems()
    problems.check(_check_run_dir, config, resume)
    problems.check(_check_packages, config)
    problems.check(check_wandb, config.monitoring.wandb_project)
    problems.check(check_tensorboard, config.monitoring.tensorboard)
    for source in config.reward.sources:
        if source.function is not None:
            problems.check(import_function, source.function)
        elif source.model is not None:
            problems.check(_check_reward_model, source.model)
    made = Path(config.run_dir) / "base_model"
    policy_path = problems.check(to_model_folder, config.policy.path, made)
    tokenizer = prompts = None
    tokenizer_path = config.policy.tokenizer or policy_path
    if policy_path is not None and tokenizer_path is not None:
        tokenizer = problems.check(
            load_tokenizer,
            tokenizer_path,
            chat_template=config.policy.chat_template,
            trust_remote_code=config.policy.trust_remote_code,
        )
        _check_models(config, policy_path, tokenizer, problems)
    if tokenizer is not None:
        prompts = problems.check(
            load_prompts, config.data, tokenizer, seed=config.seed, held_out=config.evaluation.prompts
        )
    if prompts is not None:
        for function in (s.function for s in config.reward.sources if s.function is not None):
            problems.check(check_signature, function, prompts.train[0].row.keys())
    if problems.found:
        raise InputRefused(problems.found)
    assert policy_path is not None and tokenizer_path is not None and prompts is not None
    return Prepared(
        config,
        policy_path,
        None if config.critic is None else config.critic.path or policy_path,
        _reference_path(config, policy_path),
        tokenizer_path,
        tokenizer,
        prompts,
    )


def _reference_path(config: Config, policy_path: str) -> str | None:
    if config.reference is None or (config.policy.lora is not None and config.reference.path is None):
        return None
    return config.reference.path or policy_path


RESUME_MAY_CHANGE = (
    "cluster",
    "monitoring",
    "checkpoint",
    "evaluation.every_steps",
    "evaluation.samples_shown",
    "ppo.steps",
)
"""Sections and keys that a resumed run may have different: they don't change what the past steps did."""


def _check_run_dir(config: Config, resume: bool) -> None:
    folder = Path(config.run_dir)
    stored = folder / "config.yaml"
    if not resume:
        if stored.exists() or (folder / "metrics.jsonl").exists():
            raise InputRefused(
                f"run_dir: {folder} holds a run already; go on with it (--resume), or choose another run_dir"
            )
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


def _check_packages(config: Config) -> None:
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputRefused(
            "rollout.engine: vllm isn't installed; install it (see the README), or set rollout.engine=transformers"
        )
    if config.cluster.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise InputRefused("cluster.executor: ray isn't installed; pip install ray, or set cluster.executor=inline")


def _check_reward_model(path: str) -> None:
    labels = getattr(load_model_config(path), "num_labels", 1)
    if labels != 1:
        raise InputRefused(f"reward model {path!r} has {labels} labels; a reward model has exactly 1")


def _check_models(config: Config, policy_path: str, tokenizer: Any, problems: _Problems) -> None:
    policy = problems.check(load_model_config, policy_path, trust_remote_code=config.policy.trust_remote_code)
    if policy is None:
        return
    if tokenizer is not None:
        problems.check(eos_token_ids, tokenizer, policy_path)
        problems.check(_check_vocabulary, "policy", policy_path, policy, tokenizer)
    problems.check(_check_length, config, policy_path, policy)
    if config.critic is not None:
        critic = (
            policy
            if config.critic.path is None
            else problems.check(
                load_model_config, config.critic.path, trust_remote_code=config.critic.trust_remote_code
            )
        )
        if critic is not None and tokenizer is not None:
            problems.check(_check_vocabulary, "critic", config.critic.path or policy_path, critic, tokenizer)
        layers = getattr(critic.get_text_config(), "num_hidden_layers", None) if critic is not None else None
        if layers is not None and config.critic.num_layers is not None and config.critic.num_layers > layers:
            problems.found.append(
                f"critic.num_layers is {config.critic.num_layers}, but {config.critic.path or policy_path} has {layers} layers"
            )
    if config.reference is not None and config.reference.path is not None:
        reference = problems.check(
            load_model_config, config.reference.path, trust_remote_code=config.reference.trust_remote_code
        )
        if reference is not None and _vocabulary(reference) != _vocabulary(policy):
            problems.found.append(
                f"reference.path: {config.reference.path} has a vocabulary of {_vocabulary(reference)} tokens, the policy "
                f"{policy_path} one of {_vocabulary(policy)}; the reference must read the policy's tokens"
            )


def _vocabulary(model: PretrainedConfig) -> int:
    return model.get_text_config().vocab_size


def _check_vocabulary(role: str, path: str, model: PretrainedConfig, tokenizer: Any) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= _vocabulary(model):
        raise InputRefused(
            f"{role}: {path} has a vocabulary of {_vocabulary(model)} tokens, but the policy's tokenizer gives ids up to "
            f"{largest}; tokenizer and model don't belong together"
        )


def _check_length(config: Config, path: str, model: PretrainedConfig) -> None:
    longest = getattr(model.get_text_config(), "max_position_embeddings", None)
    wanted = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest is not None and wanted > longest:
        raise InputRefused(
            f"data.max_prompt_tokens + rollout.max_response_tokens is {wanted}, but {path} reads at most {longest} tokens"
        )
