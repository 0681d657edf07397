"""Which roles a run has, as what the cluster starts."""

from __future__ import annotations

from typing import Any

from rayrlhf.actors.rollout import rollout_environment
from rayrlhf.cluster import RoleSpec
from rayrlhf.config.base import RunConfig
from rayrlhf.config.derive import derive
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig
from rayrlhf.config.schema import RolloutConfig
from rayrlhf.drivers.offline_preflight import PreparedExamples
from rayrlhf.drivers.preflight import Prepared

__all__ = ["offline_specs", "role_specs", "weight_transport"]


Wanted = tuple[str, str, int, dict[str, Any]]
"""Name, class, ranks and arguments of a role."""


def weight_transport(rollout: RolloutConfig, config: RunConfig) -> str:
    """The transport that ``auto`` stands for: shared memory unless the run joins a cluster, which may have many machines."""
    if rollout.weight_transport != "auto":
        return rollout.weight_transport
    return "object_store" if config.cluster.address is not None else "shared_memory"


def role_specs(prepared: Prepared) -> list[RoleSpec]:
    """Policy and rollout always; critic, reference and reward where the configuration has them."""
    config = prepared.config
    total_steps = derive(config).total_optimizer_steps
    transport = weight_transport(config.rollout, config)
    roles: list[Wanted] = [
        (
            "policy",
            "rayrlhf.actors.policy:PolicyTrainer",
            config.policy.ranks,
            {"model_path": prepared.policy_path, "transport": transport, "total_steps": total_steps},
        ),
        (
            "reward",
            "rayrlhf.actors.reward:RewardScorer",
            config.reward.ranks,
            {"tokenizer_path": prepared.tokenizer_path},
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
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return _specs(roles, config, (config.rollout, prepared.policy_path, prepared.tokenizer_path, longest, transport))


def offline_specs(prepared: PreparedExamples) -> list[RoleSpec]:
    """The trained model; for preferences a reference where there is one to compare with, and what samples for the KL."""
    config = prepared.config
    arguments: dict[str, Any] = {"model_path": prepared.model_path, "total_steps": prepared.total_steps}
    if isinstance(config, RewardModelConfig):
        trainer = "rayrlhf.actors.reward_trainer:RewardModelTrainer"
        return _specs([("policy", trainer, config.policy.ranks, arguments)], config, None)
    if not isinstance(config, PreferenceConfig):
        return _specs([("policy", "rayrlhf.actors.sft:SFTTrainer", config.policy.ranks, arguments)], config, None)
    transport = weight_transport(config.rollout, config)
    arguments["transport"] = transport
    roles: list[Wanted] = [
        ("policy", "rayrlhf.actors.preference:PreferenceTrainer", config.policy.ranks, arguments),
    ]
    compared = config.dpo.loss not in ("simpo", "orpo") or config.guard.kl_prompts > 0
    if prepared.reference_path is not None and compared:
        assert config.reference is not None
        at = {"model_path": prepared.reference_path}
        roles.append(("reference", "rayrlhf.actors.reference:ReferenceModel", config.reference.ranks, at))
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    sampling = (config.rollout, prepared.model_path, prepared.tokenizer_path, longest, transport)
    return _specs(roles, config, sampling if config.guard.kl_prompts and prepared.data.validation else None)


Sampling = tuple[RolloutConfig, str, str, int, str]
"""The rollout section, the model, its tokenizer, the longest sequence in tokens, and the weights' transport."""


def _specs(roles: list[Wanted], config: Any, sampling: Sampling | None) -> list[RoleSpec]:
    """Roles as processes; all share the GPUs alike, and on a CPU the cores."""
    processes = sum(ranks for _, _, ranks, _ in roles) + (sampling[0].engines if sampling is not None else 0)
    share = 1.0 / processes if config.cluster.device == "cuda" else 0.0
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if config.cluster.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    specs = [
        RoleSpec(name, build, {"config": config, **kwargs}, ranks, environment, share)
        for name, build, ranks, kwargs in roles
    ]
    return specs if sampling is None else [*specs, _rollout_spec(config, sampling, environment, share)]


def _rollout_spec(config: Any, sampling: Sampling, environment: dict[str, str], share: float) -> RoleSpec:
    rollout, model_path, tokenizer_path, longest, transport = sampling
    arguments = {
        "model_path": model_path,
        "tokenizer_path": tokenizer_path,
        "config": rollout,
        "dtype": rollout.dtype or config.policy.dtype,
        "max_model_tokens": longest,
        "transport_name": transport,
        "trust_remote_code": config.policy.trust_remote_code,
    }
    return RoleSpec(
        "rollout",
        "rayrlhf.actors.rollout:RolloutEngine",
        arguments,
        rollout.engines,
        {**environment, **rollout_environment(config.cluster.device)},
        share,
    )
