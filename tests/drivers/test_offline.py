"""Training on examples from configuration to model: learning, validation, early stopping, resume, guards, gates."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.batch import Batch
from rayrlhf.config.offline import DPOConfig
from rayrlhf.drivers import preference_validation
from rayrlhf.drivers import sft as sft_loop
from rayrlhf.drivers.offline import OfflineRun
from rayrlhf.drivers.preference_validation import of_labelled
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


def strict_rows(file) -> list[dict[str, Any]]:
    """Lines as any reader of JSON takes them, who knows no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


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


def test_an_interrupted_validation_is_made_on_resume(world: OfflineWorld, sft, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step counts already: without it the run would end without its last validation, guard, and gate."""
    validate = sft_loop.validate

    def interrupted(run):
        if run.state.step == 12:
            raise KeyboardInterrupt
        validate(run)

    with monkeypatch.context() as patched:
        patched.setattr(sft_loop, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.train("last-validation", "sft")
    again = world.train("last-validation", "sft", resume=True)
    assert again.evaluations == sft.evaluations and again.same_weights(sft)


def test_what_the_last_checkpoint_names_stays_kept(world: OfflineWorld, sft, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in step 9: the checkpoint of step 6 has step 4 as its best, though step 8 has been better since."""
    finish = OfflineRun.finish_step

    def dies(run, metrics, batch):
        if run.state.step == 8:
            raise RuntimeError("killed")
        finish(run, metrics, batch)

    monkeypatch.setattr(OfflineRun, "finish_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        world.train("killed", "sft")
    assert kept(world.folder / "killed") == {"step-4", "step-8"}
    assert "the run ends with RuntimeError: killed" in (world.folder / "killed" / "log.txt").read_text()
    monkeypatch.undo()
    again = world.train("killed", "sft", resume=True)
    assert again.same_weights(sft) and kept(again.folder) == {"step-12"}


def kept(folder) -> set[str]:
    return {path.name for path in (folder / "kept").iterdir()}


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


def test_a_run_that_only_gets_worse_gives_back_the_model_it_began_with(world: OfflineWorld) -> None:
    sections = {"training": {"max_steps": 4, "validate_every_steps": 2}, "policy": {"optimizer": {"lr": 3.0}}}
    run = world.train("worse", "sft", sections)
    assert "the final model is that of step 0, with which training began" in run.printed
    before = load_file(world.folder / "model" / "model.safetensors")
    assert all(torch.equal(run.weights[name], weight) for name, weight in before.items())


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


def test_a_reward_model_whose_tokenizer_pads_with_eos_takes_batches_by_transformers(world: OfflineWorld) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(world.folder / "padding")
    sections = {
        "policy": {"tokenizer": str(world.folder / "padding")},
        "training": {"max_steps": 2, "validate_every_steps": 2},
    }
    run = world.train("padded", "reward_model", sections)
    assert "note: the reward model's padding token is <bos>: the tokenizer pads with its EOS" in run.printed
    again = AutoTokenizer.from_pretrained(run.folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").eval()
    texts = ["w1 w2 w3 <eos>", "w4 <eos>"]
    with torch.no_grad():
        together = model(**again(texts, padding=True, return_tensors="pt")).logits[:, 0]
        alone = torch.stack([model(**again(text, return_tensors="pt")).logits[0, 0] for text in texts])
        cut = model(**again("w4", return_tensors="pt")).logits[0, 0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert abs(float(alone[1] - cut)) > 1e-3, "it is read at EOS"


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
    ratios, mismatched, desirable = log_ratios(world, run)
    z_0 = max(sum(mismatched) / len(mismatched), 0.0)
    right = [r > z_0 if good else r < z_0 for r, good in zip(ratios, desirable, strict=True)]
    assert last["rewards/accuracies"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right), "or it would say nothing"


def test_ktos_accuracy_is_about_z_0() -> None:
    """Log-ratios 0.5, 0.1 (desirable), 0.1, 0.2 (not) about z_0 = 0.3: the second one lies on the wrong side."""
    samples = Batch.from_samples({"tokens": [torch.tensor([1])] * 6}).with_columns(
        sample={
            "desirable": torch.tensor([True, True, False, False, True, True]),
            "mismatched": torch.tensor([False] * 4 + [True] * 2),
        }
    )
    ratios, reference = torch.tensor([0.5, 0.1, 0.1, 0.2, 0.4, 0.2]).double(), torch.full((6,), -3.0).double()
    run: Any = SimpleNamespace(config=SimpleNamespace(dpo=DPOConfig(loss="kto", beta=0.5)))
    found = of_labelled(run, samples, reference + ratios, reference)
    assert found["rewards/accuracies"] == 0.75 and found["examples"] == 4
    assert found["rewards/margins"] == pytest.approx(0.5 * (0.3 - 0.15))


def log_ratios(world: OfflineWorld, run) -> tuple[list[float], list[float], list[bool]]:
    """Of the held-out examples: log p_policy - log p_reference of the completion, by transformers, and of the next
    example's completion behind the same prompt; and whether it is a desirable one."""
    from transformers import AutoModelForCausalLM

    from rayrlhf.config import load_config
    from rayrlhf.data import load_labelled
    from rayrlhf.models.tokenizer import load_tokenizer

    config = load_config(world.folder / f"{run.folder.name}.yaml")
    tokenizer = load_tokenizer(str(world.folder / "model"))
    held_out = load_labelled(config.data, tokenizer, seed=config.seed).validation
    models = [AutoModelForCausalLM.from_pretrained(p).eval() for p in (run.folder / "model", world.folder / "model")]

    def ratio(prompt: torch.Tensor, completion: torch.Tensor) -> float:
        tokens = torch.cat([prompt, completion])
        sums = []
        for model in models:
            with torch.no_grad():
                rows = torch.log_softmax(model(tokens[None]).logits[0].double(), -1)
            sums.append(sum(float(rows[t - 1, tokens[t]]) for t in range(len(prompt), len(tokens))))
        return sums[0] - sums[1]

    parts = [(e.tokens[~e.mask], e.tokens[e.mask]) for e in held_out]
    own = [ratio(*part) for part in parts]
    others = [ratio(parts[k][0], parts[(k + 1) % len(parts)][1]) for k in range(len(parts))]
    return own, others, [bool(e.desirable) for e in held_out]


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
    best = max(within, key=lambda row: row["rewards/margins"])["step"]
    assert gates["step"] == best != rows[-1]["step"]
    assert json.loads((world.folder / "guarded" / "model_step.json").read_text()) == {"kept_step": best}
    assert kept(world.folder / "guarded") == {f"step-{step}" for step in (best, within[-1]["step"])}


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
    last = json.loads((world.folder / "wrong" / "evaluations.jsonl").read_text().splitlines()[-1])["step"]
    assert json.loads((world.folder / "wrong" / "model_step.json").read_text()) == {"kept_step": last}


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


SHORT = {"training": {"max_steps": 3, "validate_every_steps": 3}}


def test_two_ranks_on_ray_train_as_one_inline(world: OfflineWorld) -> None:
    one = world.train("one-rank", "dpo", SHORT)
    more = ("policy.ranks=2", "policy.zero_stage=3", "reference.ranks=2", "rollout.engine=vllm")
    two = world.train("two-ranks", "dpo", SHORT, "cluster.executor=ray", *more)
    for mine, theirs in zip(two.numbers, one.numbers, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if name == "rewards/accuracies" and abs(theirs["rewards/margins"]) < 1e-5:
                continue  # the sign of rounding errors
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for mine, theirs in zip(two.evaluations, one.evaluations, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        # The engines sample other responses than transformers does, once the weights have moved.
        if mine["step"] == 0:
            assert mine["kl_per_token"] == pytest.approx(0, abs=1e-5)
    for name, weight in two.weights.items():
        torch.testing.assert_close(weight, one.weights[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_kl_that_is_not_finite_is_beyond_the_bound(world: OfflineWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrlhf.drivers.preference_validation.sampled_kl", lambda *_: {"kl_per_token": math.nan})
    sections = {"training": {"max_steps": 2, "validate_every_steps": 1}}
    with pytest.raises(RunFailed, match="quality gate isn't passed: kl: KL nan"):
        world.train("not-finite", "dpo", sections)
    assert "halve_lr" in world.printed
    rows = strict_rows(world.folder / "not-finite" / "evaluations.jsonl")
    assert [row["kl_per_token"] for row in rows] == [None] * 3
    assert all(row["non_finite"] == {"kl_per_token": "nan"} for row in rows)
    page = (world.folder / "not-finite" / "report.html").read_text()
    assert "quality gate" in page and "KL nan" in page, "a run that failed has its report too"


@pytest.mark.parametrize("how, after_the_first", [("start", False), ("always", True)])
def test_the_engines_weights_are_verified_as_configured(
    world: OfflineWorld, monkeypatch: pytest.MonkeyPatch, how: str, after_the_first: bool
) -> None:
    told, transfer = [], preference_validation.transfer_weights

    def noting(policy, rollout, version, verify):
        told.append(verify)
        return transfer(policy, rollout, version, verify)

    monkeypatch.setattr(preference_validation, "transfer_weights", noting)
    settings = {"training": {"epochs": 1, "validate_every_steps": 3}}
    done = world.train(f"verify-{how}", "dpo", settings, f"rollout.verify_weights={how}")
    assert len(told) == len(done.evaluations) > 1
    assert told[0] and set(told[1:]) == {after_the_first}


def test_a_kl_that_is_not_measured_is_null_and_no_gate(world: OfflineWorld) -> None:
    sections = {
        "rollout": "default",
        "guard": {"max_kl": None, "kl_prompts": 0},
        "training": {"max_steps": 4, "validate_every_steps": 4},
    }
    run = world.train("no-kl", "dpo", sections)
    rows = strict_rows(run.folder / "evaluations.jsonl")
    assert [row["kl_per_token"] for row in rows] == [None, None] and not any("non_finite" in row for row in rows)
    gates = json.loads((run.folder / "gates.json").read_text())["gates"]
    assert [g["name"] for g in gates] == ["margin_positive", "margin_rising", "validation_better"]
    assert "KL" not in "".join(line for line in run.printed.splitlines() if "validation on" in line)


# -- what every run leaves ------------------------------------------------------------------------------------------


def test_every_run_leaves_a_report(world: OfflineWorld, sft, dpo) -> None:
    for run in (sft, dpo):
        page = (run.folder / "report.html").read_text()
        assert run.folder.name in page and "<svg" in page
        assert f"The report: {run.folder / 'report.html'}" in run.printed


def test_a_report_that_cannot_be_written_is_a_warning(world: OfflineWorld) -> None:
    (world.folder / "no-report" / "report.html").mkdir(parents=True)
    run = world.train("no-report", "sft", {"training": {"max_steps": 2, "validate_every_steps": 2}})
    assert "warning: no report.html: InputRefused" in run.printed and "The report:" not in run.printed
    assert (run.folder / "model" / "model.safetensors").exists()
