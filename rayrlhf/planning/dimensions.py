"""What the dimensions of a run's models don't allow: sizes that don't divide them, samples that are too long, too many layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rayrlhf.config.derive import lengths_of
from rayrlhf.config.jobs import ModelEvaluationConfig
from rayrlhf.planning.models import Known

__all__ = ["OddSize", "odd_sizes", "other_problems"]


class OddSize(NamedTuple):
    """A number of GPUs or ranks over which a model can't be dealt out."""

    key: str
    text: str
    """All but what would do."""
    legal: list[int]
    """Sizes over which the model itself can be, the nearest ones."""


def odd_sizes(config: Any, known: Known) -> list[OddSize]:
    """Of engines, and of ranks that share sequences or weights."""
    return [*_engine_sizes(config, known), *_shared_heads(config, known)]


def other_problems(config: Any, known: Known) -> list[str]:
    """Samples that are longer than a model reads, and more layers than there are."""
    return [*_lengths(config, known), *_layers(config, known)]


def _engine_sizes(config: Any, known: Known) -> Iterator[OddSize]:
    for model in known.seen("rollout"):
        size = config.rollout.tensor_parallel
        legal = model.shape.engine_sizes(model.shape.heads)
        if size not in legal:
            shape = model.shape
            yield OddSize(
                "rollout.tensor_parallel",
                f"rollout.tensor_parallel: found {size}, but {model.path} has {shape.heads} heads, {shape.kv_heads} key-value"
                f" heads and an MLP of {shape.intermediate}, which can't be dealt out over {size} GPUs",
                _nearest(legal, size),
            )


def _shared_heads(config: Any, known: Known) -> Iterator[OddSize]:
    for role in ("policy", "critic"):
        model, section = next(iter(known.seen(role)), None), getattr(config, role, None)
        if model is None or section is None:
            continue
        shape = model.shape
        divided = {
            "sequence_parallel": {"heads": shape.heads},
            "tensor_parallel": {
                "heads": shape.heads,
                "key-value heads": shape.kv_heads,
                "MLP columns": shape.intermediate,
            },
        }
        for name, numbers in divided.items():
            size = getattr(section, name, 1)
            if name == "tensor_parallel" and size > 1 and shape.experts:
                yield OddSize(
                    f"{role}.{name}",
                    f"{role}.{name}: found {size}, but {model.path} is a mixture of experts, whose weights ranks can't share",
                    [1],
                )
                continue
            odd = [f"{number} {what}" for what, number in numbers.items() if number % size]
            if size > 1 and odd:
                legal = [
                    n for n in range(1, section.ranks + 1) if not any(x % n for x in (section.ranks, *numbers.values()))
                ]
                yield OddSize(
                    f"{role}.{name}",
                    f"{role}.{name}: found {size}, but {model.path} has {' and '.join(odd)}, which can't be dealt out over"
                    f" {size} ranks",
                    _nearest(legal, size),
                )


def _lengths(config: Any, known: Known) -> Iterator[str]:
    """Of the policy, or the model that answers; of an evaluation all that are compared, and the reference."""
    models = known.seen("rollout", "reference")
    if not isinstance(config, ModelEvaluationConfig):
        models = known.seen("policy", "rollout")[:1]
    for path, longest in {model.path: model.shape.longest for model in models}.items():
        for keys, wanted in lengths_of(config).items():
            if longest is not None and wanted > longest:
                yield f"{keys} is {wanted}, but {path} reads at most {longest} tokens"


def _layers(config: Any, known: Known) -> Iterator[str]:
    for model in known.seen("critic"):
        if model.layers is not None and model.layers > model.shape.layers:
            yield f"critic.num_layers is {model.layers}, but {model.path} has {model.shape.layers} layers"


def _nearest(legal: list[int], size: int) -> list[int]:
    return [n for n in legal if n < size][-2:] + [n for n in legal if n > size][:1]
