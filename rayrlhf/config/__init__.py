"""The configuration of a run: typed, checked as a whole, and loaded without torch, Ray or vLLM.

config = load_config("configs/ppo_local.yaml", ["ppo.steps=10"])

The numbers that follow from it are made by ``rayrlhf.config.derive.derive(config)``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrlhf.config.derive import Derived, PlanRow, RoleShare, plan_rows, uses_policy_as_reference
    from rayrlhf.config.dump import dump_config, to_yaml
    from rayrlhf.config.load import load_config
    from rayrlhf.config.rules import Violation, broken_rules, source_name
    from rayrlhf.config.schema import (
        CheckpointConfig,
        ClusterConfig,
        Config,
        DataConfig,
        EvaluationConfig,
        MonitoringConfig,
        PPOConfig,
        RewardConfig,
        RewardSource,
        RolloutConfig,
    )
    from rayrlhf.config.trainers import (
        CriticConfig,
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        PolicyConfig,
        ReferenceConfig,
        TrainedConfig,
    )

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "Derived",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitoringConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PlanRow",
    "PolicyConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardSource",
    "RoleShare",
    "RolloutConfig",
    "TrainedConfig",
    "Violation",
    "broken_rules",
    "dump_config",
    "load_config",
    "plan_rows",
    "source_name",
    "to_yaml",
    "uses_policy_as_reference",
]

_HOMES = {
    "derive": ("Derived", "PlanRow", "RoleShare", "plan_rows", "uses_policy_as_reference"),
    "dump": ("dump_config", "to_yaml"),
    "load": ("load_config",),
    "rules": ("Violation", "broken_rules", "source_name"),
    "trainers": (
        "CriticConfig",
        "LoraConfig",
        "ModelConfig",
        "OptimizerConfig",
        "PolicyConfig",
        "ReferenceConfig",
        "TrainedConfig",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a name's module at its first use: a process that needs one of them doesn't pay for all."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "schema")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
