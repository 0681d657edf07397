"""The plan of a run, as rows that a terminal or a page shows."""

from __future__ import annotations

from collections.abc import Mapping

from rayrlhf.config.base import JobConfig
from rayrlhf.config.derive import (
    Derived,
    DerivedOffline,
    PlanRow,
    derive,
    derive_offline,
    takes,
    uses_policy_as_reference,
)
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.config.roots import AnyConfig, OfflineConfig, TrainedRoot
from rayrlhf.config.schema import Config, SamplerConfig
from rayrlhf.planning.claims import started_roles

__all__ = ["plan_rows"]


def plan_rows(config: JobConfig, examples: int | None = None) -> list[PlanRow]:
    """The plan as rows of section, name, value and how the value comes about.

    Args:
        config: of any algorithm.
        examples: training examples of a configuration that trains on some, once the data is read. Of no use to PPO,
            whose steps are configured.
    """
    if isinstance(config, SamplingConfig | CritiqueConfig | ModelEvaluationConfig):
        return _job_rows(config)
    if isinstance(config, Config):
        d = derive(config)
        return [*_batch_rows(config, d), *_role_rows(config, d), *_process_rows(config)]
    assert isinstance(config, SFTConfig | RewardModelConfig | PreferenceConfig), type(config)
    offline = derive_offline(config, examples)
    return [
        *_example_rows(config, offline, examples),
        *_offline_role_rows(config, offline),
        *_process_rows(config),
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


def _budget(config: TrainedRoot, role: str) -> str:
    """The key and number of tokens in one forward of a role."""
    at = "policy" if role == "reference" and _shares_policy(config) else role
    return f"{at}.tokens_per_micro_batch {getattr(config, at).tokens_per_micro_batch:,}"


def _shares_policy(config: TrainedRoot) -> bool:
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


# -- work with finished models ----------------------------------------------------------------------------------


def _job_rows(config: SamplingConfig | CritiqueConfig | ModelEvaluationConfig) -> list[PlanRow]:
    rollout: SamplerConfig = config.rollout
    prompt = config.data.max_prompt_tokens
    lengths = f"{prompt:,} prompt + {rollout.max_response_tokens:,} response"
    rows = [PlanRow("one response", "tokens, at most", f"{prompt + rollout.max_response_tokens:,}", lengths)]
    if isinstance(config, SamplingConfig):
        each, some = config.rollout.samples_per_prompt, config.sampling.prompts_at_once
        how = f"{_count(some, 'prompt')} x {each} each"
        rows.append(PlanRow("one round", "samples", f"{some * each:,}", how))
    processes = {"rollout": (rollout.engines, "rollout.engines")}
    if isinstance(config, SamplingConfig):
        processes["reward"] = (config.reward.ranks, "reward.ranks")
    if isinstance(config, ModelEvaluationConfig):
        count = len(config.models)
        rows.append(PlanRow("the run", "models", f"{count:,}", "one after the other"))
        rows.append(PlanRow("the run", "win rates", f"{count * (count - 1) // 2:,}", "each model against each"))
        if "model" in started_roles(config):
            processes["measure"] = (config.measure.ranks, "measure.ranks: the model itself, for KL and perplexity")
        processes["reference"] = (config.measure.ranks, "measure.ranks")
        if any((config.scores.reward, config.scores.safety, config.scores.helpfulness)):
            processes["scores"] = (config.scores.ranks, "scores.ranks")
    return [*rows, *_processes(config, processes)]


# -- processes --------------------------------------------------------------------------------------------------


def _process_rows(config: TrainedRoot) -> list[PlanRow]:
    started = started_roles(config)
    keys = {role: f"{role}.{'engines' if role == 'rollout' else 'ranks'}" for role in started}
    rows = _processes(config, {role: (count, keys[role]) for role, count in started.items()})
    if _shares_policy(config) and len(rows) > 1:
        rows.insert(1, PlanRow("processes", "reference", "0", "the policy with its LoRA adapters off"))
    return rows


def _processes(config: AnyConfig, processes: Mapping[str, tuple[int, str]]) -> list[PlanRow]:
    """A row a role with processes of its own, where each has its number and key, and their sum."""
    if config.cluster.executor == "inline":
        return [PlanRow("processes", "in all", "1", "cluster.executor inline: every role in the driver's process")]
    rows = [PlanRow("processes", role, f"{count:,}", key) for role, (count, key) in processes.items()]
    device = "GPUs" if config.cluster.device == "cuda" else "the CPU"
    total = sum(count for count, _ in processes.values())
    return [*rows, PlanRow("processes", "in all", f"{total:,}", f"on {device}, beside the driver")]
