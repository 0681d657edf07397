"""Ranks that share the rows of a micro-batch compute and learn what one rank alone does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import plain
from tests.models.making import LINEAR_ADAM, alone
from tests.models.parallel_cases import loads_the_compiler, ragged, refused, steps
from tests.models.ranks import Ranks

ALL = list(range(10))


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 4 heads of 16, 2 key-value heads."""
    return save(tmp_path_factory.mktemp("four-heads"))


def save(folder: Path, **settings: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = settings.pop("kind", "llama")
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.1,
            **settings,
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def compare(found: list[dict[str, Any]], expected: dict[str, Any], parts: list[list[int]], size: int) -> None:
    """Results, gradients (or how the weights moved), norms and statistics of all ranks against one rank's."""
    batch = ragged()
    for rank, result in enumerate(found):
        shard = parts[rank // size]
        own = np.concatenate([expected["results"][batch.offsets[i] : batch.offsets[i + 1]] for i in shard])
        np.testing.assert_allclose(result["results"], own, rtol=1e-5, atol=1e-5)
        as_tensors = [{n: torch.from_numpy(m) for n, m in r["moved"].items()} for r in (result, expected)]
        assert plain.relative_difference(*as_tensors) < 1e-5
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert result["counts"] == expected["counts"]
        for ours, theirs in zip(result["sums"], expected["sums"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_share_all_rows(four_heads: Path, two_ranks: Ranks, stage: int) -> None:
    trained = {"zero_stage": stage, "optimizer": LINEAR_ADAM}
    how: dict[str, Any] = {"kind": "policy", "path": str(four_heads), "parts": [ALL]}
    expected = steps(alone(), trained=trained, budget=1000, **how)
    for budget, packing in ((1000, False), (40, False), (60, True)):
        shared = {**trained, "sequence_parallel": 2}
        found = two_ranks.run(steps, trained=shared, budget=budget, packing=packing, **how)
        compare(found, expected, [ALL], 2)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_two_shards_of_two_ranks(four_heads: Path, four_ranks: Ranks, kind: str, stage: int) -> None:
    """They have different samples, and different numbers of micro-batches."""
    parts = [[5, 8], [7, 1, 0, 2, 4, 3, 9, 6]]
    trained = {"zero_stage": stage, "optimizer": LINEAR_ADAM}
    how: dict[str, Any] = {"kind": kind, "path": str(four_heads)}
    expected = steps(alone(), trained=trained, budget=1000, parts=[ALL], **how)
    for budget, packing in ((22, False), (30, True)):
        shared = {**trained, "sequence_parallel": 2}
        found = four_ranks.run(steps, trained=shared, budget=budget, packing=packing, parts=parts, **how)
        assert found[0]["micro_batches"] != found[2]["micro_batches"]
        compare(found, expected, parts, 2)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_more_ranks_than_key_heads_and_than_tokens(four_heads: Path, four_ranks: Ranks, attention: str) -> None:
    """Four ranks share two key heads, and rows of two and three tokens."""
    trained = {"zero_stage": 2, "optimizer": LINEAR_ADAM}
    how: dict[str, Any] = {"kind": "policy", "path": str(four_heads), "parts": [ALL]}
    expected = steps(alone(), trained=trained, budget=1000, **how)
    shared = {**trained, "sequence_parallel": 4, "attention": attention}
    for budget, packing in ((3, False), (60, True)):
        compare(four_ranks.run(steps, trained=shared, budget=budget, packing=packing, **how), expected, [ALL], 4)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}])
def test_two_steps_of_adam(four_heads: Path, two_ranks: Ranks, lora: dict | None, stage: int) -> None:
    """With gradient checkpointing and clipping."""
    optimizer = {"lr": 1e-2, "eps": 1e-3, "max_grad_norm": 0.1}
    trained = {"zero_stage": stage, "optimizer": optimizer, "lora": lora}
    how: dict[str, Any] = {"kind": "policy", "path": str(four_heads), "parts": [ALL], "number": 2}
    expected = steps(alone(), trained=trained, budget=1000, **how)
    assert min(expected["norms"]) > 0.1
    shared = {**trained, "sequence_parallel": 2, "gradient_checkpointing": True}
    compare(two_ranks.run(steps, trained=shared, budget=40, **how), expected, [ALL], 2)


WINDOW = 6
FAMILIES = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("kind", list(FAMILIES))
def test_families_and_windows(kind: str, attention: str, tmp_path: Path, two_ranks: Ranks) -> None:
    """Windows shorter than the samples, in all layers or in one of the two."""
    path = save(tmp_path, kind=kind, **FAMILIES[kind])
    trained = {"optimizer": LINEAR_ADAM}
    how: dict[str, Any] = {"kind": "policy", "path": str(path), "parts": [ALL]}
    expected = steps(alone(), trained=trained, budget=1, **how)
    shared = {**trained, "sequence_parallel": 2, "attention": attention}
    for budget, packing in ((60, False), (60, True)):
        compare(two_ranks.run(steps, trained=shared, budget=budget, packing=packing, **how), expected, [ALL], 2)


def test_pairs_that_share_their_prompt(four_heads: Path, two_ranks: Ranks) -> None:
    how: dict[str, Any] = {"kind": "critic", "path": str(four_heads), "pairs": True, "parts": [list(range(12))]}
    trained = {"optimizer": LINEAR_ADAM}
    expected = steps(alone(), trained=trained, budget=1000, **how)
    found = two_ranks.run(steps, trained={**trained, "sequence_parallel": 2}, budget=40, **how)
    for result in found:
        np.testing.assert_allclose(result["results"], expected["results"], rtol=1e-5, atol=1e-5)
        as_tensors = [{n: torch.from_numpy(m) for n, m in r["moved"].items()} for r in (result, expected)]
        assert plain.relative_difference(*as_tensors) < 1e-5


def test_what_cannot_be_shared_is_refused(four_heads: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    shared = {"sequence_parallel": 2}
    odd = save(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=1, hidden_size=48)
    for problems in two_ranks.run(refused, kind="policy", path=str(odd), trained=shared):
        (problem,) = problems
        assert "found 2" in problem and "3 attention heads" in problem and problem.endswith("legal with 2 ranks: 1")
    for problems in two_ranks.run(
        refused, kind="policy", path=str(four_heads), trained={**shared, "attention": "eager"}
    ):
        assert "attention eager, legal: sdpa, varlen or flash_attention_2" in problems[0]


def test_a_model_that_looks_elsewhere_is_refused(tmp_path: Path, two_ranks: Ranks) -> None:
    """OPT makes its positions in a way of its own."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
                       max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    for problems in two_ranks.run(refused, kind="policy", path=str(tmp_path / "opt"), trained={"sequence_parallel": 2}):
        assert "position by position" in problems[0]


def test_flash_attention_is_told_the_same(four_heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its kernel is called with, on rows that are packed and padded; here the reference on a CPU stands in for it."""
    import transformers.modeling_flash_attention_utils as flash

    from rayrlhf.config.trainers import ModelConfig
    from rayrlhf.models.layout import micro_batches
    from rayrlhf.models.loading import load_causal_lm
    from rayrlhf.models.sequence import SHARED, _Shuffled
    from rayrlhf.models.varlen import varlen_attention

    calls = []

    def stand_in(query: Any, key: Any, value: Any, attention_mask: Any, *, query_length: int, is_causal: bool,
                 softmax_scale: float, sliding_window: Any, softcap: Any, cu_seq_lens_q: Any, cu_seq_lens_k: Any,
                 max_length_q: int, max_length_k: int, attn_implementation: str) -> torch.Tensor:  # fmt: skip
        assert attention_mask is None and is_causal and softcap is None and sliding_window is None
        assert query.shape[1] == query_length and attn_implementation == "flash_attention_2"
        assert cu_seq_lens_k is cu_seq_lens_q and cu_seq_lens_q.dtype == torch.int32 and max_length_k == max_length_q
        calls.append(cu_seq_lens_q.tolist())
        q, k, v = (part.flatten(0, 1) for part in (query, key, value))
        return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=softmax_scale).view(query.shape)

    monkeypatch.setattr(flash, "_flash_attention_forward", stand_in)
    backbone = load_causal_lm(str(four_heads), ModelConfig(dtype="float32"), dtype=torch.float32).base_model
    backbone.set_attn_implementation(SHARED)
    for packing in (False, True):
        micro = micro_batches(ragged(), 60, packing)[1]
        states = []
        for core in ("sdpa", "flash_attention_2"):
            sharing = _Shuffled(torch.arange(micro.input_ids.shape[1]))
            sharing.core = core
            states.append(sharing.states_at(backbone, micro, micro.predict)[0])
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-5)
        if packing:
            assert micro.bounds is not None and calls[-1] == micro.bounds.tolist()
    assert len(calls) == 4, "two layers, twice"


def test_bfloat16(four_heads: Path, two_ranks: Ranks) -> None:
    """Rounded in other places, the numbers are near one rank's."""
    trained = {"dtype": "bfloat16", "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    how: dict[str, Any] = {"kind": "policy", "path": str(four_heads), "parts": [ALL], "budget": 60, "number": 2}
    expected = steps(alone(), trained=trained, **how)
    for result in two_ranks.run(steps, trained={**trained, "sequence_parallel": 2}, **how):
        assert np.abs(result["results"] - expected["results"]).mean() < 0.03
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.03)
        as_tensors = [{n: torch.from_numpy(m) for n, m in r["moved"].items()} for r in (result, expected)]
        assert plain.relative_difference(*as_tensors) < 0.3


def test_to_train_is_not_to_load_torchs_compiler(four_heads: Path) -> None:
    """It would be a second of processor time in each process, of a start that takes four."""
    fresh = Ranks(1)
    try:
        assert fresh.run(loads_the_compiler, path=str(four_heads)) == [False]
    finally:
        fresh.close()
