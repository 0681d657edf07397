"""A trained model's weights under their Hugging Face names, with adapters merged, whatever ZeRO stage holds them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.models.heads import ScalarModel
from rayrlhf.models.loading import SCORE_SHIFT, scorer_class
from rayrlhf.models.tokenizer import Padding

__all__ = ["gathered_adapters", "named_weights", "save_model_folder", "save_reward_folder"]

PADDING_SAID = "rayrlhf_padding"
"""Key of a reward model's configuration: why its padding token isn't the tokenizer's."""


def named_weights(lm: nn.Module, *, zero_stage: int, group_bytes: int = 2**28) -> Iterator[tuple[str, Tensor]]:
    """Weights one by one, as `from_pretrained` names them; a tied weight comes once.

    With LoRA, W + scale * B A stands in place of W (Hu et al. 2021, eq. 3). Under ZeRO-3 the parameters are gathered
    in groups of about ``group_bytes``; all ranks must go through the whole iterator together.

    Yields:
        (name, tensor); the tensor is only valid until the next one is asked for.
    """
    group: list[tuple[str, Any, Tensor]] = []
    size = 0
    for entry in _entries(lm):
        group.append(entry)
        size += _full_bytes(entry[2])
        if size >= group_bytes:
            yield from _gathered(group, zero_stage)
            group, size = [], 0
    if group:
        yield from _gathered(group, zero_stage)


def _entries(lm: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """(name, LoRA layer or None, parameter) of each base weight."""
    layers = {name: m for name, m in lm.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    for name, parameter in lm.named_parameters(remove_duplicate=True):
        owner = next((prefix for prefix in _prefixes(name) if prefix in layers), None)
        if owner is None:
            yield name, None, parameter
        elif name.startswith(f"{owner}.base_layer."):
            part = name.removeprefix(f"{owner}.base_layer.")
            yield f"{owner}.{part}", layers[owner] if part == "weight" else None, parameter


def _prefixes(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _full_bytes(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


def _gathered(group: list[tuple[str, Any, Tensor]], zero_stage: int) -> Iterator[tuple[str, Tensor]]:
    needed = [p for _, _, p in group]
    for _, layer, _ in group:
        if layer is not None:
            needed += [p for n, p in layer.named_parameters() if "lora_" in n]
    with _whole(needed, zero_stage), torch.no_grad():
        for name, layer, parameter in group:
            weight = parameter.detach()
            if layer is not None:
                for adapter in layer.active_adapters:
                    weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            yield name, weight


def _whole(parameters: list[Any], zero_stage: int) -> Any:
    """Within it every rank sees these parameters whole."""
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def gathered_adapters(lm: nn.Module, *, zero_stage: int) -> Any:
    """A context in which every rank sees all adapter weights whole."""
    return _whole([p for n, p in lm.named_parameters() if "lora_" in n], zero_stage)


def save_model_folder(lm: Any, weights: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder: configuration and safetensors in ``dtype``. Called on one rank."""
    state = {name: weight.to("cpu", dtype, copy=True).contiguous() for name, weight in weights}
    _write_folder(state, lm.config, folder, dtype)
    if getattr(lm, "generation_config", None) is not None:
        # As it was read: `save_pretrained` would refuse some that models are published with, after all the training.
        lm.generation_config.to_json_file(folder / "generation_config.json")


def _write_folder(state: dict[str, Tensor], config: Any, folder: Path, dtype: torch.dtype) -> None:
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, folder)
    before, config.dtype = config.dtype, dtype
    config.save_pretrained(folder)
    config.dtype = before


def save_reward_folder(
    model: ScalarModel,
    folder: Path | None,
    dtype: torch.dtype,
    *,
    zero_stage: int,
    path: str,
    mean: float,
    deviation: float,
    padding: Padding | None = None,
) -> None:
    """Write a reward model as a Hugging Face sequence-classification folder whose scores are (score - mean) / deviation.

    The head takes both in: its weight is divided, its bias (b - mean) / deviation; where the family's head has no bias, that
    number stands in the configuration as ``rayrlhf_score`` and `load_reward_model` adds it.

    Args:
        model: backbone (with or without adapters) and head.
        folder: where to; None: this rank writes nothing, and takes part in the gathering.
        dtype: of the backbone's weights. The head stays in float32: what it reads are small differences.
        path: what the model was made from, for messages.
        mean: taken off each score.
        deviation: what each score is divided by, > 0.
        padding: what stands in the configuration as ``pad_token_id``, without which transformers takes no batch; what is said
            of it stands there as ``rayrlhf_padding``. None: the configuration's own stays.

    Raises:
        ValueError: for a deviation that isn't above 0.
    """
    if not deviation > 0:
        raise ValueError(f"a deviation of {deviation}: it must be above 0")
    made, prefix, head_name, has_bias = scorer_class(model.backbone.config, path)
    state = {}
    for name, weight in named_weights(model.backbone, zero_stage=zero_stage):
        if folder is not None:
            state[f"{prefix}.{name}"] = weight.to("cpu", dtype, copy=True).contiguous()
    with _whole(list(model.head.parameters()), zero_stage), torch.no_grad():
        weight = model.head.weight.detach().cpu().double()
        bias = 0.0 if model.head.bias is None else float(model.head.bias)
    if folder is None:
        return
    shift = (bias - mean) / deviation
    state[f"{head_name}.weight"] = (weight / deviation).float()
    config = copy.deepcopy(model.backbone.config)
    config.num_labels, config.architectures = 1, [made.__name__]
    if padding is not None:
        config.get_text_config().pad_token_id = padding.id
        setattr(config, PADDING_SAID, padding.said)
    if has_bias:
        state[f"{head_name}.bias"] = torch.tensor([shift], dtype=torch.float32)
        setattr(config, SCORE_SHIFT, None)
    else:
        setattr(config, SCORE_SHIFT, {"shift": shift})
    _write_folder(state, config, folder, dtype)
