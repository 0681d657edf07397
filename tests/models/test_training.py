"""Several optimizer steps: schedule, what is skipped, what is kept, and going on from a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.actors.policy import PolicyTrainer
from rayrlhf.config.trainers import OptimizerConfig
from rayrlhf.models.engine import learning_rate
from tests.models import plain
from tests.models.making import LENGTHS, alone, config_of, parts_of, settings, training_batch
from tests.models.rank_cases import as_columns, interrupted, make_role, trained, weights_of
from tests.models.ranks import Ranks

ALL = list(range(len(LENGTHS)))
HALVES = [[0, 2, 4, 6], [1, 5, 7, 3]]


def test_learning_rate_worked_out_by_hand() -> None:
    def rates(steps: list[int], **keys: Any) -> list[float]:
        return [learning_rate(OptimizerConfig(lr=2.0, **keys), step, 12) for step in steps]

    assert rates([0, 5, 11]) == [2.0, 2.0, 2.0]
    assert rates([0, 1, 2, 3, 4, 11], warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates([0, 3, 6, 9, 12, 20], schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    assert rates([1, 4, 8, 10], schedule="linear", warmup_steps=4) == pytest.approx([1.0, 2.0, 1.0, 0.5])
    assert rates([4, 8, 12], schedule="linear", warmup_steps=4, min_lr_ratio=0.2) == pytest.approx([2.0, 1.2, 0.4])
    half = 1 / math.sqrt(2)
    assert rates([4, 6, 8, 10, 12], schedule="cosine", warmup_steps=4) == pytest.approx([2, 1 + half, 1, 1 - half, 0])
    assert rates([8, 12, 99], schedule="cosine", warmup_steps=4, min_lr_ratio=0.5) == pytest.approx([1.5, 1.0, 1.0])


def by_hand(path: Path, batch: Any, rates: list[float], config: Any) -> dict[str, torch.Tensor]:
    """Weights after torch's own AdamW with these learning rates, over the halves of the batch in turn, in float32."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decay = config.policy.optimizer.weight_decay
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-4, weight_decay=decay, fused=False)
    for k, rate in enumerate(rates):
        loss, _ = plain.ppo_loss(lm, batch, HALVES[k % 2], config.ppo, config.rollout.temperature)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), config.policy.optimizer.max_grad_norm)
        assert norm > config.policy.optimizer.max_grad_norm, "the clipping is at work"
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {name: p.detach() for name, p in lm.named_parameters()}


@pytest.mark.parametrize(("stage", "size"), [(1, 1), (2, 2), (3, 2)])
def test_steps_equal_torch_adamw(llama: Path, tmp_path: Path, stage: int, size: int, two_ranks: Ranks) -> None:
    optimizer = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "max_grad_norm": 0.05, "warmup_steps": 2,
                 "schedule": "linear"}  # fmt: skip
    run = settings(llama, tmp_path, policy={"zero_stage": stage, "optimizer": optimizer, "tokens_per_micro_batch": 30})
    batch, config = training_batch(), config_of(llama, tmp_path, policy=run["policy"])
    splits = [[[half] if size == 1 else [half[:1], half[1:]] for half in HALVES][k % 2] for k in range(4)]
    arguments: dict[str, Any] = {
        "kind": "policy", "path": str(llama), "settings": run, "columns": as_columns(batch), "schedule": splits,
        "total_steps": 4,
    }  # fmt: skip
    result = trained(alone(), **arguments) if size == 1 else two_ranks.run(trained, **arguments)[0]
    assert [m["lr"] for m in result["metrics"]] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    expected = by_hand(llama, batch, [5e-3, 1e-2, 1e-2, 5e-3], config)
    moved = {n: torch.from_numpy(result["after"][n] - result["before"][n]) for n in expected}
    wanted = {n: w - torch.from_numpy(result["before"][n]) for n, w in expected.items()}
    assert plain.relative_difference(moved, wanted) < 1e-3
    for name, weight in expected.items():
        torch.testing.assert_close(torch.from_numpy(result["after"][name]), weight, rtol=0, atol=2e-5)
        assert torch.equal(torch.from_numpy(result["exported"][name]), torch.from_numpy(result["after"][name]))


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_nothing_to_learn_from(llama: Path, tmp_path: Path, kind: str) -> None:
    """An empty minibatch between two others leaves no trace: the weights afterwards are the same, bit for bit."""
    run = settings(llama, tmp_path, policy={"optimizer": {"lr": 1e-2, "warmup_steps": 10}},
                   critic={"optimizer": {"lr": 1e-2, "warmup_steps": 10}})  # fmt: skip
    batch = training_batch()
    first, nothing, last = parts_of([0, 1])[0], parts_of([3])[0], parts_of([2, 5])[0]
    with_empty, without = (make_role(alone(), kind, str(llama), run) for _ in range(2))
    a = with_empty.update(batch, [first, nothing, last], 1)
    b = without.update(batch, [first, last], 1)
    assert (a.pop("empty_minibatches"), b.pop("empty_minibatches")) == (1.0, 0.0)
    assert a == b and a["optimizer_steps"] == 2.0 and a["skipped_steps"] == 0.0
    assert with_empty.trainer.steps_done == without.trainer.steps_done == 2
    for name, weight in weights_of(with_empty).items():
        assert torch.equal(weight, weights_of(without)[name]), name
    before = weights_of(with_empty)
    only = with_empty.update(batch, [nothing], 2)
    assert only["empty_minibatches"] == 1.0 and only["optimizer_steps"] == 0.0
    assert all(torch.equal(w, before[n]) for n, w in weights_of(with_empty).items())


def poisoned(column: str, value: float) -> Any:
    """The batch with one response token's number spoilt."""
    batch = training_batch()
    spoilt = batch[column].clone()
    spoilt[torch.nonzero(batch["response_mask"])[4]] = value
    return batch.with_columns({column: spoilt})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_is_skipped(llama: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    """Also where only the loss is spoilt and its gradient would be 0, as with an old log-probability of NaN."""
    optimizer = {"lr": 1e-2, "max_skipped_steps": 3}
    config = config_of(llama, tmp_path, policy={"zero_stage": stage, "dtype": dtype, "optimizer": optimizer})
    role = PolicyTrainer(alone(), config, str(llama), 10)
    batch, step = training_batch(), parts_of(ALL)
    role.update(batch, step, 1)
    before = weights_of(role)
    for k, (column, value) in enumerate((("advantages", math.nan), ("old_logprobs", math.nan))):
        metrics = role.update(poisoned(column, value), step, 2 + k)
        assert (metrics["skipped_steps"], metrics["optimizer_steps"]) == (1.0, 0.0), column
        assert all(torch.equal(w, before[n]) for n, w in weights_of(role).items()), column
        assert role.trainer.steps_done == 1
        kept = torch.load(tmp_path / "skipped" / f"PolicyTrainer-step-{2 + k}-minibatch-0-rank-0.pt")
        assert torch.equal(kept["tokens"], batch["tokens"]) and not torch.isfinite(kept[column]).all()
    assert role.update(batch, step, 4)["optimizer_steps"] == 1.0, "a good step in between starts the count again"
    moved = [n for n, w in weights_of(role).items() if not torch.equal(w, before[n])]
    assert moved and all(torch.isfinite(w).all() for w in weights_of(role).values())
    bad = poisoned("advantages", math.inf)
    role.update(bad, step * 2, 5)
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps one after the other.*max_skipped_steps.*skipped"):
        role.update(bad, step, 6)


def test_a_critic_skips_too(llama: Path, tmp_path: Path) -> None:
    role = make_role(alone(), "critic", str(llama), settings(llama, tmp_path))
    before = weights_of(role)
    for column in ("returns", "values"):
        assert role.update(poisoned(column, math.nan), parts_of(ALL), 1)["skipped_steps"] == 1.0
        assert all(torch.equal(w, before[n]) for n, w in weights_of(role).items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_ranks_skip_what_one_cannot_compute(llama: Path, tmp_path: Path, stage: int, two_ranks: Ranks) -> None:
    run = settings(llama, tmp_path, policy={"zero_stage": stage, "optimizer": {"lr": 1e-2}})
    results = two_ranks.run(
        trained, kind="policy", path=str(llama), settings=run, columns=as_columns(poisoned("old_logprobs", math.nan)),
        schedule=[[[2, 3, 4], [0, 1, 5]]], total_steps=4,
    )  # fmt: skip
    for result in results:
        assert result["metrics"][0]["skipped_steps"] == 1.0 and result["steps_done"] == 0
        assert all((result["after"][n] == w).all() for n, w in result["before"].items())


@pytest.mark.parametrize(("kind", "stage", "dtype"), [
    ("policy", 1, "bfloat16"), ("policy", 2, "float32"), ("policy", 3, "float32"), ("critic", 2, "bfloat16"),
])  # fmt: skip
def test_going_on_from_a_file_is_going_on(llama: Path, tmp_path: Path, kind: str, stage: int, dtype: str) -> None:
    result = interrupted(alone(), **interruption(llama, tmp_path, kind, stage, dtype))
    check_interruption(result)


@pytest.mark.parametrize("stage", [1, 3])
def test_going_on_from_a_file_with_two_ranks(llama: Path, tmp_path: Path, stage: int, two_ranks: Ranks) -> None:
    results = two_ranks.run(interrupted, **interruption(llama, tmp_path, "policy", stage, "float32", ranks=2))
    for result in results:
        check_interruption(result)
    # Each rank says what it wrote, and together that is all there is.
    mine, its = (result["written"].keys() for result in results)
    folder = tmp_path / "policy-half"
    shards = {str(f.relative_to(folder)) for f in folder.rglob("*.pt")}
    assert mine | its == shards and not mine & its and len(shards) == (4 if stage == 3 else 3)


def interruption(path: Path, run_dir: Path, kind: str, stage: int, dtype: str, ranks: int = 1) -> dict[str, Any]:
    optimizer = {"lr": 1e-2, "warmup_steps": 1, "schedule": "cosine", "weight_decay": 0.1}
    role = {"zero_stage": stage, "dtype": dtype, "optimizer": optimizer, "tokens_per_micro_batch": 40}
    parts = [[half] if ranks == 1 else [half[:1], half[1:]] for half in HALVES * 2]
    return {"kind": kind, "path": str(path), "settings": settings(path, run_dir, policy=role, critic=role),
            "columns": as_columns(training_batch()), "parts": parts}  # fmt: skip


def check_interruption(result: dict[str, Any]) -> None:
    assert all(result["same"].values()), [name for name, same in result["same"].items() if not same]
    assert result["metrics"][0] == result["metrics"][1]
    assert result["steps"] == (4, 4)
    assert result["written"] and all(said == there for said, there in result["written"].values())


def test_a_file_for_another_number_of_ranks_is_refused(llama: Path, tmp_path: Path) -> None:
    role = make_role(alone(), "policy", str(llama), settings(llama, tmp_path))
    with pytest.raises(RuntimeError, match="saved by 0 ranks"):
        role.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("stage", [2, 3])
def test_gradient_checkpointing_changes_no_gradient(llama: Path, tmp_path: Path, stage: int) -> None:
    moved, passes = [], []
    for on in (False, True):
        policy = {"zero_stage": stage, "gradient_checkpointing": on, "optimizer": {"lr": 1e3, "eps": 1e3},
                  "logits_chunk_tokens": 9}  # fmt: skip
        role = PolicyTrainer(alone(), config_of(llama, tmp_path, policy=policy), str(llama), 10)
        count: list[int] = []
        role.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=count: seen.append(1))
        before = weights_of(role)
        role.update(training_batch(), parts_of(ALL), 1)
        moved.append({n: before[n] - w for n, w in weights_of(role).items()})
        passes.append(len(count))
    assert passes == [1, 2], "the layer is computed a second time in the backward pass"
    assert plain.relative_difference(moved[1], moved[0]) < 1e-5
