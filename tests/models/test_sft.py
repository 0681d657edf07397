"""Fine-tuning: the likelihood of the learnt tokens, and of nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.actors.sft import SFTTrainer
from rayrlhf.batch import Batch
from rayrlhf.config.offline import SFTConfig
from tests.models import plain
from tests.models.making import GRADIENT_SCALE, LENGTHS, LINEAR_ADAM, MASKED_SAMPLE, alone, parts_of, ragged_tokens
from tests.models.pairs import offline_settings
from tests.models.rank_cases import as_columns, interrupted, make_role, single_steps, trained, weights_of
from tests.models.ranks import Ranks

ALL = list(range(len(LENGTHS)))


def examples() -> Batch:
    tokens, masks = ragged_tokens()
    return Batch.from_samples({"tokens": tokens, "response_mask": masks})


def nll(lm: Any, batch: Batch) -> Tensor:
    """-log p, the mean over all learnt tokens of all samples."""
    losses = []
    for i in range(len(batch)):
        logprobs, _ = plain.logprobs_and_entropies(lm, torch.tensor(plain.column(batch, "tokens", i)), 1.0)
        losses += [-p for p, m in zip(logprobs, plain.column(batch, "response_mask", i), strict=True) if m]
    return torch.stack(losses).sum() / len(losses)


@pytest.mark.parametrize(("stage", "size"), [(1, 1), (2, 1), (3, 1), (1, 2), (3, 2)])
def test_one_step_is_the_gradient_of_the_likelihood(
    llama: Path, tmp_path: Path, stage: int, size: int, two_ranks: Ranks
) -> None:
    policy = {"zero_stage": stage, "optimizer": LINEAR_ADAM, "logits_chunk_tokens": 7}
    splits = [[ALL], [ALL[::-1]], [ALL]] if size == 1 else [[[5, 1, 6], [7, 0, 2, 4, 3]], [[], ALL], [ALL[:7], [7]]]
    cases = [
        {"budget": budget, "packing": packing, "parts": parts}
        for (budget, packing), parts in zip([(1000, False), (34, False), (40, True)], splits, strict=True)
    ]
    arguments: dict[str, Any] = {
        "kind": "sft", "path": str(llama), "settings": offline_settings("sft", llama, tmp_path, policy=policy),
        "columns": as_columns(examples()), "cases": cases,
    }  # fmt: skip
    results = single_steps(alone(), **arguments) if size == 1 else two_ranks.run(single_steps, **arguments)[0]
    lm = plain.plain_lm(llama)
    loss = nll(lm, examples())
    expected = plain.gradients(lm, loss)
    for result in results:
        moved = {name: torch.from_numpy(m) / GRADIENT_SCALE for name, m in result["moved"].items()}
        assert plain.relative_difference(moved, expected) < 1e-5
        assert result["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert set(result["metrics"]) == {
            "loss", "grad_norm", "lr", "optimizer_steps", "skipped_steps", "empty_minibatches"
        }  # fmt: skip


def test_tokens_outside_the_mask_never_count(llama: Path, tmp_path: Path) -> None:
    """Neither in the loss nor in its denominator: what comes after the last learnt token can be anything."""
    batch = examples()
    other = batch["tokens"].clone()
    start, end = batch.offsets[MASKED_SAMPLE : MASKED_SAMPLE + 2].tolist()
    other[start:end] = 9
    runs = []
    for tokens in (batch["tokens"], other):
        role = make_role(alone(), "sft", str(llama), offline_settings("sft", llama, tmp_path))
        runs.append((role.update(batch.with_columns({"tokens": tokens}), parts_of(ALL), 1), weights_of(role)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(w, runs[1][1][n]) for n, w in runs[0][1].items())


def test_validation_is_the_same_likelihood(llama: Path, tmp_path: Path) -> None:
    """At temperature 1, whatever may be set elsewhere."""
    role = SFTTrainer(alone(), SFTConfig.model_validate(offline_settings("sft", llama, tmp_path)), str(llama), 10)
    batch = examples()
    found = role.token_logprobs(batch)["old_logprobs"]
    mean = float(-found[batch["response_mask"]].double().mean())
    assert mean == pytest.approx(float(nll(plain.plain_lm(llama), batch).detach()), rel=1e-6)
    assert not found[~batch["response_mask"]].any()


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 16.0}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_what_it_is_shown(llama: Path, tmp_path: Path, dtype: str, lora: dict[str, Any] | None) -> None:
    policy = {"dtype": dtype, "lora": lora, "optimizer": {"lr": 1e-2}, "tokens_per_micro_batch": 60}
    role = make_role(alone(), "sft", str(llama), offline_settings("sft", llama, tmp_path, policy=policy), 40)
    assert isinstance(role, SFTTrainer)
    before = weights_of(role)
    losses = [role.update(examples(), parts_of(ALL), k + 1)["loss"] for k in range(40)]
    assert losses[0] > 3.5 and losses[-1] < 1.5
    moved = {n for n, w in weights_of(role).items() if not torch.equal(w, before[n])}
    assert moved == ({n for n in before if "lora_" in n} if lora else set(before))
    role.save_model(str(tmp_path / "model"))
    found = float(nll(plain.plain_lm(tmp_path / "model"), examples()).detach())
    assert found == pytest.approx(losses[-1], abs=0.2) and found < losses[-2]


@pytest.mark.parametrize("size", [1, 2])
def test_going_on_from_a_file(llama: Path, tmp_path: Path, size: int, two_ranks: Ranks) -> None:
    parts = [[half] if size == 1 else [half[:1], half[1:]] for half in ([0, 2, 4, 6], [1, 5, 7, 3])] * 2
    policy = {"optimizer": {"lr": 1e-2, "schedule": "cosine"}, "zero_stage": 3 if size == 2 else 2}
    arguments: dict[str, Any] = {
        "kind": "sft", "path": str(llama), "settings": offline_settings("sft", llama, tmp_path, policy=policy),
        "columns": as_columns(examples()), "parts": parts,
    }  # fmt: skip
    results = [interrupted(alone(), **arguments)] if size == 1 else two_ranks.run(interrupted, **arguments)
    for result in results:
        assert all(result["same"].values()) and result["metrics"][0] == result["metrics"][1]


def test_the_learning_rate_can_be_scaled(llama: Path, tmp_path: Path) -> None:
    """Half the rate is half the (first, linear) step; the factor is part of the state."""
    run = offline_settings("sft", llama, tmp_path, policy={"optimizer": LINEAR_ADAM})
    moved, rates = [], []
    for factor in (1.0, 0.5):
        role = make_role(alone(), "sft", str(llama), run)
        role.set_lr_scale(factor)
        before = weights_of(role)
        rates.append(role.update(examples(), parts_of(ALL), 1)["lr"])
        moved.append({n: before[n] - w for n, w in weights_of(role).items()})
        role.save(str(tmp_path / f"state-{factor}"))
    assert rates[1] == rates[0] / 2
    assert plain.relative_difference({n: 2 * m for n, m in moved[1].items()}, moved[0]) < 1e-3
    fresh = make_role(alone(), "sft", str(llama), run)
    fresh.load(str(tmp_path / "state-0.5"))
    assert fresh.update(examples(), parts_of(ALL), 2)["lr"] == rates[1]


def test_a_step_that_is_not_finite_is_kept_and_named(llama: Path, tmp_path: Path) -> None:
    policy = {"optimizer": {"lr": 1e-2, "max_skipped_steps": 1}}
    role = make_role(alone(), "sft", str(llama), offline_settings("sft", llama, tmp_path, policy=policy))
    assert isinstance(role, SFTTrainer)
    with torch.no_grad():
        role.lm.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"1 optimizer steps.*optimizer.max_skipped_steps"):
        role.update(examples(), parts_of(ALL), 3)
    assert (tmp_path / "skipped" / "SFTTrainer-step-3-minibatch-0-rank-0.pt").exists()


def test_several_steps_of_two_ranks_end_on_both_with_the_same_weights(
    llama: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    policy = {"zero_stage": 2, "optimizer": {"lr": 1e-2}}
    first, second = two_ranks.run(
        trained, kind="sft", path=str(llama), settings=offline_settings("sft", llama, tmp_path, policy=policy),
        columns=as_columns(examples()), schedule=[[[5, 1, 6], [7, 0, 2, 4, 3]]] * 3, total_steps=3,
    )  # fmt: skip
    assert first["metrics"] == second["metrics"]
    assert all((w == second["after"][n]).all() for n, w in first["after"].items())
