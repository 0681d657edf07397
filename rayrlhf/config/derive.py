"""What follows from a configuration: the arithmetic of its batches and its processes, as the plan shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rayrlhf.config.schema import Config

__all__ = ["Derived", "PlanRow", "RoleShare", "derive", "plan_rows", "uses_policy_as_reference"]


@dataclass(frozen=True)
class RoleShare:
    """What falls to one rank of a role that holds a model."""

    ranks: int
    """Data-parallel ranks."""
    samples_per_rank: int
    """Samples of one minibatch (of a whole step, for a role that isn't trained) on the rank that gets most."""
    samples_per_micro_batch: int
    """Samples of full length that fit into one forward."""
    micro_batches: int
    """Forwards of a rank for those samples where all have full length."""


@dataclass(frozen=True)
class Derived:
    """Numbers that follow from a configuration. Unless said otherwise, they are those of the whole cluster."""

    samples_per_step: int
    """prompts_per_step * samples_per_prompt."""
    minibatches_per_epoch: int
    """Minibatches in one pass over the samples of a step."""
    optimizer_steps_per_step: int
    """Optimizer steps (of the policy, and of the critic) in one step of the run."""
    total_optimizer_steps: int
    """Optimizer steps of the run."""
    total_samples: int
    """Samples of the run."""
    max_sample_tokens: int
    """Longest prompt and longest response together."""
    max_tokens_per_step: int
    """Tokens of a step where every sample is as long as can be."""
    samples_per_engine: int
    """Samples of one step for one engine, dealt out evenly."""
    decode_waves: int
    """How often an engine fills its max_num_seqs places for them."""
    shares: dict[str, RoleShare]
    """By role: policy, and critic, reference and reward where there is a model of that role."""
    processes: dict[str, int]
    """Processes by role, in the order in which they are planned."""

    @property
    def total_processes(self) -> int:
        return sum(self.processes.values())


class PlanRow(NamedTuple):
    """One line of the plan."""

    section: str
    name: str
    value: str
    how: str


def uses_policy_as_reference(config: Config) -> bool:
    """Whether the reference is the policy with its adapters off, in the policy's own processes."""
    return config.reference is not None and config.reference.path is None and config.policy.lora is not None


def _share(samples: int, ranks: int, tokens_per_micro_batch: int, sample_tokens: int) -> RoleShare:
    per_rank = -(-samples // ranks)
    fit = tokens_per_micro_batch // sample_tokens
    return RoleShare(ranks, per_rank, fit, -(-per_rank // fit) if fit else 0)


def _shares(config: Config, samples_per_step: int, longest: int) -> dict[str, RoleShare]:
    policy, critic, reference, reward = config.policy, config.critic, config.reference, config.reward
    minibatch = config.ppo.minibatch_samples
    shares = {"policy": _share(minibatch, policy.ranks, policy.tokens_per_micro_batch, longest)}
    if critic is not None:
        shares["critic"] = _share(minibatch, critic.ranks, critic.tokens_per_micro_batch, longest)
    if reference is not None:
        ranks = policy.ranks if uses_policy_as_reference(config) else reference.ranks
        shares["reference"] = _share(samples_per_step, ranks, reference.tokens_per_micro_batch, longest)
    if any(source.model is not None for source in reward.sources):
        shares["reward"] = _share(samples_per_step, reward.ranks, reward.tokens_per_micro_batch, longest)
    return shares


def derive(config: Config) -> Derived:
    """All derived numbers of a configuration that was loaded, so that its rules hold."""
    ppo, rollout = config.ppo, config.rollout
    samples = ppo.prompts_per_step * rollout.samples_per_prompt
    optimizer_steps = samples // ppo.minibatch_samples * ppo.ppo_epochs
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    per_engine = -(-samples // rollout.engines)
    processes = {"policy": config.policy.ranks}
    if config.critic is not None:
        processes["critic"] = config.critic.ranks
    if config.reference is not None and not uses_policy_as_reference(config):
        processes["reference"] = config.reference.ranks
    processes |= {"reward": config.reward.ranks, "rollout": rollout.engines}
    return Derived(
        samples_per_step=samples,
        minibatches_per_epoch=samples // ppo.minibatch_samples,
        optimizer_steps_per_step=optimizer_steps,
        total_optimizer_steps=optimizer_steps * ppo.steps,
        total_samples=samples * ppo.steps,
        max_sample_tokens=longest,
        max_tokens_per_step=samples * longest,
        samples_per_engine=per_engine,
        decode_waves=-(-per_engine // rollout.max_num_seqs),
        shares=_shares(config, samples, longest),
        processes=processes,
    )


def plan_rows(config: Config) -> list[PlanRow]:
    """The plan as rows of section, name, value and how the value comes about."""
    return [*_batch_rows(config), *_role_rows(config), *_process_rows(config)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def _batch_rows(config: Config) -> list[PlanRow]:
    ppo, rollout, d = config.ppo, config.rollout, derive(config)
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


def _role_rows(config: Config) -> list[PlanRow]:
    d = derive(config)
    rows = []
    for role, share in d.shares.items():
        trained = role in ("policy", "critic")
        whole = config.ppo.minibatch_samples if trained else d.samples_per_step
        unit = "a minibatch" if trained else "a step"
        how = f"{_count(whole, 'sample')} over {_count(share.ranks, 'rank')}"
        rows.append(PlanRow(role, f"samples a rank, {unit}", f"{share.samples_per_rank:,}", how))
        fit = _count(share.samples_per_micro_batch, "full-length sample")
        how = f"{fit} in {role}.tokens_per_micro_batch {getattr(config, role).tokens_per_micro_batch:,}"
        rows.append(PlanRow(role, f"micro-batches a rank, {unit}", f"{share.micro_batches:,}", how))
    return rows


def _process_rows(config: Config) -> list[PlanRow]:
    d = derive(config)
    if config.cluster.executor == "inline":
        return [PlanRow("processes", "in all", "1", "cluster.executor inline: every role in the driver's process")]
    rows = [
        PlanRow("processes", role, f"{count:,}", f"{role}.{'engines' if role == 'rollout' else 'ranks'}")
        for role, count in d.processes.items()
    ]
    if uses_policy_as_reference(config):
        rows.insert(1, PlanRow("processes", "reference", "0", "the policy with its LoRA adapters off"))
    device = "GPUs" if config.cluster.device == "cuda" else "the CPU"
    return [*rows, PlanRow("processes", "in all", f"{d.total_processes:,}", f"on {device}, beside the driver")]
