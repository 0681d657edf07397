"""Which roles a run has, as what the cluster starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rayrlhf.actors.reward import NamedSource
from rayrlhf.actors.rollout import rollout_environment
from rayrlhf.cluster import RoleSpec
from rayrlhf.config.base import JobConfig
from rayrlhf.config.derive import derive, generated_lengths
from rayrlhf.config.jobs import SamplingConfig
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig
from rayrlhf.config.rules import source_name
from rayrlhf.config.schema import Config, SamplerConfig
from rayrlhf.config.trainers import LoraConfig, TrainedConfig
from rayrlhf.drivers.jobs import PreparedJob
from rayrlhf.drivers.offline_preflight import PreparedExamples
from rayrlhf.drivers.preflight import Prepared
from rayrlhf.planning.claims import claims_of

__all__ = ["Generator", "job_specs", "offline_specs", "reward_sources", "role_specs", "specs_of"]


Wanted = tuple[str, str, int, dict[str, Any]]
"""Name, class, ranks and arguments of a role."""


class Generator(NamedTuple):
    """What an engine is started with."""

    rollout: SamplerConfig
    model_path: str
    tokenizer_path: str
    longest: int
    """Prompt and response together, in tokens."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the weights, unless the rollout section names another."""
    trust_remote_code: bool = False
    lora: LoraConfig | None = None
    """The adapter that comes apart from its base, where one does."""


def role_specs(prepared: Prepared) -> list[RoleSpec]:
    """Policy and rollout always; critic, reference and reward where the configuration has them."""
    config = prepared.config
    total_steps = derive(config).total_optimizer_steps
    roles: list[Wanted] = [
        (
            "policy",
            "rayrlhf.actors.policy:PolicyTrainer",
            config.policy.ranks,
            {"model_path": prepared.policy_path, "total_steps": total_steps},
        ),
        (
            "reward",
            "rayrlhf.actors.reward:RewardScorer",
            config.reward.ranks,
            {"config": config.reward, "tokenizer_path": prepared.tokenizer_path, "sources": reward_sources(config)},
        ),
    ]
    if config.critic is not None:
        assert prepared.critic_path is not None
        arguments = {"model_path": prepared.critic_path, "total_steps": total_steps}
        roles.append(("critic", "rayrlhf.actors.critic:CriticTrainer", config.critic.ranks, arguments))
    if prepared.reference_path is not None:
        assert config.reference is not None
        arguments = {"model_path": prepared.reference_path}
        roles.append(("reference", "rayrlhf.actors.reference:ReferenceModel", config.reference.ranks, arguments))
    return specs_of(roles, config, _trained_generator(config, prepared.policy_path, prepared.tokenizer_path))


def reward_sources(config: Config | SamplingConfig) -> list[NamedSource]:
    """What scores responses; PPO's gold score has a column of its own, and is no part of the sum."""
    named = [NamedSource(source_name(source), source, source.weight) for source in config.reward.sources]
    gold = config.reward.gold if isinstance(config, Config) else None
    return named if gold is None else [*named, NamedSource("gold", gold, None)]


def job_specs(prepared: PreparedJob) -> list[RoleSpec]:
    """What generates, and for sampling what scores."""
    config = prepared.config
    roles: list[Wanted] = []
    if isinstance(config, SamplingConfig):
        arguments = {
            "config": config.reward,
            "tokenizer_path": prepared.tokenizer_path,
            "sources": reward_sources(config),
            "mark_failures": True,
        }
        roles.append(("reward", "rayrlhf.actors.reward:RewardScorer", config.reward.ranks, arguments))
    paths = prepared.model_path, prepared.tokenizer_path
    policy, longest = config.policy, max(generated_lengths(config).values())
    return specs_of(roles, config, Generator(config.rollout, *paths, longest, policy.dtype, policy.trust_remote_code))


def offline_specs(prepared: PreparedExamples) -> list[RoleSpec]:
    """The trained model; for preferences a reference where there is one to compare with, and what samples for the KL."""
    config = prepared.config
    arguments: dict[str, Any] = {"model_path": prepared.model_path, "total_steps": prepared.total_steps}
    if isinstance(config, RewardModelConfig):
        trainer = "rayrlhf.actors.reward_trainer:RewardModelTrainer"
        return specs_of([("policy", trainer, config.policy.ranks, arguments)], config, None)
    if not isinstance(config, PreferenceConfig):
        return specs_of([("policy", "rayrlhf.actors.sft:SFTTrainer", config.policy.ranks, arguments)], config, None)
    roles: list[Wanted] = [
        ("policy", "rayrlhf.actors.preference:PreferenceTrainer", config.policy.ranks, arguments),
    ]
    compared = config.dpo.loss not in ("simpo", "orpo") or config.guard.kl_prompts > 0
    if prepared.reference_path is not None and compared:
        assert config.reference is not None
        at = {"model_path": prepared.reference_path}
        roles.append(("reference", "rayrlhf.actors.reference:ReferenceModel", config.reference.ranks, at))
    generator = _trained_generator(config, prepared.model_path, prepared.tokenizer_path)
    return specs_of(roles, config, generator if config.guard.kl_prompts and prepared.data.validation else None)


def _trained_generator(config: Config | PreferenceConfig, model_path: str, tokenizer_path: str) -> Generator:
    """The engine of a policy that is trained."""
    longest = max(generated_lengths(config).values())
    policy, paths = config.policy, (model_path, tokenizer_path)
    lora = policy.lora if config.rollout.lora_transfer == "adapter" else None
    return Generator(config.rollout, *paths, longest, policy.dtype, policy.trust_remote_code, lora)


def specs_of(roles: Sequence[Wanted], config: JobConfig, generator: Generator | None) -> list[RoleSpec]:
    """Roles as processes, with the GPUs that the plan claims for them; on a CPU they share the cores.

    Args:
        roles: each is built with the whole configuration as ``config``, unless its arguments name another.
        config: of the run.
        generator: what the engines are started with; None: there is no rollout.
    """
    gpus = {claim.role: claim.gpus for claim in claims_of(config)}
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if config.cluster.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    specs = [
        RoleSpec(
            name,
            build,
            {"config": config, **kwargs},
            ranks,
            environment,
            gpus[name],
            _ranks_per_shard(config, name),
            rest=("set_residence", {"level": "none"}),
        )
        for name, build, ranks, kwargs in roles
    ]
    return specs if generator is None else [*specs, _rollout_spec(config, generator, environment, gpus["rollout"])]


def _ranks_per_shard(config: JobConfig, role: str) -> int:
    """Ranks of a role that work on the same samples: they share long sequences, or each layer's weights."""
    section = getattr(config, role, None)
    if not isinstance(section, TrainedConfig):
        return 1
    return section.sequence_parallel * section.tensor_parallel


def _rollout_spec(config: JobConfig, generator: Generator, environment: dict[str, str], gpus: int) -> RoleSpec:
    rollout = generator.rollout
    arguments = {
        "model_path": generator.model_path,
        "tokenizer_path": generator.tokenizer_path,
        "config": rollout,
        "dtype": rollout.dtype or generator.dtype,
        "max_model_tokens": generator.longest,
        "trust_remote_code": generator.trust_remote_code,
        "lora": generator.lora,
    }
    return RoleSpec(
        "rollout",
        "rayrlhf.actors.rollout:RolloutEngine",
        arguments,
        rollout.engines,
        {**environment, **rollout_environment(config.cluster.device)},
        gpus,
        rest=("sleep", {"level": 1}),
    )
