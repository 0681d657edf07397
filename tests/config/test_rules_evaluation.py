# ruff: noqa: E501
"""The rules for models side by side, each broken on purpose, alone and all together."""

from __future__ import annotations

import pytest

from rayrlhf.config import ModelEvaluationConfig, broken_rules, load_config
from rayrlhf.config.jobs import ComparedModel
from rayrlhf.config.rules import RULES
from rayrlhf.config.rules_evaluation import model_names

ALONE = "models=[{path: runs/sft/model}]"
JUDGE = "judge={url: https://host/v1, model: m}"

# rule, what breaks it, the key that is named, words of the message, what mends it
CASES = [
    ("unique_models", ["models=[{path: a/sft/model}, {path: b/sft}]"], "models.1.name", "found 'sft', the name of models.0 too", ["models.1.name=other"]),
    ("unique_models", ["models=[{path: a, name: x}, {path: b, name: x}]"], "models.1.name", "x_1", ["models.1.name=y"]),
    ("compared_path_is_model", ["models.1.path=runs/dpo/model/model.safetensors"], "models.1.path", "'runs/dpo/model'", ["models.1.path=runs/dpo/model"]),
    ("compared_path_is_model", ["reference=model.bin"], "reference", "the weight file 'model.bin'", ["reference=model.gguf"]),
    ("win_rate_has_two", [ALONE, JUDGE], "judge", "nothing to compare", ["judge=null"]),
    ("win_rate_has_two", [ALONE, "scores.tie=0.1"], "scores.tie", "legal: 0", ["scores.tie=0"]),
    ("judge_has_address", ["judge={url: host/v1, model: m}"], "judge.url", "http://", ["judge.url=http://host/v1"]),
    ("something_compares", ["scores.reward=null"], "scores.reward", "no judge", [JUDGE]),
    ("something_compares", ["scores={safety: {function: 'a:b'}}"], "scores.reward", "a judge, or both", ["scores.reward={function: 'a:b'}"]),
    ("tie_is_of_rewards", ["scores.reward=null", JUDGE, "scores.tie=0.1"], "scores.tie", "no scores.reward", ["scores.tie=0"]),
    ("templates_are_applied", ["data.chat_template=never", "data.system_prompt=Be kind"], "data.system_prompt", "auto or always", ["data.chat_template=always"]),
    ("templates_are_applied", ["data.chat_template=never", "models.1.chat_template=t.jinja"], "models.1.chat_template", "legal: null", ["data.chat_template=auto"]),
    ("measuring_attention_runs", ["measure.attention=flash_attention_2"], "measure.attention", "cluster.device cpu", ["cluster.device=cuda"]),
    ("measuring_attention_runs", ["scores.attention=flash_attention_2", "cluster.device=cuda"], "scores.attention", "scores.dtype float32", ["scores.dtype=bfloat16"]),
    ("measuring_varlen_has_a_kernel", ["scores.attention=varlen", "cluster.device=cuda"], "scores.attention", "with scores.dtype float32", ["cluster.device=cpu"]),
    ("measuring_packs_apart", ["measure.packing=true", "measure.attention=eager"], "measure.packing", "sdpa", ["measure.packing=false"]),
    ("longest_response_is_measured", ["measure.tokens_per_micro_batch=127"], "measure.tokens_per_micro_batch", "at least 128", ["measure.tokens_per_micro_batch=128"]),
    # rules that others have too
    ("one_kind_of_source", ["scores.safety={}"], "scores.safety", "exactly one of them", ["scores.safety=null"]),
    ("service_settings_are_used", ["scores.reward.token_env=T"], "scores.reward.token_env", "there is no url", ["scores.reward.token_env=null"]),
    ("function_is_import_path", ["scores.helpfulness={function: a.b}"], "scores.helpfulness.function", "so a:b", ["scores.helpfulness.function=a:b"]),
    ("files_have_no_splits", ["data.split=test"], "data.split", "has no splits", ["data.prompts=org/name"]),
    ("inline_is_one_process", ["cluster.executor=inline", "measure.ranks=2"], "measure.ranks", "legal: 1", ["cluster.executor=ray"]),
    ("inline_has_no_ray", ["cluster.executor=inline", "cluster.address=auto"], "cluster.address", "no Ray", ["cluster.address=null"]),
    ("placement_names_roles", ["cluster.placement=[[model, scores]]"], "cluster.placement.0", "found 'scores', which needs no GPU", ["scores.reward={model: rm}"]),
    ("placement_names_roles", ["cluster.placement=[[model, policy]]"], "cluster.placement.0", "legal: rollout, model, reference", ["cluster.placement=[[model, reference]]"]),
    ("inline_shares_everything", ["cluster.executor=inline", "cluster.placement=disaggregated"], "cluster.placement", "legal: colocated", ["cluster.executor=ray"]),
    ("vllm_spreads_weights", ["rollout.tensor_parallel=2", "rollout.engine=transformers"], "rollout.tensor_parallel", "one process", ["rollout.engine=vllm"]),
    ("offloaded_parameters_are_spread", ["measure.offload_parameters=cpu"], "measure.offload_parameters", "zero_stage 3", ["measure.zero_stage=3"]),
    ("offloaded_parameters_are_spread", ["scores.offload_parameters=cpu"], "scores.offload_parameters", "zero_stage 3", ["scores.zero_stage=3"]),
    ("cache_is_vllms", ["rollout.engine=transformers", "rollout.kv_cache_gib=1"], "rollout.kv_cache_gib", "legal: null", ["rollout.engine=vllm"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "key", "words", "mended"), CASES, ids=lambda value: str(value)[:60])
def test_rule(name, wrong, key, words, mended, refused, load, bases, monkeypatch):
    problems = refused(*wrong, text=bases["evaluation"])
    assert len(problems) == 1, problems
    assert f": {key}: " in problems[0] and words in problems[0] and "legal" in problems[0]
    assert problems[0].startswith(("command line: ", "c.yaml:"))
    load(*wrong, *mended, text=bases["evaluation"])
    # without the rule that is named, it is let through
    monkeypatch.setattr("rayrlhf.config.rules.RULES", [r for r in RULES if r.check.__name__ != f"_{name}"])
    load(*wrong, text=bases["evaluation"])


def test_every_rule_has_a_case():
    rules = {rule.check.__name__.strip("_") for rule in RULES if ModelEvaluationConfig in rule.of}
    assert rules == {case[0] for case in CASES}


def test_all_together(refused, bases):
    problems = refused(
        *["models=[{path: a/m.bin}, {path: a/m.bin}]", "judge={url: x, model: y}", "measure.tokens_per_micro_batch=3"],
        *["scores.reward={}", "confidence=2", "scores.reword={}"],
        text=bases["evaluation"],
    )
    assert {problem.split(": ")[1] for problem in problems} == {
        *["models.1.name", "models.1.path", "models.0.path", "judge.url", "measure.tokens_per_micro_batch"],
        *["scores.reward", "confidence", "scores.reword"],
    }


def test_a_judge_alone_needs_no_section_of_scores(load, bases):
    text = bases["evaluation"].partition("scores:")[0]
    config = load(JUDGE, text=text)
    assert config.scores.reward is None and broken_rules(config) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/dpo_local/model", "dpo_local"),
        ("build/quickstart/model/", "quickstart"),
        ("org/SomeModel-7B", "SomeModel-7B"),
        ("files/tiny.Q4.gguf", "tiny.Q4"),
        ("package:some_model", "some_model"),
        ("./model", "./model"),
    ],
)
def test_names_come_from_paths(path, name):
    assert model_names([ComparedModel(path=path)]) == [name]
    assert model_names([ComparedModel(path=path, name="mine")]) == ["mine"]


def test_the_shipped_configuration_is_legal(monkeypatch):
    from tests.conftest import ROOT

    config = load_config(ROOT / "configs" / "evaluation_local.yaml", [])
    assert broken_rules(config) == [] and model_names(config.models) == ["base", "sft", "dpo"]
