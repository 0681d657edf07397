"""Tensor parallelism: t ranks share the weights of each layer (DeepSpeed's AutoTP, for training).

Of attention and of the network behind it, the first products are divided by their outputs and the last by their inputs, so
that each layer needs two sums over the ranks (Shoeybi et al. 2019, "Megatron-LM", section 3). Embeddings, norms and heads
stay whole on every rank. What is divided how is transformers' own plan for the family (``base_model_tp_plan``).

All ranks that share weights have the same samples and compute the same loss. A weight that is whole has the same gradient on
all of them; DeepSpeed takes its mean over the data-parallel ranks alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.config.trainers import TrainedConfig
from rayrlhf.errors import InputRefused

__all__ = ["check_sharing", "mark_shares", "weight_sharing_settings", "whole_parameter", "whole_shape"]

KINDS = {"colwise": "column", "rowwise": "row"}
"""A plan's styles, and what DeepSpeed calls them."""
SUMMED = "replicated_with_grad_allreduce"
"""The style of what is whole on every rank but works on divided heads: gradients are added up over the ranks."""
SHARE = "_rayrlhf_share"
"""Attribute of a divided parameter, see `Share`."""


@dataclass(frozen=True)
class Share:
    """How a parameter is divided over the ranks that share it; each has as much as the others."""

    group: Any
    """Their process group."""
    ranks: int
    """How many they are."""
    dim: int
    """The dimension that is divided."""


def _plan(config: Any) -> dict[str, str]:
    """The styles of modules by their places, "layers.*.mlp.up_proj", without the embeddings': they stay whole."""
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    return {place: style for place, style in plan.items() if style != "embedding_rowwise"}


def check_sharing(model: Any, section: TrainedConfig, key: str) -> None:
    """Whether ranks can share a model's sequences, or its weights, as configured.

    Args:
        model: its Hugging Face configuration.
        section: how it is trained.
        key: of that section, for messages.

    Raises:
        InputRefused: with all that stands against it.
    """
    problems = [*_about_sequences(model, section, key), *_about_weights(model, section, key)]
    if problems:
        raise InputRefused(problems)


def _about_sequences(model: Any, section: TrainedConfig, key: str) -> Iterator[str]:
    size, name = section.sequence_parallel, f"{key}.sequence_parallel"
    if size == 1:
        return
    heads = model.get_text_config().num_attention_heads
    if heads % size:
        legal = [s for s in range(1, section.ranks + 1) if heads % s == 0 and section.ranks % s == 0]
        yield (
            f"{name}: found {size}, but the model has {heads} attention heads, which can't be dealt out over {size} ranks; "
            f"legal with {section.ranks} ranks: {', '.join(map(str, legal))}"
        )
    if section.attention == "eager":
        yield f"{name}: found {size} with the attention eager, legal: sdpa, varlen or flash_attention_2"


def _about_weights(model: Any, section: TrainedConfig, key: str) -> Iterator[str]:
    size, name, text = section.tensor_parallel, f"{key}.tensor_parallel", model.get_text_config()
    if size == 1:
        return
    if section.zero_stage == 3:
        yield f"{name}: found {size} with {key}.zero_stage 3, legal: zero_stage 1 or 2, or tensor_parallel 1"
    if section.lora is not None:
        yield f"{name}: found {size} with {key}.lora, legal: 1, or all weights (lora null)"
    if section.sequence_parallel > 1:
        yield f"{name}: found {size} with {key}.sequence_parallel {section.sequence_parallel}, legal: one of them above 1"
    for attribute in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        found = getattr(text, attribute, None)
        if found is not None and found % size:
            yield f"{name}: found {size}, which doesn't divide the model's {attribute} {found}"
    styles = set(_plan(model).values())
    if not styles or not styles <= {*KINDS, SUMMED}:
        others = ", ".join(sorted(styles - {*KINDS, SUMMED}))
        why = f"has layers that are divided in another way ({others})" if others else "has no plan for it"
        yield f"{name}: found {size}, but the family {text.model_type} {why}; legal: 1"


def weight_sharing_settings(model: Any, size: int) -> dict[str, Any]:
    """The part of DeepSpeed's configuration by which ``size`` neighbouring ranks share a model's weights."""
    specs: list[dict[str, Any]] = []
    for place, style in _plan(model.transformer.config).items():
        patterns = [rf"(.*\.)?{_pattern(place)}\.weight$"]
        if style == SUMMED:
            specs.append({"patterns": patterns, "partition_type": "skip", "grad_allreduce": True})
        else:
            specs.append({"patterns": patterns, "partition_type": KINDS[style]})
    return {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def _pattern(place: str) -> str:
    """A plan's place, "layers.*.mlp.up_proj", as a regular expression."""
    return place.replace(".", r"\.").replace("*", r"\d+")


def mark_shares(engine: Any, model: Any, size: int) -> None:
    """Keep in mind which parameters DeepSpeed has divided, and end its check of the first micro-batch.

    Raises:
        RuntimeError: where it hasn't divided what it should have.
    """
    # It sends the inputs to all ranks and compares them, but can't compare a `ModelInput`.
    engine.first_dataloader_check.remove()
    plan = _plan(model.transformer.config)
    for name, module in model.named_modules():
        style = next((s for p, s in plan.items() if re.search(rf"(^|\.){_pattern(p)}$", name)), None)
        sizes = getattr(module, "_partition_sizes", ())
        if sizes != ((sizes[0],) * size if sizes else ()) or (style in KINDS) != bool(sizes):
            raise RuntimeError(f"DeepSpeed divides {name} over {size} ranks as {list(sizes)}; its plan is {style}")
        if not sizes:
            continue
        setattr(module.weight, SHARE, Share(module.mp_group, size, 0 if style == "colwise" else 1))
        if module.bias is not None and style == "colwise":
            setattr(module.bias, SHARE, Share(module.mp_group, size, 0))


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole of a parameter that may be divided over ranks."""
    share: Share | None = getattr(parameter, SHARE, None)
    shape = list(parameter.shape)
    if share is not None:
        shape[share.dim] *= share.ranks
    return tuple(shape)


@torch.no_grad()
def whole_parameter(parameter: Tensor) -> Tensor:
    """The whole of a parameter that may be divided over ranks; those that share it call this together.

    Without a share it is the parameter itself, detached.
    """
    share: Share | None = getattr(parameter, SHARE, None)
    if share is None:
        return parameter.detach()
    mine = parameter.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(share.ranks)]
    dist.all_gather(parts, mine, group=share.group)
    return torch.cat(parts, share.dim)
