"""The configuration of a run: typed, checked as a whole, and loaded without torch, Ray or vLLM.

config = load_config("configs/ppo_local.yaml", ["ppo.steps=10"])

The numbers that follow from it are made by ``rayrlhf.config.derive.derive(config)``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrlhf.config.base import CheckpointConfig, ClusterConfig, JobConfig, MonitoringConfig, NodeConfig, RunConfig
    from rayrlhf.config.derive import Derived, DerivedOffline, PlanRow, RoleShare, uses_policy_as_reference
    from rayrlhf.config.dump import dump_config, to_yaml
    from rayrlhf.config.jobs import (
        ComparedModel,
        CritiqueConfig,
        CritiqueSettings,
        GeneratorConfig,
        JudgeConfig,
        ModelEvaluationConfig,
        SamplingConfig,
        SamplingSettings,
        ScoresConfig,
    )
    from rayrlhf.config.load import load_config
    from rayrlhf.config.offline import (
        DPOConfig,
        ExamplesConfig,
        ExampleSource,
        GuardConfig,
        PreferenceConfig,
        RewardModelConfig,
        RewardModelSettings,
        SFTConfig,
        SFTSettings,
        TrainingConfig,
    )
    from rayrlhf.config.roots import ROOTS, AnyConfig, OfflineConfig, TrainedRoot
    from rayrlhf.config.rules import Violation, broken_rules, source_name
    from rayrlhf.config.schema import (
        Config,
        DataConfig,
        EvaluationConfig,
        PPOConfig,
        PPOMonitoringConfig,
        PromptsConfig,
        RewardConfig,
        RewardSource,
        RolloutConfig,
        SamplerConfig,
        ScorerProcesses,
        ScoreSource,
        ScoringConfig,
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
    "AnyConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ComparedModel",
    "Config",
    "CriticConfig",
    "CritiqueConfig",
    "CritiqueSettings",
    "DPOConfig",
    "DataConfig",
    "Derived",
    "DerivedOffline",
    "EvaluationConfig",
    "ExampleSource",
    "ExamplesConfig",
    "GeneratorConfig",
    "GuardConfig",
    "JobConfig",
    "JudgeConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelEvaluationConfig",
    "MonitoringConfig",
    "NodeConfig",
    "OfflineConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOMonitoringConfig",
    "PlanRow",
    "PolicyConfig",
    "PreferenceConfig",
    "PromptsConfig",
    "ROOTS",
    "ReferenceConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RewardModelSettings",
    "RewardSource",
    "RoleShare",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SFTSettings",
    "SamplerConfig",
    "SamplingConfig",
    "SamplingSettings",
    "ScoreSource",
    "ScorerProcesses",
    "ScoresConfig",
    "ScoringConfig",
    "TrainedConfig",
    "TrainedRoot",
    "TrainingConfig",
    "Violation",
    "broken_rules",
    "dump_config",
    "load_config",
    "source_name",
    "to_yaml",
    "uses_policy_as_reference",
]

_HOMES = {
    "base": ("CheckpointConfig", "ClusterConfig", "JobConfig", "MonitoringConfig", "NodeConfig", "RunConfig"),
    "derive": ("Derived", "DerivedOffline", "PlanRow", "RoleShare", "uses_policy_as_reference"),
    "dump": ("dump_config", "to_yaml"),
    "jobs": (
        "ComparedModel",
        "CritiqueConfig",
        "CritiqueSettings",
        "GeneratorConfig",
        "JudgeConfig",
        "ModelEvaluationConfig",
        "SamplingConfig",
        "SamplingSettings",
        "ScoresConfig",
    ),
    "load": ("load_config",),
    "offline": (
        "DPOConfig",
        "ExampleSource",
        "ExamplesConfig",
        "GuardConfig",
        "PreferenceConfig",
        "RewardModelConfig",
        "RewardModelSettings",
        "SFTConfig",
        "SFTSettings",
        "TrainingConfig",
    ),
    "roots": ("ROOTS", "AnyConfig", "OfflineConfig", "TrainedRoot"),
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
