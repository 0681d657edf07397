"""Every configuration that is shipped: `plan` accepts it for the machines that it names."""

from __future__ import annotations

import re

import pytest

from rayrlhf.config import load_config
from rayrlhf.config.pipeline import is_pipeline, load_pipeline
from rayrlhf.planning.plan import make_plan
from tests.conftest import ROOT

FILES = sorted((ROOT / "configs").glob("*.yaml"))
ON_GPUS = [file for file in FILES if re.search(r"_\d+b(_lora)?$", file.stem)]
MADE = "build/quickstart/model"
"""The local configurations' model, which `make quickstart` makes: planned as the same model of the hub."""


def test_the_sizes_that_are_asked_for_are_there():
    names = {file.stem for file in ON_GPUS}
    assert {"ppo_1b", "ppo_7b", "ppo_7b_lora", "ppo_13b", "ppo_34b", "ppo_70b", "ppo_70b_lora"} <= names
    assert {"dpo_7b", "dpo_70b", "dpo_70b_lora", "sft_7b", "sft_70b", "reward_model_7b", "reward_model_13b"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_plan_accepts_it(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # the catalogue's dimensions, whatever was downloaded here
    if is_pipeline(file):
        assert load_pipeline(file).stages
        return
    planned = tmp_path / file.name
    planned.write_text(file.read_text().replace(f"path: {MADE}", "path: HuggingFaceTB/SmolLM2-135M-Instruct"))
    plan = make_plan(load_config(planned), online=False)
    assert plan.problems == []
    assert plan.placement is not None


@pytest.mark.parametrize("file", ON_GPUS, ids=lambda file: file.stem)
def test_it_uses_all_that_it_names_and_says_so(file, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = load_config(file)
    plan = make_plan(config, online=False)
    (kind,) = config.cluster.nodes
    used = {(seat.machine, gpu) for seat in plan.placement.seats for gpu in seat.gpus}
    assert len(used) == kind.count * kind.gpus, "no GPU is paid for and left idle"
    assert not plan.known.unseen and plan.usage is not None, "the memory of all models is planned"
    head = file.read_text().split("\n\n")[0].partition("algorithm:")[0].partition("run_dir:")[0]
    count = {1: "one", 2: "two", 4: "four", 8: "eight"}[kind.count]
    assert f"{count} node" in head or f"{count} GPU" in head
    assert f"rayrlhf plan configs/{file.name}" in head and config.run_dir == f"runs/{file.stem}"
