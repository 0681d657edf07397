"""Reward models: the pair loss against its definition, scores by Hugging Face, and the folder that is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.actors.reward_trainer import RewardModelTrainer
from rayrlhf.batch import Batch
from rayrlhf.config.offline import RewardModelConfig
from rayrlhf.config.trainers import ModelConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.layout import micro_batches
from rayrlhf.models.loading import load_critic, load_reward_model
from tests.models import plain
from tests.models.making import GRADIENT_SCALE, LINEAR_ADAM, alone, config_of, parts_of
from tests.models.pairs import MARGINS, offline_settings, pair_batch
from tests.models.rank_cases import as_columns, interrupted, save_and_export, single_steps
from tests.models.ranks import Ranks

ALL = list(range(12))


def settings(path: Path, run_dir: Path, keys: dict[str, Any] | None = None, **policy: Any) -> dict[str, Any]:
    return offline_settings("reward_model", path, run_dir, policy=policy, reward_model=keys or {})


def trainer(path: Path, run_dir: Path, **policy: Any) -> RewardModelTrainer:
    config = RewardModelConfig.model_validate(settings(path, run_dir, **policy))
    return RewardModelTrainer(alone(), config, str(path), 100)


def definition(scalar: torch.nn.Module, batch: Batch, margins: bool, center: float) -> tuple[Tensor, list[Tensor]]:
    """-log sigma(s_w - s_l - m) + c (s_w + s_l)^2, the mean over the pairs, in float64."""
    module: Any = scalar
    scores = []
    for start, end in batch.spans():
        states = module.backbone(input_ids=batch["tokens"][None, start:end]).last_hidden_state[0].double()
        scores.append((states[-1] * module.head.weight[0]).sum() + module.head.bias[0])
    total = torch.zeros((), dtype=torch.float64)
    for k, (w, l) in enumerate(zip(scores[0::2], scores[1::2], strict=True)):  # noqa: E741
        m = 0.0 if not margins or math.isnan(MARGINS[k]) else MARGINS[k]
        total = total + torch.log(1 + torch.exp(-(w - l - m))) + center * (w + l) ** 2
    return total / 6, scores


@pytest.mark.parametrize(("stage", "size"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)])
def test_one_step_is_the_gradient_of_the_definition(
    llama: Path, scorer: Path, tmp_path: Path, stage: int, size: int, two_ranks: Ranks
) -> None:
    """From a reward model over the llama: with a head of 0 the backbone would have no gradient."""
    margins = stage != 1
    run = settings(scorer, tmp_path, {"margin": margins, "center_coef": 0.05}, optimizer=LINEAR_ADAM, zero_stage=stage)
    half = [ALL] if size == 1 else [[0, 1, 6, 7], [10, 11, 2, 3, 8, 9, 4, 5]]
    cases = [
        {"budget": 1000, "packing": False, "parts": half},
        {"budget": 30, "packing": False, "parts": half},
        {"budget": 60, "packing": True, "parts": [ALL] if size == 1 else [ALL, []]},
    ]
    arguments: dict[str, Any] = {
        "kind": "reward",
        "path": str(scorer),
        "settings": run,
        "columns": as_columns(pair_batch()),
        "cases": cases,
    }
    results = single_steps(alone(), **arguments) if size == 1 else two_ranks.run(single_steps, **arguments)[0]
    scalar = torch.nn.Module()
    scalar.backbone = plain.plain_lm(llama).model
    scalar.head = torch.nn.Linear(64, 1).double()
    with torch.no_grad():
        scalar.head.weight.copy_(torch.from_numpy(results[0]["before"]["head.weight"]))
        scalar.head.bias.zero_()
    loss, scores = definition(scalar, pair_batch(), margins, 0.05)
    expected = plain.gradients(scalar, loss)
    differences = [float(a - b) for a, b in zip(scores[0::2], scores[1::2], strict=True)]
    for result in results:
        moved = {name: torch.from_numpy(m) / GRADIENT_SCALE for name, m in result["moved"].items()}
        assert plain.relative_difference(moved, expected) < 1e-5
        assert result["metrics"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert result["metrics"]["margin"] == pytest.approx(sum(differences) / 6, rel=1e-5)
        assert result["metrics"]["accuracy"] == pytest.approx(sum(d > 0 for d in differences) / 6, abs=1e-9)


def test_it_begins_at_chance_and_learns(llama: Path, tmp_path: Path) -> None:
    """The head begins at 0: the first loss is ln 2, every pair a tie."""
    for dtype in ("float32", "bfloat16"):
        role = trainer(llama, tmp_path, dtype=dtype, optimizer={"lr": 3e-3})
        batch = pair_batch(reference=False).with_columns(sample={"margin": torch.full((12,), math.nan)})
        found = [role.update(batch, parts_of(ALL), k + 1) for k in range(30)]
        assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert (found[0]["accuracy"], found[0]["margin"]) == (0.5, 0.0)
        assert found[-1]["accuracy"] == 1.0 and found[-1]["loss"] < 0.1


def test_swapping_the_pairs_flips_the_gradient(scorer: Path, tmp_path: Path) -> None:
    """At the same distance: the two gradients add up to that of -log sigma(d) - log sigma(-d), whose margin is tanh."""
    moved = []
    batch = pair_batch(reference=False).with_columns(sample={"margin": torch.full((12,), math.nan)})
    swapped = batch.select([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10])
    for pairs in (batch, swapped):
        role = trainer(scorer, tmp_path, optimizer=LINEAR_ADAM)
        with torch.no_grad():
            role.scalar.head.weight.mul_(1e-3)  # all scores near 0, where the slope is 1/2 on both sides
        before = {n: p.detach().clone() for n, p in role.scalar.named_parameters()}
        role.update(pairs, parts_of(ALL), 1)
        moved.append({n: p.detach() - before[n] for n, p in role.scalar.named_parameters()})
    name = "head.weight"
    assert float((moved[0][name] + moved[1][name]).norm()) < 1e-2 * float(moved[0][name].norm())
    assert float(moved[0][name].norm()) > 1.0


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_scores_are_those_of_hugging_face_for_any_samples(scorer: Path, tmp_path: Path, budget: int) -> None:
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(scorer)
    batch = pair_batch().select([3, 0, 11, 6, 5])
    expected = []
    for start, end in batch.spans():
        with torch.no_grad():
            expected.append(float(classifier(input_ids=batch["tokens"][None, start:end]).logits[0, 0]))
    role = trainer(scorer, tmp_path, tokens_per_micro_batch=budget)
    found = role.scores(Batch(batch.offsets, {"tokens": batch["tokens"]}))
    torch.testing.assert_close(found["score"], torch.tensor(expected), rtol=0, atol=1e-5)


def scored(path: Path, batch: Batch, dtype: str = "float32") -> Tensor:
    """By the folder, as the role that scores rollouts loads it."""
    model = load_reward_model(str(path), ModelConfig(), dtype=getattr(torch, dtype))
    scores = torch.zeros(len(batch))
    with torch.no_grad():
        for micro in micro_batches(batch, 1000, False, mask=None):
            scores[micro.samples] = model(micro)[1]
    return scores


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_folder_gives_normalised_scores(
    name: str, lora: dict[str, Any] | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForSequenceClassification

    path, batch = request.getfixturevalue(name), pair_batch()
    role = trainer(path, tmp_path, lora=lora, optimizer={"lr": 3e-3})
    for k in range(10):
        role.update(batch, parts_of(ALL), k + 1)
    raw = role.scores(batch)["score"].double()
    mean, deviation = float(raw.mean()), float(raw.std())
    assert deviation > 0.1
    folder = tmp_path / "model"
    role.save_model(str(folder), mean=mean, deviation=deviation)
    found = scored(folder, batch)
    torch.testing.assert_close(found.double(), (raw - mean) / deviation, rtol=0, atol=1e-5)
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-5) and float(found.std()) == pytest.approx(1.0, abs=1e-5)
    again = trainer(folder, tmp_path)  # trained on from there, it begins with these very scores
    torch.testing.assert_close(again.scores(batch)["score"], found, rtol=0, atol=1e-5)
    again.save_model(str(tmp_path / "second"), mean=0.25, deviation=2.0)
    torch.testing.assert_close(scored(tmp_path / "second", batch), (found - 0.25) / 2, rtol=0, atol=1e-5)
    critic = load_critic(str(folder), ModelConfig(), num_layers=None, dtype=torch.float32)
    assert float(critic.head.bias) == pytest.approx(-mean / deviation, rel=1e-5)
    # Other programs load it too; they see the scores up to the constant.
    classifier, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    start, end = batch.spans()[2]
    with torch.no_grad():
        plainly = float(classifier(input_ids=batch["tokens"][None, start:end]).logits[0, 0])
    assert plainly == pytest.approx(float(raw[2]) / deviation, abs=1e-4)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["rayrlhf_score"]["shift"] == pytest.approx(-mean / deviation, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_agree_before_and_after_adapters_are_merged(
    llama: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    lora = {"rank": 4, "alpha": 16.0}
    role, batch = trainer(llama, tmp_path, dtype=dtype, lora=lora, optimizer={"lr": 1e-2}), pair_batch()
    for k in range(10):
        role.update(batch, parts_of(ALL), k + 1)
    raw = role.scores(batch)["score"]
    how = {"mean": float(raw.mean()), "deviation": float(raw.std())}
    role.save_model(str(tmp_path / "model"), **how)
    checked = json.loads((tmp_path / "model" / "merge_check.json").read_text())
    assert 0 <= checked["difference"] < 0.7 * checked["tolerance"] and checked["compared"] == "scores"
    found = scored(tmp_path / "model", batch, dtype)
    off = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(found, (raw - how["mean"]) / how["deviation"], rtol=0, atol=off)
    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 0.0 * delta(self, adapter))
    with pytest.raises(RunFailed, match="merging the adapters changes scores by"):
        role.save_model(str(tmp_path / "never"), **how)
    assert not list(tmp_path.glob("never*"))


SPECIAL: list[tuple[dict[str, Any], int, str | None]] = [
    ({"pad_token": "<pad>"}, 0, None),
    ({"pad_token": "<eos>"}, 1, "pads with its EOS; <bos>"),
    ({"pad_token": None}, 1, "has no padding token; <bos>"),
    ({"pad_token": None, "unk_token": "<pad>"}, 0, "has no padding token; <pad>"),
    ({"pad_token": None, "bos_token": None}, 2, "no other special token"),
]


@pytest.mark.parametrize(("special", "expected", "said"), SPECIAL)
def test_the_folder_takes_padded_batches_by_transformers(
    scorer: Path, tmp_path: Path, special: dict[str, Any], expected: int, said: str | None
) -> None:
    """Each response ends with EOS, which a model that pads with EOS doesn't read."""
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    from rayrlhf.models.tokenizer import load_tokenizer, padding_of

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=load_tokenizer(str(scorer)).backend_tokenizer, **{"eos_token": "<eos>", "bos_token": "<bos>", **special}
    )  # fmt: skip
    padding = padding_of(tokenizer, [2])
    assert padding.id == expected and (padding.said is None) == (said is None) and (said or "") in (padding.said or "")
    role = trainer(scorer, tmp_path)
    role.scalar.backbone.config.pad_token_id = None
    role.save_model(str(tmp_path / "model"), padding=padding)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["pad_token_id"] == expected and stored.get("rayrlhf_padding") == padding.said
    rows = [torch.tensor([*row, 2]) for row in ([5, 9, 11], [7, 3, 8, 40, 12, 6], [4])]
    batch = Batch.from_samples({"tokens": rows})
    width = max(len(row) for row in rows)
    filled = torch.stack([torch.cat([row, torch.full((width - len(row),), padding.id)]) for row in rows])
    mask = torch.stack([torch.arange(width) < len(row) for row in rows]).long()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        found = classifier(input_ids=filled, attention_mask=mask).logits[:, 0]
    mine = role.scores(batch)["score"]
    assert torch.allclose(found, mine, rtol=0, atol=1e-5) == (expected != 2), (
        "with EOS it can't be right, and that is said"
    )


def test_a_folder_without_normalising_keeps_the_scores(scorer: Path, tmp_path: Path) -> None:
    role, batch = trainer(scorer, tmp_path, dtype="bfloat16"), pair_batch()
    role.save_model(str(tmp_path / "model"))
    torch.testing.assert_close(scored(tmp_path / "model", batch), scored(scorer, batch), rtol=0.05, atol=0.1)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16" and stored["architectures"] == ["LlamaForSequenceClassification"]
    with pytest.raises(ValueError, match="deviation of 0"):
        role.save_model(str(tmp_path / "never"), deviation=0.0)
    assert not (tmp_path / "never").exists()


def test_the_role_that_scores_rollouts_takes_it(llama: Path, tmp_path: Path) -> None:
    from rayrlhf.actors.reward import RewardModel
    from rayrlhf.models.tokenizer import load_tokenizer

    role, batch = trainer(llama, tmp_path, optimizer={"lr": 3e-3}), pair_batch()
    role.update(batch, parts_of(ALL) * 5, 1)
    raw = role.scores(batch)["score"]
    role.save_model(str(tmp_path / "model"), mean=float(raw.mean()), deviation=float(raw.std()))
    tokenizer = load_tokenizer(str(llama))
    tokenizer.save_pretrained(tmp_path / "model")
    config = config_of(llama, tmp_path, reward={"dtype": "float32", "sources": [{"function": "nowhere:nothing"}]})
    found = RewardModel(str(tmp_path / "model"), "model", config.reward, tokenizer, alone()).score(batch)
    torch.testing.assert_close(found, (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_write_one_folder(scorer: Path, tmp_path: Path, stage: int, two_ranks: Ranks) -> None:
    folder = tmp_path / "model"
    run = settings(scorer, tmp_path, zero_stage=stage)
    two_ranks.run(save_and_export, kind="reward", path=str(scorer), settings=run, folder=str(folder))
    assert torch.equal(scored(folder, pair_batch()), scored(scorer, pair_batch()))


@pytest.mark.parametrize("size", [1, 2])
def test_going_on_from_a_file(llama: Path, tmp_path: Path, size: int, two_ranks: Ranks) -> None:
    halves = ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    parts = [[half] if size == 1 else [half[:2], half[2:]] for half in halves] * 2
    run = settings(llama, tmp_path, optimizer={"lr": 1e-3}, zero_stage=3 if size == 2 else 1)
    arguments: dict[str, Any] = {
        "kind": "reward", "path": str(llama), "settings": run, "columns": as_columns(pair_batch()), "parts": parts,
    }  # fmt: skip
    results = [interrupted(alone(), **arguments)] if size == 1 else two_ranks.run(interrupted, **arguments)
    for result in results:
        assert all(result["same"].values()) and result["metrics"][0] == result["metrics"][1]


def test_what_cannot_be_a_reward_model_is_refused_at_once(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    with pytest.raises(InputRefused, match="policy.lora.save is 'adapter'.*'merged'"):
        trainer(llama, tmp_path, lora={"save": "adapter"})
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(InputRefused, match="can't become a reward model"):
        trainer(tmp_path / "mamba", tmp_path, attention="eager")
