"""``rayrlhf export``: adapters are merged and checked, whole models copied, nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayrlhf.drivers.export import export_model
from rayrlhf.errors import InputRefused, RunFailed
from tests.drivers.offline_runs import OfflineWorld
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> OfflineWorld:
    folder = tmp_path_factory.mktemp("export")
    save_tiny_model(folder / "model")
    return OfflineWorld(folder)


LORA = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
STEPS = {"max_steps": 2, "validate_every_steps": 2}


@pytest.fixture(scope="module")
def adapter(world: OfflineWorld):
    policy = {"lora": {**LORA, "save": "adapter"}, "optimizer": {"lr": 0.05}}
    return world.train("adapter", "sft", {"policy": policy, "training": STEPS})


def test_an_adapter_is_merged_as_the_trainer_merges_it(world: OfflineWorld, adapter, tmp_path) -> None:
    policy = {"lora": LORA, "optimizer": {"lr": 0.05}}
    merged = world.train("merged", "sft", {"policy": policy, "training": STEPS})
    lines = export_model(adapter.folder, tmp_path / "out")
    assert "adapter merged" in lines[0] and (tmp_path / "out" / "tokenizer.json").exists()
    mine, theirs, base = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", merged.folder / "model", world.folder / "model")
    )
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
    moved = [name for name in mine if not torch.allclose(mine[name], base[name], atol=1e-4)]
    assert moved and all("q_proj" in name or "down_proj" in name for name in moved)


def test_a_whole_model_is_copied(world: OfflineWorld, tmp_path) -> None:
    run = world.train("whole", "sft", {"training": STEPS})
    lines = export_model(run.folder, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in run.weights.items())
    assert "no adapters were merged" in lines[0]


@pytest.mark.parametrize(("algorithm", "what"), [("sft", "log-probabilities"), ("reward_model", "scores")])
def test_what_was_merged_in_training_says_how_well(world: OfflineWorld, tmp_path, algorithm: str, what: str) -> None:
    run = world.train(f"merged-{algorithm}", algorithm, {"policy": {"lora": LORA}, "training": STEPS})
    checked = json.loads((run.folder / "model" / "merge_check.json").read_text())
    assert checked["compared"] == what and 0 <= checked["difference"] < 1e-4
    lines = export_model(run.folder, tmp_path / "out")
    assert f"{what} differed by at most {checked['difference']:.2g} in float32" in lines[0]


def test_a_broken_adapter_is_refused_and_nothing_is_left(adapter, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(adapter.folder, folder)
    file = folder / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}, file)
    with pytest.raises(RunFailed, match="merging changes log-probabilities"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_cannot_be_exported(adapter, tmp_path) -> None:
    with pytest.raises(InputRefused, match="holds no model yet"):
        export_model(tmp_path, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputRefused, match="exists already"):
        export_model(adapter.folder, tmp_path / "there")
