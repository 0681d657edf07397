"""The configuration's root class of each algorithm."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from rayrlhf.config.base import JobConfig, RunConfig
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.config.schema import Config
from rayrlhf.config.trainers import Section

__all__ = [
    "DEFAULT",
    "EVERY",
    "JOBS",
    "OFFLINE",
    "ROOTS",
    "TRAINED",
    "AnyConfig",
    "OfflineConfig",
    "Root",
    "TrainedRoot",
    "keys_of",
]

OfflineConfig = SFTConfig | RewardModelConfig | PreferenceConfig
TrainedRoot = Config | OfflineConfig
AnyConfig = TrainedRoot | SamplingConfig | CritiqueConfig | ModelEvaluationConfig
Root = (
    type[Config]
    | type[SFTConfig]
    | type[RewardModelConfig]
    | type[PreferenceConfig]
    | type[SamplingConfig]
    | type[CritiqueConfig]
    | type[ModelEvaluationConfig]
)

ROOTS: dict[str, Root] = {
    "ppo": Config,
    "sft": SFTConfig,
    "reward_model": RewardModelConfig,
    "dpo": PreferenceConfig,
    "sampling": SamplingConfig,
    "critique": CritiqueConfig,
    "evaluation": ModelEvaluationConfig,
}
"""By the value of ``algorithm``."""
DEFAULT = "ppo"
"""The algorithm of a configuration that names none."""
OFFLINE: tuple[Root, ...] = (SFTConfig, RewardModelConfig, PreferenceConfig)
"""Those that train on a fixed set of examples."""
TRAINED: tuple[Root, ...] = (Config, *OFFLINE)
"""Those that train a model."""
JOBS: tuple[Root, ...] = (SamplingConfig, CritiqueConfig, ModelEvaluationConfig)
"""Those that work with finished models."""
EVERY: tuple[Root, ...] = tuple(ROOTS.values())

_FIRST = ("algorithm", "run_dir", "seed")


def keys_of(cls: type[Section]) -> dict[str, FieldInfo]:
    """A section's keys in the order of pages and files: what every run has besides its first three comes last."""
    fields = cls.model_fields
    if not issubclass(cls, JobConfig):
        return fields
    last = [name for name in RunConfig.model_fields if name in fields and name not in _FIRST]
    order = [*_FIRST, *(name for name in fields if name not in (*_FIRST, *last)), *last]
    return {name: fields[name] for name in order}
