"""Training on examples from configuration to model: learning, validation, early stopping, resume, guards, gates."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch

from rayrlhf.cluster.session import ray_session
from rayrlhf.config import ClusterConfig
from rayrlhf.errors import InputRefused, RunFailed
from tests.drivers.offline_runs import OfflineWorld
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> OfflineWorld:
    folder = tmp_path_factory.mktemp("offline")
    save_tiny_model(folder / "model")
    return OfflineWorld(folder)


@pytest.fixture(scope="module")
def sft(world: OfflineWorld):
    return world.train("sft", "sft")


@pytest.fixture(scope="module")
def dpo(world: OfflineWorld):
    return world.train("dpo", "dpo")


# -- supervised fine-tuning -----------------------------------------------------------------------------------------


def test_sft_learns_and_keeps_the_best_model(sft) -> None:
    first, *_, last = sft.evaluations
    assert first["step"] == 0 and last["nll"] < first["nll"] - 0.5
    assert last["perplexity"] == pytest.approx(math.exp(last["nll"]))
    assert [row["step"] for row in sft.metrics] == list(range(1, 13))  # 48 examples, 8 a step, 2 epochs
    assert sft.metrics[0]["loss"] == pytest.approx(first["nll"], rel=0.1), "training and validation measure the same"


def test_the_saved_model_has_the_validations_likelihood(world: OfflineWorld, sft) -> None:
    from transformers import AutoModelForCausalLM

    from rayrlhf.config import load_config
    from rayrlhf.data import load_examples
    from rayrlhf.models.tokenizer import load_tokenizer

    config = load_config(world.folder / "sft.yaml")
    tokenizer = load_tokenizer(str(world.folder / "model"))
    held_out = load_examples(config.data, tokenizer, seed=config.seed).validation
    model = AutoModelForCausalLM.from_pretrained(sft.folder / "model").eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in held_out:
            logprobs = torch.log_softmax(model(example.tokens[None]).logits[0].double(), -1)
            for t in torch.nonzero(example.mask).flatten().tolist():
                total -= float(logprobs[t - 1, example.tokens[t]])
                count += 1
    best = min(row["nll"] for row in sft.evaluations)
    assert total / count == pytest.approx(best, abs=1e-5)


def test_sft_goes_on_as_if_it_had_not_been_interrupted(world: OfflineWorld, sft) -> None:
    folder = world.copy(sft, "again")
    for step in (6, 9, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}", ignore_errors=True)
    again = world.train("again", "sft", resume=True)
    assert again.numbers == sft.numbers and again.evaluations == sft.evaluations
    assert again.same_weights(sft)


def test_early_stopping_ends_the_run_and_gives_the_best_model(world: OfflineWorld) -> None:
    sections = {
        "training": {"epochs": 30, "patience": 2, "validate_every_steps": 2},
        "policy": {"optimizer": {"lr": 0.1}},
    }
    run = world.train("stopped", "sft", sections)
    losses = [row["nll"] for row in run.evaluations]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 and len(run.metrics) < 180
    assert "stopping: 2 validations without a better one" in run.printed
    assert "the best validation" in run.printed


# -- reward models --------------------------------------------------------------------------------------------------


def test_a_reward_model_learns_is_normalised_and_scores_for_ppo(world: OfflineWorld) -> None:
    run = world.train("scorer", "reward_model", {"training": {"epochs": 4}})
    first, *_, last = run.evaluations
    assert first["accuracy"] == 0.5 and first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["accuracy"] > 0.9 and last["margin"] > 0.5 and 0 <= last["ece"] <= 1
    from rayrlhf.config import load_config
    from rayrlhf.config.trainers import ModelConfig
    from rayrlhf.data import load_pairs, pair_batch
    from rayrlhf.models.layout import micro_batches
    from rayrlhf.models.loading import load_reward_model
    from rayrlhf.models.tokenizer import load_tokenizer

    config = load_config(world.folder / "scorer.yaml")
    held_out = load_pairs(config.data, load_tokenizer(str(run.folder / "model")), seed=config.seed).validation
    model = load_reward_model(str(run.folder / "model"), ModelConfig(dtype="float32"), dtype=torch.float32)
    batch = pair_batch(held_out)
    scores = torch.zeros(len(batch))
    with torch.no_grad():
        for micro in micro_batches(batch, 256, False, None):
            scores[micro.samples] = model(micro)[1]
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4) and float(scores.std()) == pytest.approx(1.0, abs=1e-4)
    best = max(row["accuracy"] for row in run.evaluations)
    assert float((scores[0::2] > scores[1::2]).float().mean()) == pytest.approx(best)
    failures = (run.folder / "failures.jsonl").read_text().splitlines()
    assert len(failures) == round((1 - best) * len(held_out))


# -- preferences ----------------------------------------------------------------------------------------------------


def test_dpo_begins_at_ln_2_and_learns(dpo) -> None:
    first, *_, last = dpo.evaluations
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-6
    )
    assert first["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert dpo.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["rewards/margins"] > 0.3 and last["rewards/accuracies"] > 0.9 and last["loss"] < 0.6
    assert last["kl_per_token"] > 0.001
    gates = json.loads((dpo.folder / "gates.json").read_text())["gates"]
    assert [g["name"] for g in gates] == ["kl", "margin_positive", "margin_rising", "validation_better"]
    assert all(g["passed"] for g in gates)


def test_a_live_reference_gives_the_same_run_as_a_cached_one(world: OfflineWorld, dpo) -> None:
    live = world.train("live", "dpo", {"dpo": {"reference": "live"}})
    assert live.same_weights(dpo)
    assert (dpo.folder / "reference_logprobs.pt").exists() and not (live.folder / "reference_logprobs.pt").exists()


def test_a_cache_of_another_reference_is_refused(world: OfflineWorld, dpo) -> None:
    folder = world.copy(dpo, "stale")
    stored = torch.load(folder / "reference_logprobs.pt", weights_only=True)
    stored["fingerprint"]["reference model"] = "another"
    torch.save(stored, folder / "reference_logprobs.pt")
    with pytest.raises(InputRefused, match="log-probabilities of another reference model"):
        world.train("stale", "dpo", resume=True)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("conservative", {"label_smoothing": 0.1}),
    ("robust", {"label_smoothing": 0.1}),
    ("hinge", {}),
    ("ipo", {}),
    ("simpo", {"beta": 2.0, "simpo_margin": 1.0}),
    ("orpo", {}),
    ("length_normalized", {"beta": 1.0}),
]


@pytest.mark.parametrize(("loss", "keys"), VARIANTS)
def test_every_loss_raises_the_margin(world: OfflineWorld, loss: str, keys: dict[str, Any]) -> None:
    sections = {"dpo": {"loss": loss, **keys}, "training": {"max_steps": 6, "validate_every_steps": 6}}
    if loss in ("simpo", "orpo"):
        sections["guard"] = {"actions": ["halve_lr"]}
    run = world.train(f"loss-{loss}", "dpo", sections)
    first, last = run.evaluations[0], run.evaluations[-1]
    assert last["rewards/margins"] > first["rewards/margins"] and last["loss"] < first["loss"]


def test_kto_takes_labelled_completions(world: OfflineWorld) -> None:
    sections = {
        "dpo": {"loss": "kto", "reference": "live"},
        "data": {"train": str(world.folder / "labelled.jsonl")},
        "training": {"max_steps": 8, "validate_every_steps": 8},
    }
    run = world.train("kto", "dpo", sections)
    first, last = run.evaluations[0], run.evaluations[-1]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6), "sigmoid(0) for both kinds"
    assert last["rewards/margins"] > 0.05 and last["loss"] < first["loss"]


def test_the_guard_acts_in_order_and_the_best_is_within_the_bound(world: OfflineWorld) -> None:
    sections = {
        "guard": {"max_kl": 0.05},
        "training": {"epochs": 4, "validate_every_steps": 2},
        "policy": {"optimizer": {"lr": 1e-2}},
    }
    try:
        world.train("guarded", "dpo", sections)
    except RunFailed as failed:
        assert "quality gate" in str(failed)
    printed = world.printed
    places = [printed.find(word) for word in ("halve_lr", "raise_beta", "roll_back")]
    assert -1 not in places and places == sorted(places)
    rows = [json.loads(line) for line in (world.folder / "guarded" / "evaluations.jsonl").read_text().splitlines()]
    within = [row for row in rows if row["kl_per_token"] <= 0.05]
    gates = json.loads((world.folder / "guarded" / "gates.json").read_text())
    assert gates["step"] == max(within, key=lambda row: row["rewards/margins"])["step"]


def test_a_run_that_learns_the_wrong_thing_fails_its_gate(world: OfflineWorld) -> None:
    rows = [json.loads(line) for line in (world.folder / "pairs.jsonl").read_text().splitlines()]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:32]]
    (world.folder / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swapped))
    (world.folder / "right.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[32:]))
    sections = {
        "data": {
            "train": str(world.folder / "swapped.jsonl"),
            "validation": str(world.folder / "right.jsonl"),
            "validation_fraction": 0.05,
        },
        "training": {"keep_best": False},
    }
    with pytest.raises(RunFailed, match="quality gate isn't passed: margin_positive"):
        world.train("wrong", "dpo", sections)
    assert (world.folder / "wrong" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("algorithm", ["sft", "reward_model", "dpo"])
def test_lora(world: OfflineWorld, algorithm: str) -> None:
    sections: dict[str, Any] = {"policy": {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}}}
    sections["policy"]["optimizer"] = {"lr": 2e-2}
    if algorithm == "dpo":
        sections["reference"] = "default"
    run = world.train(f"lora-{algorithm}", algorithm, sections)
    assert (
        run.evaluations[-1]["loss" if algorithm != "sft" else "nll"]
        < run.evaluations[0]["loss" if algorithm != "sft" else "nll"]
    )


# -- on Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_once():
    """One Ray for all tests of this file; runs use it and leave it."""
    with ray_session(ClusterConfig()):
        yield


RAY = "cluster.executor=ray"
SHORT = {"training": {"max_steps": 3, "validate_every_steps": 3}}


@pytest.mark.parametrize("algorithm", ["sft", "reward_model", "dpo"])
def test_two_ranks_on_ray_train_as_one_inline(world: OfflineWorld, ray_once, algorithm: str) -> None:
    one = world.train(f"one-{algorithm}", algorithm, SHORT)
    more = ("reference.ranks=2", "rollout.engine=vllm") if algorithm == "dpo" else ()
    stage = {"sft": 1, "reward_model": 2, "dpo": 3}[algorithm]
    two = world.train(f"two-{algorithm}", algorithm, SHORT, RAY, "policy.ranks=2", f"policy.zero_stage={stage}", *more)
    for mine, theirs in zip(two.numbers, one.numbers, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if name == "rewards/accuracies" and abs(theirs["rewards/margins"]) < 1e-5:
                continue  # the sign of rounding errors
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for mine, theirs in zip(two.evaluations, one.evaluations, strict=True):
        key = "nll" if algorithm == "sft" else "loss"
        assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
        # The engines sample other responses than transformers does, once the weights have moved.
        if algorithm == "dpo" and mine["step"] == 0:
            assert mine["kl_per_token"] == pytest.approx(0, abs=1e-5)
    for name, weight in two.weights.items():
        torch.testing.assert_close(weight, one.weights[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_kl_that_is_not_finite_is_beyond_the_bound(world: OfflineWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.drivers.preference_validation.sampled_kl", lambda run, data: math.nan)
    sections = {"training": {"max_steps": 2, "validate_every_steps": 1}}
    with pytest.raises(RunFailed, match="quality gate isn't passed: kl: KL nan"):
        world.train("not-finite", "dpo", sections)
    assert "halve_lr" in world.printed
