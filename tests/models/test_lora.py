"""Adapters: off they are the base, merged they are peft's own merge, and they train like peft trains them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.actors.critic import CriticTrainer
from rayrlhf.actors.policy import PolicyTrainer
from rayrlhf.config.trainers import LoraConfig, ModelConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.adapters import add_lora
from rayrlhf.models.loading import load_causal_lm
from tests.models import plain
from tests.models.making import LENGTHS, alone, config_of, parts_of, settings, training_batch
from tests.models.rank_cases import as_columns, interrupted, save_and_export, trained, weights_of
from tests.models.ranks import Ranks

ALL = list(range(len(LENGTHS)))
LORA = {"rank": 4, "alpha": 16.0}


def lora_settings(path: Path, run_dir: Path, stage: int, **lora: Any) -> dict[str, Any]:
    optimizer = {"lr": 1e-2, "eps": 1e-4, "max_grad_norm": 0.05}
    role = {"zero_stage": stage, "optimizer": optimizer, "lora": {**LORA, **lora}, "tokens_per_micro_batch": 30}
    return settings(path, run_dir, policy=role, critic=role)


def by_peft(path: Path, before: dict[str, Any], batch: Any, config: Any, steps: int) -> Any:
    """peft and torch alone, from the same first adapters, in float32."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(lm, PeftLora(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0))
    named = dict(lm.named_parameters())
    assert sorted(n for n in named if "lora_" in n) == sorted(n for n in before if "lora_" in n)
    with torch.no_grad():
        for name, weight in before.items():
            named[name].copy_(torch.from_numpy(weight))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    for _ in range(steps):
        loss, _ = plain.ppo_loss(lm, batch, ALL, config.ppo, config.rollout.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 0.05)
        optimizer.step()
    return model


@pytest.mark.parametrize(("stage", "size"), [(2, 1), (2, 2), (3, 2)])
def test_training_and_merging_equal_peft(llama: Path, tmp_path: Path, stage: int, size: int, two_ranks: Ranks) -> None:
    run, batch = lora_settings(llama, tmp_path, stage), training_batch()
    parts = [ALL] if size == 1 else [[1, 4, 6], [0, 2, 3, 5, 7]]
    arguments: dict[str, Any] = {
        "kind": "policy", "path": str(llama), "settings": run, "columns": as_columns(batch), "schedule": [parts] * 3,
        "total_steps": 3,
    }  # fmt: skip
    result = trained(alone(), **arguments) if size == 1 else two_ranks.run(trained, **arguments)[0]
    before, after = result["before"], result["after"]
    assert all((w == 0).all() for n, w in before.items() if "lora_B" in n)
    frozen = [n for n in before if "lora_" not in n]
    assert frozen and all((before[n] == after[n]).all() for n in frozen), "the base doesn't move"
    assert any((before[n] != after[n]).any() for n in before if "lora_B" in n)

    config = config_of(llama, tmp_path, policy=run["policy"])
    model = by_peft(llama, before, batch, config, steps=3)
    for name, parameter in model.get_base_model().named_parameters():
        torch.testing.assert_close(torch.from_numpy(after[name]), parameter.detach(), rtol=0, atol=1e-4)
    with torch.no_grad():  # from here on with exactly the trained adapters: what is compared is the merging
        for name, parameter in model.get_base_model().named_parameters():
            parameter.copy_(torch.from_numpy(after[name]))
    merged = model.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert sorted(result["exported"]) == sorted(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(torch.from_numpy(result["exported"][name]), weight.detach(), rtol=0, atol=1e-6)
    lm, base = merged.double(), plain.plain_lm(llama)
    for i in ALL:
        tokens, mask = (torch.tensor(plain.column(batch, name, i)) for name in ("tokens", "response_mask"))
        start, end = batch.offsets[i : i + 2].tolist()
        with torch.no_grad():
            adapted, plainly = (plain.logprobs_and_entropies(m, tokens, 0.7)[0].float() * mask for m in (lm, base))
        found = torch.from_numpy(result["logprobs"][start:end])
        torch.testing.assert_close(found, adapted, rtol=0, atol=2e-5)
        without = torch.from_numpy(result["without_adapters"][start:end])
        torch.testing.assert_close(without, plainly, rtol=0, atol=5e-6)
    assert abs(result["logprobs"] - result["without_adapters"]).max() > 1e-2


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_off_are_the_base_exactly(llama: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    """So the KL of the first step is exactly 0; and after training the reference is still the base, bit for bit."""
    run = lora_settings(llama, tmp_path, stage)
    role = PolicyTrainer(alone(), config_of(llama, tmp_path, policy={**run["policy"], "dtype": dtype}), str(llama), 10)
    base = PolicyTrainer(
        alone(), config_of(llama, tmp_path, policy={"dtype": dtype, "tokens_per_micro_batch": 30}), str(llama), 10
    )  # fmt: skip
    batch = training_batch()
    expected = base.token_logprobs(batch)["old_logprobs"]
    assert torch.equal(role.token_logprobs(batch)["old_logprobs"], expected)
    assert torch.equal(role.token_logprobs(batch, adapters=False)["reference_logprobs"], expected)
    role.update(batch, parts_of(ALL) * 3, 1)
    assert torch.equal(role.token_logprobs(batch, adapters=False)["reference_logprobs"], expected)
    moved = role.token_logprobs(batch)["old_logprobs"] - expected
    assert float(moved.abs().max()) > 1e-2, "and they are on again afterwards"


def test_first_adapters_come_from_the_seed_alone(llama: Path) -> None:
    def adapters(seed: int, noise: int) -> list[torch.Tensor]:
        lm = load_causal_lm(str(llama), ModelConfig(), dtype=torch.float32)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        add_lora(lm, LoraConfig(**LORA), seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [p.detach() for n, p in lm.named_parameters() if "lora_A" in n]

    first, again, other = adapters(1, 5), adapters(1, 6), adapters(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_critic_with_adapters(llama: Path, scorer: Path, tmp_path: Path) -> None:
    """Adapters and head are trained, the backbone is not."""
    adapted = config_of(llama, tmp_path, critic=lora_settings(llama, tmp_path, 2)["critic"])
    role = CriticTrainer(alone(), adapted, str(scorer), 10)
    bare = config_of(llama, tmp_path, critic={"tokens_per_micro_batch": 30})
    plain_critic = CriticTrainer(alone(), bare, str(scorer), 10)
    batch, before = training_batch(), weights_of(role)
    assert torch.equal(role.values(batch)["values"], plain_critic.values(batch)["values"])
    role.update(batch, parts_of(ALL) * 2, 1)
    moved = {n for n, w in weights_of(role).items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if "lora_" in n or n.startswith("head.")}


@pytest.mark.parametrize(("stage", "size"), [(2, 1), (3, 1), (3, 2)])
def test_going_on_from_a_file(llama: Path, tmp_path: Path, stage: int, size: int, two_ranks: Ranks) -> None:
    parts = [[half] if size == 1 else [half[:1], half[1:]] for half in ([0, 2, 4, 6], [1, 5, 7, 3])] * 2
    arguments: dict[str, Any] = {
        "kind": "policy", "path": str(llama), "settings": lora_settings(llama, tmp_path, stage),
        "columns": as_columns(training_batch()), "parts": parts,
    }  # fmt: skip
    results = [interrupted(alone(), **arguments)] if size == 1 else two_ranks.run(interrupted, **arguments)
    for result in results:
        assert all(result["same"].values()) and result["metrics"][0] == result["metrics"][1]
    for file in (tmp_path / "policy-half").rglob("*model_states.pt"):
        stored = torch.load(file, weights_only=False)["module"]
        frozen = {name for name in stored if "lora_" not in name}
        assert len(stored) > 1 and frozen <= {"lm.lm_head.weight"}, "but the tied one, by its second name"


@pytest.mark.parametrize("size", [1, 2])
def test_the_adapter_alone_is_saved_where_asked(llama: Path, tmp_path: Path, size: int, two_ranks: Ranks) -> None:
    run = lora_settings(llama, tmp_path, 3 if size == 2 else 2, save="adapter")
    folder = tmp_path / "adapter"
    arguments: dict[str, Any] = {"kind": "policy", "path": str(llama), "settings": run, "folder": str(folder)}
    _ = save_and_export(alone(), **arguments) if size == 1 else two_ranks.run(save_and_export, **arguments)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    lm = AutoModelForCausalLM.from_pretrained(llama)
    loaded = PeftModel.from_pretrained(lm, folder)
    expected = load_causal_lm(str(llama), ModelConfig(), dtype=torch.float32)
    add_lora(expected, LoraConfig(**LORA), seed=0)
    stored = dict(loaded.get_base_model().named_parameters())
    for name, weight in expected.named_parameters():
        assert torch.equal(stored[name], weight), name


def test_what_cannot_have_adapters_is_refused(llama: Path, qwen: Path) -> None:
    def adapted(path: Path, modules: list[str]) -> None:
        add_lora(load_causal_lm(str(path), ModelConfig(), dtype=torch.float32), LoraConfig(target_modules=modules), 0)

    for modules in (["q_prj"], ["q_proj", "q_prj"]):
        with pytest.raises(
            InputRefused, match="found q_prj, which the model doesn't have; its linear layers are down_proj"
        ):
            adapted(llama, modules)
    for module in ("lm_head", "embed_tokens"):
        with pytest.raises(InputRefused, match="lora.target_modules: .*tied"):
            adapted(llama, [module])
        adapted(qwen, [module])


def test_no_adapter_of_the_output_layer_with_zero_3(qwen: Path, tmp_path: Path) -> None:
    run = lora_settings(qwen, tmp_path, 3, target_modules=["lm_head", "q_proj"])
    with pytest.raises(InputRefused, match="with zero_stage 3 the output layer can't have an adapter"):
        PolicyTrainer(alone(), config_of(qwen, tmp_path, policy=run["policy"]), str(qwen), 10)


def test_adapters_of_embedding_and_output_layer(qwen: Path, tmp_path: Path) -> None:
    """Where they aren't tied: merged as peft merges them."""
    run = lora_settings(qwen, tmp_path, 2, target_modules=["embed_tokens", "lm_head", "q_proj"])
    role = PolicyTrainer(alone(), config_of(qwen, tmp_path, policy=run["policy"]), str(qwen), 10)
    batch = training_batch()
    role.update(batch, parts_of(ALL) * 3, 1)
    found = role.token_logprobs(batch)["old_logprobs"]
    role.save_model(str(tmp_path / "merged"))
    with torch.no_grad():
        exported = {n: p.detach().clone() for n, p in plain.plain_lm(tmp_path / "merged").named_parameters()}
        merged = role.peft.merge_and_unload()
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(exported[name].float(), weight.detach(), rtol=0, atol=1e-6)
    config = config_of(tmp_path / "merged", tmp_path)
    again = PolicyTrainer(alone(), config, str(tmp_path / "merged"), 10)
    torch.testing.assert_close(again.token_logprobs(batch)["old_logprobs"], found, rtol=0, atol=2e-5)
