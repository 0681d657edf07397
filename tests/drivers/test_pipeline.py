"""Pipelines of tiny models, with real processes: the whole road, stop and go, refusals, failures, gates."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rayrlhf.config.pipeline import load_pipeline
from rayrlhf.drivers.pipeline import run_pipeline
from rayrlhf.drivers.pipeline_inputs import look
from rayrlhf.drivers.pipeline_plan import Action, decide
from rayrlhf.drivers.pipeline_results import winners
from rayrlhf.drivers.pipeline_state import PipelineState, output_fingerprint
from rayrlhf.errors import InputRefused
from tests.conftest import ROOT
from tests.drivers.offline_runs import words, write_examples
from tests.support.tiny import save_tiny_model

pytestmark = pytest.mark.timeout(900)

TRAINED = {"dtype": "float32", "tokens_per_micro_batch": 256, "optimizer": {"lr": 3e-3, "warmup_steps": 1}}
EXAMPLES = {"max_prompt_tokens": 8, "max_tokens": 24, "validation_fraction": 0.25, "chat_template": "never"}
TRAINING = {"epochs": 1, "batch_examples": 8, "max_steps": 4}
SAMPLING = {"engine": "transformers", "max_response_tokens": 8}
QUIET = {"progress": "lines", "tensorboard": False}
SCORE = {"function": "tests.drivers.pipeline_score:small_numbers"}


def sft(**more: Any) -> dict[str, Any]:
    stage = {"algorithm": "sft", "policy": {**TRAINED, "path": "MODEL"}, "data": {**EXAMPLES, "train": "SFT"}}
    return {**stage, "training": TRAINING, "monitoring": QUIET, **more}


def ppo(**more: Any) -> dict[str, Any]:
    return {
        "algorithm": "ppo",
        "policy": {**TRAINED, "path": "stage:sft"},
        "critic": TRAINED,
        "reference": {"dtype": "float32"},
        "reward": {"sources": [SCORE]},
        "data": {"prompts": "PROMPTS", "max_prompt_tokens": 8},
        "rollout": {**SAMPLING, "samples_per_prompt": 2, "chunk_samples": 4},
        "ppo": {"steps": 4, "prompts_per_step": 8, "minibatch_samples": 8},
        "evaluation": {"prompts": 8},
        "checkpoint": {"every_steps": 1, "keep": 9},
        "monitoring": QUIET,
        **more,
    }


def dpo(**more: Any) -> dict[str, Any]:
    return {
        "algorithm": "dpo",
        "policy": {**TRAINED, "path": "stage:sft"},
        "reference": {"dtype": "float32"},
        "data": {**EXAMPLES, "train": "stage:pairs"},
        "training": TRAINING,
        "guard": {"kl_prompts": 8, "max_kl": 50.0},
        "rollout": SAMPLING,
        "monitoring": QUIET,
        **more,
    }


def compare(*models: str) -> dict[str, Any]:
    return {
        "algorithm": "evaluation",
        "models": [{"name": name, "path": f"stage:{name}"} for name in models],
        "measure": {"dtype": "float32", "tokens_per_micro_batch": 256},
        "rollout": SAMPLING,
        "data": {"prompts": "PROMPTS", "completion_column": "completion", "limit": 16, "max_prompt_tokens": 8},
        "scores": {"reward": SCORE},
    }


WHOLE = {
    "sft": sft(),
    "pairs": {
        "algorithm": "sampling",
        "policy": {"path": "stage:sft", "dtype": "float32"},
        "reward": {"sources": [SCORE]},
        "rollout": {**SAMPLING, "samples_per_prompt": 4},
        "data": {"prompts": "PROMPTS", "max_prompt_tokens": 8, "limit": 48},
    },
    "reward": {
        "algorithm": "reward_model",
        "policy": {**TRAINED, "path": "stage:sft"},
        "data": {**EXAMPLES, "train": "stage:pairs"},
        "training": TRAINING,
        "monitoring": QUIET,
    },
    "ppo": ppo(reward={"sources": [SCORE], "gold": {"name": "learnt", "model": "stage:reward"}}),
    "dpo": dpo(),
    "compare": compare("sft", "dpo", "ppo"),
}


class World:
    """A folder with a model and data, in which pipelines are made."""

    def __init__(self, folder: Path):
        self.folder = folder
        save_tiny_model(folder / "model")
        write_examples(folder)
        chance = random.Random(0)
        rows = [{"prompt": words(chance, 0, 60, 5), "completion": f" {words(chance, 0, 60)}"} for _ in range(64)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def file(self, name: str, stages: dict[str, Any], **keys: Any) -> Path:
        """A pipeline's file, whose folder has its name."""
        values = {
            "algorithm": "pipeline",
            "run_dir": str(self.folder / name),
            "seed": 5,
            "cluster": {"executor": "inline", "threads": 1, "start_timeout_s": 200, "call_timeout_s": 120},
            **keys,
            "stages": stages,
        }
        text = json.dumps(values)
        for word, path in (
            ("MODEL", "model"),
            ("SFT", "sft.jsonl"),
            ("PAIRS", "pairs.jsonl"),
            ("PROMPTS", "prompts.jsonl"),
        ):
            text = text.replace(f'"{word}"', json.dumps(str(self.folder / path)))
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(json.loads(text), sort_keys=False))
        return file

    def command(self, file: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`rayrlhf pipeline` as a user types it."""
        line = [sys.executable, "-m", "rayrlhf.cli", "pipeline", str(file), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "150", **env}
        return subprocess.run(line, capture_output=True, text=True, timeout=800, cwd=ROOT, env=environment)

    def state(self, name: str) -> dict[str, dict[str, Any]]:
        return json.loads((self.folder / name / "pipeline.json").read_text())["stages"]

    def refused(self, file: Path, *overrides: str, redo: Sequence[str] = ()) -> list[str]:
        with pytest.raises(InputRefused) as caught:
            run_pipeline(load_pipeline(file, list(overrides), look), redo=redo)
        return caught.value.problems

    def same_weights(self, a: str, b: str) -> bool:
        mine, theirs = (load_file(self.folder / run / "model" / "model.safetensors") for run in (a, b))
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def whole(world: World) -> subprocess.CompletedProcess[str]:
    """SFT, pairs, reward model, PPO, DPO and their comparison, undisturbed."""
    done = world.command(world.file("whole", WHOLE))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def times(folder: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and f.parent != folder}


# -- the whole road -------------------------------------------------------------------------------------------------


def test_the_whole_road(world: World, whole) -> None:
    state = world.state("whole")
    assert {name: record["status"] for name, record in state.items()} == dict.fromkeys(WHOLE, "done")
    run = world.folder / "whole"
    assert (run / "compare" / "win_rates.json").is_file() and (run / "report.html").stat().st_size > 10_000
    headings = re.findall(r"stage (\d of 6: \w+ \(\w+\))", whole.stdout)
    assert headings[0] == "1 of 6: sft (sft)" and headings[-1] == "6 of 6: compare (evaluation)"
    assert "stages" not in whole.stderr and "Traceback" not in whole.stderr


def test_each_stage_took_what_the_one_before_had_made(world: World, whole) -> None:
    run, state = world.folder / "whole", world.state("whole")
    stored = yaml.safe_load((run / "dpo" / "config.yaml").read_text())
    assert stored["policy"]["path"] == str(run / "sft" / "model")
    assert stored["data"]["train"] == str(run / "pairs" / "data.jsonl")
    assert state["dpo"]["inputs"] == {n: state[n]["output"] for n in ("sft", "pairs")}
    assert state["sft"]["output"] == output_fingerprint(run / "sft" / "model")
    # DPO begins as SFT ended: at its first validation policy and reference are one model, and no margin is there.
    first = json.loads((run / "dpo" / "evaluations.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert not world.same_weights("whole/sft", "whole/dpo")


def test_the_end_says_who_won_and_how_surely(world: World, whole) -> None:
    rows = json.loads((world.folder / "whole" / "compare" / "win_rates.json").read_text())
    table = whole.stdout[whole.stdout.rindex("Pipeline") :]
    judge = rows[0]["judge"]
    means: dict[str, list[float]] = {}
    for row in (row for row in rows if row["judge"] == judge):
        means.setdefault(row["a"], []).append(row["rate"])
        means.setdefault(row["b"], []).append(1 - row["rate"])
    best = max(means, key=lambda name: sum(means[name]) / len(means[name]))
    assert f"{best} wins by {judge}: " in table
    assert all(name in table for name in WHOLE) and "this call: 0:0" in table


def test_the_winner_by_hand(tmp_path: Path) -> None:
    # Mean rates by score: sft (0.3 + 0.2) / 2, dpo (0.7 + 0.56) / 2 = 0.63, ppo (0.8 + 0.44) / 2 = 0.62.
    rows = [
        {"a": "dpo", "b": "sft", "judge": "score", "rate": 0.7, "low": 0.6, "high": 0.8},
        {"a": "ppo", "b": "sft", "judge": "score", "rate": 0.8, "low": 0.7, "high": 0.9},
        {"a": "ppo", "b": "dpo", "judge": "score", "rate": 0.44, "low": 0.3, "high": 0.55},
        {"a": "ppo", "b": "dpo", "judge": "other", "rate": 0.2, "low": 0.1, "high": 0.3},
        {"a": "ppo", "b": "sft", "judge": "other", "rate": None, "low": None, "high": None},
    ]
    (tmp_path / "win_rates.json").write_text(json.dumps(rows))
    assert winners(tmp_path) == [
        "dpo wins by score: 70 % [60 %, 80 %] against sft, 56 % [45 %, 70 %] against ppo; 50 % lies within the interval"
        " against ppo",
        "dpo wins by other: 80 % [70 %, 90 %] against ppo",
    ]
    assert winners(tmp_path / "none") == []


# -- it goes on where it stopped ------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(world: World, whole) -> None:
    before = times(world.folder / "whole")
    again = world.command(world.folder / "whole.yaml", "stages.sft.monitoring.progress=none", "cluster.threads=2")
    assert again.returncode == 0, again.stderr
    assert times(world.folder / "whole") == before
    assert "stage 1 of 6" not in again.stdout and "wins by" in again.stdout


@pytest.fixture(scope="module")
def stopped(world: World) -> Path:
    """SFT and PPO as in the whole road; killed in the third step of PPO, with its parent, and interrupted in the fourth."""
    file = world.file("stopped", {"sft": sft(), "ppo": ppo()})
    killed = world.command(file, DOES="kill", AT_CALL="12")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = world.state("stopped")
    assert (state["sft"]["status"], state["ppo"]["status"]) == ("done", "running")
    assert not (world.folder / "stopped" / "ppo" / "model").exists()
    return file


def test_killed_and_interrupted_it_ends_as_if_undisturbed(world: World, whole, stopped: Path) -> None:
    before = times(world.folder / "stopped" / "sft")
    interrupted = world.command(stopped, DOES="interrupt", AT_CALL="3")
    assert interrupted.returncode == 1 and "it was interrupted; the same command goes on" in interrupted.stderr
    assert "going on from its last checkpoint" in interrupted.stdout
    record = world.state("stopped")["ppo"]
    assert record["status"] == "interrupted" and record["pid"] is None and record["exit_code"] is not None
    ended = world.command(stopped)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert world.state("stopped")["ppo"]["status"] == "done"
    assert times(world.folder / "stopped" / "sft") == before
    assert world.same_weights("stopped/sft", "whole/sft")
    assert world.same_weights("stopped/ppo", "whole/ppo")
    assert not world.same_weights("stopped/ppo", "stopped/sft")


def test_redo_moves_away_and_begins_anew(world: World, whole, stopped: Path) -> None:
    made = (world.folder / "stopped" / "ppo" / "metrics.jsonl").read_text()
    done = world.command(stopped, "--redo", "ppo", "stages.ppo.ppo.steps=2")
    assert done.returncode == 0, done.stderr
    run = world.folder / "stopped"
    assert (run / "replaced" / "ppo-1" / "metrics.jsonl").read_text() == made
    assert (run / "ppo" / "metrics.jsonl").read_text().count("\n") == 2
    assert "stage 1 of 2" not in done.stdout


def test_what_is_done_with_each_stage(world: World, whole) -> None:
    pipeline = load_pipeline(world.folder / "whole.yaml")

    def actions(redo: Sequence[str] = (), **statuses: str) -> dict[str, str]:
        state = PipelineState(world.folder / "whole")
        for name, status in statuses.items():
            state.stages[name].status = status
        return {name: action.value for name, action in decide(pipeline, state, redo).items() if action != Action.KEEP}

    assert actions() == {}
    assert actions(redo=["dpo"]) == {"dpo": "anew", "compare": "anew"}
    assert actions(redo=["reward"]) == {"reward": "anew", "ppo": "anew", "compare": "anew"}
    # It has a checkpoint of its last step; sampling and evaluation have none.
    assert actions(sft="running", pairs="interrupted", compare="failed") == {
        "sft": "resume",
        "pairs": "anew",
        "compare": "anew",
    }
    checkpoints = world.folder / "whole" / "sft" / "checkpoints"
    checkpoints.rename(checkpoints.with_name("elsewhere"))
    try:
        assert actions(sft="failed") == {"sft": "anew"}
    finally:
        checkpoints.with_name("elsewhere").rename(checkpoints)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_another_configuration_of_what_has_run_is_refused(world: World, whole) -> None:
    before = times(world.folder / "whole")
    file = world.folder / "whole.yaml"
    assert world.refused(file, "stages.sft.training.max_steps=5", "stages.dpo.dpo.beta=0.3") == [
        "stages.sft: training.max_steps is 5, but it ran with 4; --redo sft does it and what needs it again",
        "stages.dpo: dpo.beta is 0.3, but it ran with 0.1; --redo dpo does it and what needs it again",
    ]
    (problem, *_) = world.refused(file, "stages.pairs.reward.sources.0.name=other")
    assert problem.startswith("stages.pairs: reward.sources.0.name is 'other', but it ran with None;")
    assert world.refused(file, redo=["ppp"]) == ["--redo: there is no stage 'ppp'; did you mean ppo?"]
    assert times(world.folder / "whole") == before


def test_an_output_that_was_changed_or_removed_is_refused(world: World, whole) -> None:
    data = world.folder / "whole" / "pairs" / "data.jsonl"
    text = data.read_text()
    try:
        data.write_text(text[:-1] + " \n")
        (changed,) = world.refused(world.folder / "whole.yaml")
        data.unlink()
        (gone,) = world.refused(world.folder / "whole.yaml")
    finally:
        data.write_text(text)
    assert changed.startswith(f"stages.pairs: {data} isn't what the stage made: it was changed since; --redo pairs")
    assert gone.startswith(f"stages.pairs: {data} isn't there any more; --redo pairs")


def test_a_folder_in_use_or_of_something_else_is_refused(world: World) -> None:
    file = world.file("used", {"sft": sft()})
    folder = world.folder / "used"
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "notes.txt").write_text("mine")
    (problem,) = world.refused(file)
    assert problem.startswith(f"stages.sft: {folder / 'sft'} holds something that this pipeline didn't make;")
    with open(folder / "pipeline.lock", "r+") as lock:
        assert int(lock.read()) == os.getpid(), "left by the call before, whose lock ended with it"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert world.refused(file) == [f"run_dir: {folder} is in use by another pipeline, process {os.getpid()}"]
    assert not (folder / "pipeline.json").exists()


def test_a_stage_that_is_still_running_is_refused(world: World) -> None:
    file = world.file("alive", {"sft": sft()})
    folder = world.folder / "alive"
    folder.mkdir()
    record = {"status": "running", "started": "2026-01-01T00:00:00+00:00", "pid": 12}
    (folder / "pipeline.json").write_text(json.dumps({"stages": {"sft": record}}))
    with open(folder / ".sft.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = "stages.sft: it is still running, as process 12; end that first"
        assert world.refused(file) == world.refused(file, redo=["sft"]) == [told]
    assert decide(load_pipeline(file), PipelineState(folder), []) == {"sft": Action.ANEW}


def test_inputs_from_outside_are_looked_at(world: World) -> None:
    stages = {"sft": sft(), "ppo": ppo(), "compare": compare("sft")}
    file = world.file("outside", stages)
    (world.folder / "empty").mkdir()
    found = world.refused(
        file,
        f"stages.sft.policy.path={world.folder / 'empty'}",
        f"stages.sft.data.train={world.folder / 'none.jsonl'}",
        "stages.ppo.policy.tokenizer=./nowhere",
        "stages.ppo.critic.path=package:no_such_package",
        "stages.ppo.reward.sources.0.function=tests.drivers.pipeline_score:smal_numbers",
        "stages.compare.reference=none.gguf",
        "stages.compare.models.0.chat_template=none.jinja",
    )
    told = dict(problem.removeprefix("command line: ").split(": ", 1) for problem in found)
    assert told == {
        "stages.sft.policy.path": f"found '{world.folder / 'empty'}', which holds no model: it has no config.json",
        "stages.sft.data.train": f"found '{world.folder / 'none.jsonl'}'; there is no such file",
        "stages.ppo.policy.tokenizer": "found './nowhere'; there is no such folder",
        "stages.ppo.critic.path": "found package:no_such_package; no Python package 'no_such_package' is installed",
        "stages.ppo.reward.sources.0.function": told["stages.ppo.reward.sources.0.function"],
        "stages.compare.reference": "found 'none.gguf'; there is no such file",
        "stages.compare.models.0.chat_template": "found 'none.jinja'; there is no such file",
    }
    assert "has no function 'smal_numbers'" in told["stages.ppo.reward.sources.0.function"]
    assert not (world.folder / "outside").exists()


# -- what goes wrong on the way -------------------------------------------------------------------------------------


def test_a_failed_stage_stops_what_needs_it_and_nothing_else(world: World) -> None:
    bad = sft(data={**EXAMPLES, "train": "PAIRS"})  # no column completion: only the stage itself can tell
    stages = {
        "bad": bad,
        "good": sft(),
        "after": ppo(policy={**TRAINED, "path": "stage:bad"}),
        "also": dict(compare("after")),
    }
    done = world.command(world.file("failing", stages, parallel_stages=2))
    assert done.returncode == 1
    state = world.state("failing")
    assert {n: r["status"] for n, r in state.items()} == {
        "bad": "failed",
        "good": "done",
        "after": "skipped",
        "also": "skipped",
    }
    assert state["bad"]["exit_code"] == 2 and state["after"]["words"] == "bad failed"
    ending = done.stderr[done.stderr.rindex("The run failed:") :]
    assert (
        "stage bad (exit code 2):\nRefused:" in ending
        and "'completion'" in ending
        and "2 more could not be run" in ending
    )
    # Side by side each line says whose it is.
    assert re.search(r"^good \| .*validation on", done.stdout, re.MULTILINE)
    assert re.search(r"^bad \| Refused:", done.stderr, re.MULTILINE)


def test_a_gate_stops_what_needs_it_unless_it_is_only_noted(world: World) -> None:
    # No step can leave the KL at zero: the bound can't be held.
    strict = dpo(
        data={**EXAMPLES, "train": "PAIRS"},
        policy={**TRAINED, "path": "MODEL"},
        training={**TRAINING, "keep_best": False},
    )
    strict["guard"] = {"kl_prompts": 8, "max_kl": 1e-9, "actions": []}
    file = world.file("gated", {"dpo": strict, "compare": compare("dpo")})
    stopped = world.command(file)
    assert stopped.returncode == 1 and "the quality gate of dpo isn't passed, and gates is stop" in stopped.stderr
    assert [r["status"] for r in world.state("gated").values()] == ["gate", "skipped"]
    assert "what needs it was not run" in stopped.stdout
    before, compared = times(world.folder / "gated" / "dpo"), world.folder / "gated" / "compare"
    noted = world.command(file, "gates=note")
    assert noted.returncode == 0, noted.stdout + noted.stderr
    assert [r["status"] for r in world.state("gated").values()] == ["gate", "done"]
    assert world.state("gated")["compare"]["output"] == output_fingerprint(compared / "evaluation.json")
    compared.rename(compared.with_name("elsewhere"))
    (gone,) = world.refused(file, "gates=note")
    assert gone.startswith(
        f"stages.compare: {compared / 'evaluation.json'} isn't there any more; --redo compare does it"
    )
    assert "its model was used all the same" in noted.stdout and times(world.folder / "gated" / "dpo") == before
