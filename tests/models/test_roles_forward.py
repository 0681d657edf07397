"""What the roles compute without training: against plain Hugging Face, temperature, dropout, empty shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayrlhf.actors.critic import CriticTrainer
from rayrlhf.actors.policy import PolicyTrainer
from rayrlhf.actors.reference import ReferenceModel
from tests.models import plain
from tests.models.making import LENGTHS, alone, config_of, training_batch


def expected_logprobs(path: Path, temperature: float) -> torch.Tensor:
    lm, batch = plain.plain_lm(path), training_batch()
    with torch.no_grad():
        columns = [
            plain.logprobs_and_entropies(lm, torch.tensor(plain.column(batch, "tokens", i)), temperature)[0]
            for i in range(len(LENGTHS))
        ]
    return torch.cat(columns).float() * batch["response_mask"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_and_reference_use_the_rollout_temperature(llama: Path, tmp_path: Path, temperature: float) -> None:
    config = config_of(
        llama, tmp_path, rollout={"temperature": temperature}, policy={"tokens_per_micro_batch": 30, "packing": True}
    )
    batch, expected = training_batch(), expected_logprobs(llama, temperature)
    policy = PolicyTrainer(alone(), config, str(llama), 10)
    reference = ReferenceModel(alone(), config, str(llama))
    torch.testing.assert_close(policy.token_logprobs(batch)["old_logprobs"], expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(reference.token_logprobs(batch)["reference_logprobs"], expected, rtol=0, atol=5e-6)
    other = policy.token_logprobs(batch, temperature=2.0)["old_logprobs"]
    torch.testing.assert_close(other, expected_logprobs(llama, 2.0), rtol=0, atol=5e-6)


def test_values_do_not_depend_on_the_temperature(llama: Path, scorer: Path, tmp_path: Path) -> None:
    batch, found = training_batch(), []
    for temperature in (1.0, 0.7):
        config = config_of(
            llama,
            tmp_path,
            rollout={"temperature": temperature},
            critic={"tokens_per_micro_batch": 40, "num_layers": 1},
        )
        critic = CriticTrainer(alone(), config, str(scorer), 10)
        found.append(critic.values(batch))
    assert torch.equal(found[0]["values"], found[1]["values"]) and float(found[0]["values"].abs().max()) > 0.1
    backbone = plain.plain_lm(llama).model
    backbone.layers = backbone.layers[:1]
    head = critic.trainer.module.head
    with torch.no_grad():
        values = [
            plain.plain_values(backbone, head.weight[0], head.bias[0], torch.tensor(plain.column(batch, "tokens", i)))
            for i in range(len(LENGTHS))
        ]
    inside = torch.cat([v[:-1] for v in values]).float() * batch["response_mask"]
    torch.testing.assert_close(found[0]["values"], inside, rtol=0, atol=5e-6)
    torch.testing.assert_close(
        found[0]["final_values"], torch.stack([v[-1] for v in values]).float(), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_no_samples(llama: Path, tmp_path: Path, stage: int) -> None:
    config = config_of(llama, tmp_path, policy={"zero_stage": stage}, critic={"zero_stage": stage})
    nothing = training_batch().select([])
    assert len(PolicyTrainer(alone(), config, str(llama), 10).token_logprobs(nothing)) == 0
    assert CriticTrainer(alone(), config, str(llama), 10).values(nothing)["final_values"].shape == (0,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_keeps_rotary_frequencies_and_results(llama: Path, tmp_path: Path, dtype: str) -> None:
    config = config_of(llama, tmp_path, policy={"dtype": dtype}, reference={"dtype": dtype})
    policy = PolicyTrainer(alone(), config, str(llama), 10)
    reference = ReferenceModel(alone(), config, str(llama))
    frequencies = policy.lm.model.rotary_emb.inv_freq
    expected = 10000 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)
    batch = training_batch()
    a, b = policy.token_logprobs(batch)["old_logprobs"], reference.token_logprobs(batch)["reference_logprobs"]
    assert torch.equal(a, b), (
        "the same weights in the same type: KL to the reference is exactly 0 before the first step"
    )
    assert float((a - expected_logprobs(llama, 0.7)).abs().max()) < (1e-5 if dtype == "float32" else 0.2)


def test_no_dropout_anywhere(tmp_path: Path) -> None:
    """A model that drops half of everything in training computes the same in train and eval mode, twice."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5,
                   attn_pdrop=0.5, summary_first_dropout=0.5)
    ).save_pretrained(tmp_path / "gpt2")  # fmt: skip
    check_without_dropout(tmp_path / "gpt2", tmp_path)


def test_no_dropout_in_attention_nor_whole_layers(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(llama)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "llama")
    check_without_dropout(tmp_path / "llama", tmp_path)
    OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=2,
                  max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    ).save_pretrained(tmp_path / "opt")  # fmt: skip
    check_without_dropout(tmp_path / "opt", tmp_path)


def check_without_dropout(path: Path, run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(path, run_dir, policy={"tokens_per_micro_batch": 40})
    batch, drawn = training_batch(), torch.tensor([5, 6, 7])[None]
    torch.manual_seed(1)
    random = AutoModelForCausalLM.from_pretrained(path).train()
    assert not torch.equal(random(drawn).logits, random(drawn).logits), "the model does have dropout"
    policy = PolicyTrainer(alone(), config, str(path), 10)
    critic = CriticTrainer(alone(), config, str(path), 10)
    with torch.no_grad():
        critic.trainer.module.head.weight.normal_()
    for role, work in ((policy, policy.token_logprobs), (critic, critic.values)):
        assert role.trainer.engine.training
        first, second = work(batch), work(batch)
        assert all(first[name].any() for name in first.keys())  # noqa: SIM118
        role.trainer.engine.eval()
        third = work(batch)
        for name in first.keys():  # noqa: SIM118
            assert torch.equal(first[name], second[name]) and torch.equal(first[name], third[name])
