"""Models that are read under ZeRO-3: the same weights, and no rank ever holds all of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.making import alone, parts_of, settings, training_batch
from tests.models.rank_cases import make_role, weights_of
from tests.models.ranks import Ranks
from tests.models.zero_cases import loading_peaks, same_weights
from tests.support.tiny import save_reward_model, save_tiny_model

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
                         "pad_token_id": 0}  # fmt: skip


def save_family(folder: Path, family: str, **keys: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **keys})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen3", {"tie_word_embeddings": False}),
        ("Gemma2", {"attn_logit_softcapping": None}),
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}),
    ],
)
def test_a_model_in_parts_has_the_same_weights(
    tmp_path: Path, two_ranks: Ranks, family: str, keys: dict[str, Any], dtype: str
) -> None:
    """Also experts, which lie in the file one by one and in the model in one tensor; also tied ones."""
    path = save_family(tmp_path, family, **keys)
    for found in two_ranks.run(same_weights, path=str(path), kind="lm", dtype=dtype):
        assert not found["differing"] and found["trials"]
        assert 0.5 <= found["share"] < 0.52
        assert bool(found["tied"]) == (family in ("Llama", "Gemma2"))


def test_both_names_of_a_tied_weight_in_the_file(tmp_path: Path, two_ranks: Ranks) -> None:
    """Where the two differ they aren't tied, whatever the configuration says; where they don't, they are."""
    for name, shift in (("same", 0.0), ("other", 1.0)):
        folder = save_tiny_model(tmp_path / name, tied=True)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + shift
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for found in two_ranks.run(same_weights, path=str(folder), kind="lm", dtype="float32"):
            assert not found["differing"] and bool(found["tied"]) == (name == "same")


@pytest.mark.parametrize(("kind", "layers"), [("critic", None), ("critic", 1), ("scorer", None)])
@pytest.mark.parametrize("start", ["lm", "scorer"])
def test_a_scalar_model_in_parts(
    llama: Path, tmp_path: Path, two_ranks: Ranks, kind: str, layers: int | None, start: str
) -> None:
    if (kind, start) == ("scorer", "lm"):
        pytest.skip("a language model is no reward model")
    path = llama if start == "lm" else save_reward_model(tmp_path, llama)
    for found in two_ranks.run(same_weights, path=str(path), kind=kind, dtype="float32", num_layers=layers):
        assert not found["differing"] and found["trials"] and found["share"] < 0.52


def test_a_reward_models_shift_is_kept(llama: Path, tmp_path: Path) -> None:
    import json

    folder = save_reward_model(tmp_path, llama)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rayrlhf_score": {"shift": -1.5}}))
    found = same_weights(alone(), str(folder), "scorer", "float32")
    assert not found["differing"] and found["share"] == 1.0


def test_a_file_of_pickled_weights(llama: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "bin"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    for found in two_ranks.run(same_weights, path=str(folder), kind="lm", dtype="float32"):
        assert not found["differing"]


def test_no_rank_holds_the_whole_model(tmp_path: Path, two_ranks: Ranks) -> None:
    """A rank's memory never grows by much more than its half and the largest tensor; loaded whole it grows by all of it.

    The file is in bfloat16 and the model in float32, so that nothing of it can stay in the file's own pages.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"vocab_size": 4000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10,
             "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "large", max_shard_size="40MB")
    full = 4 * sum(p.numel() for p in model.parameters())
    largest = 4 * max(p.numel() for p in model.parameters())
    assert full > 290e6 and len(list((tmp_path / "large").glob("*.safetensors"))) > 3
    del model
    save_tiny_model(tmp_path / "little")
    for found in two_ranks.run(loading_peaks, path=str(tmp_path / "large"), in_parts=True):
        assert found["after"] < 0.55 * full and found["after"] > 0.45 * full
        assert found["peak"] < 0.5 * full + 2 * largest + 0.1 * full
    for found in two_ranks.run(loading_peaks, path=str(tmp_path / "large"), in_parts=False):
        assert found["peak"] > 0.95 * full


@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    [
        ("policy", "bfloat16", None),
        ("policy", "bfloat16", {"rank": 4}),
        ("critic", "bfloat16", {"rank": 4}),
        ("critic", "float32", None),
    ],
)
def test_training_doesnt_notice_how_the_model_was_read(
    llama: Path, scorer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, lora: Any
) -> None:
    """The same weights after two optimizer steps, bit for bit, as where DeepSpeed splits a model that was read whole in
    float32: master weights and adapters begin at the same values."""
    section = {"zero_stage": 3, "dtype": dtype, "lora": lora, "optimizer": {"lr": 1e-2}}
    run = settings(llama, tmp_path, policy=section, critic=section)
    batch, steps = training_batch(), parts_of([0, 2, 4]) + parts_of([1, 5, 7])
    found = []
    for _ in range(2):
        role = make_role(alone(), kind, str(scorer if kind == "critic" else llama), run)
        role.update(batch, steps, 1)
        found.append(weights_of(role))
        for actor in ("language_model", "critic"):
            monkeypatch.setattr(f"rayrlhf.actors.{actor}.partitioner_for", lambda *_: None)
    assert found[0].keys() == found[1].keys()
    assert not [name for name, weight in found[0].items() if not torch.equal(weight, found[1][name])]
