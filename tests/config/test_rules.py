# ruff: noqa: E501
"""Each rule between keys: what breaks it, what is said, and that a nearest legal value mends it."""

from __future__ import annotations

import pytest
import yaml

from rayrlhf.config import broken_rules
from rayrlhf.config.rules import RULES
from rayrlhf.config.schema import Config

GROUPS = ("ppo.advantage_estimator=rloo", "critic=null")

# rule, what breaks it, the key that is named, words of the message, what mends it
CASES = [
    # base: 16 prompts x 4 = 64 samples, minibatch 32, 64 + 64 tokens, 10 steps x 2 minibatches = 20 optimizer steps
    ("minibatch_divides", ["ppo.minibatch_samples=24"], "ppo.minibatch_samples", "the 64 samples of a step (ppo.prompts_per_step 16 x rollout.samples_per_prompt 4); legal: a divisor, the nearest: 16 and 32", ["ppo.minibatch_samples=16"]),
    ("minibatch_divides", ["ppo.minibatch_samples=128"], "ppo.minibatch_samples", "the nearest: 64", ["ppo.minibatch_samples=64"]),
    ("minibatch_fills_ranks", ["policy.ranks=33"], "ppo.minibatch_samples", "found 32, fewer than policy.ranks 33", ["policy.ranks=32"]),
    ("minibatch_fills_ranks", ["critic.ranks=64"], "ppo.minibatch_samples", "at least 64", ["ppo.minibatch_samples=64"]),
    ("samples_fill_ranks", ["rollout.engines=65"], "rollout.engines", "at most 64", ["rollout.engines=64"]),
    ("samples_fill_ranks", ["reward.ranks=65"], "reward.ranks", "at most 64", ["reward.ranks=64"]),
    ("longest_sample_fits", ["policy.tokens_per_micro_batch=127"], "policy.tokens_per_micro_batch", "at least 128", ["policy.tokens_per_micro_batch=128"]),
    ("longest_sample_fits", ["critic.tokens_per_micro_batch=127"], "critic.tokens_per_micro_batch", "at least 128", ["critic.tokens_per_micro_batch=128"]),
    ("longest_sample_fits", ["reference.tokens_per_micro_batch=127"], "reference.tokens_per_micro_batch", "at least 128", ["reference=null", "ppo.kl_coef=0"]),
    ("longest_sample_fits", ["reward.tokens_per_micro_batch=127", "reward.sources=[{model: rm}]"], "reward.tokens_per_micro_batch", "at least 128", ["reward.sources=[{function: 'a:b'}]"]),
    ("warmup_ends", ["policy.optimizer.warmup_steps=20"], "policy.optimizer.warmup_steps", "the run has 20 optimizer steps", ["policy.optimizer.warmup_steps=19"]),
    ("warmup_ends", ["critic.optimizer.warmup_steps=40", "ppo.ppo_epochs=2"], "critic.optimizer.warmup_steps", "at most 39", ["critic.optimizer.warmup_steps=39"]),
    ("lr_falls", ["policy.optimizer.min_lr_ratio=0.1"], "policy.optimizer.min_lr_ratio", "schedule linear or cosine", ["policy.optimizer.schedule=cosine"]),
    ("gae_has_critic", ["critic=null"], "critic", "gae needs a critic", ["critic={}"]),
    ("groups_have_no_critic", ["ppo.advantage_estimator=grpo"], "critic", "grpo would never use", ["critic=null"]),
    ("groups_have_members", [*GROUPS, "rollout.samples_per_prompt=1", "ppo.minibatch_samples=16"], "rollout.samples_per_prompt", "at least 2", ["rollout.samples_per_prompt=2"]),
    ("groups_have_no_discount", [*GROUPS, "ppo.gamma=0.99"], "ppo.gamma", "legal: 1", ["ppo.gamma=1"]),
    ("bootstrap_has_values", [*GROUPS, "ppo.truncated_responses=bootstrap"], "ppo.truncated_responses", "terminal or mask", ["ppo.truncated_responses=mask"]),
    ("kl_has_reference", ["reference=null"], "ppo.kl_coef", "found 0.05, but without a reference", ["ppo.kl_coef=0"]),
    ("kl_has_reference", ["reference=null", "ppo.kl_coef=0", "ppo.kl_loss_coef=0.1"], "ppo.kl_loss_coef", "found 0.1", ["reference={}"]),
    ("target_and_controller", ["ppo.kl_controller=adaptive"], "ppo.target_kl", "needs a KL to aim at", ["ppo.target_kl=6"]),
    ("target_and_controller", ["ppo.target_kl=6"], "ppo.target_kl", "fixed would never use", ["ppo.kl_controller=adaptive"]),
    ("horizon_is_gentle", ["ppo.kl_controller=adaptive", "ppo.target_kl=6", "ppo.kl_horizon=1"], "ppo.kl_horizon", "could bring ppo.kl_coef to 0", ["ppo.kl_horizon=100"]),
    ("adaptive_can_move", ["ppo.kl_controller=adaptive", "ppo.target_kl=6", "ppo.kl_coef=0"], "ppo.kl_coef", "never changes", ["ppo.kl_coef=0.05"]),
    ("whole_distribution", ["rollout.top_p=0.9"], "rollout.top_p", "importance weights", ["ppo.importance_sampling_cap=null"]),
    ("whole_distribution", ["rollout.top_k=50"], "rollout.top_k", "found 50", ["rollout.top_k=0"]),
    ("denominator_and_aggregation", ["ppo.loss_aggregation=fixed_denominator"], "ppo.loss_denominator", "2048, say", ["ppo.loss_denominator=2048"]),
    ("denominator_and_aggregation", ["ppo.loss_denominator=99"], "ppo.loss_denominator", "found 99", ["ppo.loss_aggregation=fixed_denominator"]),
    ("one_kind_of_source", ["reward.sources=[{weight: 2}]"], "reward.sources.0", "neither function nor model", ["reward.sources.0.model=rm"]),
    ("one_kind_of_source", ["reward.sources.0.model=rm"], "reward.sources.0", "found the function my_rewards:score and the model rm", ["reward.sources.0.function=null"]),
    ("function_is_import_path", ["reward.sources.0.function=my.rewards.score"], "reward.sources.0.function", "so my.rewards:score", ["reward.sources.0.function=my.rewards:score"]),
    ("function_is_import_path", ["reward.sources.0.function=my/rewards.py:score"], "reward.sources.0.function", "so my.rewards:score", ["reward.sources.0.function=my.rewards:score"]),
    ("unique_sources", ["reward.sources=[{function: 'a:score'}, {function: 'b:score'}]"], "reward.sources.1.name", "found 'score'", ["reward.sources.1.name=other"]),
    ("unique_sources", ["reward.sources=[{function: 'a:gold'}]", "reward.gold={function: 'b:f'}"], "reward.sources.0.name", "the name of reward.gold", ["reward.sources.0.name=other"]),
    ("unique_sources", ["reward.sources=[{model: x/rm}, {function: 'b:rm'}]"], "reward.sources.1.name", "rm_1, say", ["reward.sources.1.name=rm_1"]),
    ("length_penalty_applies", ["reward.length_penalty_from=10"], "reward.length_penalty_from", "legal: 0", ["reward.length_penalty=0.1"]),
    ("length_penalty_applies", ["reward.length_penalty=0.1", "reward.length_penalty_from=64"], "reward.length_penalty_from", "at most 63", ["reward.length_penalty_from=63"]),
    ("flash_attention_runs", ["policy.attention=flash_attention_2"], "policy.attention", "with cluster.device cpu", ["cluster.device=cuda"]),
    ("flash_attention_runs", ["reward.attention=flash_attention_2", "cluster.device=cuda"], "reward.attention", "with reward.dtype float32", ["reward.dtype=bfloat16"]),
    ("flash_attention_runs", ["critic.attention=flash_attention_2", "cluster.device=cuda", "critic.dtype=float32"], "critic.attention", "with critic.dtype float32", ["critic.dtype=bfloat16"]),
    ("varlen_has_a_kernel", ["reward.attention=varlen", "cluster.device=cuda"], "reward.attention", "with reward.dtype float32", ["reward.dtype=bfloat16"]),
    ("varlen_has_a_kernel", ["policy.attention=varlen", "policy.dtype=float32", "cluster.device=cuda"], "policy.attention", "with policy.dtype float32", ["cluster.device=cpu"]),
    ("shared_rows_have_attention", ["policy.attention=eager", "policy.sequence_parallel=2", "policy.ranks=2"], "policy.attention", "found eager", ["policy.attention=varlen"]),
    ("packing_has_boundaries", ["reference.packing=true", "reference.attention=eager"], "reference.packing", "sdpa", ["reference.attention=sdpa"]),
    ("shared_reference_has_policy_settings", ["policy.lora={}", "reference.ranks=2"], "reference.ranks", "legal: 1", ["reference.path=other"]),
    ("shared_reference_has_policy_settings", ["policy.lora={}", "reference.dtype=float32"], "reference.dtype", "legal: bfloat16", ["policy.lora=null"]),
    ("shared_reference_has_policy_settings", ["policy.lora={}", "reference.tokens_per_micro_batch=1"], "reference.tokens_per_micro_batch", "legal: 8192", ["reference.tokens_per_micro_batch=8192"]),
    ("stopping_rules_apply", ["health.stop_on=[collapse, loss_spike]", "health.ignore=[loss_spike]"], "health.stop_on", "found loss_spike, which", ["health.ignore=[truncation]"]),
    ("one_kind_of_source", ["reward.gold={name: x}"], "reward.gold", "neither function nor model nor url", ["reward.gold={function: 'a:b'}"]),
    ("service_settings_are_used", ["reward.sources.0={url: 'host:8900'}"], "reward.sources.0.url", "begins with http:// or https://", ["reward.sources.0.url=http://host:8900"]),
    ("service_settings_are_used", ["reward.sources.0.token_env=TOKEN"], "reward.sources.0.token_env", "there is no url", ["reward.sources.0={url: 'https://host', token_env: TOKEN}"]),
    ("service_settings_are_used", ["reward.gold={function: 'a:b', retries: 9}"], "reward.gold.retries", "found 9", ["reward.gold.retries=4"]),
    ("path_is_model", ["policy.path=models/x/model.safetensors"], "policy.path", "'models/x'", ["policy.path=models/x"]),
    ("template_for_system_prompt", ["data.chat_template=never", "data.system_prompt=Be kind"], "data.system_prompt", "auto or always", ["data.chat_template=always"]),
    ("template_for_system_prompt", ["data.chat_template=never", "policy.chat_template=t.jinja"], "policy.chat_template", "auto or always", ["policy.chat_template=null"]),
    ("files_have_no_splits", ["data.split=test"], "data.split", "prompts.jsonl is a file", ["data.prompts=org/name"]),
    ("files_have_no_splits", ["data.subset=en"], "data.subset", "has no subsets", ["data.subset=null"]),
    ("prompts_are_left", ["data.limit=64"], "data.limit", "at least 65", ["data.limit=65"]),
    ("evaluation_has_prompts", ["evaluation.prompts=0", "evaluation.every_steps=5"], "evaluation.every_steps", "nothing is evaluated", ["evaluation.every_steps=0"]),
    ("evaluation_has_prompts", ["evaluation.prompts=0", "data.eval_prompts=e.jsonl"], "data.eval_prompts", "nothing is evaluated", ["evaluation.prompts=8"]),
    ("inline_is_one_process", ["cluster.executor=inline", "policy.ranks=2"], "policy.ranks", "legal: 1", ["cluster.executor=ray"]),
    ("inline_is_one_process", ["cluster.executor=inline", "rollout.engines=2"], "rollout.engines", "legal: 1", ["rollout.engines=1"]),
    ("inline_has_no_ray", ["cluster.executor=inline", "cluster.address=auto"], "cluster.address", "no Ray", ["cluster.address=null"]),
    ("cache_is_vllms", ["rollout.engine=transformers", "rollout.kv_cache_gib=1"], "rollout.kv_cache_gib", "legal: null", ["rollout.engine=vllm"]),
    ("placement_names_roles", ["cluster.placement=[[policy, critic], [reference, judge]]"], "cluster.placement.1", "found 'judge', which this run doesn't start; legal: policy, critic, reference, rollout", ["cluster.placement=[[policy, critic], [reference, rollout]]"]),
    ("placement_names_roles", ["cluster.placement=[[policy, reward]]"], "cluster.placement.0", "needs no GPU", ["reward.sources=[{model: rm}]"]),
    ("placement_names_roles", ["cluster.placement=[[policy, critic], [policy, rollout]]"], "cluster.placement.1", "stands there twice", ["cluster.placement=disaggregated"]),
    ("placement_names_roles", ["cluster.placement=[[policy, reference]]", "policy.lora={}"], "cluster.placement.0", "found 'reference'", ["reference.path=other"]),
    ("inline_shares_everything", ["cluster.executor=inline", "cluster.placement=disaggregated"], "cluster.placement", "legal: colocated", ["cluster.executor=ray"]),
    ("ranks_hold_whole_groups", ["policy.ranks=6", "policy.sequence_parallel=4"], "policy.sequence_parallel", "legal: 1, 2, 3, 6", ["policy.ranks=8"]),
    ("ranks_hold_whole_groups", ["critic.tensor_parallel=2"], "critic.tensor_parallel", "doesn't divide critic.ranks 1", ["critic.ranks=2"]),
    ("ranks_hold_whole_groups", ["policy.ranks=4", "policy.sequence_parallel=2", "policy.tensor_parallel=2"], "policy.tensor_parallel", "not both", ["policy.tensor_parallel=1"]),
    ("minibatch_fills_ranks", ["policy.ranks=66", "policy.sequence_parallel=2"], "ppo.minibatch_samples", "fewer than policy.ranks 66 / policy.sequence_parallel 2: some ranks would have nothing to train on; legal: at least 33", ["policy.ranks=64"]),
    ("one_way_to_spread_weights", ["policy.ranks=2", "policy.tensor_parallel=2", "policy.zero_stage=3"], "policy.tensor_parallel", "zero_stage 1 or 2", ["policy.zero_stage=2"]),
    ("one_way_to_spread_weights", ["critic.ranks=2", "critic.tensor_parallel=2", "critic.lora={}"], "critic.tensor_parallel", "lora: null", ["critic.lora=null"]),
    ("vllm_spreads_weights", ["rollout.tensor_parallel=2", "rollout.engine=transformers"], "rollout.tensor_parallel", "one process", ["rollout.engine=vllm"]),
    ("vllm_spreads_weights", ["rollout.tensor_parallel=2", "cluster.executor=inline"], "rollout.tensor_parallel", "the executor ray", ["rollout.tensor_parallel=1"]),
    ("offloaded_parameters_are_spread", ["policy.offload_parameters=cpu"], "policy.offload_parameters", "found cpu with policy.zero_stage 2", ["policy.zero_stage=3"]),
    ("offloaded_parameters_are_spread", ["reference.offload_parameters=cpu"], "reference.offload_parameters", "found cpu with reference.zero_stage 0", ["reference.zero_stage=3"]),
    ("offloaded_parameters_are_spread", ["reward.offload_parameters=cpu"], "reward.offload_parameters", "legal: none, or zero_stage 3", ["reward.offload_parameters=none"]),
    ("nvme_has_a_folder", ["critic.offload_optimizer=nvme", "critic.zero_stage=3"], "critic.nvme_path", "needs a folder", ["critic.nvme_path=/nvme"]),
    ("nvme_has_a_folder", ["policy.nvme_path=/nvme", "policy.offload_optimizer=cpu"], "policy.nvme_path", "nothing is offloaded to", ["policy.offload_optimizer=nvme", "policy.zero_stage=3"]),
    ("adapters_travel_where_there_are_some", ["rollout.lora_transfer=adapter"], "rollout.lora_transfer", "legal: merged, or policy.lora", ["policy.lora={}"]),
    ("adapters_fit_into_their_engine", ["rollout.lora_transfer=adapter", "policy.lora={rank: 600}", "reference={}"], "policy.lora.rank", "found 600, but vLLM applies adapters up to rank 512", ["policy.lora.rank=512"]),
    ("transport_has_its_wire", ["rollout.weight_transport=nccl"], "rollout.weight_transport", "cluster.device is cpu", ["cluster.device=cuda", "cluster.placement=disaggregated"]),
    ("nccl_goes_between_gpus", ["rollout.weight_transport=nccl", "cluster.device=cuda"], "rollout.weight_transport", "no two processes on one", ["rollout.weight_transport=ipc"]),
    ("nvme_takes_what_is_spread", ["policy.offload_optimizer=nvme", "policy.nvme_path=/nvme"], "policy.offload_optimizer", "found nvme with policy.zero_stage 2", ["policy.zero_stage=3"]),
    ("transport_has_its_wire", ["rollout.weight_transport=shared_memory", "cluster.nodes=[{count: 2}]"], "rollout.weight_transport", "stays on one machine, but cluster.nodes has 2", ["cluster.nodes=[{}]"]),
    ("transport_has_its_wire", ["cluster.executor=inline", "rollout.weight_transport=gloo"], "rollout.weight_transport", "both ends are one process", ["rollout.weight_transport=shared_memory"]),
    ("ipc_shares_gpus", ["rollout.weight_transport=ipc", "cluster.device=cuda", "cluster.placement=[[policy, critic], [reference, rollout]]"], "rollout.weight_transport", "GPUs of their own", ["cluster.placement=[[policy, rollout]]"]),
    ("ipc_shares_gpus", ["rollout.weight_transport=ipc", "cluster.device=cuda", "policy.ranks=3", "rollout.engines=2", "rollout.tensor_parallel=2"], "rollout.weight_transport", "only 3 of the engines' 4 GPUs", ["policy.ranks=4"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "key", "words", "mended"), CASES, ids=lambda value: str(value)[:60])
def test_rule(name, wrong, key, words, mended, refused, load):
    problems = refused(*wrong)
    assert len(problems) == 1, problems
    assert f": {key}: " in problems[0] and words in problems[0] and "legal" in problems[0]
    assert problems[0].startswith(("command line: ", "c.yaml:"))
    load(*wrong, *mended)


def test_every_rule_has_a_case():
    assert {rule.check.__name__.strip("_") for rule in RULES if Config in rule.of} == {case[0] for case in CASES}


def test_the_named_rule_is_the_broken_one(load):
    """The base breaks none; each case breaks the rule that it names, read through the rule itself."""
    base = load()
    assert broken_rules(base) == []
    for name, wrong, key, _, _ in CASES:
        config = _unchecked(base, wrong)
        broken = {
            (rule.check.__name__.strip("_"), violation.keys[0])
            for rule in RULES
            for arguments in rule.arguments(config, type(config))
            for violation in rule.check(*arguments)
        }
        assert broken == {(name, key)}


def _unchecked(base: Config, overrides: list[str]) -> Config:
    """The base with overrides, validated by pydantic alone."""
    tree = base.model_dump()
    for override in overrides:
        key, _, text = override.partition("=")
        *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
        here = tree
        for part in parents:
            here = here[part]
        here[last] = yaml.safe_load(text)
    return Config.model_validate(tree)


def test_violations_name_the_line_of_the_key_to_mend(refused):
    text_problem = refused("reward.sources.0.name=x", "ppo.minibatch_samples=24", "reward.sources.0.model=rm")
    assert [problem.split(": ")[:2] for problem in text_problem] == [
        ["c.yaml:6", "reward.sources.0"],
        ["command line", "ppo.minibatch_samples"],
    ]
    assert refused("rollout.samples_per_prompt=5")[0].startswith("c.yaml:16: ppo.minibatch_samples: found 32")
    # a key that isn't given: where the override stands that broke the rule
    assert refused("rollout.max_response_tokens=9000")[0].startswith("command line: policy.tokens_per_micro_batch: ")


def test_inline_names_each_role(refused):
    ranks = [f"{role}.ranks=2" for role in ("policy", "critic", "reference", "reward")]
    problems = refused("cluster.executor=inline", "rollout.engines=2", *ranks)
    assert len(problems) == 5


def test_three_sources_of_one_name(refused):
    problems = refused("reward.sources=[{function: 'a:f'}, {function: 'b:f'}, {function: 'c:f'}, {function: 'c:g'}]")
    assert [problem.split(": ")[1] for problem in problems] == ["reward.sources.1.name", "reward.sources.2.name"]
