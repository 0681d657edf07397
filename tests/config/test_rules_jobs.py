# ruff: noqa: E501
"""The rules for sampling and for critique and revision, each broken on purpose, alone and all together."""

from __future__ import annotations

import pytest

from rayrlhf.config import CritiqueConfig, SamplingConfig
from rayrlhf.config.rules import RULES

# algorithm, rule, what breaks it, the key that is named, words of the message, what mends it
CASES = [
    # base: 4 samples a prompt, prompts and responses of up to 64 tokens, 64 prompts at once
    ("sampling", "pair_has_two_responses", ["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt", "at least 2", ["sampling.form=best"]),
    ("sampling", "pairs_have_responses", ["sampling.pairs_per_prompt=3"], "sampling.pairs_per_prompt", "6 responses to a prompt are needed", ["rollout.samples_per_prompt=6"]),
    ("sampling", "pairs_have_responses", ["sampling.form=all", "sampling.pairs_per_prompt=2"], "sampling.pairs_per_prompt", "which is for pairs", ["sampling.form=pairs"]),
    ("sampling", "gap_is_of_pairs", ["sampling.form=best", "sampling.least_gap=0.1"], "sampling.least_gap", "found 0.1, which is for pairs", ["sampling.form=pairs"]),
    ("sampling", "gap_is_of_pairs", ["sampling.form=all", "sampling.least_gap=2"], "sampling.least_gap", "sampling.form is all", ["sampling.least_gap=0"]),
    ("sampling", "scored_sample_fits", ["reward.sources=[{model: rm}]", "reward.tokens_per_micro_batch=127"], "reward.tokens_per_micro_batch", "at least 128", ["reward.tokens_per_micro_batch=128"]),
    ("sampling", "sampling_engines_have_prompts", ["rollout.engines=65"], "rollout.engines", "64 prompts of sampling.prompts_at_once", ["sampling.prompts_at_once=65"]),
    ("sampling", "sampling_engines_have_prompts", ["rollout.engines=5", "data.limit=4"], "rollout.engines", "4 prompts of data.limit", ["data.limit=5"]),
    ("critique", "critique_engines_have_prompts", ["rollout.engines=5", "data.limit=4"], "rollout.engines", "at most 4", ["data.limit=null"]),
    ("critique", "response_is_no_prompt", ["data.response_column=prompt"], "data.response_column", "the column of the prompts", ["data.prompt_column=question"]),
    # rules that training has too
    ("sampling", "one_kind_of_source", ["reward.sources.0.model=rm"], "reward.sources.0", "found the function my_rewards:score and the model rm", ["reward.sources.0.function=null"]),
    ("sampling", "service_settings_are_used", ["reward.sources.0.timeout_s=5"], "reward.sources.0.timeout_s", "there is no url", ["reward.sources.0={url: 'http://host', timeout_s: 5}"]),
    ("sampling", "function_is_import_path", ["reward.sources.0.function=my_rewards.py"], "reward.sources.0.function", "package.module:function", ["reward.sources.0.function='my_rewards:score'"]),
    ("sampling", "unique_sources", ["reward.sources=[{function: 'a:f'}, {function: 'b:f'}]"], "reward.sources.1.name", "the name of reward.sources.0 too", ["reward.sources.1.name=g"]),
    ("sampling", "path_is_model", ["policy.path=models/x/model.safetensors"], "policy.path", "'models/x'", ["policy.path=models/x"]),
    ("critique", "path_is_model", ["policy.path=x.pt"], "policy.path", "weight file", ["policy.path=x"]),
    ("critique", "template_for_system_prompt", ["data.chat_template=never", "data.system_prompt=Be kind"], "data.system_prompt", "auto or always", ["data.chat_template=always"]),
    ("sampling", "files_have_no_splits", ["data.split=test"], "data.split", "prompts.jsonl is a file", ["data.prompts=org/name"]),
    ("sampling", "inline_is_one_process", ["cluster.executor=inline", "reward.ranks=2"], "reward.ranks", "legal: 1", ["cluster.executor=ray"]),
    ("critique", "inline_is_one_process", ["cluster.executor=inline", "rollout.engines=2"], "rollout.engines", "legal: 1", ["rollout.engines=1"]),
    ("critique", "inline_has_no_ray", ["cluster.executor=inline", "cluster.address=auto"], "cluster.address", "no Ray", ["cluster.address=null"]),
    ("sampling", "placement_names_roles", ["cluster.placement=[[policy, rollout]]"], "cluster.placement.0", "legal: rollout", ["cluster.placement=colocated"]),
    ("critique", "inline_shares_everything", ["cluster.executor=inline", "cluster.placement=disaggregated"], "cluster.placement", "legal: colocated", ["cluster.executor=ray"]),
    ("critique", "vllm_spreads_weights", ["rollout.tensor_parallel=2", "cluster.executor=inline"], "rollout.tensor_parallel", "the executor ray", ["cluster.executor=ray"]),
    ("sampling", "offloaded_parameters_are_spread", ["reward.offload_parameters=cpu"], "reward.offload_parameters", "zero_stage 3", ["reward.zero_stage=3"]),
    ("sampling", "varlen_has_a_kernel", ["cluster.device=cuda", "reward.attention=varlen"], "reward.attention", "with reward.dtype float32", ["reward.dtype=bfloat16"]),
    ("sampling", "flash_attention_runs", ["cluster.device=cuda", "reward.attention=flash_attention_2"], "reward.attention", "with reward.dtype float32", ["reward.dtype=bfloat16"]),
    ("sampling", "cache_is_vllms", ["rollout.engine=transformers", "rollout.kv_cache_gib=1"], "rollout.kv_cache_gib", "legal: null", ["rollout.engine=vllm"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "name", "wrong", "key", "words", "mended"), CASES, ids=lambda value: str(value)[:60]
)
def test_rule(algorithm, name, wrong, key, words, mended, refused, load, bases, monkeypatch):
    problems = refused(*wrong, text=bases[algorithm])
    assert len(problems) == 1, problems
    assert f": {key}: " in problems[0] and words in problems[0] and "legal" in problems[0]
    assert problems[0].startswith(("command line: ", "c.yaml:"))
    load(*wrong, *mended, text=bases[algorithm])
    # without the rule that is named, it is let through
    monkeypatch.setattr("rayrlhf.config.rules.RULES", [r for r in RULES if r.check.__name__ != f"_{name}"])
    load(*wrong, text=bases[algorithm])


def test_every_rule_has_a_case():
    jobs = {rule.check.__name__.strip("_") for rule in RULES if {SamplingConfig, CritiqueConfig} & set(rule.of)}
    assert jobs == {case[1] for case in CASES}


def test_all_together(refused, bases):
    problems = refused(
        *["rollout.samples_per_prompt=1", "rollout.engines=99", "policy.path=x.bin", "cluster.exec=ray"],
        *["reward.sources=[{name: nothing}]", "data.limit=0"],
        text=bases["sampling"],
    )
    # rollout.engines says nothing: its rule reads data.limit, which is illegal
    assert {problem.split(": ")[1] for problem in problems} == {
        *["rollout.samples_per_prompt", "policy.path", "cluster.exec", "reward.sources.0", "data.limit"],
    }
