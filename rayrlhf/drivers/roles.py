"""Which roles a run has, as what the cluster starts."""

from __future__ import annotations

from typing import Any

from rayrlhf.actors.rollout import rollout_environment
from rayrlhf.cluster import RoleSpec
from rayrlhf.config import Config
from rayrlhf.config.derive import derive
from rayrlhf.drivers.preflight import Prepared
from rayrlhf.models.loading import DTYPES

__all__ = ["role_specs", "weight_transport"]


def weight_transport(config: Config) -> str:
    """The transport that ``auto`` stands for: shared memory unless the run joins a cluster, which may have many machines."""
    if config.rollout.weight_transport != "auto":
        return config.rollout.weight_transport
    return "object_store" if config.cluster.address is not None else "shared_memory"


def role_specs(prepared: Prepared) -> list[RoleSpec]:
    """Policy and rollout always; critic, reference and reward where the configuration has them."""
    config = prepared.config
    total_steps = derive(config).total_optimizer_steps
    transport = weight_transport(config)
    roles: list[tuple[str, str, int, dict[str, Any]]] = [
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
    processes = sum(ranks for _, _, ranks, _ in roles) + config.rollout.engines
    # All roles share the GPUs alike; on a CPU they share the cores.
    share = 1.0 / processes if config.cluster.device == "cuda" else 0.0
    environment = _environment(config)
    specs = [
        RoleSpec(name, build, {"config": config, **kwargs}, ranks, environment, share)
        for name, build, ranks, kwargs in roles
    ]
    return [*specs, _rollout_spec(prepared, transport, environment, share)]


def _environment(config: Config) -> dict[str, str]:
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if config.cluster.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _rollout_spec(prepared: Prepared, transport: str, environment: dict[str, str], share: float) -> RoleSpec:
    config = prepared.config
    arguments = {
        "model_path": prepared.policy_path,
        "tokenizer_path": prepared.tokenizer_path,
        "config": config.rollout,
        "dtype": config.rollout.dtype or config.policy.dtype,
        "max_model_tokens": config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        "transport_name": transport,
        "trust_remote_code": config.policy.trust_remote_code,
    }
    assert arguments["dtype"] in DTYPES
    return RoleSpec(
        "rollout",
        "rayrlhf.actors.rollout:RolloutEngine",
        arguments,
        config.rollout.engines,
        {**environment, **rollout_environment(config.cluster.device)},
        share,
    )
