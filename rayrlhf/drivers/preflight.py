"""Everything that can be known to be wrong before the first actor starts: models, tokenizers, rewards, data, folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.actors.reward import check_signature, import_function
from rayrlhf.config import Config
from rayrlhf.data import PromptData, load_prompts
from rayrlhf.drivers.checks import Problems, check_length, check_packages, check_run_dir, check_vocabulary, vocabulary
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import load_config as load_model_config
from rayrlhf.models.loading import to_model_folder
from rayrlhf.models.tokenizer import eos_token_ids, load_tokenizer
from rayrlhf.monitoring import check_tensorboard, check_wandb

__all__ = ["Prepared", "prepare"]


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


def prepare(config: Config, *, resume: bool | None) -> Prepared:
    """Check everything that a run takes in, and load its prompts.

    Args:
        config: the resolved configuration.
        resume: whether an interrupted run in ``config.run_dir`` is to go on; None: that folder isn't used.

    Raises:
        InputRefused: with every problem that was found.
    """
    problems = Problems()
    if resume is not None:
        problems.check(check_run_dir, config, resume)
    problems.check(check_packages, config, config.rollout)
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


def _check_reward_model(path: str) -> None:
    labels = getattr(load_model_config(path), "num_labels", 1)
    if labels != 1:
        raise InputRefused(f"reward model {path!r} has {labels} labels; a reward model has exactly 1")


def _check_models(config: Config, policy_path: str, tokenizer: Any, problems: Problems) -> None:
    policy = problems.check(load_model_config, policy_path, trust_remote_code=config.policy.trust_remote_code)
    if policy is None:
        return
    if tokenizer is not None:
        problems.check(eos_token_ids, tokenizer, policy_path)
        problems.check(check_vocabulary, "policy", policy_path, policy, tokenizer)
    wanted = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    keys = "data.max_prompt_tokens + rollout.max_response_tokens"
    problems.check(check_length, keys, wanted, policy_path, policy)
    if config.critic is not None:
        critic = (
            policy
            if config.critic.path is None
            else problems.check(
                load_model_config, config.critic.path, trust_remote_code=config.critic.trust_remote_code
            )
        )
        if critic is not None and tokenizer is not None:
            problems.check(check_vocabulary, "critic", config.critic.path or policy_path, critic, tokenizer)
        layers = getattr(critic.get_text_config(), "num_hidden_layers", None) if critic is not None else None
        if layers is not None and config.critic.num_layers is not None and config.critic.num_layers > layers:
            problems.found.append(
                f"critic.num_layers is {config.critic.num_layers}, but {config.critic.path or policy_path} has {layers} layers"
            )
    if config.reference is not None and config.reference.path is not None:
        reference = problems.check(
            load_model_config, config.reference.path, trust_remote_code=config.reference.trust_remote_code
        )
        if reference is not None and vocabulary(reference) != vocabulary(policy):
            problems.found.append(
                f"reference.path: {config.reference.path} has a vocabulary of {vocabulary(reference)} tokens, the policy "
                f"{policy_path} one of {vocabulary(policy)}; the reference must read the policy's tokens"
            )
