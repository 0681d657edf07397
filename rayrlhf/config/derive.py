"""What follows from a configuration: the arithmetic of its batches and its processes, as the plan shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rayrlhf.config.base import JobConfig
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.config.roots import OfflineConfig
from rayrlhf.config.schema import Config
from rayrlhf.errors import InputRefused

__all__ = [
    "LORA_RANKS",
    "Derived",
    "DerivedOffline",
    "PlanRow",
    "RoleShare",
    "data_ranks",
    "derive",
    "derive_offline",
    "generated_lengths",
    "guard_actions",
    "lengths_of",
    "longest_of",
    "lora_room",
    "needs_gpu",
    "needs_reference",
    "ranks_in_words",
    "roles_of",
    "takes",
    "uses_policy_as_reference",
]

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters for which vLLM makes room (`MaxLoRARanks` in vllm/config/lora.py)."""


class PlanRow(NamedTuple):
    """One line of a plan, as a terminal or a page shows it."""

    section: str
    name: str
    value: str
    how: str


@dataclass(frozen=True)
class RoleShare:
    """What falls to one rank of a role that holds a model."""

    ranks: int
    """Data-parallel ranks: those that share a long sample or a layer's weights count once."""
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


@dataclass(frozen=True)
class DerivedOffline:
    """Numbers that follow from a configuration of training on examples, for the whole cluster."""

    samples_per_example: int
    """Sequences of one example: 2 of a pair, and of a completion with the mismatched one that kto compares it with."""
    samples_per_step: int
    """Sequences of one optimizer step."""
    max_tokens_per_step: int
    """Tokens of a step where every sequence is as long as can be."""
    steps_per_epoch: int | None
    """Optimizer steps of an epoch; None where the number of examples isn't known."""
    total_steps: int | None
    """Optimizer steps of the run, unless it ends early; None where neither the number of examples is known nor
    training.max_steps given."""
    shares: dict[str, RoleShare]
    """By role: policy, and reference where there is one. Of a training step."""
    processes: dict[str, int]
    """Processes by role, in the order in which they are planned."""

    @property
    def total_processes(self) -> int:
        return sum(self.processes.values())


def uses_policy_as_reference(config: Config | PreferenceConfig) -> bool:
    """Whether the reference is the policy with its adapters off, in the policy's own processes."""
    return config.reference is not None and config.reference.path is None and config.policy.lora is not None


def lora_room(rank: int) -> int:
    """The least rank for which vLLM makes room in which adapters of this rank fit.

    Raises:
        InputRefused: where it makes none that is large enough; a whole configuration with such a rank breaks a rule.
    """
    room = next((room for room in LORA_RANKS if room >= rank), None)
    if room is None:
        raise InputRefused(f"policy.lora.rank is {rank}; vLLM applies adapters up to rank {LORA_RANKS[-1]}")
    return room


def data_ranks(section: Any) -> int:
    """Parts into which a role's samples are split: its ranks, of which those count once that work on the same samples."""
    together = getattr(section, "sequence_parallel", 1) * getattr(section, "tensor_parallel", 1)
    return max(1, section.ranks // together)


def ranks_in_words(section: Any, role: str) -> str:
    """`data_ranks`, and how it comes about."""
    parts = [f"{role}.ranks {section.ranks}"]
    for name in ("sequence_parallel", "tensor_parallel"):
        if getattr(section, name, 1) > 1:
            parts.append(f"{role}.{name} {getattr(section, name)}")
    return " / ".join(parts)


def _share(samples: int, ranks: int, tokens_per_micro_batch: int, sample_tokens: int) -> RoleShare:
    per_rank = -(-samples // ranks)
    fit = tokens_per_micro_batch // sample_tokens
    return RoleShare(ranks, per_rank, fit, -(-per_rank // fit) if fit else 0)


def _shares(config: Config, samples_per_step: int, longest: int) -> dict[str, RoleShare]:
    policy, critic, reference, reward = config.policy, config.critic, config.reference, config.reward
    minibatch = config.ppo.minibatch_samples
    shares = {"policy": _share(minibatch, data_ranks(policy), policy.tokens_per_micro_batch, longest)}
    if critic is not None:
        shares["critic"] = _share(minibatch, data_ranks(critic), critic.tokens_per_micro_batch, longest)
    if reference is not None:
        at = policy if uses_policy_as_reference(config) else reference
        shares["reference"] = _share(samples_per_step, data_ranks(at), at.tokens_per_micro_batch, longest)
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


# -- lengths ----------------------------------------------------------------------------------------------------


def generated_lengths(config: JobConfig) -> dict[str, int]:
    """The longest sequences of an engine, in tokens, prompt and response together, by the keys that they come from.

    Those of a configuration with ``rollout``.
    """
    run: Any = config
    response = run.rollout.max_response_tokens
    lengths = {"data.max_prompt_tokens + rollout.max_response_tokens": run.data.max_prompt_tokens + response}
    if config.algorithm != "critique":
        return lengths
    asked = run.critique.max_input_tokens
    questions = {
        "critique.max_input_tokens + critique.max_critique_tokens": asked + run.critique.max_critique_tokens,
        "critique.max_input_tokens + rollout.max_response_tokens": asked + response,
    }
    # Responses that are given aren't sampled.
    return questions | (lengths if run.data.response_column is None else {})


def lengths_of(config: JobConfig) -> dict[str, int]:
    """The longest sequences of a run, in tokens, by the keys that they come from: its models must read them."""
    run: Any = config
    if config.algorithm not in ("sft", "reward_model", "dpo"):
        return generated_lengths(config)
    sampled = generated_lengths(config) if config.algorithm == "dpo" and run.guard.kl_prompts else {}
    return {"data.max_tokens": run.data.max_tokens, **sampled}


# -- training on examples ---------------------------------------------------------------------------------------


def needs_reference(loss: str) -> bool:
    """Whether a preference loss compares the policy with a reference."""
    return loss not in ("simpo", "orpo")


def guard_actions(config: PreferenceConfig) -> list[str]:
    """What is done, one after the other, when the KL bound is passed."""
    if config.guard.actions is not None:
        return list(config.guard.actions)
    return ["halve_lr", *(["raise_beta"] if needs_reference(config.dpo.loss) else []), "roll_back"]


def takes(config: OfflineConfig) -> Literal["examples", "pairs", "labelled"]:
    """What an algorithm trains on: completions, pairs, or labelled completions."""
    if config.algorithm == "sft":
        return "examples"
    return "labelled" if config.algorithm == "dpo" and config.dpo.loss == "kto" else "pairs"


def _longest_trained(config: OfflineConfig, role: str) -> tuple[int, str]:
    """The most tokens that stay together in one forward over training examples, and how they come about."""
    prompt, whole, kind = config.data.max_prompt_tokens, config.data.max_tokens, takes(config)
    if kind == "labelled":
        return prompt + whole, "a prompt with another one's completion: data.max_prompt_tokens + data.max_tokens"
    if kind == "pairs" and role == "policy":
        return 2 * whole, "a pair: twice data.max_tokens"
    return whole, "data.max_tokens"


def longest_of(config: OfflineConfig, role: str) -> tuple[int, str]:
    """The most tokens that stay together in one forward of the policy or the reference, and how they come about.

    Over training examples, and over the responses that are sampled for the guard's KL.
    """
    trained = _longest_trained(config, role)
    if config.algorithm != "dpo" or config.guard.kl_prompts == 0:
        return trained
    sampled = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    how = "data.max_prompt_tokens + rollout.max_response_tokens"
    if role == "reference" and not needs_reference(config.dpo.loss):
        return sampled, how
    return max(trained, (sampled, how))


def derive_offline(config: OfflineConfig, examples: int | None = None) -> DerivedOffline:
    """All derived numbers of a configuration that was loaded, so that its rules hold.

    Args:
        examples: training examples, once the data is read.
    """
    training, kind = config.training, takes(config)
    each = 1 if kind == "examples" else 2
    samples = each * training.batch_examples
    epoch = None if examples is None else -(-examples // training.batch_examples)
    total = training.max_steps
    if epoch is not None:
        total = min(epoch * training.epochs, total or epoch * training.epochs)
    shares, processes = {"policy": _trained_share(config, each)}, {"policy": config.policy.ranks}
    if config.algorithm == "dpo" and config.reference is not None:
        shared = uses_policy_as_reference(config)
        at = config.policy if shared else config.reference
        if needs_reference(config.dpo.loss):
            longest, _ = _longest_trained(config, "reference")
            shares["reference"] = _share(samples, data_ranks(at), at.tokens_per_micro_batch, longest)
        if not shared:
            processes["reference"] = config.reference.ranks
    if config.algorithm == "dpo" and config.guard.kl_prompts > 0:
        processes["rollout"] = config.rollout.engines
    longest, _ = _longest_trained(config, "reference")
    return DerivedOffline(each, samples, samples * longest, epoch, total, shares, processes)


def _trained_share(config: OfflineConfig, each: int) -> RoleShare:
    """What falls to a rank of the policy: an example's samples stay on one rank, a pair's in one micro-batch."""
    ranks, budget = data_ranks(config.policy), config.policy.tokens_per_micro_batch
    together = 2 if takes(config) == "pairs" else 1
    per_rank = each * -(-config.training.batch_examples // ranks)
    longest, _ = _longest_trained(config, "policy")
    fit = together * (budget // longest)
    return RoleShare(ranks, per_rank, fit, -(-per_rank // fit) if fit else 0)


# -- roles of any run -------------------------------------------------------------------------------------------


def roles_of(config: JobConfig) -> dict[str, int]:
    """The processes of every role that a run starts, by the name under which it starts, in the order of planning."""
    any_config: Any = config
    if config.algorithm == "ppo":
        return derive(any_config).processes
    if config.algorithm in ("sft", "reward_model", "dpo"):
        return derive_offline(any_config).processes
    processes = {"rollout": any_config.rollout.engines}
    if config.algorithm == "sampling":
        processes["reward"] = any_config.reward.ranks
    if config.algorithm == "evaluation":
        processes |= {"model": any_config.measure.ranks, "reference": any_config.measure.ranks}
        if _scored_by(any_config):
            processes["scores"] = any_config.scores.ranks
    return processes


def needs_gpu(config: JobConfig, role: str) -> bool:
    """Whether a role computes on a device: all but those that score by functions and services."""
    return role not in ("reward", "scores") or any(source.model is not None for source in _scored_by(config))


def _scored_by(config: Any) -> list[Any]:
    """Everything that scores responses in a run."""
    if config.algorithm == "evaluation":
        named = (config.scores.reward, config.scores.safety, config.scores.helpfulness)
        return [source for source in named if source is not None]
    sources = [config.reward.sources[k] for k in range(len(config.reward.sources))]
    gold = config.reward.gold if config.algorithm == "ppo" else None
    return sources if gold is None else [*sources, gold]
