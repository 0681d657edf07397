"""LoRA adapters in a model (Hu et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch

from rayrlhf.config.trainers import LoraConfig
from rayrlhf.errors import InputRefused

__all__ = ["add_lora"]


def add_lora(lm: Any, lora: LoraConfig, seed: int) -> Any:
    """Put adapters into a model and freeze the rest; returns the peft model around it.

    A: Kaiming-uniform from ``seed``, B: 0 (Hu et al. 2021, section 4.1), so that nothing changes before the first step.

    Raises:
        InputRefused: where the model has no such modules, or one of them shares its weight with another module.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    _refuse_unknown_modules(lm, lora)
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a fraction works as well
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(lm, settings)
        except ValueError as error:
            raise InputRefused(
                f"lora.target_modules {lora.target_modules}: {str(error).strip().splitlines()[0]}"
            ) from error
    _refuse_tied(lm)
    return adapted


def _refuse_unknown_modules(lm: Any, lora: LoraConfig) -> None:
    """peft takes a name that fits nothing for one that is meant for other models, as long as another one fits."""
    if lora.target_modules == "all-linear":
        return
    there = [name for name, _ in lm.named_modules()]
    unknown = [t for t in lora.target_modules if not any(n == t or n.endswith(f".{t}") for n in there)]
    if unknown:
        linear = {name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, torch.nn.Linear)}
        raise InputRefused(
            f"lora.target_modules: found {', '.join(unknown)}, which the model doesn't have; its linear layers are"
            f" {', '.join(sorted(linear))}"
        )


def _refuse_tied(lm: Any) -> None:
    """An adapter of one of two modules with the same weight: no merged weight could stand for both."""
    names: dict[int, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and any(".base_layer." in name for name in shared):
            both = " and ".join(name.replace(".base_layer", "") for name in shared)
            raise InputRefused(f"lora.target_modules: {both} are one tied weight, which can't have an adapter")
