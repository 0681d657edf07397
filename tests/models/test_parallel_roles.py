"""PPO's policy and critic on ranks that share sequences or weights: an update is that of one rank, numbers and all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.making import LENGTHS, alone, settings, training_batch
from tests.models.parallel_cases import updated
from tests.models.rank_cases import as_columns
from tests.models.ranks import Ranks
from tests.models.test_parallel_sequence import save
from tests.support.tiny import save_reward_model

ONE = [[[0, 1, 2, 3, 4, 5, 6, 7]], [[6, 1, 2, 5]]]
"""Two optimizer steps, on one rank or on ranks of which all share their samples."""
TWO = [[[0, 5], [1, 2, 3, 4, 6, 7]], [[6, 1, 2, 5], []]]
"""The same in two shards; in the second step one has nothing to do."""
PPO = {"importance_sampling_cap": 1.3, "entropy_coef": 0.02, "kl_loss_coef": 0.1, "minibatch_samples": 4}
ADAM = {"lr": 1e-3, "eps": 1e-3, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of four heads; the critic starts from a reward model, so that its head isn't 0."""
    folder = tmp_path_factory.mktemp("models")
    from tests.support.tiny import save_tokenizer

    policy = save(folder / "policy", pad_token_id=0)
    save_tokenizer(policy)
    return {"policy": str(policy), "critic": str(save_reward_model(folder / "critic", policy))}


@pytest.fixture(scope="module")
def sharers() -> Iterator[Ranks]:
    """Two ranks for weights alone: DeepSpeed keeps its groups for as long as a process lives."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def run_settings(models: dict[str, str], folder: Path, kind: str, **section: Any) -> dict[str, Any]:
    shared = {"optimizer": ADAM, "tokens_per_micro_batch": 40, **section}
    return settings(models["policy"], folder, ppo=PPO, **{kind: shared})


def compare(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in found:
        for name, column in expected["before"].items():
            np.testing.assert_allclose(result["before"][name], column, rtol=1e-5, atol=1e-5)
        assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-6)
        assert result["metrics"] == found[0]["metrics"], "the same on all ranks"
        for name, weight in expected["weights"].items():
            np.testing.assert_allclose(
                result["weights"][name], weight, rtol=0, atol=1e-5 * np.abs(weight).max(), err_msg=name
            )


def both(models: dict[str, str], folder: Path, kind: str, ranks: Ranks, parts: list, **section: Any) -> None:
    how: dict[str, Any] = {"kind": kind, "path": models[kind], "columns": as_columns(training_batch())}
    stage = section.get("zero_stage", 2)
    single = run_settings(models, folder, kind, zero_stage=stage, lora=section.get("lora"))
    expected = updated(alone(), settings=single, parts=ONE, **how)
    assert expected["metrics"]["optimizer_steps"] == 2
    several = run_settings(models, folder, kind, ranks=ranks.size, **section)
    compare(ranks.run(updated, settings=several, parts=parts, **how), expected)


@pytest.mark.parametrize("kind", ["policy", "critic"])
@pytest.mark.parametrize("stage", [2, 3])
def test_sequences(models: dict[str, str], tmp_path: Path, kind: str, stage: int, two_ranks: Ranks) -> None:
    assert len(LENGTHS) == 8
    section: dict[str, Any] = {"sequence_parallel": 2, "zero_stage": stage, "gradient_checkpointing": True}
    both(models, tmp_path, kind, two_ranks, ONE, **section)


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_sequences_in_two_shards(models: dict[str, str], tmp_path: Path, kind: str, four_ranks: Ranks) -> None:
    both(models, tmp_path, kind, four_ranks, TWO, sequence_parallel=2, zero_stage=3, packing=True)


def test_sequences_with_adapters(models: dict[str, str], tmp_path: Path, two_ranks: Ranks) -> None:
    section: dict[str, Any] = {"sequence_parallel": 2, "zero_stage": 3, "lora": {"rank": 4}}
    both(models, tmp_path, "policy", two_ranks, ONE, **section)


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_weights(models: dict[str, str], tmp_path: Path, kind: str, sharers: Ranks) -> None:
    both(models, tmp_path, kind, sharers, ONE, tensor_parallel=2, zero_stage=1, attention="varlen")
