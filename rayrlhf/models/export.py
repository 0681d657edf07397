"""A trained model's weights under their Hugging Face names, with adapters merged, whatever ZeRO stage holds them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.errors import RunFailed
from rayrlhf.models.heads import ScalarModel
from rayrlhf.models.loading import SCORE_SHIFT, scorer_class
from rayrlhf.models.parallel import whole_parameter, whole_shape
from rayrlhf.models.tokenizer import Padding

__all__ = [
    "adapter_layout",
    "gathered_adapters",
    "named_adapters",
    "named_weights",
    "save_model_folder",
    "save_reward_folder",
    "weight_layout",
]

PADDING_SAID = "rayrlhf_padding"
"""Key of a reward model's configuration: why its padding token isn't the tokenizer's."""


def named_weights(
    lm: nn.Module, *, zero_stage: int, group_bytes: int = 2**28, merged: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Weights one by one, as a checkpoint that `save_pretrained` writes names them; a tied weight comes once.

    Where transformers holds a parameter in another form than checkpoints do (the experts of a mixture as one tensor), the
    checkpoint's tensors come one after the other. With LoRA, W + scale * B A stands in place of W (Hu et al. 2021, eq. 3).
    Under ZeRO-3 the parameters are gathered in groups of about ``group_bytes``; all ranks must go through the whole
    iterator together.

    Args:
        merged: False gives the weights without their adapters.

    Yields:
        (name, tensor); the tensor is only valid until the next one is asked for.
    """
    form = _form(lm)
    for group in _groups(_entries(lm), group_bytes):
        adapters = [p for _, layer, _ in group if layer is not None for p in _adapters_of(layer)] if merged else []
        with _whole([p for _, _, p in group] + adapters, zero_stage), torch.no_grad():
            for name, layer, parameter in group:
                weight = whole_parameter(parameter)
                if layer is not None and merged:
                    for adapter in layer.active_adapters:
                        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
                yield from form(name, weight)


def weight_layout(lm: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, type) of what `named_weights` yields, in its order; nothing is gathered, and no rank is waited for.

    Raises:
        RunFailed: where the checkpoint's tensors can't be made of one parameter at a time.
    """
    form = _form(lm)
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    stand_ins = {name: torch.empty(_full_shape(p), dtype=p.dtype, device="meta") for name, _, p in _entries(lm)}
    for name, stand_in in stand_ins.items():
        found += [(n, tuple(t.shape), t.dtype) for n, t in form(name, stand_in)]
    apart = Counter((n, shape) for n, shape, _ in found)
    together = Counter((n, tuple(t.shape)) for n, t in _checkpoint_form(lm, stand_ins).items())
    if apart != together:
        odd = sorted({n for n, _ in (apart - together) + (together - apart)})
        raise RunFailed(
            f"{type(lm).__name__}: checkpoints of this model hold tensors that are made of several of its parameters "
            f"({', '.join(odd[:4])}); such weights can't be exported"
        )
    return found


def _checkpoint_form(lm: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and tensors as `save_pretrained` writes them, from the model's own."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(lm, state)


def _form(lm: nn.Module) -> Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]:
    """How one parameter stands in a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    model: Any = lm
    if not getattr(model, "_weight_conversions", None) and not get_model_conversion_mapping(model, add_legacy=False):
        return lambda name, weight: [(name, weight)]
    return lambda name, weight: _checkpoint_form(model, {name: weight}).items()


_Entry = tuple[str, Any, Any]
"""Name, LoRA layer or None, parameter."""


def _entries(lm: nn.Module) -> Iterator[_Entry]:
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


def _adapters_of(layer: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in layer.named_parameters() if "lora_" in n]


def _groups(entries: Iterable[_Entry], group_bytes: int) -> Iterator[list[_Entry]]:
    """Neighbouring entries whose weights take up about so many bytes together."""
    group: list[_Entry] = []
    size = 0
    for entry in entries:
        group.append(entry)
        size += torch.Size(_full_shape(entry[2])).numel() * entry[2].element_size()
        if size >= group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _full_shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also where ZeRO-3 or tensor parallelism leaves a share of it here."""
    return tuple(getattr(parameter, "ds_shape", whole_shape(parameter)))


def _whole(parameters: list[Any], zero_stage: int) -> Any:
    """Within it every rank sees these parameters whole."""
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def gathered_adapters(lm: nn.Module, *, zero_stage: int) -> Any:
    """A context in which every rank sees all adapter weights whole."""
    return _whole([p for n, p in lm.named_parameters() if "lora_" in n], zero_stage)


def adapter_layout(lm: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, type) of what `named_adapters` yields, in its order; nothing is gathered."""
    return [(name, _full_shape(p), p.dtype) for name, _, p in _adapter_entries(lm)]


def named_adapters(lm: nn.Module, *, zero_stage: int, group_bytes: int = 2**28) -> Iterator[tuple[str, Tensor]]:
    """The adapters' tensors under the names that `peft.PeftModel.save_pretrained` gives them; as `named_weights`."""
    for group in _groups(_adapter_entries(lm), group_bytes):
        with _whole([p for _, _, p in group], zero_stage):
            for name, _, parameter in group:
                yield name, parameter.detach()


def _adapter_entries(lm: nn.Module) -> Iterator[_Entry]:
    for name, parameter in lm.named_parameters():
        if "lora_" in name:
            yield f"base_model.model.{name.replace('.default', '')}", None, parameter


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
