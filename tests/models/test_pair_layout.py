"""Two responses with one prompt: computed once or twice, log-probabilities, scores and gradients are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.batch import Batch, BatchError
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.models.heads import PolicyModel, ScalarModel
from rayrlhf.models.layout import PromptSharing, micro_batches, neighbours_together, pair_micro_batches
from rayrlhf.models.loading import load_causal_lm, prompt_sharing
from tests.models import plain
from tests.models.pairs import CHOSEN, PROMPTS, REJECTED, pair_batch

ALWAYS = PromptSharing(longest=1000, hidden_size=2**20)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
WINDOW = 9
"""Some samples are longer, some not."""


def save_family(folder: Path, family: str) -> Path:
    import transformers as hf

    configs = {
        "llama": lambda: hf.LlamaConfig(**SIZES),
        "qwen2": lambda: hf.Qwen2Config(**SIZES),
        "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=WINDOW),
        "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=32, sliding_window=WINDOW, attn_logit_softcapping=None),
        "gpt2": lambda: hf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2),
        "bloom": lambda: hf.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=2),
        "mamba": lambda: hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2),
    }
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(configs[family]()).save_pretrained(folder)
    return folder


def computed(model: PolicyModel, batch: Batch, **how: Any) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
    """Log-probabilities [T], gradients of a loss that weighs each token differently, and the micro-batches."""
    model.zero_grad()
    found, loss = torch.zeros(batch.num_tokens), torch.zeros(())
    factors = torch.sin(torch.arange(batch.num_tokens).float())
    inputs = pair_micro_batches(batch, **how)
    for micro in inputs:
        logprobs = model(micro, 1.0)[0]
        found[micro.where] = logprobs.detach()
        loss = loss + (factors[micro.where] * logprobs).sum() / batch.num_tokens
    loss.backward()
    return found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, inputs


@pytest.mark.parametrize("attention", ["unpadded", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_shared_prompts_change_nothing(
    family: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "sdpa":  # with masks, as on a GPU
        monkeypatch.setattr("rayrlhf.models.heads.longest_unpadded", lambda backbone: 0)
    kernel = "eager" if attention == "eager" else "sdpa"
    settings = ModelConfig(dtype="float32", attention=kernel)  # type: ignore[arg-type]
    model = PolicyModel(load_causal_lm(str(save_family(tmp_path, family)), settings, dtype=torch.float32), 1000)
    sharing = prompt_sharing(model.lm.base_model, settings)
    assert sharing is not None
    sharing = PromptSharing(sharing.longest, 2**20)  # also where it doesn't pay
    batch = pair_batch()
    alone = torch.zeros(batch.num_tokens)
    for micro in micro_batches(batch, 1, False):
        alone[micro.where] = model(micro, 1.0)[0].detach()
    apart, gradient, rows = computed(model, batch, budget=1000)
    assert all(micro.attention_mask is None for micro in rows)
    torch.testing.assert_close(apart, alone, rtol=0, atol=2e-6)
    for budget in (1000, 40, 1):
        together, of_shared, rows = computed(model, batch, budget=budget, sharing=sharing)
        masked = sum(len(micro.samples) // 2 for micro in rows if micro.attention_mask is not None)
        fits = [p + max(c, r) <= sharing.longest for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
        assert masked == sum(fits) and (masked < 6) == (family in ("mistral", "gemma2"))
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
        assert plain.relative_difference(of_shared, gradient) < 1e-5


def test_bfloat16_on_our_kernels(llama: Path) -> None:
    settings = ModelConfig()
    lm = load_causal_lm(str(llama), settings, dtype=torch.bfloat16)
    assert lm.config._attn_implementation == "sdpa_for_cpu"
    assert prompt_sharing(lm.base_model, settings) is not None
    model, batch = PolicyModel(lm, 1000), pair_batch()
    apart, _, _ = computed(model, batch, budget=1000)
    together, _, _ = computed(model, batch, budget=1000, sharing=ALWAYS)
    exact = PolicyModel(load_causal_lm(str(llama), settings, dtype=torch.float32), 1000)
    expected, _, _ = computed(exact, batch, budget=1000)
    assert float((together - expected).abs().max()) < 2 * float((apart - expected).abs().max()) + 1e-3


def test_where_sharing_would_be_wrong(tmp_path: Path, llama: Path) -> None:
    """A recurrent model feeds one response to the other, a model with distances in its attention has them wrong."""
    eager = ModelConfig(attention="eager")
    for family, shares in (("mamba", False), ("bloom", False), ("gpt2", True)):
        lm = load_causal_lm(str(save_family(tmp_path / family, family)), eager, dtype=torch.float32)
        assert (prompt_sharing(lm.base_model, eager) is not None) == shares, family
    lm = load_causal_lm(str(llama), ModelConfig(), dtype=torch.float32)
    assert prompt_sharing(lm.base_model, ModelConfig(attention="flash_attention_2")) is None
    assert prompt_sharing(lm.base_model, ModelConfig(packing=True)) is None


@pytest.mark.parametrize("sharing", [None, ALWAYS])
def test_the_second_response_does_not_see_the_first(llama: Path, sharing: PromptSharing | None) -> None:
    model = PolicyModel(load_causal_lm(str(llama), ModelConfig(), dtype=torch.float32), 1000)
    batch = pair_batch()
    disturbed = batch["tokens"].clone()
    for i in range(0, len(batch), 2):
        disturbed[batch.offsets[i] + batch["prompt_length"][i] : batch.offsets[i + 1]] = 7
    before, _, _ = computed(model, batch, budget=1000, sharing=sharing)
    after, _, _ = computed(model, batch.with_columns({"tokens": disturbed}), budget=1000, sharing=sharing)
    rejected = torch.repeat_interleave(torch.arange(len(batch)) % 2 == 1, batch.lengths)
    assert torch.equal(before[rejected], after[rejected])
    assert float((before - after).abs().max()) > 0.1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("sharing", [None, ALWAYS, PromptSharing(8, 2**20)])
@pytest.mark.parametrize("budget", [1, 30, 64, 1000])
def test_every_pair_stays_whole_within_the_budget(budget: int, sharing: PromptSharing | None, packing: bool) -> None:
    batch = pair_batch()
    seen, where = [], []
    for micro in pair_micro_batches(batch, budget, packing=packing, sharing=sharing):
        samples = micro.samples.view(-1, 2)
        assert torch.equal(samples[:, 0] + 1, samples[:, 1]) and not (samples[:, 0] % 2).any()
        assert micro.input_ids.numel() <= budget or len(samples) == 1
        ids = micro.input_ids.flatten()
        assert torch.equal(batch["tokens"][micro.where], micro.targets)
        assert ids[micro.last].tolist() == [int(batch["tokens"][batch.offsets[s + 1] - 1]) for s in micro.samples]
        seen += micro.samples.tolist()
        where += micro.where.tolist()
    assert sorted(seen) == list(range(12))
    assert sorted(where) == torch.nonzero(batch["response_mask"]).flatten().tolist()


def test_scores_are_read_at_the_last_token_of_each_response(llama: Path) -> None:
    lm = load_causal_lm(str(llama), ModelConfig(), dtype=torch.float32)
    head = torch.nn.Linear(64, 1)
    model, batch = ScalarModel(lm.base_model, head), pair_batch()
    expected = []
    for start, end in batch.spans():
        with torch.no_grad():
            states = lm.base_model(input_ids=batch["tokens"][None, start:end]).last_hidden_state[0]
            expected.append(float(states[-1] @ head.weight[0] + head.bias))
    for sharing in (None, ALWAYS):
        found = torch.zeros(12)
        for micro in pair_micro_batches(batch, 50, sharing=sharing, mask=None):
            found[micro.samples] = model(micro)[1].detach()
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


def test_neighbours_share_and_others_do_not(llama: Path) -> None:
    """Ranks may get a pair's samples apart; each sample's log-probabilities are the same anyway."""
    model = PolicyModel(load_causal_lm(str(llama), ModelConfig(), dtype=torch.float32), 1000)
    for order, shared in (
        (range(12), 12),
        ([0, 1, 3, 2, 4, 7, 6], 6),
        ([1, 0, 5], 2),
        ([0, 2, 4], 0),
        ([3], 0),
        ([], 0),
    ):
        batch = pair_batch().select(list(order))
        found, alone, masked = torch.zeros(batch.num_tokens), torch.zeros(batch.num_tokens), 0
        for micro in neighbours_together(batch, 60, packing=False, sharing=ALWAYS):
            found[micro.where] = model(micro, 1.0)[0].detach()
            masked += len(micro.samples) if micro.attention_mask is not None else 0
        for micro in micro_batches(batch, 1, False):
            alone[micro.where] = model(micro, 1.0)[0].detach()
        assert masked == shared
        torch.testing.assert_close(found, alone, rtol=0, atol=2e-6)


def test_when_sharing_pays() -> None:
    """A long prompt with short answers is shared, a short one before long answers isn't."""
    pays = PromptSharing(10_000, 576)
    sizes = torch.tensor([[64, 64, 64], [500, 50, 50], [5, 1000, 1000], [0, 4, 4]])
    assert pays(*sizes.t()).tolist() == [True, True, False, False]
    assert PromptSharing(100, 576)(*sizes.t()).tolist() == [False, False, False, False]
    # By hand: 6 * 10 * 2 = 120 operations saved, against (2 + 8 + 8)^2 - (10^2 + 10^2) / 2 = 224.
    assert PromptSharing(100, 10)(*torch.tensor([[2], [8], [8]])).tolist() == [False]
    assert PromptSharing(100, 19)(*torch.tensor([[2], [8], [8]])).tolist() == [True]


def test_what_is_no_pair_is_refused() -> None:
    batch = pair_batch()
    with pytest.raises(BatchError, match="3 samples can't all be members of pairs"):
        pair_micro_batches(batch.select([0, 1, 2]), 100)
    with pytest.raises(BatchError, match=r"pairs \[1\] have prompts of different lengths"):
        pair_micro_batches(batch.select([0, 1, 2, 0]), 100)
    with pytest.raises(BatchError, match=r"pairs \[0\] have different prompts"):
        pair_micro_batches(batch.select([0, 8]), 100)
    with pytest.raises(BatchError, match="tokens of a pair's prompt can't be wanted"):
        wanted = batch["response_mask"].clone()
        wanted[1] = True
        pair_micro_batches(batch.with_columns({"response_mask": wanted}), 100)
