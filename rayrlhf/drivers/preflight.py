"""Everything that can be known to be wrong before the first actor starts: models, tokenizers, rewards, data, folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rayrlhf.actors.reward_function import check_signature, import_function
from rayrlhf.actors.reward_http import check_service
from rayrlhf.config import Config
from rayrlhf.config.schema import ScoreSource
from rayrlhf.data import Prompt, PromptData, load_prompts
from rayrlhf.drivers.checks import Problems, check_lengths, check_packages, check_run_dir, check_vocabulary, vocabulary
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import load_config as load_model_config
from rayrlhf.models.loading import to_model_folder
from rayrlhf.models.tokenizer import eos_token_ids, load_tokenizer
from rayrlhf.monitoring import check_tensorboard, check_wandb
from rayrlhf.planning.plan import check_plan

__all__ = ["Opened", "Prepared", "check_signatures", "check_sources", "open_model", "prepare"]


@dataclass(frozen=True)
class Opened:
    """A model's folder, its configuration and its tokenizer. What can't be had is None, and a problem is noted."""

    path: str | None
    model: PretrainedConfig | None
    tokenizer_path: str | None
    tokenizer: Any


def open_model(
    path: str,
    problems: Problems,
    *,
    made: Path,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    role: str = "policy",
) -> Opened:
    """Look at a model that generates: its folder, its EOS tokens, and whether its tokenizer belongs to it.

    Args:
        path: as configurations give it: a folder, a hub name, a .gguf file or ``package:NAME``.
        problems: where what is wrong is noted.
        made: where a folder is made of a .gguf file.
        tokenizer: folder or name of the tokenizer; None: the model's.
        chat_template: file with another chat template.
        role: what messages call the model.
    """
    folder = problems.check(to_model_folder, path, made)
    tokenizer_path = tokenizer or folder
    if folder is None or tokenizer_path is None:
        return Opened(folder, None, tokenizer_path, None)
    loaded = problems.check(
        load_tokenizer, tokenizer_path, chat_template=chat_template, trust_remote_code=trust_remote_code
    )
    model = problems.check(load_model_config, folder, trust_remote_code=trust_remote_code)
    if model is not None and loaded is not None:
        problems.check(eos_token_ids, loaded, folder)
        problems.check(check_vocabulary, role, folder, model, loaded)
    return Opened(folder, model, tokenizer_path, loaded)


def check_sources(sources: Sequence[ScoreSource], problems: Problems, *, trust_remote_code: bool = False) -> None:
    """Note what keeps sources of scores from being used: no such function, no reward model, nobody at the address."""
    for source in sources:
        if source.function is not None:
            problems.check(import_function, source.function)
        elif source.model is not None:
            problems.check(_check_reward_model, source.model, trust_remote_code)
        else:
            problems.check(check_service, source)


def check_signatures(sources: Sequence[ScoreSource], prompts: Sequence[Prompt], problems: Problems) -> None:
    """Note the functions among the sources that want columns which the data hasn't."""
    for function in (source.function for source in sources if source.function is not None):
        problems.check(check_signature, function, prompts[0].row.keys())


def _check_reward_model(path: str, trust_remote_code: bool) -> None:
    labels = getattr(load_model_config(path, trust_remote_code=trust_remote_code), "num_labels", 1)
    if labels != 1:
        raise InputRefused(f"reward model {path!r} has {labels} labels; a reward model has exactly 1")


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


def prepare(config: Config, *, resume: bool) -> Prepared:
    """Check everything that a run takes in, and load its prompts.

    Args:
        config: the resolved configuration.
        resume: whether an interrupted run in ``config.run_dir`` is to go on.

    Raises:
        InputRefused: with every problem that was found.
    """
    problems = Problems()
    problems.check(check_run_dir, config, resume)
    problems.found += check_plan(config)
    problems.check(check_packages, config, config.rollout)
    problems.check(check_wandb, config.monitoring.wandb_project)
    problems.check(check_tensorboard, config.monitoring.tensorboard)
    sources = [*config.reward.sources, *([config.reward.gold] if config.reward.gold is not None else [])]
    check_sources(sources, problems, trust_remote_code=config.reward.trust_remote_code)
    opened = open_model(
        config.policy.path,
        problems,
        made=Path(config.run_dir) / "base_model",
        tokenizer=config.policy.tokenizer,
        chat_template=config.policy.chat_template,
        trust_remote_code=config.policy.trust_remote_code,
    )
    _check_models(config, opened, problems)
    prompts = None
    if opened.tokenizer is not None:
        prompts = problems.check(
            load_prompts, config.data, opened.tokenizer, seed=config.seed, held_out=config.evaluation.prompts
        )
    if prompts is not None:
        check_signatures(sources, prompts.train, problems)
    if problems.found:
        raise InputRefused(problems.found)
    assert opened.path is not None and opened.tokenizer_path is not None and prompts is not None
    return Prepared(
        config,
        opened.path,
        None if config.critic is None else config.critic.path or opened.path,
        _reference_path(config, opened.path),
        opened.tokenizer_path,
        opened.tokenizer,
        prompts,
    )


def _reference_path(config: Config, policy_path: str) -> str | None:
    if config.reference is None or (config.policy.lora is not None and config.reference.path is None):
        return None
    return config.reference.path or policy_path


def _check_models(config: Config, opened: Opened, problems: Problems) -> None:
    policy, policy_path, tokenizer = opened.model, opened.path, opened.tokenizer
    if policy is None or policy_path is None:
        return
    check_lengths(config, policy_path, policy, problems)
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
