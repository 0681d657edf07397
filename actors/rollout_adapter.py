"""A LoRA adapter on its way into an engine: what it must look like, as a folder, and as changes to weights."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rayrlhf.actors.rollout_common import ModelFacts
from rayrlhf.weights import Manifest

__all__ = ["adapted_name", "adapter_problems", "adapter_request", "scale_of", "write_adapter"]

PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


def adapted_name(name: str) -> tuple[str, str]:
    """The weight that a tensor of an adapter changes, by its Hugging Face name, and which factor it is: ``A`` or ``B``.

    Raises:
        ValueError: for a name that peft gives to no factor.
    """
    for end, factor in ((A, "A"), (B, "B")):
        if name.startswith(PREFIX) and name.endswith(end):
            return name.removeprefix(PREFIX).removesuffix(end) + ".weight", factor
    raise ValueError(f"{name!r} is no factor of a LoRA adapter")


def adapter_problems(facts: ModelFacts, manifest: Manifest, largest_rank: int) -> list[str]:
    """What keeps an adapter from fitting the engine's model.

    Args:
        facts: of the model.
        manifest: of kind ``adapter``.
        largest_rank: for which the engine has room.
    """
    settings = dict(manifest.adapter or {})
    problems = [
        f"it has {key}={settings[key]!r}, which engines don't apply"
        for key in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern")
        if settings.get(key)
    ]
    if settings.get("bias", "none") != "none":
        problems.append(f"it has bias={settings['bias']!r}, which engines don't apply")
    rank = settings.get("r")
    if not isinstance(rank, int) or not 0 < rank <= largest_rank:
        return [*problems, f"its rank is {rank}, the engine was started for ranks up to {largest_rank}"]
    factors: dict[str, set[str]] = {}
    for entry in manifest.entries():
        try:
            name, factor = adapted_name(entry.name)
        except ValueError as error:
            problems.append(str(error))
            continue
        factors.setdefault(name, set()).add(factor)
        weight = facts.shapes.get(name)
        if weight is None:
            problems.append(f"{entry.name}: {name} is no parameter of the engine's model")
        elif entry.shape != (expected := (rank, weight[1]) if factor == "A" else (weight[0], rank)):
            problems.append(f"{entry.name} has the shape {list(entry.shape)}, expected is {list(expected)}")
    problems += [f"{name} has only its factor {min(found)}" for name, found in factors.items() if len(found) == 1]
    return problems if factors else [*problems, "it has no tensors"]


def scale_of(settings: Mapping[str, Any]) -> float:
    """By which B A is multiplied: alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (Kalajdzievski 2023)."""
    rank = settings["r"]
    return settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def write_adapter(folder: Path, settings: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write an adapter as peft does."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(dict(settings), default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{value!r} of an adapter's configuration can't be written as JSON")


def adapter_request(number: int, folder: str) -> Any:
    """What vLLM calls an adapter by.

    Args:
        folder: read only where the adapter isn't loaded yet.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"policy-{number}", number, folder)
