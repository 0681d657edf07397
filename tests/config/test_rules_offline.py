# ruff: noqa: E501
"""The rules for training on examples, each broken on purpose, alone and all together."""

from __future__ import annotations

import pytest

from rayrlhf.config import ROOTS, broken_rules
from rayrlhf.config.roots import OFFLINE
from rayrlhf.config.rules import RULES

SIMPO = ("dpo.loss=simpo",)
UNMEASURED = ("guard.kl_prompts=0", "guard.max_kl=null")
NOTHING_HELD_OUT = ("data.validation_fraction=0", "training.keep_best=false")

# algorithm, rule, what breaks it, the key that is named, words of the message, what mends it
CASES = [
    # base: batches of 16, prompts of up to 64 tokens, examples of up to 128
    ("sft", "longest_example_fits", ["policy.tokens_per_micro_batch=127"], "policy.tokens_per_micro_batch", "at least 128", ["policy.tokens_per_micro_batch=128"]),
    ("reward_model", "longest_example_fits", ["policy.tokens_per_micro_batch=255"], "policy.tokens_per_micro_batch", "a pair: twice data.max_tokens", ["policy.tokens_per_micro_batch=256"]),
    ("dpo", "longest_example_fits", ["reference.tokens_per_micro_batch=127"], "reference.tokens_per_micro_batch", "at least 128", ["reference.tokens_per_micro_batch=128"]),
    ("dpo", "longest_example_fits", ["dpo.loss=kto", "policy.tokens_per_micro_batch=191"], "policy.tokens_per_micro_batch", "another one's completion", ["policy.tokens_per_micro_batch=192"]),
    ("dpo", "longest_example_fits", ["rollout.max_response_tokens=500", "policy.tokens_per_micro_batch=563"], "policy.tokens_per_micro_batch", "data.max_prompt_tokens + rollout.max_response_tokens", ["rollout.max_response_tokens=499"]),
    ("dpo", "longest_example_fits", [*SIMPO, "reference.tokens_per_micro_batch=127"], "reference.tokens_per_micro_batch", "at least 128", ["rollout.max_response_tokens=63"]),
    ("sft", "prompt_leaves_room", ["data.max_prompt_tokens=128"], "data.max_prompt_tokens", "less than 128", ["data.max_tokens=129"]),
    ("sft", "batch_fills_ranks", ["policy.ranks=17"], "training.batch_examples", "at least 17", ["policy.ranks=16"]),
    ("sft", "warmup_ends_before_last_step", ["policy.optimizer.warmup_steps=5", "training.max_steps=5"], "policy.optimizer.warmup_steps", "at most 4", ["policy.optimizer.warmup_steps=4"]),
    ("sft", "fraction_is_used", ["data.validation=v.jsonl", "data.validation_fraction=0.1"], "data.validation_fraction", "nothing is taken out of data.train", ["data.validation=null"]),
    ("sft", "example_files_have_no_splits", ["data.train=[{path: a.jsonl, split: test}]"], "data.train.0.split", "has no splits", ["data.train.0.path=org/name"]),
    ("dpo", "example_files_have_no_splits", ["data.validation=[{path: a.csv, subset: en}]"], "data.validation.0.subset", "has no subsets", ["data.validation.0.subset=null"]),
    ("sft", "columns_are_read", ["data.train=[{path: a.jsonl, chosen_column: good}]"], "data.train.0.chosen_column", "it takes examples", ["data.train.0.chosen_column=chosen"]),
    ("reward_model", "columns_are_read", ["data.train=[{path: a.jsonl, label_column: ok}]"], "data.train.0.label_column", "it takes pairs", ["data.train=a.jsonl"]),
    ("dpo", "columns_are_read", ["data.train=[{path: a.jsonl, completion_column: answer}]"], "data.train.0.completion_column", "read are prompt_column, chosen_column, rejected_column, margin_column", ["dpo.loss=kto"]),
    ("sft", "mixture_has_several", ["data.train=[{path: a.jsonl, weight: 2}]"], "data.train.0.weight", "there is no other", ["data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl}]"]),
    ("sft", "validation_has_examples", ["data.validation_fraction=0"], "training.keep_best", "no examples are held out", ["training.keep_best=false"]),
    ("sft", "validation_has_examples", [*NOTHING_HELD_OUT, "training.patience=3"], "training.patience", "found 3", ["data.validation=v.jsonl", "data.validation_fraction=0.05"]),
    ("sft", "validation_has_examples", [*NOTHING_HELD_OUT, "training.validate_every_steps=5"], "training.validate_every_steps", "found 5", ["training.validate_every_steps=0"]),
    ("reward_model", "validation_has_examples", [*NOTHING_HELD_OUT, "reward_model.failures_shown=0"], "reward_model.normalize", "legal: false", ["reward_model.normalize=false"]),
    ("reward_model", "validation_has_examples", [*NOTHING_HELD_OUT, "reward_model.normalize=false"], "reward_model.failures_shown", "legal: 0", ["reward_model.failures_shown=0"]),
    ("dpo", "loss_has_reference", ["reference=null"], "reference", "compares the policy with a reference", ["reference={}"]),
    ("dpo", "loss_has_reference", ["reference=null", "dpo.loss=kto"], "reference", "dpo.loss kto", [SIMPO[0], *UNMEASURED]),
    ("dpo", "reference_is_compared", [SIMPO[0], *UNMEASURED], "reference", "simpo doesn't need", ["reference=null"]),
    ("dpo", "reference_is_compared", ["dpo.loss=orpo", *UNMEASURED, "reference.path=other"], "reference", "orpo doesn't need", ["dpo.loss=sigmoid"]),
    ("dpo", "live_reference_is_used", [*SIMPO, "dpo.reference=live"], "dpo.reference", "needs no reference's", ["dpo.reference=cached"]),
    ("dpo", "live_reference_is_used", ["dpo.loss=orpo", *UNMEASURED, "reference=null", "dpo.reference=live"], "dpo.reference", "orpo", ["dpo.reference=cached"]),
    ("dpo", "smoothing_and_loss", ["dpo.label_smoothing=0.1"], "dpo.label_smoothing", "sigmoid would never use", ["dpo.loss=conservative"]),
    ("dpo", "smoothing_and_loss", ["dpo.label_smoothing=0.1", "dpo.loss=kto"], "dpo.label_smoothing", "kto would never use", ["dpo.label_smoothing=0"]),
    ("dpo", "smoothing_and_loss", ["dpo.loss=robust"], "dpo.label_smoothing", "robust is sigmoid", ["dpo.label_smoothing=0.2"]),
    ("dpo", "smoothing_and_loss", ["dpo.loss=conservative"], "dpo.label_smoothing", "conservative is sigmoid", ["dpo.loss=sigmoid"]),
    ("dpo", "settings_belong_to_loss", ["dpo.simpo_margin=1"], "dpo.simpo_margin", "the loss simpo", [*SIMPO]),
    ("dpo", "settings_belong_to_loss", ["dpo.desirable_weight=2"], "dpo.desirable_weight", "the loss kto", ["dpo.loss=kto"]),
    ("dpo", "settings_belong_to_loss", ["dpo.undesirable_weight=2", "dpo.loss=ipo"], "dpo.undesirable_weight", "ipo would never use", ["dpo.undesirable_weight=1"]),
    ("dpo", "curriculum_has_gaps", ["dpo.curriculum=true", "dpo.loss=kto"], "dpo.curriculum", "single completions", ["dpo.loss=hinge"]),
    ("dpo", "curriculum_has_gaps", ["dpo.curriculum=true", *SIMPO], "dpo.curriculum", "no reference to order", ["dpo.curriculum=false"]),
    ("dpo", "kto_compares_examples", ["dpo.loss=kto", "training.batch_examples=1"], "training.batch_examples", "at least 2", ["training.batch_examples=2"]),
    ("reward_model", "reward_model_is_merged", ["policy.lora={save: adapter}"], "policy.lora.save", "legal: merged", ["policy.lora.save=merged"]),
    ("dpo", "target_and_adaptive_beta", ["dpo.adaptive_beta=true"], "dpo.target_kl", "needs a KL to aim at", ["dpo.target_kl=0.05"]),
    ("dpo", "target_and_adaptive_beta", ["dpo.target_kl=0.05"], "dpo.target_kl", "never used", ["dpo.adaptive_beta=true"]),
    ("dpo", "target_and_adaptive_beta", ["dpo.adaptive_beta=true", "dpo.target_kl=0.1"], "dpo.target_kl", "below 0.1", ["guard.max_kl=0.2"]),
    ("dpo", "beta_pulls", [*SIMPO, "dpo.adaptive_beta=true", "dpo.target_kl=0.05"], "dpo.adaptive_beta", "doesn't pull", ["dpo.adaptive_beta=false", "dpo.target_kl=null"]),
    ("dpo", "beta_pulls", ["dpo.loss=orpo", "guard.actions=[raise_beta]"], "guard.actions", "any of halve_lr, roll_back", ["guard.actions=[halve_lr, roll_back]"]),
    ("dpo", "kl_is_measured", ["guard.kl_prompts=0"], "guard.max_kl", "no KL is measured", ["guard.max_kl=null"]),
    ("dpo", "kl_is_measured", [*UNMEASURED, "dpo.adaptive_beta=true", "dpo.target_kl=0.05"], "dpo.adaptive_beta", "no KL is measured", ["guard.kl_prompts=8"]),
    ("dpo", "kl_is_to_reference", [*SIMPO, "reference=null"], "guard.kl_prompts", "there is no KL", [*UNMEASURED]),
    ("dpo", "kl_is_to_reference", [*NOTHING_HELD_OUT], "guard.kl_prompts", "no examples are held out", UNMEASURED),
    ("dpo", "kl_is_of_policy", ["rollout.temperature=0.7"], "rollout.temperature", "legal: 1", ["rollout.temperature=1"]),
    ("dpo", "kl_is_of_policy", ["rollout.top_p=0.9"], "rollout.top_p", "legal: 1", ["rollout.top_p=1"]),
    ("dpo", "kl_is_of_policy", ["rollout.top_k=50"], "rollout.top_k", "legal: 0", ["rollout.top_k=0"]),
    ("dpo", "kl_is_of_policy", ["rollout.samples_per_prompt=2"], "rollout.samples_per_prompt", "one response a prompt", ["rollout.samples_per_prompt=1"]),
    ("dpo", "rollout_is_used", [*UNMEASURED, "rollout.max_response_tokens=32"], "rollout.max_response_tokens", "nothing is sampled", ["rollout.max_response_tokens=64"]),
    ("dpo", "rollout_is_used", [*UNMEASURED, "rollout.engine=transformers"], "rollout.engine", "nothing is sampled", ["guard.kl_prompts=8"]),
    ("dpo", "engines_have_prompts", ["rollout.engines=9", "guard.kl_prompts=8"], "rollout.engines", "at most 8", ["guard.kl_prompts=9"]),
    ("dpo", "actions_have_bound", ["guard.max_kl=null", "guard.actions=[halve_lr]"], "guard.actions", "nothing is ever done", ["guard.max_kl=0.2"]),
    # rules that PPO has too
    ("sft", "varlen_has_a_kernel", ["policy.attention=varlen", "policy.dtype=float32", "cluster.device=cuda"], "policy.attention", "with policy.dtype float32", ["policy.dtype=bfloat16"]),
    ("sft", "shared_rows_have_attention", ["policy.attention=eager", "policy.sequence_parallel=2", "policy.ranks=2"], "policy.attention", "found eager", ["policy.sequence_parallel=1"]),
    ("sft", "flash_attention_runs", ["policy.attention=flash_attention_2"], "policy.attention", "with cluster.device cpu", ["cluster.device=cuda"]),
    ("dpo", "packing_has_boundaries", ["reference.packing=true", "reference.attention=eager"], "reference.packing", "sdpa", ["reference.attention=sdpa"]),
    ("dpo", "shared_reference_has_policy_settings", ["policy.lora={}", "reference.dtype=float32"], "reference.dtype", "legal: bfloat16", ["reference.path=other"]),
    ("reward_model", "path_is_model", ["policy.path=models/x/model.safetensors"], "policy.path", "'models/x'", ["policy.path=models/x"]),
    ("sft", "lr_falls", ["policy.optimizer.min_lr_ratio=0.1"], "policy.optimizer.min_lr_ratio", "linear or cosine", ["policy.optimizer.schedule=linear"]),
    ("sft", "template_for_system_prompt", ["data.chat_template=never", "data.system_prompt=Be kind"], "data.system_prompt", "auto or always", ["data.chat_template=always"]),
    ("dpo", "inline_is_one_process", ["cluster.executor=inline", "reference.ranks=2"], "reference.ranks", "legal: 1", ["cluster.executor=ray"]),
    ("sft", "inline_has_no_ray", ["cluster.executor=inline", "cluster.address=auto"], "cluster.address", "no Ray", ["cluster.address=null"]),
    ("sft", "placement_names_roles", ["cluster.placement=[[policy, rollout]]"], "cluster.placement.0", "found 'rollout', which this run doesn't start; legal: policy", ["cluster.placement=colocated"]),
    ("dpo", "placement_names_roles", ["cluster.placement=[[policy, rollout]]", *UNMEASURED], "cluster.placement.0", "legal: policy, reference", ["cluster.placement=[[policy, reference]]"]),
    ("reward_model", "inline_shares_everything", ["cluster.executor=inline", "cluster.placement=disaggregated"], "cluster.placement", "legal: colocated", ["cluster.placement=colocated"]),
    ("sft", "ranks_hold_whole_groups", ["policy.ranks=3", "policy.tensor_parallel=2"], "policy.tensor_parallel", "legal: 1, 3", ["policy.ranks=4"]),
    ("sft", "batch_fills_ranks", ["policy.ranks=34", "policy.sequence_parallel=2"], "training.batch_examples", "fewer than policy.ranks 34 / policy.sequence_parallel 2: some ranks would have nothing to train on; legal: at least 17", ["policy.ranks=32"]),
    ("dpo", "one_way_to_spread_weights", ["policy.ranks=2", "policy.tensor_parallel=2", "policy.zero_stage=3"], "policy.tensor_parallel", "zero_stage 1 or 2", ["policy.tensor_parallel=1"]),
    ("dpo", "vllm_spreads_weights", ["rollout.tensor_parallel=2", "rollout.engine=transformers"], "rollout.tensor_parallel", "one process", ["rollout.engine=vllm"]),
    ("dpo", "offloaded_parameters_are_spread", ["reference.offload_parameters=cpu"], "reference.offload_parameters", "zero_stage 3", ["reference.zero_stage=3"]),
    ("sft", "nvme_takes_what_is_spread", ["policy.offload_optimizer=nvme", "policy.nvme_path=/nvme"], "policy.offload_optimizer", "found nvme with policy.zero_stage", ["policy.zero_stage=3"]),
    ("dpo", "nccl_goes_between_gpus", ["rollout.weight_transport=nccl", "cluster.device=cuda"], "rollout.weight_transport", "no two processes on one", ["rollout.weight_transport=ipc"]),
    ("sft", "nvme_has_a_folder", ["policy.offload_optimizer=nvme", "policy.zero_stage=3"], "policy.nvme_path", "needs a folder", ["policy.nvme_path=/nvme"]),
    ("dpo", "adapters_travel_where_there_are_some", ["rollout.lora_transfer=adapter"], "rollout.lora_transfer", "legal: merged", ["policy.lora={}"]),
    ("dpo", "adapters_fit_into_their_engine", ["rollout.lora_transfer=adapter", "policy.lora={rank: 600}"], "policy.lora.rank", "legal: up to that", ["policy.lora.rank=8"]),
    ("dpo", "transport_has_its_wire", ["rollout.weight_transport=ipc"], "rollout.weight_transport", "cluster.device is cpu", ["cluster.device=cuda"]),
    ("dpo", "ipc_shares_gpus", ["rollout.weight_transport=ipc", "cluster.device=cuda", "cluster.placement=disaggregated"], "rollout.weight_transport", "GPUs of their own", ["cluster.placement=colocated"]),
    ("dpo", "cache_is_vllms", ["rollout.engine=transformers", "rollout.kv_cache_gib=1"], "rollout.kv_cache_gib", "legal: null", ["rollout.engine=vllm"]),
    ("sft", "stopping_rules_apply", ["health.stop_on=[loss_spike]", "health.ignore=[loss_spike]"], "health.stop_on", "health.ignore leaves out", ["health.ignore=[]"]),
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
    offline = {rule.check.__name__.strip("_") for rule in RULES if set(rule.of) & set(OFFLINE)}
    assert offline == {case[1] for case in CASES}


@pytest.mark.parametrize("algorithm", ROOTS)
def test_bases_break_none(load, bases, algorithm):
    assert broken_rules(load(text=bases[algorithm])) == []


def test_all_together(refused, bases):
    problems = refused(
        *["dpo.label_smoothing=0.1", "dpo.simpo_margin=2", "rollout.top_p=0.5", "policy.ranks=99", "dpo.target_kl=3"],
        *["data.train=[{path: a.jsonl, split: x, weight: 3, label_column: l}]", "guard.kl_prompts=-1", "dpo.beat=1"],
        text=bases["dpo"],
    )
    # rollout.top_p says nothing: its rule reads guard.kl_prompts, which is illegal
    assert {problem.split(": ")[1] for problem in problems} == {
        *["dpo.label_smoothing", "dpo.simpo_margin", "training.batch_examples", "dpo.target_kl", "guard.kl_prompts"],
        *["data.train.0.split", "data.train.0.weight", "data.train.0.label_column", "dpo.beat"],
    }
