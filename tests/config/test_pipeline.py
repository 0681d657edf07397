"""A pipeline's file: stages resolved and put in order, repetitions written out, and every way to get it wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.config import load_config
from rayrlhf.config.pipeline import Pipeline, is_pipeline, load_pipeline, pipeline_rows
from rayrlhf.errors import InputRefused

ROOT = Path(__file__).parents[2]
FILE = """algorithm: pipeline
run_dir: runs/all
seed: 7
cluster: {executor: inline, threads: 1}
stages:
  compare: {algorithm: evaluation, models: [{name: a, path: stage:sft}, {name: b, path: stage:dpo}],
    data: {prompts: p.jsonl}, scores: {reward: {model: stage:reward}}}
  sft: {algorithm: sft, policy: {path: models/x/tiny}, data: {train: sft.jsonl}}
  pairs: {algorithm: sampling, policy: {path: stage:sft}, reward: {sources: [{function: "mine:score"}]},
    data: {prompts: p.jsonl}}
  reward:
    algorithm: reward_model
    policy: {path: stage:sft}
    data: {train: stage:pairs}
  dpo: {algorithm: dpo, seed: 3, policy: {path: stage:sft}, data: {train: stage:pairs}, cluster: {threads: 2}}
"""
ROUNDS = """algorithm: pipeline
run_dir: runs/all
seed: 7
stages:
  sft: {algorithm: sft, policy: {path: tiny}, data: {train: sft.jsonl}}
  rounds:
    repeat: 3
    start: {dpo: stage:sft}
    stages:
      pairs: {algorithm: sampling, policy: {path: "previous:dpo"}, reward: {sources: [{function: "mine:score"}]},
        data: {prompts: p.jsonl}}
      dpo: {algorithm: dpo, seed: 20, policy: {path: "previous:dpo"}, data: {train: stage:pairs}}
  compare: {algorithm: evaluation, models: [{name: one, path: stage:rounds-1-dpo}, {name: last, path: stage:rounds.dpo}],
    data: {prompts: p.jsonl}, scores: {reward: {function: "mine:score"}}}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Pipeline]:
    def run(text: str = FILE, *overrides: str, **more: Any) -> Pipeline:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return load_pipeline(path, list(overrides), **more)

    return run


@pytest.fixture
def refused(load: Callable[..., Pipeline], tmp_path: Path) -> Callable[..., list[str]]:
    def run(text: str = FILE, *overrides: str, **more: Any) -> list[str]:
        with pytest.raises(InputRefused) as caught:
            load(text, *overrides, **more)
        return [problem.replace(str(tmp_path / "c.yaml"), "c.yaml") for problem in caught.value.problems]

    return run


def test_stages_are_resolved_and_each_comes_after_what_it_needs(load) -> None:
    pipeline = load()
    assert [stage.name for stage in pipeline.stages] == ["sft", "pairs", "reward", "dpo", "compare"]
    sft, pairs, reward, dpo, compare = pipeline.stages
    assert pairs.config.policy.path == "runs/all/sft/model" and pairs.needs == ["sft"]
    assert reward.config.data.train == "runs/all/pairs/data.jsonl"
    assert [model.path for model in compare.config.models] == ["runs/all/sft/model", "runs/all/dpo/model"]
    assert compare.config.scores.reward.model == "runs/all/reward/model"
    assert compare.needs == ["sft", "dpo", "reward"] and compare.output is None
    assert [stage.config.run_dir for stage in pipeline.stages] == [f"runs/all/{s.name}" for s in pipeline.stages]


def test_seed_and_cluster_are_the_pipelines_unless_a_stage_has_its_own(load) -> None:
    sft, *_, dpo, _ = load().stages
    assert (sft.config.seed, dpo.config.seed) == (7, 3)
    assert (sft.config.cluster.executor, sft.config.cluster.threads) == ("inline", 1)
    assert (dpo.config.cluster.executor, dpo.config.cluster.threads) == ("inline", 2)


def test_overrides_reach_into_stages(load) -> None:
    pipeline = load(FILE, "stages.dpo.dpo.beta=0.2", "stages.sft.policy.path=5", "run_dir=elsewhere", "gates=note")
    assert pipeline.stages[3].config.dpo.beta == 0.2
    assert pipeline.stages[0].config.policy.path == "5", "a path is a text, as in a stage's own file"
    assert pipeline.stages[1].config.policy.path == "elsewhere/sft/model"
    assert pipeline.config.gates == "note"


def test_a_stage_is_what_its_own_file_would_be(load, tmp_path: Path) -> None:
    alone = {"algorithm": "sft", "run_dir": "runs/all/sft", "seed": 7, "cluster": {"executor": "inline", "threads": 1}}
    alone |= {"policy": {"path": "models/x/tiny"}, "data": {"train": "sft.jsonl"}}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    assert load().stages[0].config == load_config(tmp_path / "alone.yaml")


def test_a_repetition_is_written_out(load) -> None:
    pipeline = load(ROUNDS)
    names = ["sft", *(f"rounds-{r}-{name}" for r in (1, 2, 3) for name in ("pairs", "dpo")), "compare"]
    assert [stage.name for stage in pipeline.stages] == names
    by_name = {stage.name: stage for stage in pipeline.stages}
    for r, before in ((1, "sft"), (2, "rounds-1-dpo"), (3, "rounds-2-dpo")):
        pairs, dpo = by_name[f"rounds-{r}-pairs"], by_name[f"rounds-{r}-dpo"]
        assert pairs.config.policy.path == dpo.config.policy.path == f"runs/all/{before}/model"
        assert dpo.config.data.train == f"runs/all/rounds-{r}-pairs/data.jsonl"
        assert pairs.config.seed == 7 + r and dpo.config.seed == 20 + r
    assert [m.path for m in by_name["compare"].config.models] == [
        "runs/all/rounds-1-dpo/model",
        "runs/all/rounds-3-dpo/model",
    ]


def test_a_repetition_may_start_from_a_path_and_its_keys_be_overridden(load) -> None:
    pipeline = load(
        ROUNDS, "stages.rounds.repeat=1", "stages.rounds.start.dpo=7", "stages.rounds.stages.dpo.dpo.beta=3"
    )
    by_name = {stage.name: stage for stage in pipeline.stages}
    assert by_name["rounds-1-pairs"].config.policy.path == "7" and not by_name["rounds-1-pairs"].needs
    assert by_name["rounds-1-dpo"].config.dpo.beta == 3


def test_the_plan_says_what_each_stage_gives_and_needs(load) -> None:
    rows = pipeline_rows(load())
    assert ("stages", "pairs (sampling)", "pairs/data.jsonl", "after sft") in [tuple(row) for row in rows]
    assert ("stages", "compare (evaluation)", "a report", "after sft, dpo, reward") in [tuple(row) for row in rows]


@pytest.mark.parametrize("name", ["pipeline_local.yaml", "iterative_dpo_local.yaml"])
def test_the_pipelines_that_come_with_it_are_legal(name: str) -> None:
    assert is_pipeline(ROOT / "configs" / name)
    assert load_pipeline(ROOT / "configs" / name).stages[-1].name == "compare"


# what is replaced in FILE, by what -> the problems, whole
WRONG = {
    "unknown stage": (
        "train: stage:pairs}\n  dpo",
        "train: stage:pair}\n  dpo",
        ["c.yaml:14: stages.reward.data.train: found stage:pair, but there is no such stage; did you mean pairs?"],
    ),
    "misspelt key of a stage": (
        "{algorithm: sft,",
        "{algorithm: sft, trainin: {epochs: 1},",
        ["c.yaml:8: stages.sft.trainin: there is no such key; did you mean training?"],
    ),
    "unknown algorithm": (
        "algorithm: reward_model",
        "algorithm: reward_modl",
        [
            "c.yaml:12: stages.reward.algorithm: found the text 'reward_modl'; legal: one of ppo, sft, reward_model, dpo,"
            " sampling, critique, evaluation; did you mean reward_model?"
        ],
    ),
    "broken rule of a stage": (
        "dpo: {algorithm: dpo, seed: 3,",
        "dpo: {algorithm: dpo, seed: 3, rollout: {engines: 2},",
        [
            "c.yaml:15: stages.dpo.rollout.engines: found 2, but cluster.executor inline runs every role in the driver's"
            " one process; legal: 1, or the executor ray"
        ],
    ),
    "missing key of a stage": (
        "policy: {path: models/x/tiny}, ",
        "",
        [
            "c.yaml:8: stages.sft.policy: is missing; legal: a section with keys such as path, tokenizer,"
            " chat_template (The model that is trained)"
        ],
    ),
    "data where a model is wanted": (
        "  reward:\n    algorithm: reward_model\n    policy: {path: stage:sft}",
        "  reward:\n    algorithm: reward_model\n    policy: {path: stage:pairs}",
        [
            "c.yaml:13: stages.reward.policy.path: found stage:pairs (sampling), which gives data; a model is wanted here"
        ],
    ),
    "a model where data is wanted": (
        "data: {train: sft.jsonl}",
        "data: {train: stage:reward}",
        [
            "c.yaml:8: stages.sft.data.train: found stage:reward (reward_model), which gives a reward model; data is"
            " wanted here",
        ],
    ),
    "a reward model to sample from": (
        "dpo: {algorithm: dpo, seed: 3, policy: {path: stage:sft}",
        "dpo: {algorithm: dpo, seed: 3, policy: {path: stage:reward}",
        [
            "c.yaml:15: stages.dpo.policy.path: found stage:reward (reward_model), which gives a reward model; a language"
            " model is wanted here"
        ],
    ),
    "a policy as a reward model": (
        "{reward: {model: stage:reward}}",
        "{reward: {model: stage:dpo}}",
        [
            "c.yaml:7: stages.compare.scores.reward.model: found stage:dpo (dpo), which gives a language model; a"
            " reward model is wanted here"
        ],
    ),
    "an evaluation as an input": (
        "dpo: {algorithm: dpo, seed: 3, policy: {path: stage:sft}",
        "dpo: {algorithm: dpo, seed: 3, policy: {path: stage:compare}",
        [
            "c.yaml:15: stages.dpo.policy.path: found stage:compare (evaluation), which gives nothing that a stage could"
            " take; a language model is wanted here",
        ],
    ),
    "pairs without the column that is read": (
        "data: {train: sft.jsonl}}\n",
        "data: {train: sft.jsonl}}\n  more: {algorithm: sft, policy: {path: tiny}, data: {train: stage:pairs}}\n",
        [
            "c.yaml:9: stages.more.data.train: found stage:pairs, which writes the columns chosen, margin, prompt,"
            " rejected; here completion is read too"
        ],
    ),
    "adapters alone": (
        "policy: {path: models/x/tiny}",
        "policy: {path: models/x/tiny, lora: {save: adapter}}",
        [
            f"c.yaml:{line}: stages.{key}: found stage:sft, which gives adapters alone; legal: policy.lora.save merged in"
            " that stage"
            for line, key in (
                (6, "compare.models.0.path"),
                (9, "pairs.policy.path"),
                (13, "reward.policy.path"),
                (15, "dpo.policy.path"),
            )
        ],
    ),
    "itself": (
        "policy: {path: models/x/tiny}",
        "policy: {path: stage:sft}",
        ["c.yaml:8: stages.sft.policy.path: the stages need each other in a circle: sft needs sft"],
    ),
    "a folder of its own": (
        "{algorithm: sft,",
        "{algorithm: sft, run_dir: mine,",
        ["c.yaml:8: stages.sft.run_dir: found the text 'mine'; a stage's folder is runs/all/sft: leave it out"],
    ),
    "previous: without repetition": (
        "policy: {path: models/x/tiny}",
        "policy: {path: 'previous:dpo'}",
        [
            "c.yaml:8: stages.sft.policy.path: found previous:dpo, but this stage isn't repeated; legal: stage:NAME, or"
            " previous: in a repetition"
        ],
    ),
    "a key of the pipeline": (
        "seed: 7",
        "sed: 7",
        ["c.yaml:3: sed: there is no such key; did you mean seed?"],
    ),
    "a key of the pipeline's cluster": (
        "executor: inline, threads: 1",
        "executor: inline, thread: 1",
        ["c.yaml:4: cluster.thread: there is no such key; did you mean cluster.threads?"],
    ),
    "a stage's key at the top": (
        "seed: 7",
        "policy: {path: tiny}",
        [
            "c.yaml:3: policy: belongs to the algorithms ppo, sft, reward_model, dpo, sampling and critique; this file has"
            " algorithm pipeline; legal in the top level: algorithm, run_dir, seed, parallel_stages, gates, cluster"
        ],
    ),
    "stages misspelt": (
        "stages:",
        "stage:",
        ["c.yaml:5: stage: there is no such key; did you mean stages?"],
    ),
    "key twice in a stage": (
        "    policy: {path: stage:sft}\n",
        "    policy: {path: stage:sft}\n    policy: {path: stage:sft}\n",
        ["c.yaml:14: stages.reward.policy: the key stands twice, first at c.yaml:13; remove one"],
    ),
    "illegal name": (
        "  dpo: {",
        "  'd p o': {",
        [
            "c.yaml:6: stages.compare.models.1.path: found stage:dpo, but there is no such stage; there are: compare, sft,"
            " pairs, reward",
            "c.yaml:15: stages.d p o: isn't a legal name of a stage; legal: letters, digits, - and _, with a letter or _"
            " first; not replaced",
        ],
    ),
    "a stage without keys": (
        "  sft: {algorithm: sft, policy: {path: models/x/tiny}, data: {train: sft.jsonl}}",
        "  sft: {algorithm: sft, policy: {path: models/x/tiny}, data: {train: sft.jsonl}}\n  other:",
        ["c.yaml:9: stages.other: found nothing (null); legal: a section with a stage's keys"],
    ),
    "a pipeline in a pipeline": (
        "algorithm: reward_model",
        "algorithm: pipeline",
        [
            "c.yaml:12: stages.reward.algorithm: found pipeline, whose command is rayrlhf pipeline; legal here: one of ppo,"
            " sft, reward_model, dpo, sampling, critique, evaluation"
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(refused, case: str) -> None:
    old, new, problems = WRONG[case]
    assert FILE.count(old) == 1, case
    assert refused(FILE.replace(old, new)) == problems


WRONG_ROUNDS = {
    "no start": (
        "    start: {dpo: stage:sft}\n",
        "",
        [
            f"c.yaml:{line}: stages.rounds.stages.{name}.policy.path: found previous:dpo, but stages.rounds.start.dpo isn't"
            " given; legal: there, what it is in the first round"
            for line, name in ((9, "pairs"), (11, "dpo"))
        ],
    ),
    "start of no stage": (
        "{dpo: stage:sft}",
        "{dpo: stage:sft, pear: x}",
        ["c.yaml:8: stages.rounds.start.pear: there is no such stage in this repetition; did you mean pairs?"],
    ),
    "previous of no stage": (
        'dpo: {algorithm: dpo, seed: 20, policy: {path: "previous:dpo"}',
        'dpo: {algorithm: dpo, seed: 20, policy: {path: "previous:sft"}',
        [
            "c.yaml:12: stages.rounds.stages.dpo.policy.path: found previous:sft, but there is no such stage in this"
            " repetition; there are: pairs, dpo"
        ],
    ),
    "no rounds": (
        "repeat: 3",
        "repeat: 0",
        [
            "c.yaml:7: stages.rounds.repeat: found 0; legal: a whole number of at least 1, the rounds of this repetition",
        ],
    ),
    "unknown key of a repetition": (
        "repeat: 3",
        "repeat: 3\n    seed: 1",
        ["c.yaml:8: stages.rounds.seed: there is no such key in a repetition; there are: repeat, start, stages"],
    ),
    "repetition in a repetition": (
        "      dpo: {algorithm: dpo",
        "      more: {repeat: 2, stages: {}}\n      dpo: {algorithm: dpo",
        [
            "c.yaml:12: stages.rounds.stages.more: a repetition can't stand in a repetition; legal: a section with a"
            " stage's keys"
        ],
    ),
    "one name twice": (
        "  compare: {",
        "  pairs: {algorithm: sft, policy: {path: tiny}, data: {train: sft.jsonl}}\n  compare: {",
        ["c.yaml:13: stages.pairs: the name pairs is that of stages.rounds.stages.pairs too; give it another"],
    ),
}


@pytest.mark.parametrize("case", WRONG_ROUNDS)
def test_what_is_refused_of_repetitions(refused, case: str) -> None:
    old, new, problems = WRONG_ROUNDS[case]
    assert ROUNDS.count(old) == 1, case
    found = refused(
        ROUNDS.replace(old, new), *(["stages.compare.models=[{path: stage:sft}]"] if case == "no rounds" else [])
    )
    assert found == problems


def test_overrides_make_no_stages(refused) -> None:
    assert refused(FILE, "stages.dop.dpo.beta=1") == [
        "command line: stages.dop: there is no such stage; did you mean dpo?"
    ]
    assert refused(FILE, "stages.dpo.dpo.beta=-1") == [
        "command line: stages.dpo.dpo.beta: found -1; legal: a number above 0"
    ]


def test_all_problems_come_at_once_in_the_files_order(refused) -> None:
    text = FILE.replace("seed: 7", "sed: 7").replace("train: stage:pairs}\n  dpo", "train: stage:pear}\n  dpo")
    lines = [
        problem.split(": ")[:2] for problem in refused(text.replace("models/x/tiny", "stage:compare"), "gates=maybe")
    ]
    assert lines == [
        ["c.yaml:3", "sed"],
        ["c.yaml:8", "stages.sft.policy.path"],
        ["c.yaml:14", "stages.reward.data.train"],
        ["command line", "gates"],
    ]


def test_what_comes_from_outside_is_looked_at_and_told_by_line(load, refused) -> None:
    asked: list[tuple[str, str]] = []

    def look(wanted: str, name: str) -> str | None:
        asked.append((wanted, name))
        return f"no {name}" if name in ("p.jsonl", "mine:score") else None

    assert refused(FILE, look=look) == [
        "c.yaml:7: stages.compare.data.prompts: no p.jsonl",
        "c.yaml:9: stages.pairs.reward.sources.0.function: no mine:score",
        "c.yaml:10: stages.pairs.data.prompts: no p.jsonl",
    ]
    assert sorted(set(asked)) == [
        ("a function", "mine:score"),
        ("a language model", "models/x/tiny"),
        ("data", "p.jsonl"),
        ("data", "sft.jsonl"),
    ]


@pytest.mark.parametrize(
    "name, found, command",
    [
        ("dpo", "found dpo", "dpo is rayrlhf train CONFIG"),
        ("sft", "found sft", "sft is rayrlhf train CONFIG"),
        ("pairs", "found sampling", "sampling is rayrlhf sample CONFIG"),
        ("critique", "found critique", "critique is rayrlhf critique CONFIG"),
        ("evaluation", "found evaluation", "evaluation is rayrlhf evaluate CONFIG"),
        ("ppo", "is missing, which stands for ppo", "ppo is rayrlhf train CONFIG"),
    ],
)
def test_a_configuration_of_a_run_is_no_pipeline(name: str, found: str, command: str) -> None:
    path = ROOT / "configs" / f"{name}_local.yaml"
    lines = path.read_text().splitlines()
    number = next((f":{i}" for i, text in enumerate(lines, 1) if text.startswith("algorithm:")), "")
    with pytest.raises(InputRefused) as caught:
        load_pipeline(path)
    assert caught.value.problems == [f"{path}{number}: algorithm: {found}; legal: pipeline; the command for {command}"]


def test_a_pipeline_is_no_configuration_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(FILE)
    with pytest.raises(InputRefused, match="found pipeline, whose command is rayrlhf pipeline"):
        load_config(tmp_path / "c.yaml")
