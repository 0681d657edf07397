"""What a role's constructor would raise of its configuration, its check raises before any weight is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rayrlhf.actors.critic import CriticTrainer
from rayrlhf.actors.policy import PolicyTrainer
from rayrlhf.actors.preference import PreferenceTrainer
from rayrlhf.actors.reference import ReferenceModel
from rayrlhf.actors.reward import NamedSource, RewardScorer
from rayrlhf.actors.reward_trainer import RewardModelTrainer
from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.actors.sft import SFTTrainer
from rayrlhf.config.jobs import ScoresConfig
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.config.schema import RewardConfig, RolloutConfig, ScorerProcesses, ScoreSource
from rayrlhf.config.trainers import LoraConfig, ReferenceConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.skeleton import bare_backbone, bare_causal_lm, bare_reward_model
from tests.models.making import alone, config_of

EXAMPLES: dict[Any, Any] = {
    SFTTrainer: (SFTConfig, "sft"),
    PreferenceTrainer: (PreferenceConfig, "dpo"),
    RewardModelTrainer: (RewardModelConfig, "reward_model"),
}
"""Trainers on examples, their configurations and what these call the algorithm."""
TRAINERS = [PolicyTrainer, CriticTrainer, *EXAMPLES]


@pytest.fixture(autouse=True)
def no_weight_is_read_by_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("weights are read")

    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(kind, "from_pretrained", never)


def run_with(path: Path, tmp_path: Path, trainer: Any, **keys: Any) -> dict[str, Any]:
    """A trainer's arguments, with these keys in the section of its role."""
    if trainer in EXAMPLES:
        kind, algorithm = EXAMPLES[trainer]
        policy = {"path": str(path), "dtype": "float32", **keys}
        values = {"run_dir": str(tmp_path), "policy": policy, "data": {"train": "nowhere.jsonl"}}
        config = kind.model_validate(values | {"algorithm": algorithm})
    else:
        config = config_of(path, tmp_path, **{trainer.role: keys})
    return {"config": config, "model_path": str(path), "total_steps": 1}


def same_as_the_constructor(role: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> str:
    """What a role's check refuses; its constructor, which may read weights, does the same."""
    with pytest.raises(InputRefused) as checked:
        role.check(**arguments)
    monkeypatch.undo()
    with pytest.raises(InputRefused) as built:
        role(alone(), **arguments)
    assert checked.value.problems == built.value.problems
    return str(checked.value)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_whose_adapters_have_no_place(llama: Path, tmp_path: Path, monkeypatch: Any, trainer: Any) -> None:
    arguments = run_with(llama, tmp_path, trainer, lora={"target_modules": ["attention_of_another_family"]})
    said = same_as_the_constructor(trainer, monkeypatch, **arguments)
    assert said.startswith("lora.target_modules: found attention_of_another_family, which the model doesn't have; ")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_whose_disk_cannot_be_written(llama: Path, tmp_path: Path, monkeypatch: Any, trainer: Any) -> None:
    (tmp_path / "file").write_text("")
    disk = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path / "file/below")}
    said = same_as_the_constructor(trainer, monkeypatch, **run_with(llama, tmp_path, trainer, **disk))
    assert said.startswith(f"{trainer.role}.nvme_path: {tmp_path}/file/below can't be written")


def test_a_machine_without_asynchronous_io(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    disk = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(InputRefused, match="critic.offload_optimizer is nvme.*libaio"):
        CriticTrainer.check(**run_with(llama, tmp_path, CriticTrainer, **disk))
    assert list(tmp_path.iterdir()) == []  # and nothing is left there


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_without_the_package_of_its_attention(llama: Path, tmp_path: Path, trainer: Any) -> None:
    flash = {"attention": "flash_attention_2", "dtype": "bfloat16"}
    with pytest.raises(InputRefused) as refused:
        trainer.check(**run_with(llama, tmp_path, trainer, **flash))
    (said,) = refused.value.problems
    assert said.startswith(f"{trainer.role}.attention: found flash_attention_2, which can't be used on this machine (")
    assert "legal: sdpa, eager or varlen, or install the package flash-attn" in said


def test_an_adapter_of_a_tied_layer_or_of_a_divided_output_layer(
    llama: Path, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = run_with(llama, tmp_path, PolicyTrainer, lora={"target_modules": ["lm_head"]})
    with pytest.raises(InputRefused, match="are one tied weight, which can't have an adapter"):
        PolicyTrainer.check(**arguments)
    own = run_with(qwen, tmp_path, PolicyTrainer, lora={"target_modules": ["lm_head"]}, zero_stage=3)
    said = same_as_the_constructor(PolicyTrainer, monkeypatch, **own)
    assert "with zero_stage 3 the output layer can't have an adapter" in said


def test_heads_that_cannot_be_dealt_out(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="policy.sequence_parallel: found 4, but the model has 2 attention heads"):
        PolicyTrainer.check(**run_with(llama, tmp_path, PolicyTrainer, ranks=4, sequence_parallel=4))
    with pytest.raises(
        InputRefused, match="critic.tensor_parallel: found 2, which doesn't divide .* num_key_value_heads 1"
    ):
        CriticTrainer.check(**run_with(llama, tmp_path, CriticTrainer, ranks=2, tensor_parallel=2))


def test_more_layers_than_there_are(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = same_as_the_constructor(CriticTrainer, monkeypatch, **run_with(llama, tmp_path, CriticTrainer, num_layers=9))
    assert "critic.num_layers is 9, but" in said


def test_a_reward_model_that_would_be_an_adapter(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = run_with(llama, tmp_path, RewardModelTrainer, lora={"save": "adapter"})
    assert "policy.lora.save is 'adapter'" in same_as_the_constructor(RewardModelTrainer, monkeypatch, **adapter)


def test_a_reference_and_a_model_that_is_compared(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config_of(llama, tmp_path, reference={"attention": "flash_attention_2"})
    with pytest.raises(InputRefused, match="^reference.attention: found flash_attention_2"):
        ReferenceModel.check(run, str(llama))
    comparison: Any = SimpleNamespace(reference=ReferenceConfig(attention="flash_attention_2"), rollout=RolloutConfig())
    with pytest.raises(InputRefused, match="^measure.attention: found flash_attention_2"):
        ReferenceModel.check(comparison, str(llama))
    run = config_of(llama, tmp_path)
    said = same_as_the_constructor(ReferenceModel, monkeypatch, config=run, model_path=str(tmp_path / "nowhere"))
    assert "there is no such folder" in said


@pytest.mark.parametrize(
    ("config", "key"),
    [(RewardConfig(sources=[{"function": "math:fabs"}], attention="flash_attention_2"), "reward"),
     (ScoresConfig(attention="flash_attention_2"), "scores")],
)  # fmt: skip
def test_a_scorer_without_the_package_of_its_attention(
    llama: Path, scorer: Path, config: ScorerProcesses, key: str
) -> None:
    sources = [NamedSource("reward", ScoreSource(model=str(scorer)))]
    with pytest.raises(InputRefused, match=f"^{key}.attention: found flash_attention_2"):
        RewardScorer.check(config, str(llama), sources)


@pytest.mark.parametrize("what", ["labels", "function", "twice"])
def test_a_scorer_that_cannot_be_used(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    folder = tmp_path / "labels"
    LlamaConfig(num_labels=3, architectures=["LlamaForSequenceClassification"]).save_pretrained(folder)
    sources = {
        "labels": [NamedSource("a", ScoreSource(model=str(folder)))],
        "function": [NamedSource("a", ScoreSource(function="json:no_such"))],
        "twice": [NamedSource("a", ScoreSource(function="json:dumps"))] * 2,
    }[what]
    said = same_as_the_constructor(
        RewardScorer, monkeypatch, config=ScoresConfig(), tokenizer_path=str(llama), sources=sources
    )
    words = {"labels": "has 3 labels", "function": "json has no function 'no_such'", "twice": "the name of several"}
    assert words[what] in said


def test_an_engine_that_cannot_be_cut_or_has_no_room(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(lora: LoraConfig | None = None, **keys: Any) -> None:
        RolloutEngine.check(str(llama), RolloutConfig(**keys), "float32", 64, lora=lora)

    check()
    with pytest.raises(InputRefused, match="rollout.tensor_parallel is 5, which does not divide the model"):
        check(tensor_parallel=5)
    with pytest.raises(InputRefused, match="rollout.kv_cache_gib is 1e-06; one sequence of 64 tokens needs"):
        check(kv_cache_gib=1e-6)
    with pytest.raises(InputRefused, match="policy.lora.rank is 999; vLLM applies adapters up to rank 512"):
        check(lora=LoraConfig(rank=999))
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    with pytest.raises(InputRefused, match="rollout.engine: found vllm, which isn't installed on this machine"):
        check()


def test_what_can_be_built_passes(llama: Path, scorer: Path, tmp_path: Path) -> None:
    for trainer in TRAINERS:
        for keys in ({}, {"lora": {}}, {"attention": "varlen"}, {"attention": "eager", "zero_stage": 3}):
            trainer.check(**run_with(llama, tmp_path, trainer, **keys))
    CriticTrainer.check(config_of(llama, tmp_path, critic={"num_layers": 1, "lora": {}}), str(scorer), 1)
    RewardScorer.check(ScoresConfig(), str(llama), [NamedSource("reward", ScoreSource(model=str(scorer)))], True)
    ReferenceModel.check(config_of(llama, tmp_path), str(llama))


def test_models_without_weights_are_the_models(llama: Path, scorer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size: nothing is allocated."""
    settings = ReferenceConfig()
    bare = [bare_causal_lm(str(llama), settings, "x"), bare_reward_model(str(scorer), settings, "x")]
    bare.append(bare_backbone(str(scorer), settings, "x", 1))
    assert {p.device for model in bare for p in model.parameters()} == {torch.device("meta")}
    assert bare[0].lm_head.weight is bare[0].model.embed_tokens.weight  # tied
    monkeypatch.undo()
    kinds: list[Any] = [AutoModelForCausalLM, AutoModelForSequenceClassification]
    for model, kind, path in zip(bare, kinds, (llama, scorer), strict=False):
        names = {name: p.shape for name, p in kind.from_pretrained(path).named_parameters()}
        assert {name: p.shape for name, p in model.named_parameters()} == names
    assert len(bare[2].layers) == 1
