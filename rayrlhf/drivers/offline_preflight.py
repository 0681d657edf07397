"""Everything that can be known to be wrong before training on examples starts: model, tokenizer, data, folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config.offline import PreferenceConfig, SFTConfig
from rayrlhf.config.roots import OfflineConfig
from rayrlhf.data import ExampleData, load_examples, load_labelled, load_pairs
from rayrlhf.drivers.checks import Problems, check_lengths, check_packages, check_run_dir, check_vocabulary, vocabulary
from rayrlhf.errors import InputRefused
from rayrlhf.models.loading import load_config as load_model_config
from rayrlhf.models.loading import to_model_folder
from rayrlhf.models.tokenizer import eos_token_ids, load_tokenizer
from rayrlhf.monitoring import check_tensorboard, check_wandb
from rayrlhf.planning.plan import check_plan

__all__ = ["PreparedExamples", "prepare_examples"]


@dataclass(frozen=True)
class PreparedExamples:
    """The inputs of a run on examples, all checked."""

    config: OfflineConfig
    model_path: str
    reference_path: str | None
    """None where there is no reference, or the policy with its adapters off is it."""
    tokenizer_path: str
    tokenizer: Any
    data: ExampleData

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data.train) // self.config.training.batch_examples)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, unless it ends early."""
        training = self.config.training
        steps = self.steps_per_epoch * training.epochs
        return steps if training.max_steps is None else min(steps, training.max_steps)


def loader(config: OfflineConfig) -> tuple[Callable[..., ExampleData], dict[str, Any]]:
    """What reads the data that an algorithm takes, and its own arguments."""
    if isinstance(config, SFTConfig):
        return load_examples, {"loss_on": config.sft.loss_on}
    if isinstance(config, PreferenceConfig) and config.dpo.loss == "kto":
        return load_labelled, {}
    return load_pairs, {}


def prepare_examples(config: OfflineConfig, *, resume: bool) -> PreparedExamples:
    """Check everything that a run takes in, and load its examples.

    Raises:
        InputRefused: with every problem that was found.
    """
    problems = Problems()
    rollout = config.rollout if isinstance(config, PreferenceConfig) and config.guard.kl_prompts else None
    problems.check(check_run_dir, config, resume)
    problems.found += check_plan(config)
    problems.check(check_packages, config, rollout)
    problems.check(check_wandb, config.monitoring.wandb_project)
    problems.check(check_tensorboard, config.monitoring.tensorboard)
    model_path = problems.check(to_model_folder, config.policy.path, Path(config.run_dir) / "base_model")
    tokenizer_path = config.policy.tokenizer or model_path
    tokenizer = data = None
    if model_path is not None and tokenizer_path is not None:
        tokenizer = problems.check(
            load_tokenizer,
            tokenizer_path,
            chat_template=config.policy.chat_template,
            trust_remote_code=config.policy.trust_remote_code,
        )
        _check_models(config, model_path, tokenizer, problems)
    if tokenizer is not None:
        load, arguments = loader(config)
        data = problems.check(load, config.data, tokenizer, seed=config.seed, **arguments)
    if problems.found:
        raise InputRefused(problems.found)
    assert model_path is not None and tokenizer_path is not None and data is not None
    return PreparedExamples(config, model_path, _reference_path(config, model_path), tokenizer_path, tokenizer, data)


def _reference_path(config: OfflineConfig, model_path: str) -> str | None:
    reference = getattr(config, "reference", None)
    if reference is None or (reference.path is None and config.policy.lora is not None):
        return None
    return reference.path or model_path


def _check_models(config: OfflineConfig, path: str, tokenizer: Any, problems: Problems) -> None:
    trust = config.policy.trust_remote_code
    model = problems.check(load_model_config, path, trust_remote_code=trust)
    if model is None:
        return
    if tokenizer is not None:
        problems.check(eos_token_ids, tokenizer, path)
        problems.check(check_vocabulary, "policy", path, model, tokenizer)
    check_lengths(config, path, model, problems)
    if not isinstance(config, PreferenceConfig):
        return
    other = config.reference.path if config.reference is not None else None
    reference = problems.check(load_model_config, other, trust_remote_code=trust) if other is not None else None
    if reference is not None and vocabulary(reference) != vocabulary(model):
        problems.found.append(
            f"reference.path: {other} has a vocabulary of {vocabulary(reference)} tokens, the policy {path} one of "
            f"{vocabulary(model)}; the reference must read the policy's tokens"
        )
