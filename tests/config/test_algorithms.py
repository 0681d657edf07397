"""Which algorithm a configuration is for, whose keys are in the wrong place, and the shapes that examples may have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from rayrlhf.config import (
    ROOTS,
    Config,
    CritiqueConfig,
    ModelEvaluationConfig,
    PreferenceConfig,
    RewardModelConfig,
    SamplingConfig,
    SFTConfig,
    dump_config,
    load_config,
)
from rayrlhf.config.base import JobConfig, RunConfig
from rayrlhf.config.choosing import ALGORITHM
from rayrlhf.config.roots import JOBS, TRAINED, keys_of

ROOT = Path(__file__).parents[2]
LEGAL = "one of ppo, sft, reward_model, dpo, sampling, critique, evaluation"


def test_each_algorithm_has_its_class(load, bases):
    trained = {"ppo": Config, "sft": SFTConfig, "reward_model": RewardModelConfig, "dpo": PreferenceConfig}
    jobs = {"sampling": SamplingConfig, "critique": CritiqueConfig, "evaluation": ModelEvaluationConfig}
    classes = trained | jobs
    assert classes == ROOTS and get_args(ALGORITHM) == tuple(ROOTS) == tuple(bases)
    assert tuple(trained.values()) == TRAINED and tuple(jobs.values()) == JOBS
    for name, text in bases.items():
        config = load(text=text)
        assert type(config) is classes[name] and config.algorithm == name and isinstance(config, JobConfig)
        assert isinstance(config, RunConfig) == (name in trained)
        assert set(keys_of(type(config))) == set(type(config).model_fields)


def test_the_command_line_names_it_too(load, bases):
    assert type(load("algorithm=reward_model", text=bases["sft"])) is RewardModelConfig
    assert type(load("algorithm=ppo")) is Config


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("dpoo", "found the text 'dpoo'; legal: {}; did you mean dpo?"),
        ("DPO", "found the text 'DPO'; legal: {}; did you mean dpo?"),
        ("rm", "found the text 'rm'; legal: {}; did you mean reward_model?"),
        ("reward-model", "found the text 'reward-model'; legal: {}; did you mean reward_model?"),
        ("kto", "found the text 'kto'; legal: {}; did you mean dpo with dpo.loss kto?"),
        ("grpo", "found the text 'grpo'; legal: {}; did you mean ppo with ppo.advantage_estimator grpo?"),
        ("xyzzy", "found the text 'xyzzy'; legal: {}"),
        ("null", "found nothing (null); legal: {}"),
        ("[dpo]", "found the list ['dpo']; legal: {}"),
        ("3", "found 3; legal: {}"),
        ("true", "found true; legal: {}"),
    ],
)
def test_an_unknown_one(refused, bases, written, told):
    told = f"c.yaml:1: algorithm: {told.format(LEGAL)}"
    for name in ("sft", "dpo"):
        text = bases[name].replace(f"algorithm: {name}", f"algorithm: {written}")
        assert told in refused(text=text)


def test_the_rest_is_checked_for_what_was_meant(refused, bases):
    """As the nearest algorithm, else as the only one that has the file's sections."""
    text = bases["dpo"].replace("beta: 0.1", "bta: 0.1")
    for written in ("dpoo", "xyzzy", "[ppo]"):
        problems = refused("training.batch_examples=0", text=text.replace("algorithm: dpo", f"algorithm: {written}"))
        assert [problem.split(": ")[1] for problem in problems] == ["algorithm", "dpo.bta", "training.batch_examples"]
    # rules are applied too, those that read the algorithm among them
    wrong = ["policy.ranks=99", "policy.tokens_per_micro_batch=1"]
    problems = refused(*wrong, text=bases["sft"].replace("sft", "stf"))
    told = ["algorithm", "training.batch_examples", "policy.tokens_per_micro_batch"]
    assert sorted(problem.split(": ")[1] for problem in problems) == sorted(told)


def test_a_missing_one(refused, bases):
    """Without one it is PPO, unless the file has sections which PPO hasn't."""
    text = bases["dpo"].replace("algorithm: dpo\n", "")
    assert refused(text=text) == [
        f"c.yaml: algorithm: is missing; legal: {LEGAL}; the keys training and dpo belong to dpo"
    ]
    assert refused("policy.ranks=99", text=text)[1].split(": ")[1] == "training.batch_examples"
    text = bases["sft"].replace("algorithm: sft\n", "")
    assert refused(text=text) == [
        f"c.yaml: algorithm: is missing; legal: {LEGAL}; the key training belongs to sft, reward_model or dpo"
    ]


@pytest.mark.parametrize(
    ("algorithm", "override", "told"),
    [
        ("sft", "ppo.kl_coef=0.1", "ppo: belongs to the algorithm ppo; this file has algorithm sft; legal in the top"),
        ("dpo", "ppo.steps=1", "ppo: belongs to the algorithm ppo; this file has algorithm dpo; legal in the top"),
        ("sft", "rollout.engines=2", "rollout: belongs to the algorithms ppo, dpo, sampling, critique and evaluation;"
         " this file has algorithm sft"),
        ("ppo", "training.epochs=2", "training: belongs to the algorithms sft, reward_model and dpo; this file has"
         " algorithm ppo, as none is named; legal in"),
        ("ppo", "reward_model.normalize=true", "algorithm ppo, as none is named; did you mean reward.sources.0.model?"),
        ("sft", "data.prompts=a.jsonl", "data.prompts: belongs to the algorithms ppo, sampling, critique and evaluation;"
         " this file has algorithm sft; did you mean data.train?"),
        ("ppo", "data.max_tokens=9", "this file has algorithm ppo, as none is named; did you mean"
         " rollout.max_response_tokens?"),
        ("sampling", "reward.gold.function=a:b", "reward.gold: belongs to the algorithm ppo; this file has algorithm"),
        ("sampling", "checkpoint.keep=1", "checkpoint: belongs to the algorithms ppo, sft, reward_model and dpo; this"),
        ("critique", "reward.ranks=2", "reward: belongs to the algorithms ppo and sampling; this file has algorithm"),
        ("evaluation", "policy.path=m", "policy: belongs to the algorithms ppo, sft, reward_model, dpo, sampling and"),
        ("dpo", "monitoring.samples_per_step=2", "monitoring.samples_per_step: belongs to the algorithm ppo; this"),
        ("sft", "data.train_=a", "data.train_: there is no such key; did you mean data.train?"),
    ],
)  # fmt: skip
def test_a_key_of_another_algorithm(refused, bases, algorithm, override, told):
    problems = refused(override, text=bases[algorithm])
    assert len(problems) == 1 and told in problems[0], problems


# -- examples: one source or several ----------------------------------------------------------------------------


def test_one_source_or_several(load, bases, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load("data.train=~/a.jsonl", text=bases["sft"]).data.train == "/home/someone/a.jsonl"
    assert load("data.train=2023", text=bases["sft"]).data.train == "2023"
    several = "data.train=[{path: ~/a.jsonl, weight: 2}, {path: b.jsonl, prompt_column: 7}]"
    config = load(several, "data.train.1.weight=3", text=bases["sft"])
    assert [(s.path, s.weight, s.prompt_column) for s in config.data.train] == [
        ("/home/someone/a.jsonl", 2.0, "prompt"),
        ("b.jsonl", 3.0, "7"),
    ]
    dump_config(config, tmp_path / "d.yaml")
    assert load_config(tmp_path / "d.yaml") == config


SOURCES = "a text that isn't empty, or a list of at least one of sections"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("[]", f"data.train: found the list []; legal: {SOURCES}"),
        ("{path: a}", f"data.train: found a section with the keys path; legal: {SOURCES}; put '- '"),
        ("true", f"data.train: found true; legal: {SOURCES}"),
        ("null", f"data.train: found nothing (null); legal: {SOURCES}"),
        ("[{path: a, weight: 0}, {path: b}]", "data.train.0.weight: found 0; legal: a number above 0"),
        ("[{path: a}, {weight: 2}]", "data.train.1.path: is missing; legal: a text that isn't empty (A .jsonl"),
        ("[{path: a}, {path: b, wieght: 2}]", "data.train.1.wieght: there is no such key; did you mean data.train.1.w"),
        ("[a.jsonl, {path: b}]", "data.train.0: found the text 'a.jsonl'; legal: a section with keys such as path"),
        ("'$DATA/a.jsonl'", "data.train: found the text '$DATA/a.jsonl'; variables are not filled in"),
        ("[{path: '$DATA/a'}, {path: b}]", "data.train.0.path: found the text '$DATA/a'; variables are not filled in"),
    ],
)
def test_sources_that_are_none(refused, bases, written, told):
    problems = refused(f"data.train={written}", text=bases["sft"])
    assert len(problems) == 1 and problems[0].startswith(f"command line: {told}"), problems


def test_a_list_of_words(load, refused, bases):
    assert load("guard.actions=[roll_back]", text=bases["dpo"]).guard.actions == ["roll_back"]
    legal = "a list of any of halve_lr, raise_beta, roll_back, or null"
    assert refused("guard.actions=[halve_lr, rollback]", text=bases["dpo"]) == [
        f"command line: guard.actions.1: found the text 'rollback'; legal in guard.actions: {legal}; did you mean"
        " roll_back?"
    ]
    assert refused("guard.actions=halve_lr", text=bases["dpo"]) == [
        f"command line: guard.actions: found the text 'halve_lr'; legal: {legal}; write [halve_lr]"
    ]
    assert "did you mean loss_spike?" in refused("health.ignore=[los_spike]", text=bases["sft"])[0]


def test_a_partly_given_rollout_keeps_the_other_defaults(load, bases):
    config = load("rollout.engine=transformers", text=bases["dpo"])
    assert config.rollout.max_response_tokens == 64 == load(text=bases["dpo"]).rollout.max_response_tokens


# -- the files that come with it --------------------------------------------------------------------------------


PIPELINE = re.compile(r"^algorithm: pipeline$", re.MULTILINE)
RUNS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not PIPELINE.search(p.read_text()))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_configurations_load(path):
    config = load_config(path)
    assert path.stem.startswith(({"sampling": "pairs"}.get(config.algorithm, config.algorithm), "quickstart"))


@pytest.mark.parametrize("algorithm", [name for name in ROOTS if name != "ppo"])
def test_loading_stays_light(tmp_path, bases, algorithm):
    (tmp_path / "c.yaml").write_text(bases[algorithm])
    code = (
        "import sys, rayrlhf.config as c, rayrlhf.planning.rows as r; r.plan_rows(c.load_config(sys.argv[1]), 100);"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'numpy', 'datasets', 'deepspeed'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "c.yaml")]
    subprocess.run(command, check=True, env=env, cwd=tmp_path, timeout=60)
