"""Ranks that share each layer's weights compute and learn what one rank alone does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import plain
from tests.models.making import LINEAR_ADAM, alone
from tests.models.parallel_cases import interrupted, parts_held, refused, steps
from tests.models.ranks import Ranks
from tests.models.test_parallel_sequence import ALL, compare, save


@pytest.fixture(scope="module")
def sharers() -> Iterator[Ranks]:
    """Two ranks that do nothing else: DeepSpeed keeps its groups for as long as a process lives."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_pairs() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_gradients(kind: str, stage: int, tmp_path: Path, sharers: Ranks) -> None:
    path = save(tmp_path)
    trained = {"zero_stage": stage, "optimizer": LINEAR_ADAM}
    how: dict[str, Any] = {"kind": kind, "path": str(path), "parts": [ALL]}
    expected = steps(alone(), trained=trained, budget=1000, **how)
    for budget, packing in ((40, False), (60, True)):
        found = sharers.run(steps, trained={**trained, "tensor_parallel": 2}, budget=budget, packing=packing, **how)
        compare(found, expected, [ALL], 2)


def test_two_shards_of_two_ranks(tmp_path: Path, two_pairs: Ranks) -> None:
    parts = [[5, 8], [7, 1, 0, 2, 4, 3, 9, 6]]
    trained = {"optimizer": LINEAR_ADAM}
    how: dict[str, Any] = {"kind": "policy", "path": str(save(tmp_path))}
    expected = steps(alone(), trained=trained, budget=1000, parts=[ALL], **how)
    found = two_pairs.run(steps, trained={**trained, "tensor_parallel": 2}, budget=22, parts=parts, **how)
    assert found[0]["micro_batches"] != found[2]["micro_batches"]
    compare(found, expected, parts, 2)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},  # biases
    "qwen3": {},  # norms over the heads, whose gradients are parts
    "gemma3_text": {"tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_two_steps_of_adam(kind: str, tmp_path: Path, sharers: Ranks) -> None:
    """With gradient checkpointing and clipping."""
    path = save(tmp_path, kind=kind, **FAMILIES[kind])
    trained = {"optimizer": {"lr": 1e-2, "eps": 1e-3, "max_grad_norm": 0.1}}
    how: dict[str, Any] = {"kind": "policy", "path": str(path), "parts": [ALL], "number": 2, "budget": 60}
    expected = steps(alone(), trained=trained, **how)
    assert min(expected["norms"]) > 0.1
    shared = {**trained, "tensor_parallel": 2, "gradient_checkpointing": True}
    compare(sharers.run(steps, trained=shared, **how), expected, [ALL], 2)


def test_each_rank_holds_its_part(tmp_path: Path, sharers: Ranks) -> None:
    for parts in sharers.run(parts_held, path=str(save(tmp_path)), trained={"tensor_parallel": 2}):
        assert parts["q_proj"] == (32, 64) and parts["k_proj"] == (16, 64) and parts["o_proj"] == (64, 32)
        assert parts["up_proj"] == (48, 64) and parts["down_proj"] == (64, 48)
        assert parts["embed_tokens"] == parts["lm_head"] == (64, 64)


def test_saved_and_loaded(tmp_path: Path, two_pairs: Ranks) -> None:
    """Two shards of two ranks; the whole weights are the same on all of them, and have the shapes that are announced."""
    trained = {"tensor_parallel": 2, "optimizer": {"lr": 1e-2}}
    arguments: dict[str, Any] = {"path": str(save(tmp_path / "model")), "folder": str(tmp_path / "state")}
    found = two_pairs.run(interrupted, trained=trained, parts=[ALL[:4], ALL[4:]], **arguments)
    for result in found:
        assert result["same"] and result["norms"][0][2:] == result["norms"][1]
        assert {name: w.shape for name, w in result["weights"].items()} == result["layout"]
        for name, weight in result["weights"].items():
            assert np.array_equal(weight, found[0]["weights"][name]), name


def test_what_cannot_be_divided_is_refused(tmp_path: Path, sharers: Ranks) -> None:
    one_key = str(save(tmp_path / "one", num_key_value_heads=1, intermediate_size=97))
    for problems in sharers.run(refused, kind="policy", path=one_key, trained={"tensor_parallel": 2}):
        assert problems == [
            "policy.tensor_parallel: found 2, which doesn't divide the model's num_key_value_heads 1",
            "policy.tensor_parallel: found 2, which doesn't divide the model's intermediate_size 97",
        ]
    experts = str(save(tmp_path / "experts", kind="mixtral", num_local_experts=2))
    for (problem,) in sharers.run(refused, kind="policy", path=experts, trained={"tensor_parallel": 2}):
        assert "the family mixtral has layers that are divided in another way" in problem and problem.endswith(
            "legal: 1"
        )
    both = {"tensor_parallel": 2, "lora": {"rank": 4}}
    for (problem,) in sharers.run(refused, kind="policy", path=str(save(tmp_path / "lora")), trained=both):
        assert "found 2 with policy.lora" in problem


def test_bfloat16(tmp_path: Path, sharers: Ranks) -> None:
    """Rounded in other places, the numbers are near one rank's."""
    trained = {"dtype": "bfloat16", "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    how: dict[str, Any] = {"kind": "policy", "path": str(save(tmp_path)), "parts": [ALL], "budget": 60, "number": 2}
    expected = steps(alone(), trained=trained, **how)
    for result in sharers.run(steps, trained={**trained, "tensor_parallel": 2}, **how):
        assert np.abs(result["results"] - expected["results"]).mean() < 0.03
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.03)
        as_tensors = [{n: torch.from_numpy(m) for n, m in r["moved"].items()} for r in (result, expected)]
        assert plain.relative_difference(*as_tensors) < 0.3
