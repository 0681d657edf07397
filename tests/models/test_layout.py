"""Micro-batches: nothing lost, nothing seen that mustn't be, padded and packed the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.batch import Batch, BatchError
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.heads import PolicyModel, ScalarModel
from rayrlhf.models.layout import ModelInput, micro_batches, plan_micro_batches
from rayrlhf.models.loading import load_causal_lm
from tests.models.making import LENGTHS, ragged_tokens


def batch_of(tokens: list[Tensor], masks: list[Tensor]) -> Batch:
    return Batch.from_samples({"tokens": tokens, "response_mask": masks})


def policy(path: Path, dtype: str = "float32") -> PolicyModel:
    lm = load_causal_lm(str(path), ModelConfig(dtype="float32"), dtype=getattr(torch, dtype))
    return PolicyModel(lm, chunk_tokens=1000)


def test_every_sample_once_within_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths = torch.tensor([rng.randint(1, 40) for _ in range(rng.randint(0, 12))], dtype=torch.int64)
        budget, packing = rng.randint(1, 120), rng.random() < 0.5
        plan = plan_micro_batches(lengths, budget, packing)
        assert sorted(i for part in plan for i in part) == list(range(len(lengths)))
        for part in plan:
            inside = [int(lengths[i]) for i in part]
            assert len(part) == 1 or (sum(inside) if packing else max(inside) * len(inside)) <= budget


@pytest.mark.parametrize("packing", [False, True])
def test_positions_name_the_tokens_that_they_stand_for(packing: bool) -> None:
    tokens, masks = ragged_tokens()
    batch = batch_of(tokens, masks)
    seen, samples = [], []
    for micro in micro_batches(batch, 40, packing):
        ids = micro.input_ids.flatten()
        assert torch.equal(ids[micro.predict + 1], micro.targets), "each hidden state is the one before its target"
        assert torch.equal(batch["tokens"][micro.where], micro.targets)
        assert ids[micro.last].tolist() == [int(tokens[i][-1]) for i in micro.samples]
        seen += micro.where.tolist()
        samples += micro.samples.tolist()
    assert sorted(seen) == torch.nonzero(batch["response_mask"]).flatten().tolist()
    assert sorted(samples) == list(range(len(LENGTHS)))


def test_what_has_no_prediction_is_refused() -> None:
    with pytest.raises(BatchError, match="first token"):
        micro_batches(batch_of([torch.arange(3, 6)], [torch.ones(3, dtype=torch.bool)]), 10, False)
    with pytest.raises(BatchError, match=r"\[1\] have no tokens"):
        nothing = torch.zeros(0)
        micro_batches(batch_of([torch.arange(2), nothing.long()], [torch.zeros(2).bool(), nothing.bool()]), 10, False)


def run(model: PolicyModel, batch: Batch, budget: int, packing: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probabilities [T], a loss that weighs each token differently, and its gradients."""
    model.zero_grad()
    found, loss = torch.zeros(batch.num_tokens), torch.zeros(())
    factors = torch.sin(torch.arange(batch.num_tokens).float())
    for micro in micro_batches(batch, budget, packing):
        logprobs, entropy = model(micro, 0.7, True)
        part = (factors[micro.where] * (logprobs + 0.1 * entropy)).sum() / batch.num_tokens
        part.backward()
        found[micro.where] = logprobs.detach()
        loss = loss + part.detach()
    return found, loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_packed_or_padded_much_or_little(name: str, request: pytest.FixtureRequest) -> None:
    model = policy(request.getfixturevalue(name))
    batch = batch_of(*ragged_tokens())
    one_each = run(model, batch, 1, False)
    assert len(micro_batches(batch, 1, False)) == len(LENGTHS), "no padding at all"
    for budget, packing in ((168, False), (40, False), (87, True), (30, True)):
        logprobs, loss, gradients = run(model, batch, budget, packing)
        torch.testing.assert_close(logprobs, one_each[0], rtol=0, atol=5e-6)
        torch.testing.assert_close(loss, one_each[1], rtol=0, atol=1e-6)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, one_each[2][parameter], rtol=1e-5, atol=1e-6)


def test_whatever_stands_in_the_padding(llama: Path) -> None:
    model = policy(llama)
    (micro,) = micro_batches(batch_of(*ragged_tokens()), 168, False)
    other = micro.input_ids.clone()
    for row, sample in enumerate(micro.samples.tolist()):
        other[row, LENGTHS[sample] :] = torch.randint(0, 64, (micro.input_ids.shape[1] - LENGTHS[sample],))
    assert not torch.equal(other, micro.input_ids)
    as_it_is, changed = (ModelInput(**{**vars(micro), "grid": None, "input_ids": i}) for i in (micro.input_ids, other))
    with torch.no_grad():
        assert torch.equal(model(as_it_is, 1.0)[0], model(changed, 1.0)[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_crosses_a_boundary_of_a_packed_row(llama: Path, attention: str) -> None:
    settings = ModelConfig(dtype="float32", attention=attention, packing=True)
    model = PolicyModel(load_causal_lm(str(llama), settings, dtype=torch.float32), 1000)
    scalar = ScalarModel(model.lm.base_model, torch.nn.Linear(64, 1))
    tokens, masks = ragged_tokens()
    first = micro_batches(batch_of(tokens, masks), 87, True)[0]
    disturbed = [t.clone() for t in tokens]
    disturbed[5] = disturbed[5] % 60 + 3  # the longest, which stands at the beginning of the row
    second = micro_batches(batch_of(disturbed, masks), 87, True)[0]
    inside = (first.where >= sum(LENGTHS[:5])) & (first.where < sum(LENGTHS[:6]))
    with torch.no_grad():
        before, after = model(first, 1.0)[0], model(second, 1.0)[0]
        values = [scalar(m)[0] for m in (first, second)]
        ends = [scalar(m)[1] for m in (first, second)]
    assert float((before - after)[inside].abs().min()) > 0 and float((before - after)[inside].abs().max()) > 0.1
    for a, b in (
        (before[~inside], after[~inside]),
        (values[0][~inside], values[1][~inside]),
        (ends[0][1:], ends[1][1:]),
    ):
        assert len(a) and torch.allclose(a, b, rtol=0, atol=1e-7)


def test_a_model_that_leaks_is_not_packed(tmp_path: Path) -> None:
    """OPT makes its positions and its mask in a way of its own: in a packed row its samples see each other."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2)  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    load_causal_lm(str(tmp_path), ModelConfig(dtype="float32"), dtype=torch.float32)
    with pytest.raises(InputRefused, match="OPT.*packing to false"):
        load_causal_lm(str(tmp_path), ModelConfig(dtype="float32", packing=True), dtype=torch.float32)


def test_a_leak_is_told_from_rounding_whatever_the_size_of_the_hidden_states(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    opt = OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                                   max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2))  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                         num_attention_heads=2, max_position_embeddings=64))  # fmt: skip
    with torch.no_grad():
        opt.model.decoder.final_layer_norm.weight.fill_(0.01)
        llama.model.norm.weight.fill_(1000.0)
    for model in (opt, llama):
        model.save_pretrained(tmp_path / type(model).__name__)
    packed = ModelConfig(dtype="bfloat16", packing=True)
    with pytest.raises(InputRefused, match="OPT.*packing to false"):
        load_causal_lm(str(tmp_path / "OPTForCausalLM"), packed, dtype=torch.bfloat16)
    load_causal_lm(str(tmp_path / "LlamaForCausalLM"), packed, dtype=torch.bfloat16)


@pytest.fixture
def successor(tmp_path: Path) -> Path:
    """A model that knows one thing: token v is followed by (7 v + 3) mod 64. Its hidden state is its token, one-hot."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        for v in range(64):
            model.lm_head.weight[(7 * v + 3) % 64, v] = 4.0  # times 8: RMSNorm of a one-hot vector of width 64
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("packing", [False, True])
def test_log_probability_t_is_of_token_t_given_those_before(successor: Path, packing: bool) -> None:
    model = policy(successor)
    chains = []
    for start, length in ((5, 9), (11, 6)):
        chain = [start]
        while len(chain) < length:
            chain.append((7 * chain[-1] + 3) % 64)
        chains.append(torch.tensor(chain))
    masks = [torch.arange(len(c)) >= 2 for c in chains]
    chains[0][5] = (chains[0][5] + 1) % 64  # not the successor of token 4, nor is token 6 its successor
    batch = batch_of(chains, masks)
    found: Any = torch.full((batch.num_tokens,), float("nan"))
    for micro in micro_batches(batch, 100, packing):
        found[micro.where] = model(micro, 1.0)[0].detach()
    expected = [float("nan")] * 2 + [0.0] * 3 + [-32.0] * 2 + [0.0] * 2 + [float("nan")] * 2 + [0.0] * 4
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=5e-3, equal_nan=True)


@pytest.mark.parametrize("packing", [False, True])
def test_value_t_is_of_the_state_before_token_t(successor: Path, packing: bool) -> None:
    lm = load_causal_lm(str(successor), ModelConfig(dtype="float32"), dtype=torch.float32)
    head = torch.nn.Linear(64, 1)
    with torch.no_grad():
        head.weight.copy_(torch.arange(64.0)[None] / 8)  # reads the token's number
        head.bias.zero_()
    model = ScalarModel(lm.base_model, head)
    tokens, masks = ragged_tokens()
    batch = batch_of(tokens, masks)
    found, final = torch.zeros(batch.num_tokens), torch.zeros(len(batch))
    for micro in micro_batches(batch, 50, packing):
        values, last = model(micro)
        found[micro.where], final[micro.samples] = values.detach(), last.detach()
    before = torch.cat([torch.cat([torch.zeros(1), t[:-1].float()]) for t in tokens])
    torch.testing.assert_close(found, before * batch["response_mask"], rtol=0, atol=5e-3)
    torch.testing.assert_close(final, torch.tensor([float(t[-1]) for t in tokens]), rtol=0, atol=5e-3)
