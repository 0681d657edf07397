"""The plan on the command line: what it shows, its exit codes, how long it takes, and its document."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BASE = ROOT / "tests" / "config" / "base.yaml"
LARGE = ROOT / "configs" / "ppo_70b.yaml"


def plan(*words: str, cwd: Path = ROOT, columns: int = 100) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rayrlhf.cli", "plan", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def processor_s() -> float:
    """Time that commands had of the processor so far; by the clock the machine may be busy with other things."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("columns", [80, 100])
def test_a_large_run_is_shown_whole_in_a_terminal_and_not_much_later_than_a_small_one(columns):
    begun = processor_s()
    assert plan(str(BASE), columns=columns).returncode == 0
    small = processor_s() - begun
    done = plan(str(LARGE), columns=columns)
    assert done.returncode == 0, done.stdout + done.stderr
    # The promise is 5 seconds, more than which a slow machine may need; on any a large run takes 1.2 times as long.
    assert processor_s() - begun - small < 4 * small
    assert max(map(len, done.stdout.splitlines())) <= columns
    for words in (
        "70,553,706,496",
        "node 0 to node 7",
        "1 engine each",
        "Ask Ray for: GPU: 64 on 8 nodes (8 each)",
    ):
        assert words in done.stdout, words
    assert re.search("│ +start +│ +rollout +│ +score +│ +update +│ +transfer +│", done.stdout)
    # By hand in test_plan.py: rollout, score, update, transfer; the start has the most with the engine, which is built first.
    assert re.search(r"│ parameters +│ +16\.4 +│ +16\.4 +│ +18\.3 +│ +2\.3 +│ +18\.5 +│", done.stdout)
    assert re.search(r"│ optimizer +│ +- +│ +- +│ +- +│ +13\.6 +│ +- +│", done.stdout)
    assert "Peak:" in done.stdout and "the network between" in done.stdout
    assert "What can't work" not in done.stdout


def test_the_document_is_one_for_programs():
    done = plan(str(LARGE), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["resources"]["gpus_by_node"]["node 7"] == 8
    assert all(gpu["peak_bytes"] <= gpu["limit_bytes"] for gpu in found["memory"]["gpus"])
    assert all(sum(gpu["phases"][gpu["peak_phase"]].values()) == gpu["peak_bytes"] for gpu in found["memory"]["gpus"])


def test_what_can_not_run_ends_with_1_and_all_reasons():
    done = plan(str(LARGE), "cluster.nodes.0.count=2", "rollout.tensor_parallel=7", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["ok"] is False and len(found["problems"]) == 2
    shown = plan(str(LARGE), "cluster.nodes.0.count=2", "rollout.tensor_parallel=7")
    assert shown.returncode == 1 and "What can't work" in shown.stdout and "what would do" in shown.stdout


def test_the_base_of_an_adapter_is_shown():
    done = plan(str(ROOT / "configs" / "ppo_70b_lora.yaml"))
    (line,) = [line for line in done.stdout.splitlines() if "base, ipc" in line]
    assert "141.11" in line
    assert "2,004 MiB" in done.stdout


def test_an_engine_that_would_find_too_little_ends_with_1():
    words = [
        "cluster.executor=inline",
        "cluster.nodes=[{gpus: 1, gpu_memory_gib: 40}]",
        "rollout.gpu_memory_fraction=0.9",
    ]
    done = plan(str(BASE), "cluster.device=cuda", "policy.path=Qwen/Qwen2.5-0.5B", *words)
    shown = " ".join(done.stdout.split())
    assert (
        done.returncode == 1
        and "an engine starts only where rollout.gpu_memory_fraction 0.9 of 40.0 GiB is free" in shown
    )


def test_what_is_not_legal_ends_with_2():
    done = plan(str(LARGE), "policy.ranks=none")
    assert done.returncode == 2 and "Refused" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "base", ["base", "base_sft", "base_reward_model", "base_dpo", "base_sampling", "base_evaluation"]
)
def test_every_algorithm_is_shown(base):
    done = plan(f"tests/config/{base}.yaml")
    assert "processes" in done.stdout and "Traceback" not in done.stderr
    # Their models are names that nobody knows.
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0 and "Models that couldn't be looked at" in shown and "its memory isn't planned" in shown


def test_a_folder_without_config_json_ends_with_1(tmp_path):
    done = plan(str(BASE), f"policy.path={tmp_path}")
    assert done.returncode == 1 and "has no config.json" in " ".join(done.stdout.split())


def test_the_documents_keys_are_described():
    """Each key stands in docs/plan.md, and nothing stands there that isn't."""
    found = json.loads(plan(str(LARGE), "reward.sources=[{model: ./runs/reward}]", "--json").stdout)
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE))
    assert rows == set(_paths(found))


NAMED = ("memory.gpus.phases", "memory.machines.parts", "memory.machines.phases", "resources.gpus_by_node")
"""Whose keys are phases, parts and machines."""


def _paths(value: object, at: str = "") -> set[str]:
    """Dotted keys as the page has them: without indices, and without the names of roles, phases, parts and machines."""
    if isinstance(value, list):
        return set().union(*(_paths(item, at) for item in value))
    if not isinstance(value, dict) or at in NAMED:
        return set()
    if at == "roles":
        return set().union(*(_paths(role, "roles.") for role in value.values()))
    keys = {key: f"{at.rstrip('.')}.{key}".lstrip(".") for key in value}
    return set(keys.values()).union(*(_paths(value[key], path) for key, path in keys.items()))
