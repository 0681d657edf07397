"""Attention of variable lengths: samples of a packed row are told apart, and each is attended to as if it stood alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models import varlen
from rayrlhf.models.heads import PolicyModel, ScalarModel, hidden_states
from rayrlhf.models.layout import micro_batches, pair_micro_batches
from rayrlhf.models.loading import load_causal_lm, prompt_sharing
from rayrlhf.models.packing import packs
from rayrlhf.models.varlen import bounds_of, varlen_attention
from tests.models import plain
from tests.models.making import LENGTHS, ragged_tokens
from tests.models.pairs import pair_batch
from tests.models.test_parallel_sequence import FAMILIES, WINDOW, save

VARLEN = ModelConfig(dtype="float32", attention="varlen")
SDPA = ModelConfig(dtype="float32")


def written_out(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, window: int) -> Tensor:
    """Token by token: softmax over the tokens of its sample that stand before it, at most ``window``, itself included."""
    output, start = torch.zeros_like(query), 0
    groups = query.shape[1] // key.shape[1]
    for length in lengths:
        for i in range(length):
            seen = range(start + max(0, i - window + 1), start + i + 1)
            for head in range(query.shape[1]):
                scores = torch.stack([query[start + i, head] @ key[j, head // groups] for j in seen]) * scale
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                output[start + i, head] = sum(w * value[j, head // groups] for w, j in zip(weights, seen, strict=True))
        start += length
    return output


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_against_the_definition(window: int | None) -> None:
    lengths = [5, 1, 7, 2]
    torch.manual_seed(0)
    parts = [torch.randn(15, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 5, 6, 13, 15], dtype=torch.int32)
    found = varlen_attention(*parts, bounds, 7, scale=0.3, window=window)  # type: ignore[arg-type]
    expected = written_out(*parts, lengths, 0.3, 1000 if window is None else window)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    factors = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((o * factors).sum(), parts) for o in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_kernel_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernel is called with; in its place here stands the definition, which reads those arguments alone."""
    import torch.nn.attention.varlen as torch_varlen

    def kernel(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
               scale: float, window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:  # fmt: skip
        lengths = cu_seq_q.diff().tolist()
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == max(lengths)
        left, right = window_size
        assert right == 0 and (enable_gqa or query.shape[1] == key.shape[1])
        # The kernel's window counts the tokens on the left, without the token itself; -1: all.
        return written_out(query.double(), key.double(), value.double(), lengths, scale, 1000 if left < 0 else left + 1)

    def kernel_of_2_11(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
                       max_k: int, *, scale: float, window_size: tuple[int, int]) -> Tensor:  # fmt: skip
        return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    torch.manual_seed(0)
    q, k, v = (torch.randn(10, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 6, 10], dtype=torch.int32)
    for stand_in in (kernel, kernel_of_2_11):
        monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in)
        for window in (None, 1, 4):
            found = varlen._by_kernel(q, k, v, bounds, 6, 0.3, window)
            expected = varlen_attention(q.double(), k.double(), v.double(), bounds, 6, scale=0.3, window=window)
            torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"bfloat16 on a GPU, not in torch\.float32"):
        varlen._by_kernel(q.float(), k, v, bounds, 6, 0.3, None)


def test_our_kernel_call_fits_the_installed_torch() -> None:
    """The names of the arguments that the test above takes for granted."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind(*range(7), scale=0.3, window_size=(-1, 0), enable_gqa=True)


def test_where_samples_lie() -> None:
    tokens, masks = ragged_tokens()
    batch = Batch.from_samples({"tokens": tokens, "response_mask": masks})
    for micro in micro_batches(batch, 40, True):
        assert micro.bounds is not None and micro.position_ids is not None and micro.bounds.dtype == torch.int32
        lengths = [LENGTHS[i] for i in micro.samples.tolist()]
        assert micro.bounds.diff().tolist() == lengths and micro.bounds[0] == 0 and micro.longest == max(lengths)
        bounds, longest = bounds_of(micro.position_ids)
        assert torch.equal(bounds, micro.bounds) and longest == micro.longest
    assert all(micro.bounds is None for micro in micro_batches(batch, 40, False))
    rows = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    assert bounds_of(rows)[0].tolist() == [0, 3, 4, 5, 8] and bounds_of(rows)[1] == 3


def outcome(model: PolicyModel, batch: Batch, budget: int, packing: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found, factors = torch.zeros(batch.num_tokens), torch.sin(torch.arange(batch.num_tokens).float())
    for micro in micro_batches(batch, budget, packing):
        logprobs = model(micro, 1.0)[0]
        found[micro.where] = logprobs.detach()
        (factors[micro.where] * logprobs).sum().backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_models(kind: str, tmp_path: Path) -> None:
    """Packed and padded, against torch's attention on one sample after the other; windows shorter than the samples."""
    path, (tokens, masks) = str(save(tmp_path, kind=kind, **FAMILIES[kind])), ragged_tokens()
    assert max(LENGTHS) > 2 * WINDOW
    batch = Batch.from_samples({"tokens": tokens, "response_mask": masks})
    expected = outcome(PolicyModel(load_causal_lm(path, SDPA, dtype=torch.float32), 1000), batch, 1, False)
    model = PolicyModel(load_causal_lm(path, VARLEN, dtype=torch.float32), 1000)
    for budget, packing in ((168, False), (87, True), (30, True)):
        found, gradients = outcome(model, batch, budget, packing)
        torch.testing.assert_close(found, expected[0], rtol=0, atol=5e-6)
        assert plain.relative_difference(gradients, expected[1]) < 1e-5


@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2", "sdpa"])
def test_what_a_model_is_told_of_its_rows(attention: str) -> None:
    """Under the names of transformers; of padded rows only torch's attention needs to know."""
    told: dict[str, Any] = {}

    def backbone(input_ids: Tensor, **how: Any) -> Any:
        told.clear()
        told.update({name: value for name, value in how.items() if "_length" in name or "cu_" in name})
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 4))

    backbone.config = SimpleNamespace(_attn_implementation=attention)  # type: ignore[attr-defined]
    tokens, masks = ragged_tokens()
    batch = Batch.from_samples({"tokens": tokens, "response_mask": masks})
    for packing, bounds, longest in ((True, [0, 21, 38], 21), (False, [0, 21, 42], 21)):
        micro = micro_batches(batch, 42, packing)[0]
        hidden_states(backbone, micro, micro.predict)
        if attention == "sdpa" or (attention == "flash_attention_2" and not packing):
            assert not told
            continue
        assert sorted(told) == ["cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q"]
        assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == bounds
        assert told["max_length_q"] == told["max_length_k"] == longest


def test_it_packs_by_default_and_shares_no_prompts(tmp_path: Path) -> None:
    assert packs(VARLEN) and packs(ModelConfig(attention="flash_attention_2")) and not packs(SDPA)
    assert not packs(ModelConfig(attention="varlen", packing=False))
    padded = ModelConfig(dtype="float32", attention="varlen", packing=False)
    lm = load_causal_lm(str(save(tmp_path)), padded, dtype=torch.float32)
    assert prompt_sharing(lm.base_model, padded) is None and prompt_sharing(lm.base_model, VARLEN) is None
    model, values = ScalarModel(lm.base_model, torch.nn.Linear(64, 1)), []
    for packing in (False, True):
        (micro,) = pair_micro_batches(pair_batch(), 1000, packing=packing)
        values.append(model(micro)[1][torch.argsort(micro.samples)].detach())
    torch.testing.assert_close(*values, rtol=0, atol=5e-6)


def test_a_model_that_hands_nothing_down_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a row would be one sample."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    path, attention = str(save(tmp_path)), LlamaAttention.forward

    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any, **how: Any) -> Any:
        return attention(self, hidden_states=hidden_states, position_embeddings=position_embeddings)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    with pytest.raises(InputRefused, match="packing to false"):
        load_causal_lm(path, VARLEN, dtype=torch.float32)


@pytest.mark.parametrize("how", [{"softcap": 50.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.ones(1)},
                                 {"dropout": 0.1}, {"is_causal": False}])  # fmt: skip
def test_what_it_cannot_do_is_not_left_out(how: dict[str, Any]) -> None:
    parts = [torch.randn(1, 4, 3, 8) for _ in range(3)]
    module: Any = SimpleNamespace()
    varlen._attention(module, *parts, None, softcap=None, dropout=0.0)
    with pytest.raises(ValueError, match="SimpleNamespace"):
        varlen._attention(module, *parts, None, **how)
    with pytest.raises(ValueError, match="takes no mask"):
        varlen._attention(module, *parts, torch.ones(1, 1, 3, 3))


def test_a_soft_cap_is_refused_at_once(tmp_path: Path) -> None:
    path = str(save(tmp_path, kind="gemma2"))
    with pytest.raises(InputRefused, match="caps its attention logits"):
        load_causal_lm(path, VARLEN, dtype=torch.float32)
