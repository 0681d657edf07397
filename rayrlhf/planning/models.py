"""The models of a run's roles: their dimensions, and what a process of each role holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rayrlhf.config.base import JobConfig
from rayrlhf.config.derive import derive, derive_offline, lengths_of
from rayrlhf.config.jobs import ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.schema import Config, ScoreSource
from rayrlhf.planning.claims import started_roles
from rayrlhf.planning.known import HubAwayError, NoSuchFolderError, NotKnownError, NotThereError, shape_of
from rayrlhf.planning.memory import ModelBytes, forward_bytes, frozen_bytes, trained_bytes, training_bytes
from rayrlhf.planning.shapes import Shape

__all__ = ["HeldModels", "Known", "RoleModel", "Unseen", "known_models", "longest_sample"]


@dataclass(frozen=True)
class RoleModel:
    """One model of a role."""

    key: str
    """Of the configuration, that names it."""
    path: str
    shape: Shape
    head: str = "vocabulary"
    layers: int | None = None
    counted_as: str | None = None
    """The model whose dimensions these are, as this one can't be looked at."""


class Unseen(NamedTuple):
    """A model that couldn't be looked at: what a plan says holds without it."""

    key: str
    """Of the configuration, that names it."""
    path: str
    why: str
    counted_as: str | None = None
    """The model whose dimensions stand in for its own; None: its memory isn't planned."""

    def __str__(self) -> str:
        counted = "its memory isn't planned" if self.counted_as is None else f"counted as {self.counted_as}"
        return f"{self.key}: {self.why}; {counted}"


@dataclass
class Known:
    """What is known of a run's models."""

    models: dict[str, list[RoleModel]] = field(default_factory=dict)
    """By role. A role has several where it scores by several."""
    missing: list[str] = field(default_factory=list)
    """Messages about models that aren't there."""
    unseen: list[Unseen] = field(default_factory=list)
    """Models whose dimensions can't be had, or stand in for theirs."""
    misfits: dict[str, str] = field(default_factory=dict)
    """By role, messages about adapters of modules that its model doesn't have. No memory is planned for such a role."""

    def one(self, role: str) -> RoleModel | None:
        """A role's first model."""
        return next(iter(self.models.get(role, [])), None)

    def seen(self, *roles: str) -> list[RoleModel]:
        """The models of roles, without those for which others stand in: of these nothing is known that could be wrong."""
        return [model for role in roles for model in self.models.get(role, []) if model.counted_as is None]


def known_models(config: JobConfig, *, online: bool = True) -> Known:
    """The dimensions of every model of a run.

    A model that isn't there may still be trained by an earlier run: it is counted as the policy's, or as the first of those that
    are compared, and told among what couldn't be looked at.

    Args:
        online: whether the hub may be asked.
    """
    known = Known()
    fallback: RoleModel | None = None
    asked: set[str] = set()
    roles = {*started_roles(config), "policy"}
    for role, key, path, head, layers in _wanted(config):
        if role not in roles:
            continue
        try:
            found = RoleModel(key, path, shape_of(path, online=online), head, layers)
        except NoSuchFolderError:
            why = f"there is no folder {path} here, and the run is refused unless there is one when it starts"
            other = None if fallback is None else _stand_in(fallback, key, path, head, layers)
            if other is None or _misfit(config, role, other) is not None:
                _add(known.unseen, Unseen(key, path, why))
                continue
            _add(known.unseen, Unseen(key, path, why, other.counted_as))
            found = other
        except NotThereError as error:
            _add(known.missing, f"{key}: {error}")
            continue
        except NotKnownError as error:
            online = online and not isinstance(error, HubAwayError)
            if path not in asked:
                known.unseen.append(Unseen(key, path, str(error)))
            asked.add(path)
            continue
        if role in ("policy", "rollout"):
            fallback = fallback or found
        known.models.setdefault(role, []).append(found)
        if (misfit := _misfit(config, role, found)) is not None:
            known.misfits[role] = misfit
    return known


def _stand_in(other: RoleModel, key: str, path: str, head: str, layers: int | None) -> RoleModel:
    shape = replace(other.shape, source=f"counted as {other.path}")
    return RoleModel(key, path, shape, head, layers, counted_as=other.path)


def _add(texts: list[Any], text: Any) -> None:
    if text not in texts:
        texts.append(text)


def _misfit(config: Any, role: str, model: RoleModel) -> str | None:
    """What is wrong with the modules for which a role wants adapters."""
    lora = getattr(getattr(config, role, None), "lora", None)
    names = [] if lora is None else model.shape.misnamed(lora, head=model.head, layers=model.layers)
    if not names:
        return None
    legal = ", ".join(model.shape.adaptable(head=model.head))
    return (
        f"{role}.lora.target_modules: found {', '.join(names)}, but {model.path} has no layer of that name that can have an"
        f" adapter; legal: all-linear, or some of {legal}"
    )


def _wanted(config: Any) -> list[tuple[str, str, str, str, int | None]]:
    """Role, key, path, head and layers of each model."""
    found: list[tuple[str, str, str, str, int | None]] = []
    if isinstance(config, ModelEvaluationConfig):
        for k, model in enumerate(config.models):
            found += [(role, f"models.{k}.path", model.path, "vocabulary", None) for role in ("rollout", "model")]
        path = config.reference or config.models[0].path
        found.append(("reference", "reference" if config.reference else "models.0.path", path, "vocabulary", None))
        sources = {f"scores.{name}": getattr(config.scores, name) for name in ("reward", "safety", "helpfulness")}
        return found + _scorers("scores", sources)
    path, head = config.policy.path, "score" if config.algorithm == "reward_model" else "vocabulary"
    found.append(("policy", "policy.path", path, head, None))
    if getattr(config, "rollout", None) is not None:
        found.append(("rollout", "policy.path", path, "vocabulary", None))
    critic = getattr(config, "critic", None)
    if critic is not None:
        key = "critic.path" if critic.path else "policy.path"
        found.append(("critic", key, critic.path or path, "scalar", critic.num_layers))
    reference = getattr(config, "reference", None)
    if reference is not None:
        key = "reference.path" if reference.path else "policy.path"
        found.append(("reference", key, reference.path or path, "vocabulary", None))
    if isinstance(config, Config | SamplingConfig):
        named = {f"reward.sources.{k}": source for k, source in enumerate(config.reward.sources)}
        found += _scorers("reward", {**named, "reward.gold": getattr(config.reward, "gold", None)})
    return found


def _scorers(role: str, sources: Mapping[str, ScoreSource | None]) -> list[tuple[str, str, str, str, int | None]]:
    return [
        (role, f"{key}.model", source.model, "score", None)
        for key, source in sources.items()
        if source is not None and source.model is not None
    ]


# -- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldModels:
    """What a process of a role holds, of all its models together."""

    states: ModelBytes
    forward: int
    """Activations of a forward."""
    training: int = 0
    """Activations of forward and backward."""

    @classmethod
    def of(cls, config: Any, role: str, models: list[RoleModel]) -> HeldModels:
        """For any role but the engines'."""
        tokens = _tokens(config, role)
        if role in ("policy", "critic"):
            section, one = getattr(config, role), models[0]
            where: dict[str, Any] = {"head": one.head, "layers": one.layers}
            states = trained_bytes(section, one.shape, **where)
            forward = forward_bytes(
                section, one.shape, tokens, head=one.head, sequence_parallel=section.sequence_parallel
            )
            return cls(states, forward, training_bytes(section, one.shape, _trained_tokens(config, role), **where))
        name = {"model": "measure"}.get(role, role)
        section = (
            config.measure if isinstance(config, ModelEvaluationConfig) and role != "scores" else getattr(config, name)
        )
        stage = getattr(section, "zero_stage", 0)
        offloaded = getattr(section, "offload_parameters", "none") != "none"
        each = [
            frozen_bytes(m.shape, section.dtype, section.ranks, zero_stage=stage, offloaded=offloaded, head=m.head)
            for m in models
        ]
        whole = max(one.forward_buffers for one in each)
        loading = max(one.loading for one in each)  # one after the other
        # An evaluation has one of its models at a time.
        each = [max(each, key=lambda one: one.parameters + sum(one.host.values()))] if role == "model" else each
        host = sum(one.host.get("parameters", 0) for one in each)
        states = ModelBytes(
            sum(one.parameters for one in each),
            buffers=whole,
            forward_buffers=whole,
            host={"parameters": host} if host else {},
            pinning=sum(one.pinning for one in each),
            away=sum(one.away for one in each),
            loading=loading,
        )
        return cls(states, max(forward_bytes(section, m.shape, tokens, head=m.head) for m in models))


def longest_sample(config: Any) -> int:
    """The most tokens of one sample in a forward."""
    return max(lengths_of(config).values())


def _budget(config: Any, role: str) -> int:
    if role in ("model", "reference") and isinstance(config, ModelEvaluationConfig):
        return config.measure.tokens_per_micro_batch
    return getattr(config, role).tokens_per_micro_batch


def _tokens(config: Any, role: str) -> int:
    """Tokens of a forward: a full micro-batch, or all that a rank has where that is less."""
    if isinstance(config, Config):
        d = derive(config)
        if role in d.shares:
            ranks = d.shares[role].ranks
            return min(_budget(config, role), -(-d.samples_per_step // ranks) * d.max_sample_tokens)
    return _budget(config, role)


def _trained_tokens(config: Any, role: str) -> int:
    """Tokens of a micro-batch in training."""
    if isinstance(config, Config):
        d = derive(config)
        return min(_budget(config, role), d.shares[role].samples_per_rank * d.max_sample_tokens)
    d_offline = derive_offline(config)
    each = d_offline.max_tokens_per_step // d_offline.samples_per_step
    return min(_budget(config, role), d_offline.shares[role].samples_per_rank * each)
