"""Pipelines that end between two stages, and stages whose end nobody saw: what the next call makes of them."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.config.pipeline import Stage, load_pipeline
from rayrlhf.drivers.pipeline import _Run
from rayrlhf.drivers.pipeline_plan import Action, decide
from rayrlhf.drivers.pipeline_process import is_running
from rayrlhf.drivers.pipeline_results import stage_result
from rayrlhf.drivers.pipeline_state import PipelineState, Record, config_fingerprint, output_fingerprint
from rayrlhf.errors import InputRefused
from tests.drivers.test_pipeline import EXAMPLES, TRAINED, World, ppo, sft

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("stops"))


def test_a_stage_that_would_go_on_isn_t_forgotten_when_its_turn_doesn_t_come(world: World) -> None:
    every = {"every_steps": 1, "keep": 9}
    first = ppo(policy={**TRAINED, "path": "MODEL"})
    file = world.file("two", {"one": first, "two": sft(checkpoint=every)})
    folder = world.folder / "two"
    made = world.command(file)
    assert made.returncode == 0, made.stderr
    shutil.copytree(folder, world.folder / "undisturbed")
    # As if both had been cut off after their second step.
    state = PipelineState(folder)
    for name, status in (("one", "interrupted"), ("two", "running")):
        state.stages[name].status, state.stages[name].output = status, None
        shutil.rmtree(folder / name / "model")
        for step in (3, 4):
            shutil.rmtree(next((folder / name / "checkpoints").glob(f"*{step}")))
    state.write()
    before = world.state("two")["two"]
    stopped = world.command(file, DOES="interrupt", AT_CALL="1")
    assert stopped.returncode == 1 and "it was interrupted" in stopped.stderr
    assert world.state("two")["one"]["status"] == "interrupted" and world.state("two")["two"] == before
    assert "running" not in stopped.stdout[stopped.stdout.rindex("Pipeline") :]
    ended = world.command(file)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("going on from its last checkpoint") == 2
    assert world.state("two")["two"]["seconds"] > before["seconds"] > 0
    assert world.same_weights("two/one", "undisturbed/one") and world.same_weights("two/two", "undisturbed/two")


def test_what_has_run_goes_on_also_after_it_was_skipped(world: World) -> None:
    """And what needs a stage that failed in an earlier call isn't skipped before that one has had its turn."""
    file = world.file("skipped", {"sft": sft(), "ppo": ppo()})
    folder, pipeline = world.folder / "skipped", load_pipeline(file)
    for stage in pipeline.stages:
        (stage.folder / "checkpoints").mkdir(parents=True)
    state = PipelineState(folder)
    run = _Run(pipeline, state, dict.fromkeys(("sft", "ppo"), Action.RESUME), Console(file=io.StringIO()))
    record = {"status": "failed", "started": "2026-01-01T00:00:00+00:00", "seconds": 3.0, "config": "c"}
    (folder / "pipeline.json").write_text(json.dumps({"stages": {"sft": record, "ppo": {**record, "seconds": 4.0}}}))
    state.stages = PipelineState(folder).stages
    run._prepare()
    sft_stage, ppo_stage = pipeline.stages
    assert run._blocked(ppo_stage) == []
    run.waiting.remove(sft_stage)  # it had its turn, and failed again
    assert run._blocked(ppo_stage) == ["sft"]
    run._skip(ppo_stage, ["sft"])
    kept = PipelineState(folder).stages["ppo"]
    assert (kept.status, kept.started, kept.seconds, kept.config) == ("skipped", record["started"], 4.0, "c")
    # Without a checkpoint it begins anew; it isn't taken for somebody else's.
    assert decide(pipeline, PipelineState(folder), []) == {"sft": Action.ANEW, "ppo": Action.ANEW}


def _until_ended(run: _Run, name: str) -> None:
    until = time.monotonic() + 300
    while run.running[name].poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_an_interrupt_leaves_what_has_ended_done_and_a_lost_stage_is_found(world: World) -> None:
    file = world.file("ends", {"good": sft(), "bad": sft(data={**EXAMPLES, "train": "PAIRS"}), "under_way": sft()})
    folder, pipeline = world.folder / "ends", load_pipeline(file)
    folder.mkdir()
    state, said = PipelineState(folder), io.StringIO()
    run = _Run(pipeline, state, decide(pipeline, state, []), Console(file=said, width=200))
    run._prepare()
    good, bad, under_way = pipeline.stages
    run._start(good)
    run._start(bad)
    _until_ended(run, "good")
    _until_ended(run, "bad")
    run._start(under_way)
    # As if the pipeline had been killed before it could write the number of the process down.
    lost = PipelineState(folder)
    lost.stages["under_way"].pid = None
    with pytest.raises(InputRefused) as caught:
        decide(pipeline, lost, ["good"])
    told = f"as the process that was given {folder / 'under_way.yaml'}; end that first"
    assert caught.value.problems == [f"stages.under_way: it is still running, {told}"]
    run._interrupt()
    assert "ending the stages under way (under_way)" in said.getvalue()
    found = PipelineState(folder).stages
    assert [(r.status, r.pid) for r in found.values()] == [("done", None), ("failed", None), ("interrupted", None)]
    assert found["good"].exit_code == 0 and found["good"].output is not None and "Refused" in found["bad"].words
    assert not is_running(folder / "under_way.yaml")
    assert decide(pipeline, PipelineState(folder), [])["good"] == Action.KEEP


def test_an_evaluation_whose_results_are_gone_or_changed_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    stage = {"algorithm": "evaluation", "models": [{"name": n, "path": "MODEL"} for n in "ab"]}
    stage |= {"data": {"prompts": "PROMPTS"}, "scores": {"reward": {"function": "builtins:len"}}}
    file = world.file("compared", {"compare": stage})
    pipeline = load_pipeline(file)
    (compare,) = pipeline.stages
    results = compare.folder / "evaluation.json"
    compare.folder.mkdir(parents=True)
    results.write_text("{}")
    state = PipelineState(world.folder / "compared")
    state.stages["compare"] = Record("done", "2026-01-01T00:00:00+00:00", config=config_fingerprint(compare.config))
    state.stages["compare"].output = output_fingerprint(results)
    state.write()
    assert decide(pipeline, state, []) == {"compare": Action.KEEP}
    results.write_text("[]")
    (changed,) = world.refused(file)
    shutil.rmtree(compare.folder)
    (gone,) = world.refused(file)
    assert changed.startswith(
        f"stages.compare: {results} isn't what the stage made: it was changed since; --redo compare"
    )
    assert gone.startswith(f"stages.compare: {results} isn't there any more; --redo compare does it")
    assert decide(pipeline, state, ["compare"]) == {"compare": Action.ANEW}


@pytest.mark.parametrize(
    "algorithm, key, best, last",
    [("sft", "perplexity", "6.000", "7.000"), ("reward_model", "accuracy", "9.000", "7.000")],
)
def test_the_result_is_that_of_the_model_which_is_kept(tmp_path: Path, algorithm, key, best, last) -> None:
    rows = [{"step": step, key: value} for step, value in enumerate((8.0, 9.0, 6.0, 7.0))]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "c.yaml"
    for keep_best, after in ((True, best), (False, last)):
        training = f"training: {{keep_best: {json.dumps(keep_best)}}}"
        text = f"algorithm: {algorithm}\nrun_dir: {tmp_path}\npolicy: {{path: tiny}}\ndata: {{train: x.jsonl}}\n{training}\n"
        file.write_text(text)
        assert stage_result(Stage("s", load_config(file), {})) == f"held-out {key} 8.000 -> {after}"
