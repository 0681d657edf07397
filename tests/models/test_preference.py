"""Preference training: every loss against its definition in float64, for any division of the work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.actors.preference import PreferenceTrainer
from rayrlhf.actors.reference import ReferenceModel
from rayrlhf.batch import Batch
from rayrlhf.config.offline import PreferenceConfig
from tests.models import plain
from tests.models.making import GRADIENT_SCALE, LINEAR_ADAM, alone, parts_of
from tests.models.pairs import labelled_batch, offline_settings, pair_batch
from tests.models.rank_cases import as_columns, interrupted, make_role, single_steps, weights_of
from tests.models.ranks import Ranks

ALL = list(range(12))
HALF = [[0, 1, 6, 7], [10, 11, 2, 3, 8, 9, 4, 5]]
BETA = 0.7
DPO = {"beta": BETA, "label_smoothing": 0.2, "simpo_margin": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6}
ORDER = {"budget": 1000, "packing": False}


def settings(path: Path, run_dir: Path, loss: str, **policy: Any) -> dict[str, Any]:
    dpo = {**DPO, "loss": loss}
    if loss not in ("conservative", "robust"):
        dpo.pop("label_smoothing")
    return offline_settings("dpo", path, run_dir, policy=policy, dpo=dpo)


def sums(lm: Any, batch: Batch) -> list[tuple[Tensor, float, int]]:
    """For each sample log p and log p_ref of its response, summed, and its number of tokens."""
    found = []
    for i in range(len(batch)):
        logprobs, _ = plain.logprobs_and_entropies(lm, torch.tensor(plain.column(batch, "tokens", i)), 1.0)
        mask, reference = (plain.column(batch, name, i) for name in ("response_mask", "reference_logprobs"))
        total = sum(p for p, m in zip(logprobs, mask, strict=True) if m)
        found.append((total, sum(r for r, m in zip(reference, mask, strict=True) if m), sum(mask)))
    return found  # type: ignore[return-value]


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def log_odds(mean: Tensor) -> Tensor:
    return mean - torch.log(1 - torch.exp(mean))


def pair_definition(kind: str, chosen: tuple, rejected: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one pair, and the two rewards, as the papers write them."""
    (w, ref_w, n_w), (l, ref_l, n_l) = chosen, rejected  # noqa: E741
    if kind in ("simpo", "orpo"):
        a, b = w / n_w, l / n_l
    elif kind in ("ipo", "length_normalized"):
        a, b = (w - ref_w) / n_w, (l - ref_l) / n_l
    else:
        a, b = w - ref_w, l - ref_l
    h = BETA * (a - b)
    losses = {
        "sigmoid": lambda: -log_sigmoid(h),
        "conservative": lambda: -0.8 * log_sigmoid(h) - 0.2 * log_sigmoid(-h),
        "robust": lambda: (-0.8 * log_sigmoid(h) + 0.2 * log_sigmoid(-h)) / 0.6,
        "hinge": lambda: torch.clamp(1 - h, min=0),
        "ipo": lambda: (a - b - 1 / (2 * BETA)) ** 2,
        "simpo": lambda: -log_sigmoid(h - 0.3),
        "orpo": lambda: -a - BETA * log_sigmoid(log_odds(a) - log_odds(b)),
        "length_normalized": lambda: -log_sigmoid(h),
    }
    return losses[kind](), BETA * a, BETA * b


def steps(
    kind: str, batch: Batch, path: Path, run: dict[str, Any], cases: list[dict[str, Any]], ranks: Ranks | None
) -> list[dict[str, Any]]:
    arguments = {"kind": kind, "path": str(path), "settings": run, "columns": as_columns(batch), "cases": cases}
    return single_steps(alone(), **arguments) if ranks is None else ranks.run(single_steps, **arguments)[0]


def check(results: list[dict[str, Any]], lm: Any, loss: Tensor, metrics: dict[str, float]) -> None:
    expected = plain.gradients(lm, loss)
    for k, result in enumerate(results):
        moved = {name: torch.from_numpy(m) / GRADIENT_SCALE for name, m in result["moved"].items()}
        assert plain.relative_difference(moved, expected) < 1e-5, f"case {k}"
        for name, value in {"loss": float(loss.detach()), **metrics}.items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (k, name)


def expected_of_pairs(kind: str, lm: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    each = sums(lm, batch)
    found = [pair_definition(kind, *pair) for pair in zip(each[0::2], each[1::2], strict=True)]
    chosen, rejected = (torch.stack([f[k].detach() for f in found]) for k in (1, 2))
    metrics = {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": float((chosen > rejected).double().mean()),
        "logps/chosen": float(torch.stack([e[0] for e in each[0::2]]).detach().mean()),
        "logps/rejected": float(torch.stack([e[0] for e in each[1::2]]).detach().mean()),
    }
    if kind == "orpo":
        metrics["nll_loss"] = float(-torch.stack([e[0] / e[2] for e in each[0::2]]).detach().mean())
    return torch.stack([f[0] for f in found]).mean(), metrics


KINDS = ["sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo", "length_normalized"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_is_its_definition(llama: Path, tmp_path: Path, kind: str) -> None:
    """One micro-batch or several, prompts shared or packed rows, in another order of the pairs."""
    run = settings(llama, tmp_path, kind, optimizer=LINEAR_ADAM, logits_chunk_tokens=7)
    cases = [
        {"budget": 1000, "packing": False, "parts": [ALL]},
        {"budget": 40, "packing": False, "parts": [[10, 11, 2, 3, 8, 9, 4, 5, 0, 1, 6, 7]]},
        {"budget": 60, "packing": True, "parts": [ALL]},
    ]
    lm = plain.plain_lm(llama)
    results = steps("preference", pair_batch(), llama, run, cases, None)
    check(results, lm, *expected_of_pairs(kind, lm, pair_batch()))
    assert results[0]["micro_batches"] == 1 and results[1]["micro_batches"] > 2


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sigmoid", "orpo"])
def test_two_ranks(llama: Path, tmp_path: Path, kind: str, stage: int, two_ranks: Ranks) -> None:
    run = settings(llama, tmp_path, kind, optimizer=LINEAR_ADAM, zero_stage=stage)
    cases = [{**ORDER, "parts": HALF}, {"budget": 30, "packing": False, "parts": HALF}, {**ORDER, "parts": [[], ALL]}]
    lm = plain.plain_lm(llama)
    results = steps("preference", pair_batch(), llama, run, cases, two_ranks)
    check(results, lm, *expected_of_pairs(kind, lm, pair_batch()))


@pytest.mark.parametrize(("stage", "size"), [(1, 1), (3, 1), (2, 2), (3, 2)])
def test_kto(llama: Path, tmp_path: Path, stage: int, size: int, two_ranks: Ranks) -> None:
    """z_0 is that of all mismatched samples of the step, whichever rank has them."""
    batch, lm = labelled_batch(), plain.plain_lm(llama)
    each = sums(lm, batch)
    ratios = torch.stack([logp - reference for logp, reference, _ in each])
    z_0 = float(ratios[6:].detach().mean())
    assert z_0 > 0.1, "the clamp isn't at work"
    liked = batch["desirable"][:6]
    loss = torch.stack([
        1.3 * (1 - torch.sigmoid(BETA * (r - z_0))) if good else 0.6 * (1 - torch.sigmoid(BETA * (z_0 - r)))
        for r, good in zip(ratios[:6], liked, strict=True)
    ]).mean()  # fmt: skip
    rewards = BETA * ratios[:6].detach()
    metrics = {
        "kl": z_0,
        "rewards/chosen": float(rewards[liked].mean()),
        "rewards/rejected": float(rewards[~liked].mean()),
        "rewards/margins": float(rewards[liked].mean() - rewards[~liked].mean()),
        "rewards/accuracies": float(((rewards > BETA * z_0) == liked).double().mean()),
        "logps/chosen": sum(float(e[0]) for e, good in zip(each, liked, strict=False) if good) / 3,
    }
    split = [ALL] if size == 1 else [[0, 4, 7, 8, 11], [1, 2, 3, 5, 6, 9, 10]]
    other = [ALL[::-1]] if size == 1 else [[6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5]]
    run = settings(llama, tmp_path, "kto", optimizer=LINEAR_ADAM, zero_stage=stage)
    cases = [{**ORDER, "parts": split}, {"budget": 25, "packing": False, "parts": other}]
    check(steps("preference", batch, llama, run, cases, two_ranks if size == 2 else None), lm, loss, metrics)


def test_kto_where_the_mismatched_samples_have_become_less_likely(llama: Path, tmp_path: Path) -> None:
    """Then z_0 is 0, not below; and nothing of them is trained on."""
    batch = labelled_batch()
    raised = torch.where(batch["response_mask"], batch["reference_logprobs"] + 3.0, 0.0)
    role = make_role(alone(), "preference", str(llama), settings(llama, tmp_path, "kto"))
    found = role.update(batch.with_columns({"reference_logprobs": raised}), parts_of(ALL), 1)
    assert found["kl"] == 0.0 and found["optimizer_steps"] == 1.0


def own_reference(role: PreferenceTrainer, batch: Batch) -> Batch:
    return batch.with_columns({"reference_logprobs": role.token_logprobs(batch, temperature=1.0)["old_logprobs"]})


@pytest.mark.parametrize(("kind", "at_start"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("kto", None)])
def test_at_the_start_policy_and_reference_are_one(llama: Path, tmp_path: Path, kind: str, at_start: float) -> None:
    """Reference log-probabilities from the reference role, live, or from the policy itself."""
    config = PreferenceConfig.model_validate(settings(llama, tmp_path, kind))
    batch = labelled_batch() if kind == "kto" else pair_batch()
    live = ReferenceModel(alone(), config.model_copy(update={"reference": config.reference.model_copy(
        update={"dtype": "float32"})}), str(llama))  # fmt: skip
    role = PreferenceTrainer(alone(), config, str(llama), 10)
    cached = own_reference(role, batch)
    column = live.token_logprobs(batch, temperature=1.0)["reference_logprobs"]
    torch.testing.assert_close(column, cached["reference_logprobs"], rtol=0, atol=1e-6)
    found = role.update(cached, parts_of(ALL), 1)
    expected = at_start if at_start is not None else (3 * 1.3 + 3 * 0.6) / 6 / 2
    assert found["loss"] == pytest.approx(expected, abs=3e-6)
    assert found["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_beta_can_be_changed(llama: Path, tmp_path: Path) -> None:
    role = make_role(alone(), "preference", str(llama), settings(llama, tmp_path, "sigmoid", optimizer={"lr": 1e-12}))
    assert isinstance(role, PreferenceTrainer)
    plainly, more, again = (role.update(pair_batch(), parts_of(ALL), 1, **b) for b in ({}, {"beta": 1.4}, {}))
    assert more["rewards/margins"] == pytest.approx(2 * plainly["rewards/margins"], rel=1e-4)
    assert again["rewards/margins"] == pytest.approx(plainly["rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 16.0}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_margins_grow(llama: Path, tmp_path: Path, dtype: str, lora: dict[str, Any] | None) -> None:
    """With LoRA the reference is the policy without its adapters: bit for bit the same before and after."""
    run = settings(llama, tmp_path, "sigmoid", dtype=dtype, lora=lora, optimizer={"lr": 3e-3})
    role = make_role(alone(), "preference", str(llama), run, 20)
    assert isinstance(role, PreferenceTrainer)
    batch = own_reference(role, pair_batch())
    before = weights_of(role)
    found = [role.update(batch, parts_of(ALL), k + 1) for k in range(20)]
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5 if dtype == "float32" else 0.05)
    assert found[-1]["rewards/margins"] > 2.0 and found[-1]["rewards/accuracies"] == 1.0
    if lora:
        off = role.token_logprobs(batch, adapters=False, temperature=1.0)["reference_logprobs"]
        assert torch.equal(off, batch["reference_logprobs"])
        moved = {n for n, w in weights_of(role).items() if not torch.equal(w, before[n])}
        assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("size", [1, 2])
def test_going_on_from_a_file(llama: Path, tmp_path: Path, size: int, two_ranks: Ranks) -> None:
    halves = ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    parts = [[half] if size == 1 else [half[:2], half[2:]] for half in halves] * 2
    run = settings(llama, tmp_path, "sigmoid", optimizer={"lr": 1e-3, "schedule": "linear"}, zero_stage=2)
    arguments: dict[str, Any] = {
        "kind": "preference", "path": str(llama), "settings": run, "columns": as_columns(pair_batch()), "parts": parts,
    }  # fmt: skip
    results = [interrupted(alone(), **arguments)] if size == 1 else two_ranks.run(interrupted, **arguments)
    for result in results:
        assert all(result["same"].values()) and result["metrics"][0] == result["metrics"][1]
