"""Exported weights have the names, shapes and values of the checkpoint that `save_pretrained` writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.errors import RunFailed
from rayrlhf.models import export
from rayrlhf.models.export import adapter_layout, named_adapters, named_weights, save_model_folder, weight_layout

FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {}),
    "gemma2": ("Gemma2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
}


def tiny(family: str) -> Any:
    """A model of this family with random weights, norms and biases included."""
    import transformers
    from transformers import AutoModelForCausalLM

    kind, more = FAMILIES[family]
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**sizes, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("read", [False, True], ids=["made", "read"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_values_are_those_of_the_checkpoint(family: str, read: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    if read:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = [(name, weight.clone()) for name, weight in named_weights(model, zero_stage=0, group_bytes=10_000)]
    assert sorted(name for name, _ in found) == sorted(expected)
    for name, weight in found:
        assert torch.equal(weight, expected[name]), name
    assert weight_layout(model) == [(name, tuple(weight.shape), weight.dtype) for name, weight in found]
    assert ("lm_head.weight" in expected) == (family not in ("llama-tied",))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_a_mixture_that_is_written_computes_the_same(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    save_model_folder(model, named_weights(model, zero_stage=0), tmp_path, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_layout_takes_no_memory() -> None:
    with torch.device("meta"):
        model = tiny("mixtral")
    assert {name: shape for name, shape, _ in weight_layout(model)} == {
        name: tuple(weight.shape) for name, weight in named_weights(tiny("mixtral"), zero_stage=0)
    }


def test_a_checkpoint_tensor_made_of_two_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse(lm: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {re.sub("[qk]_proj", "qk_proj", name): tensor for name, tensor in state.items()}

    monkeypatch.setattr(export, "_checkpoint_form", fuse)
    monkeypatch.setattr(export, "_form", lambda lm: lambda name, weight: fuse(lm, {name: weight}).items())
    with pytest.raises(
        RunFailed,
        match=r"LlamaForCausalLM: .* made of several of its parameters \(model.layers.0.self_attn.qk_proj.weight, ",
    ):
        weight_layout(tiny("llama"))


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_adapters_have_the_names_under_which_peft_saves_them(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny(family)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    found = {name: tensor.clone() for name, tensor in named_adapters(model, zero_stage=0, group_bytes=500)}
    assert sorted(found) == sorted(expected) and len(found) == 2 * 7 * 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert adapter_layout(model) == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()]
    base = {name: tensor.clone() for name, tensor in named_weights(model, zero_stage=0, merged=False)}
    plain = dict(tiny(family).named_parameters())
    assert base.keys() == plain.keys() and all(torch.equal(base[name], plain[name]) for name in plain)
    merged = dict(named_weights(model, zero_stage=0))
    change = merged["model.layers.1.mlp.up_proj.weight"] - base["model.layers.1.mlp.up_proj.weight"]
    a, b = (found[f"base_model.model.model.layers.1.mlp.up_proj.lora_{m}.weight"] for m in "AB")
    assert float((change - 2.0 * b @ a).detach().abs().max()) < 1e-6, "alpha 8, rank 4"
