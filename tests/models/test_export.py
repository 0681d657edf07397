"""A trained model as a Hugging Face folder, and weights by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.actors.policy import PolicyTrainer
from rayrlhf.errors import RunFailed
from rayrlhf.models.cpu import with_cpu_kernels
from rayrlhf.models.export import named_weights
from tests.models.making import LENGTHS, alone, config_of, parts_of, ragged_tokens, settings, training_batch
from tests.models.rank_cases import save_and_export
from tests.models.ranks import Ranks

ALL = list(range(len(LENGTHS)))


def logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return with_cpu_kernels(model.eval())(input_ids=ragged_tokens()[0][1][None]).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_saved_folder_is_the_trained_model(
    name: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    config = config_of(path, tmp_path, policy={"dtype": dtype, "optimizer": {"lr": 1e-2}})
    role = PolicyTrainer(alone(), config, str(path), 10)
    role.update(training_batch(), parts_of(ALL) * 2, 1)
    folder = tmp_path / "model"
    role.save_model(str(folder))
    with torch.no_grad():
        expected = role.lm(input_ids=ragged_tokens()[0][1][None]).logits
    found = logits(folder)
    assert found.dtype == getattr(torch, dtype) and torch.equal(found, expected)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["dtype"] == dtype and stored["tie_word_embeddings"] == (name == "llama")
    assert stored["architectures"] == [type(role.lm).__name__]
    assert role.lm.config.dtype == torch.float32, "the model itself is as it was"
    assert float((found.float() - logits(path)).abs().max()) > 1e-2, "it was trained"


def adapted(path: Path, tmp_path: Path, dtype: str) -> PolicyTrainer:
    """With adapters that have moved a long way."""
    lora = {"rank": 4, "alpha": 16.0}
    config = config_of(path, tmp_path, policy={"dtype": dtype, "lora": lora, "optimizer": {"lr": 3e-2}})
    role = PolicyTrainer(alone(), config, str(path), 10)
    for step in range(5):
        role.update(training_batch(), parts_of(ALL), step + 1)
    return role


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_merged_adapters_compute_what_the_adapters_did(
    name: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    role = adapted(request.getfixturevalue(name), tmp_path, dtype)
    role.save_model(str(tmp_path / "model"))
    assert sorted(p.name for p in tmp_path.iterdir() if "model" in p.name) == ["model"], "no half-written folder"
    checked = json.loads((tmp_path / "model" / "merge_check.json").read_text())
    assert 0 <= checked["difference"] < 0.7 * checked["tolerance"] and checked["dtype"] == dtype
    with torch.no_grad():
        expected = role.lm(input_ids=ragged_tokens()[0][1][None]).logits
    assert float((logits(tmp_path / "model").float() - expected.float()).abs().max()) < (
        1e-4 if dtype == "float32" else 0.2
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["left out", "twice", "nan"])
def test_a_wrong_merge_is_not_written(
    llama: Path, tmp_path: Path, dtype: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    role = adapted(llama, tmp_path, dtype)
    role.save_model(str(tmp_path / "model"))
    right, delta = logits(tmp_path / "model"), Linear.get_delta_weight
    factor = {"left out": 0.0, "twice": 2.0, "nan": float("nan")}[fault]
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: factor * delta(self, adapter))
    with pytest.raises(RunFailed, match="merging the adapters changes log-probabilities by"):
        role.save_model(str(tmp_path / "model"))
    assert torch.equal(logits(tmp_path / "model"), right), "the earlier folder stays"
    with pytest.raises(RunFailed):
        role.save_model(str(tmp_path / "another"))
    assert not (tmp_path / "another").exists() and not (tmp_path / "another.partial").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_write_one_folder(qwen: Path, tmp_path: Path, stage: int, two_ranks: Ranks) -> None:
    for lora in (None, {"rank": 4}):  # which begin as nothing
        run = settings(qwen, tmp_path, policy={"zero_stage": stage, "lora": lora})
        two_ranks.run(save_and_export, kind="policy", path=str(qwen), settings=run, folder=str(tmp_path / "model"))
        assert torch.equal(logits(tmp_path / "model"), logits(qwen))


@pytest.mark.parametrize("group_bytes", [1, 30_000, 2**28])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_names_are_those_of_the_folder(name: str, group_bytes: int, request: pytest.FixtureRequest) -> None:
    """Each weight once, a tied one under one name, in any grouping."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path = request.getfixturevalue(name)
    lm = AutoModelForCausalLM.from_pretrained(path)
    found = [(n, w.clone()) for n, w in named_weights(lm, zero_stage=1, group_bytes=group_bytes)]
    expected = load_file(path / "model.safetensors")
    assert sorted(n for n, _ in found) == sorted(expected)
    assert all(torch.equal(w, expected[n]) for n, w in found)


def test_generation_settings_that_transformers_would_not_save(llama: Path, tmp_path: Path) -> None:
    """Some published models have a temperature without sampling, which `save_pretrained` refuses to write."""
    folder = Path(shutil.copytree(llama, tmp_path / "published"))
    before: dict[str, Any] = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(before))
    role = PolicyTrainer(alone(), config_of(folder, tmp_path), str(folder), 10)
    role.save_model(str(tmp_path / "model"))
    after = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (after["eos_token_id"], after["temperature"]) == ([2, 7], 0.6)
    assert torch.equal(logits(tmp_path / "model"), logits(llama))
