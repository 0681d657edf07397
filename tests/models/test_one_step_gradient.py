"""One optimizer step moves the weights by the gradient of the loss's definition, however the work is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import plain
from tests.models.making import (
    GRADIENT_SCALE,
    LENGTHS,
    LINEAR_ADAM,
    MASKED_SAMPLE,
    alone,
    config_of,
    settings,
    training_batch,
)
from tests.models.rank_cases import as_columns, single_steps
from tests.models.ranks import Ranks

ALL = list(range(len(LENGTHS)))
PPO = {
    "importance_sampling_cap": 1.3,
    "clip_range_high": 0.3,
    "entropy_coef": 0.02,
    "kl_loss_coef": 0.1,
}


@pytest.fixture(scope="module")
def known(llama: Path) -> dict[str, Any]:
    """The batch, and the policy's gradient over all of it from one process and one sample at a time."""
    lm = plain.plain_lm(llama)
    config = config_of(llama, "unused", ppo=PPO)
    tokens = [torch.tensor(plain.column(training_batch(), "tokens", i)) for i in ALL]
    with torch.no_grad():
        logprobs = [plain.logprobs_and_entropies(lm, t, config.rollout.temperature)[0] for t in tokens]
    batch = training_batch(logprobs=logprobs)
    loss, sums = plain.ppo_loss(lm, batch, ALL, config.ppo, config.rollout.temperature)
    assert 0.1 < sums["clipped"] / sums["tokens"] < 0.6, "some tokens are clipped, some are not"
    expected = plain.gradients(lm, loss)
    return {"batch": batch, "expected": expected, "sums": sums, "columns": as_columns(batch)}


def run_settings(path: Path, folder: Path, stage: int) -> dict[str, Any]:
    role = {"zero_stage": stage, "optimizer": LINEAR_ADAM, "logits_chunk_tokens": 7}
    return settings(path, folder, policy=role, critic=role, ppo=PPO)


def as_gradients(moved: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(m) / GRADIENT_SCALE for name, m in moved.items()}


def check(results: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> None:
    for k, result in enumerate(results):
        difference = plain.relative_difference(as_gradients(result["moved"]), expected)
        assert difference < 1e-5, f"case {k}: {difference}"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_any_number_of_micro_batches_in_any_order(known: dict, llama: Path, tmp_path: Path, stage: int) -> None:
    cases = [
        {"budget": 168, "packing": False, "parts": [ALL], "expect": 1},
        {"budget": 70, "packing": False, "parts": [ALL], "expect": 2},
        {"budget": 34, "packing": False, "parts": [ALL], "expect": 4},
        {"budget": 34, "packing": False, "parts": [[6, 2, 7, 5, 0, 3, 1, 4]], "expect": 4},
        {"budget": 87, "packing": True, "parts": [ALL], "expect": 1},
        {"budget": 27, "packing": True, "parts": [ALL[::-1]], "expect": 4},
    ]
    results = single_steps(alone(), "policy", str(llama), run_settings(llama, tmp_path, stage), known["columns"], cases)
    assert [r["micro_batches"] for r in results] == [c["expect"] for c in cases]
    check(results, known["expected"])
    for result in results:
        metrics, sums = result["metrics"], known["sums"]
        assert metrics["clipfrac"] == pytest.approx(sums["clipped"] / sums["tokens"], abs=1e-9)
        assert metrics["ppo_kl"] == pytest.approx(sums["ppo_kl"] / sums["tokens"], rel=1e-4)
        assert metrics["entropy"] == pytest.approx(sums["entropy"] / sums["tokens"], rel=1e-5)
        assert metrics["policy_loss"] == pytest.approx(sums["surrogate"] / sums["tokens"], rel=1e-4, abs=1e-6)
        norm = sum(float(g.norm()) ** 2 for g in known["expected"].values()) ** 0.5
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks(known: dict, llama: Path, tmp_path: Path, stage: int, two_ranks: Ranks) -> None:
    cases = [
        {"budget": 1000, "packing": False, "parts": [[0, 1, 2, 3, 4], [5, 6, 7]]},
        {"budget": 22, "packing": False, "parts": [[5, 1, 6], [7, 0, 2, 4, 3]]},
        {"budget": 22, "packing": True, "parts": [[5], [7, 0, 2, 4, 3, 1, 6]]},
        {"budget": 40, "packing": False, "parts": [[], [7, 0, 2, 4, 3, 1, 6, 5]]},
    ]
    check_ranks(two_ranks, cases, known, run_settings(llama, tmp_path, stage))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_ranks(known: dict, llama: Path, tmp_path: Path, stage: int, four_ranks: Ranks) -> None:
    cases = [
        {"budget": 22, "packing": False, "parts": [[0, 5], [1, 3], [2, 7, 4], [6]]},
        {"budget": 22, "packing": False, "parts": [[MASKED_SAMPLE], [0, 1, 2, 4, 5, 6, 7], [], []]},
    ]
    check_ranks(four_ranks, cases, known, run_settings(llama, tmp_path, stage))


def check_ranks(ranks: Ranks, cases: list[dict[str, Any]], known: dict, run: dict[str, Any]) -> None:
    results = ranks.run(
        single_steps, kind="policy", path=run["policy"]["path"], settings=run, columns=known["columns"], cases=cases
    )
    assert len({r[-1]["micro_batches"] for r in results}) > 1, "the ranks have different numbers of micro-batches"
    check(results[0], known["expected"])
    for rank in results[1:]:
        assert [r["metrics"] for r in rank] == [r["metrics"] for r in results[0]], "metrics are the same on all ranks"
    sums = known["sums"]
    for result in results[0]:
        assert result["metrics"]["entropy"] == pytest.approx(sums["entropy"] / sums["tokens"], rel=1e-5)
        assert result["metrics"]["clipfrac"] == pytest.approx(sums["clipped"] / sums["tokens"], abs=1e-9)


def test_without_entropy_bonus_and_kl_term(known: dict, llama: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    """Then the loss reads fewer of the model's outputs, on ranks with samples and without."""
    ppo = {"importance_sampling_cap": 1.3, "clip_range_high": 0.3}
    role = {"zero_stage": 3, "optimizer": LINEAR_ADAM, "logits_chunk_tokens": 7}
    run = settings(llama, tmp_path, policy=role, ppo=ppo)
    lm, config = plain.plain_lm(llama), config_of(llama, tmp_path, ppo=ppo)
    loss, sums = plain.ppo_loss(lm, known["batch"], ALL, config.ppo, config.rollout.temperature)
    cases = [
        {"budget": 22, "packing": False, "parts": [[5, 1, 6], [7, 0, 2, 4, 3]]},
        {"budget": 30, "packing": False, "parts": [[], ALL]},
        {"budget": 30, "packing": True, "parts": [[MASKED_SAMPLE], ALL[:3] + ALL[4:]]},
    ]
    check_ranks(two_ranks, cases, {**known, "expected": plain.gradients(lm, loss), "sums": sums}, run)


@pytest.mark.parametrize("size", [1, 2])
def test_critic(known: dict, llama: Path, scorer: Path, tmp_path: Path, size: int, two_ranks: Ranks) -> None:
    """It starts from a reward model over the llama: with a head of 0 the backbone would have no gradient."""
    run = run_settings(llama, tmp_path, 3 if size == 2 else 2)
    split = [ALL] if size == 1 else [[5, 1, 2], [0, 3, 4, 6, 7]]
    nobody = [ALL] if size == 1 else [ALL, []]
    cases = [
        {"budget": 168, "packing": False, "parts": split},
        {"budget": 34, "packing": False, "parts": split},
        {"budget": 34, "packing": True, "parts": nobody},
    ]
    arguments: dict[str, Any] = {
        "kind": "critic",
        "path": str(scorer),
        "settings": run,
        "columns": known["columns"],
        "cases": cases,
    }
    results = single_steps(alone(), **arguments) if size == 1 else two_ranks.run(single_steps, **arguments)[0]
    scalar = torch.nn.Module()
    scalar.backbone = plain.plain_lm(llama).model
    scalar.head = torch.nn.Linear(64, 1).double()
    before = results[0]["before"]
    with torch.no_grad():
        scalar.head.weight.copy_(torch.from_numpy(before["head.weight"]))
        scalar.head.bias.copy_(torch.from_numpy(before["head.bias"]))
    loss = plain.critic_loss(scalar, known["batch"], ALL, clip=0.2)
    check(results, plain.gradients(scalar, loss))
    assert results[0]["metrics"]["value_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_a_masked_sample_changes_nothing(known: dict, llama: Path, tmp_path: Path) -> None:
    """Neither the gradient nor a denominator, in any aggregation."""
    without = [i for i in ALL if i != MASKED_SAMPLE]
    for aggregation in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"):
        run = run_settings(llama, tmp_path / aggregation, 1)
        run["ppo"] = {**run["ppo"], "loss_aggregation": aggregation}
        cases = [{"budget": 40, "packing": False, "parts": [part]} for part in (ALL, without)]
        full, less = single_steps(alone(), "policy", str(llama), run, known["columns"], cases)
        assert plain.relative_difference(as_gradients(full["moved"]), as_gradients(less["moved"])) < 5e-6
        assert full["metrics"]["policy_loss"] == pytest.approx(less["metrics"]["policy_loss"], abs=1e-6)


def test_first_minibatch_is_reinforce_with_advantages(known: dict, llama: Path, tmp_path: Path) -> None:
    """The old log-probabilities are the policy's own: ratio 1, nothing clipped, gradient of -A log p."""
    from rayrlhf.actors.policy import PolicyTrainer

    run = run_settings(llama, tmp_path, 2)
    run["ppo"] = {"steps": 1, "prompts_per_step": 8, "minibatch_samples": 8, "importance_sampling_cap": None}
    config = config_of(llama, tmp_path, policy=run["policy"], ppo=run["ppo"])
    assert config.rollout.temperature == 0.7
    asked = PolicyTrainer(alone(), config, str(llama), 10)
    asked.trained = asked.trained.model_copy(update={"tokens_per_micro_batch": 25})
    batch = known["batch"].merge(asked.token_logprobs(known["batch"]))
    cases = [{"budget": 1000, "packing": False, "parts": [ALL]}]
    (result,) = single_steps(alone(), "policy", str(llama), run, as_columns(batch), cases)
    assert result["metrics"]["clipfrac"] == 0
    assert abs(result["metrics"]["ppo_kl"]) < 1e-9

    lm = plain.plain_lm(llama)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in ALL:
        logprobs, _ = plain.logprobs_and_entropies(lm, torch.tensor(plain.column(batch, "tokens", i)), 0.7)
        mask, advantages = plain.column(batch, "response_mask", i), plain.column(batch, "advantages", i)
        total = total - sum(a * p for a, p, m in zip(advantages, logprobs, mask, strict=True) if m)
        count += sum(mask)
    check([result], plain.gradients(lm, total / count))
