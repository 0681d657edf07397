"""Ragged samples without padding: the same numbers as sample by sample, and no work for padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.models.cpu import longest_unpadded, with_cpu_kernels
from rayrlhf.models.heads import PolicyModel, ScalarModel
from rayrlhf.models.layout import ModelInput, PromptSharing, micro_batches, pair_micro_batches
from rayrlhf.models.loading import load_causal_lm
from rayrlhf.models.unpadded import collect, spread
from tests.models import plain
from tests.models.making import LENGTHS, ragged_tokens
from tests.models.pairs import CHOSEN, PROMPTS, REJECTED, pair_batch
from tests.models.test_loading import random_lm
from tests.models.test_pair_layout import ALWAYS, WINDOW, save_family

FLOAT32 = ModelConfig(dtype="float32")


def ragged() -> Batch:
    tokens, masks = ragged_tokens()
    return Batch.from_samples({"tokens": tokens, "response_mask": masks})


def load(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_causal_lm(str(save_family(folder / family, family)), FLOAT32, dtype=dtype)


def outcome(model: PolicyModel, batch: Batch, inputs: list[ModelInput]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities [T], and gradients of a loss that weighs each token differently."""
    model.zero_grad()
    found = torch.zeros(batch.num_tokens)
    factors = torch.sin(torch.arange(batch.num_tokens).float())
    for micro in inputs:
        logprobs = model(micro, 1.0)[0]
        found[micro.where] = logprobs.detach()
        (factors[micro.where] * logprobs).sum().backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of(model: Any, run: Callable[[], Any]) -> list[int]:
    """How many rows the first layer's product with a weight has, call by call."""
    linear = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    seen: list[int] = []
    hook = linear.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 0].numel()))
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_log_probabilities_and_gradients(family: str, checkpointing: bool, tmp_path: Path) -> None:
    lm, batch = load(tmp_path, family), ragged()
    model = PolicyModel(lm, 1000)
    alone, expected = outcome(model, batch, micro_batches(batch, 1, False))
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.train()
    for budget in (168, 40):
        inputs = micro_batches(batch, budget, False)
        assert any(micro.grid is not None for micro in inputs)
        found, gradients = outcome(model, batch, inputs)
        torch.testing.assert_close(found, alone, rtol=0, atol=3e-6)
        assert plain.relative_difference(gradients, expected) < 1e-5


def test_against_plain_forwards_in_float64(llama: Path) -> None:
    model, batch = PolicyModel(load_causal_lm(str(llama), FLOAT32, dtype=torch.float32), 1000), ragged()
    (micro,) = micro_batches(batch, 168, False)
    with torch.no_grad():
        found = model(micro, 0.7)[0].double()
    exact, expected = plain.plain_lm(llama), torch.zeros(batch.num_tokens, dtype=torch.float64)
    for start, end in batch.spans():
        with torch.no_grad():
            expected[start:end] = plain.logprobs_and_entropies(exact, batch["tokens"][start:end], 0.7)[0]
    torch.testing.assert_close(found, expected[micro.where], rtol=0, atol=5e-6)


def test_padding_costs_nothing(llama: Path) -> None:
    lm = load_causal_lm(str(llama), FLOAT32, dtype=torch.float32)
    model = PolicyModel(lm, 1000)
    (micro,) = micro_batches(ragged(), 168, False)
    assert rows_of(lm, lambda: model(micro, 1.0)) == [sum(LENGTHS)]
    assert rows_of(lm, lambda: model(replace(micro, grid=None), 1.0)) == [len(LENGTHS) * max(LENGTHS)]
    (shared,) = pair_micro_batches(pair_batch(), 1000, sharing=ALWAYS)
    assert rows_of(lm, lambda: model(shared, 1.0)) == [sum(PROMPTS) + sum(CHOSEN) + sum(REJECTED)]


def test_equal_lengths_need_no_grid(llama: Path) -> None:
    tokens = [torch.arange(3, 13) for _ in range(4)]
    masks = [torch.arange(10) >= 4 for _ in range(4)]
    (micro,) = micro_batches(Batch.from_samples({"tokens": tokens, "response_mask": masks}), 100, False)
    assert micro.grid is None


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_longer_than_a_window_is_left_to_the_model(family: str, tmp_path: Path) -> None:
    lm, batch = load(tmp_path, family), ragged()
    assert longest_unpadded(lm.base_model) == WINDOW
    model = PolicyModel(lm, 1000)
    alone, expected = outcome(model, batch, micro_batches(batch, 1, False))
    short = torch.tensor([i for i, length in enumerate(LENGTHS) if length <= WINDOW])
    long = torch.tensor([i for i, length in enumerate(LENGTHS) if length > WINDOW])
    inputs = [micro_batches(batch, 168, False, samples=part)[0] for part in (short, long)]
    assert rows_of(lm, lambda: model(inputs[0], 1.0)) == [sum(LENGTHS[i] for i in short)]
    assert rows_of(lm, lambda: model(inputs[1], 1.0)) == [len(long) * max(LENGTHS)]
    found, gradients = outcome(model, batch, inputs)
    torch.testing.assert_close(found, alone, rtol=0, atol=3e-6)
    assert plain.relative_difference(gradients, expected) < 1e-5


@pytest.mark.parametrize("what", ["mixes tokens", "loses the grid"])
def test_a_model_that_would_be_wrong_keeps_its_padding(what: str) -> None:
    """As a recurrent model would be, or one that doesn't hand arguments down to its attention."""
    model = random_lm("Llama")
    model.set_attn_implementation("sdpa")
    layer = model.model.layers[1]
    mlp, attention = layer.mlp.forward, layer.self_attn.forward
    if what == "mixes tokens":  # each with the one before it, in the row
        layer.mlp.forward = lambda x: mlp(x) + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    else:
        layer.self_attn.forward = lambda *args, grid=None, **how: attention(*args, **how)
    assert longest_unpadded(with_cpu_kernels(model).base_model) == 0
    batch = ragged()
    alone, _ = outcome(PolicyModel(model, 1000), batch, micro_batches(batch, 1, False))
    found, _ = outcome(PolicyModel(model, 1000), batch, micro_batches(batch, 168, False))
    torch.testing.assert_close(found, alone, rtol=0, atol=3e-6)


def test_no_sample_sees_another(llama: Path) -> None:
    model = PolicyModel(load_causal_lm(str(llama), FLOAT32, dtype=torch.float32), 1000)
    batch = ragged()
    tokens = batch["tokens"].clone()
    begin, end = batch.offsets[5:7].tolist()
    tokens[begin:end] = tokens[begin:end] % 60 + 3
    with torch.no_grad():
        before, after = (outcome_without_gradient(model, b) for b in (batch, batch.with_columns({"tokens": tokens})))
    inside = torch.zeros(batch.num_tokens, dtype=torch.bool)
    inside[begin:end] = True
    assert torch.equal(before[~inside], after[~inside])
    assert float((before - after)[inside].abs().max()) > 0.1


def outcome_without_gradient(model: PolicyModel, batch: Batch) -> Tensor:
    found = torch.zeros(batch.num_tokens)
    for micro in micro_batches(batch, 168, False):
        found[micro.where] = model(micro, 1.0)[0]
    return found


def test_bfloat16_is_as_near_to_float32_as_with_padding(llama: Path) -> None:
    narrow, wide = (
        PolicyModel(load_causal_lm(str(llama), FLOAT32, dtype=dtype), 1000) for dtype in (torch.bfloat16, torch.float32)
    )
    (micro,) = micro_batches(ragged(), 168, False)
    with torch.no_grad():
        expected = wide(micro, 1.0)[0]
        error = float((narrow(micro, 1.0)[0] - expected).norm())
        padded = float((narrow(replace(micro, grid=None), 1.0)[0] - expected).norm())
    assert error < 1.5 * padded + 1e-3


@pytest.mark.parametrize("sharing", [None, PromptSharing(8, 2**20)])
def test_values_before_each_token_and_at_the_end(llama: Path, sharing: PromptSharing | None) -> None:
    lm = load_causal_lm(str(llama), FLOAT32, dtype=torch.float32)
    model = ScalarModel(lm.base_model, torch.nn.Linear(64, 1))
    for micro in pair_micro_batches(pair_batch(), 1000, sharing=sharing):
        assert micro.grid is not None
        with torch.no_grad():
            for found, expected in zip(model(micro), model(replace(micro, grid=None)), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


def test_spreading_and_collecting_against_plain_indexing() -> None:
    """Their gradients, of numbers that differ in every cell which is read."""
    (micro,) = pair_micro_batches(pair_batch(), 1000, sharing=ALWAYS)
    grid = micro.grid
    assert grid is not None
    tokens = grid.input_ids.shape[1]
    torch.manual_seed(0)
    values = torch.randn(1, 2, tokens, 3, dtype=torch.float64, requires_grad=True)
    cells = spread(values, grid)
    real = torch.zeros(len(grid.token_in), dtype=torch.bool)
    real[grid.cell_of] = True
    real[grid.second_cell] = True
    assert int(real.sum()) == sum(2 * p + c + r for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True))
    factors = torch.randn(len(grid.token_in), 2, 3, dtype=torch.float64) * real[:, None, None]
    (cells.transpose(1, 2).reshape(-1, 2, 3) * factors).sum().backward()
    expected = torch.zeros(tokens, 2, 3, dtype=torch.float64)
    for cell, token in enumerate(grid.token_in.tolist()):
        expected[token] += factors[cell]
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0].transpose(0, 1), expected)

    there = torch.randn(len(grid.token_in) // grid.width, grid.width, 2, 3, dtype=torch.float64, requires_grad=True)
    back = collect(there, grid)[0]
    assert torch.equal(back, there.detach().reshape(-1, 2, 3)[grid.cell_of])
    weights = torch.randn_like(back)
    (back * weights).sum().backward()
    assert there.grad is not None
    torch.testing.assert_close(there.grad.reshape(-1, 2, 3)[grid.cell_of], weights)
    assert int((there.grad.reshape(-1, 6).abs().sum(1) > 0).sum()) == tokens
