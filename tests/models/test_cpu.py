"""Kernels for the CPU against float64, and where they are used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayrlhf.config.trainers import ModelConfig
from rayrlhf.models.cpu import OneDnnLinear, has_onednn, with_cpu_kernels
from rayrlhf.models.loading import load_causal_lm, without_dropout
from tests.models.test_loading import random_lm


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 24)])
def test_linear_layer_and_its_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    ours, exact = OneDnnLinear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(shape, requires_grad=True)
    x_exact = x.detach().double().requires_grad_()
    seen, expected = ours(x), exact(x_exact)
    weights = torch.randn_like(expected)
    (seen * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=1e-6)
    assert x.grad is not None and x_exact.grad is not None
    torch.testing.assert_close(x.grad.double(), x_exact.grad, rtol=1e-5, atol=1e-5)
    for own, other in zip(ours.parameters(), exact.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layer_takes_what_torchs_takes(rows: int, dtype: torch.dtype) -> None:
    layer = OneDnnLinear(4, 2).to(dtype)
    plain = nn.Linear(4, 2).to(dtype)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(rows, 4, dtype=dtype)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    assert layer(torch.randn(4, dtype=dtype)).shape == (2,)


@pytest.mark.parametrize(("family", "keys"), [("Llama", {}), ("Gemma2", {"sliding_window": 4}), ("Qwen3", {})])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bfloat16_model_is_as_near_to_float64_as_torchs_own(family: str, keys: dict, packed: bool) -> None:
    plain = random_lm(family, **keys)
    plain.set_attn_implementation("sdpa")
    exact = random_lm(family, **keys).double()
    ids = torch.arange(1, 25)[None] % 64
    positions = (torch.arange(12).repeat(2) if packed else torch.arange(24))[None]
    how = {"input_ids": ids, "position_ids": positions, "use_cache": False}

    def outcome(model) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logits = model(**how).logits.double()
        torch.log_softmax(logits, -1)[..., 3].sum().backward()
        return logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.double()

    expected = outcome(exact)
    theirs = outcome(plain.bfloat16())
    ours = outcome(with_cpu_kernels(plain))
    for own, other, right in zip(ours, theirs, expected, strict=True):
        assert not torch.equal(own, other)  # it's our attention that ran
        assert (own - right).norm() <= 2 * (other - right).norm()


def test_long_sequences_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.models.cpu.SHORT", 4)
    model = random_lm("Llama")
    model.set_attn_implementation("sdpa")
    ids = torch.arange(1, 9)[None]
    model = model.bfloat16()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(with_cpu_kernels(model)(ids).logits, expected)


def test_loaded_models_have_them(tmp_path) -> None:
    model = random_lm("Llama")
    model.save_pretrained(tmp_path)
    lm = load_causal_lm(str(tmp_path), ModelConfig(dtype="float32"), dtype=torch.float32)
    assert lm.config._attn_implementation == "sdpa_for_cpu"
    eager = load_causal_lm(str(tmp_path), ModelConfig(dtype="float32", attention="eager"), dtype=torch.float32)
    assert eager.config._attn_implementation == "eager"
    assert isinstance(lm.lm_head, OneDnnLinear) is has_onednn()
    assert without_dropout(lm) is lm
