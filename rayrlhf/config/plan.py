"""The plan of a run, as rows that a terminal or a page shows."""

from __future__ import annotations

from typing import NamedTuple

from rayrlhf.config.base import RunConfig
from rayrlhf.config.derive import (
    Derived,
    DerivedOffline,
    derive,
    derive_offline,
    takes,
    uses_policy_as_reference,
)
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.config.roots import AnyConfig, OfflineConfig
from rayrlhf.config.schema import Config

__all__ = ["PlanRow", "plan_rows"]


class PlanRow(NamedTuple):
    """One line of the plan."""

    section: str
    name: str
    value: str
    how: str


def plan_rows(config: RunConfig, examples: int | None = None) -> list[PlanRow]:
    """The plan as rows of section, name, value and how the value comes about.

    Args:
        config: of any algorithm.
        examples: training examples of a configuration that trains on some, once the data is read. Of no use to PPO,
            whose steps are configured.
    """
    if isinstance(config, Config):
        d = derive(config)
        return [*_batch_rows(config, d), *_role_rows(config, d), *_process_rows(config, d)]
    assert isinstance(config, SFTConfig | RewardModelConfig | PreferenceConfig), type(config)
    offline = derive_offline(config, examples)
    return [
        *_example_rows(config, offline, examples),
        *_offline_role_rows(config, offline),
        *_process_rows(config, offline),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def _batch_rows(config: Config, d: Derived) -> list[PlanRow]:
    ppo, rollout = config.ppo, config.rollout
    samples, engines = _count(d.samples_per_step, "sample"), _count(rollout.engines, "engine")
    lengths = f"{config.data.max_prompt_tokens:,} prompt + {rollout.max_response_tokens:,} response"
    step = [
        ("prompts", ppo.prompts_per_step, "ppo.prompts_per_step"),
        (
            "samples",
            d.samples_per_step,
            f"{_count(ppo.prompts_per_step, 'prompt')} x {rollout.samples_per_prompt} each",
        ),
        ("samples an engine", d.samples_per_engine, f"{samples} over {engines}, {rollout.max_num_seqs:,} at a time"),
        ("minibatches a pass", d.minibatches_per_epoch, f"{samples} / {ppo.minibatch_samples:,} a minibatch"),
        (
            "optimizer steps",
            d.optimizer_steps_per_step,
            f"{d.minibatches_per_epoch:,} a pass x {_count(ppo.ppo_epochs, 'pass')}",
        ),
        ("tokens a sample, at most", d.max_sample_tokens, lengths),
        ("tokens, at most", d.max_tokens_per_step, f"{samples} x {d.max_sample_tokens:,}"),
    ]
    run = [
        ("steps", ppo.steps, "ppo.steps"),
        ("samples", d.total_samples, f"{_count(ppo.steps, 'step')} x {d.samples_per_step:,}"),
        ("optimizer steps", d.total_optimizer_steps, f"{_count(ppo.steps, 'step')} x {d.optimizer_steps_per_step:,}"),
    ]
    return [
        PlanRow(section, name, f"{value:,}", how)
        for section, rows in (("one step", step), ("the run", run))
        for name, value, how in rows
    ]


def _role_rows(config: Config, d: Derived) -> list[PlanRow]:
    rows = []
    for role, share in d.shares.items():
        trained = role in ("policy", "critic")
        whole = config.ppo.minibatch_samples if trained else d.samples_per_step
        unit = "a minibatch" if trained else "a step"
        how = f"{_count(whole, 'sample')} over {_count(share.ranks, 'rank')}"
        rows.append(PlanRow(role, f"samples a rank, {unit}", f"{share.samples_per_rank:,}", how))
        fit = _count(share.samples_per_micro_batch, "full-length sample")
        how = f"{fit} in {_budget(config, role)}"
        rows.append(PlanRow(role, f"micro-batches a rank, {unit}", f"{share.micro_batches:,}", how))
    return rows


def _budget(config: AnyConfig, role: str) -> str:
    """The key and number of tokens in one forward of a role."""
    at = "policy" if role == "reference" and _shares_policy(config) else role
    return f"{at}.tokens_per_micro_batch {getattr(config, at).tokens_per_micro_batch:,}"


def _shares_policy(config: AnyConfig) -> bool:
    return config.algorithm in ("ppo", "dpo") and uses_policy_as_reference(config)


# -- training on examples ---------------------------------------------------------------------------------------

_UNKNOWN = "known when the data is read"


def _example_rows(config: OfflineConfig, d: DerivedOffline, examples: int | None) -> list[PlanRow]:
    training, noun = config.training, "pair" if takes(config) == "pairs" else "example"
    per_step = _count(training.batch_examples, noun)
    step = [(f"{noun}s", training.batch_examples, "training.batch_examples")]
    if d.samples_per_example > 1:
        why = "chosen and rejected" if noun == "pair" else "its own completion and another one's"
        step.append(("samples", d.samples_per_step, f"{per_step} x {d.samples_per_example}: {why}"))
    longest = d.max_tokens_per_step // d.samples_per_step
    step.append(("tokens, at most", d.max_tokens_per_step, f"{_count(d.samples_per_step, 'sample')} x {longest:,}"))
    rows = [PlanRow("one step", name, f"{value:,}", how) for name, value, how in step]
    rows.append(PlanRow("the run", "epochs", f"{training.epochs:,}", "training.epochs"))
    epochs = _count(training.epochs, "epoch")
    limit = "" if training.max_steps is None else f", at most training.max_steps {training.max_steps:,}"
    if examples is None:
        value = "?" if training.max_steps is None else f"at most {training.max_steps:,}"
        epoch = "?", f"training {noun}s / {training.batch_examples:,}: {_UNKNOWN}"
        how = f"{epochs} x optimizer steps an epoch{limit}"
    else:
        value, how = f"{d.total_steps:,}", f"{epochs} x {d.steps_per_epoch:,}{limit}"
        epoch = f"{d.steps_per_epoch:,}", f"{_count(examples, noun)} / {training.batch_examples:,}, rounded up"
    rows.append(PlanRow("the run", "optimizer steps an epoch", *epoch))
    return [*rows, PlanRow("the run", "optimizer steps", value, how)]


def _offline_role_rows(config: OfflineConfig, d: DerivedOffline) -> list[PlanRow]:
    rows = []
    for role, share in d.shares.items():
        over = f"{_count(d.samples_per_step, 'sample')} over {_count(share.ranks, 'rank')}"
        rows.append(PlanRow(role, "samples a rank, a step", f"{share.samples_per_rank:,}", over))
        fit = f"{_count(share.samples_per_micro_batch, 'full-length sample')} in {_budget(config, role)}"
        rows.append(PlanRow(role, "micro-batches a rank, a step", f"{share.micro_batches:,}", fit))
    return rows


# -- processes --------------------------------------------------------------------------------------------------


def _process_rows(config: AnyConfig, d: Derived | DerivedOffline) -> list[PlanRow]:
    if config.cluster.executor == "inline":
        return [PlanRow("processes", "in all", "1", "cluster.executor inline: every role in the driver's process")]
    rows = [
        PlanRow("processes", role, f"{count:,}", f"{role}.{'engines' if role == 'rollout' else 'ranks'}")
        for role, count in d.processes.items()
    ]
    if _shares_policy(config):
        rows.insert(1, PlanRow("processes", "reference", "0", "the policy with its LoRA adapters off"))
    device = "GPUs" if config.cluster.device == "cuda" else "the CPU"
    return [*rows, PlanRow("processes", "in all", f"{d.total_processes:,}", f"on {device}, beside the driver")]
