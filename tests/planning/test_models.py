"""The models of a run: those that can't be looked at, and what the others' dimensions allow, as the roles have it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from rayrlhf.errors import InputRefused
from rayrlhf.models.export import weight_layout
from rayrlhf.models.parallel import check_sharing
from rayrlhf.planning.document import document
from rayrlhf.planning.known import _catalogue
from rayrlhf.planning.memory import frozen_bytes
from rayrlhf.planning.models import HeldModels, known_models
from rayrlhf.planning.plan import check_plan, make_plan
from rayrlhf.planning.shapes import FAMILIES
from rayrlhf.weights.bucket import plan_buckets


def test_a_model_that_nobody_knows_is_no_problem_but_said(load):
    plan = make_plan(load("policy.path=nobody/nothing"))
    (unseen,) = plan.known.unseen
    assert plan.problems == [] and str(unseen).endswith("its memory isn't planned")
    assert plan.known.models == {} and check_plan(plan.config) == []


def test_a_folder_that_is_not_there_is_said_and_what_it_is_counted_as(load):
    """A reward model of an earlier stage is counted as the policy's model, and its few layers are no reason to refuse."""
    words = ["reward.sources=[{model: ./runs/rm/model}]", "critic={path: ./runs/value, num_layers: 99}"]
    plan = make_plan(load("policy.path=Qwen/Qwen2.5-0.5B", *words))
    assert plan.problems == [] and plan.known.models["reward"][0].shape.hidden == 896
    unseen = json.loads(json.dumps(document(plan)["unseen"]))
    assert [(model["key"], model["path"], model["counted_as"]) for model in unseen] == [
        ("critic.path", "./runs/value", "Qwen/Qwen2.5-0.5B"),
        ("reward.sources.0.model", "./runs/rm/model", "Qwen/Qwen2.5-0.5B"),
    ]
    assert all("no folder" in model["why"] and "refused unless there is one" in model["why"] for model in unseen)
    assert document(plan)["roles"]["reward"]["models"][0]["source"] == "counted as Qwen/Qwen2.5-0.5B"
    # Nothing stands in for the policy, and no other role's model for a third one.
    typo = make_plan(load("policy.path=/models/typo", "critic.path=Qwen/Qwen2.5-0.5B", *words[:1]))
    assert [(model.key, model.counted_as) for model in typo.known.unseen] == [
        ("policy.path", None),
        ("reward.sources.0.model", None),
    ]
    assert set(typo.known.models) == {"critic"} and document(typo)["ok"] is True


@pytest.mark.parametrize("base", ["base", "base_sft", "base_dpo"])
def test_adapters_of_modules_that_are_not_there(load, base):
    """Told by name, early too, and with what is there; no memory is planned for the role."""
    words = ["cluster.device=cuda", "cluster.nodes=[{gpus: 1}]", "policy.path=Qwen/Qwen2.5-0.5B"]
    for targets, wrong in (("[foo]", "foo"), ("[q_proj, foo, lm_head]", "foo, lm_head")):
        plan = make_plan(load(*words, f"policy.lora={{target_modules: {targets}}}", base=base))
        (problem,) = plan.problems
        assert problem == (
            f"policy.lora.target_modules: found {wrong}, but Qwen/Qwen2.5-0.5B has no layer of that name that can have an"
            " adapter; legal: all-linear, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
        )
        assert check_plan(plan.config) == plan.problems
        # The critic of PPO alone is left, 494,032,768 numbers and a head.
        critic = 494_032_768 + 896 + 1 if base == "base" else 0
        assert plan.usage is not None and plan.transfer is None
        assert plan.usage.gpus[0].phases["update"].get("optimizer", 0) == 12 * critic


def test_experts_have_no_adapters_by_name(load):
    config = load(
        "policy.path=mistralai/Mixtral-8x7B-v0.1",
        "policy.lora={target_modules: [w1, w2, w3]}",
        "critic.path=Qwen/Qwen2.5-0.5B",
    )
    (problem,) = make_plan(config).problems
    assert (
        "found w1, w2, w3" in problem and "some of embed_tokens, q_proj" in problem and check_plan(config) == [problem]
    )


def test_ranks_share_no_weights_of_a_mixture(load):
    mixture = ["policy.path=mistralai/Mixtral-8x7B-v0.1", "policy.ranks=2", "policy.tensor_parallel=2"]
    config = load(*mixture, "critic.path=Qwen/Qwen2.5-0.5B")
    (problem,) = make_plan(config).problems
    assert problem.startswith(
        "policy.tensor_parallel: found 2, but mistralai/Mixtral-8x7B-v0.1 is a mixture of experts"
    )
    assert problem.endswith("what would do: 1") and check_plan(config) == [problem]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_over_which_ranks_share_weights_are_those_of_the_role(load, family, tmp_path):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24}
    model = transformers.AutoConfig.for_model(family, hidden_size=32, num_hidden_layers=1, vocab_size=64, **sizes)
    model.save_pretrained(tmp_path)
    for size in (2, 4):
        config = load(f"policy.path={tmp_path}", "policy.ranks=4", f"policy.tensor_parallel={size}")
        try:
            check_sharing(model, config.policy, "policy")
            refused = False
        except InputRefused:
            refused = True
        assert refused == bool(check_plan(config)) == (size == 4 or family == "mixtral")


def problems(load, *overrides: str, base: str) -> list[str]:
    return make_plan(load(*overrides, base=base)).problems


def test_what_a_model_reads_is_compared_with_what_is_checked_before_a_run(load):
    """Qwen2.5 0.5B reads 32,768 tokens, SmolLM2 8,192, Llama 2 4,096."""
    long = ["data.max_prompt_tokens=8000", "rollout.max_response_tokens=1000"]
    smol, llama = "HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-2-7b-hf"
    budget = [f"{role}.tokens_per_micro_batch=40000" for role in ("policy", "reference")]
    sampled = f"data.max_prompt_tokens + rollout.max_response_tokens is 9000, but {smol} reads at most 8192 tokens"
    preference = [f"policy.path={smol}", *long, *budget, "data.max_tokens=8100"]
    assert problems(load, *preference, base="base_dpo") == [sampled]
    unsampled = [words for words in preference if not words.startswith("rollout.")]
    assert problems(load, *unsampled, "guard.kl_prompts=0", "guard.max_kl=null", base="base_dpo") == []
    compared = ["measure.tokens_per_micro_batch=9000", f"reference={llama}"]
    models = f"models=[{{path: Qwen/Qwen2.5-0.5B}}, {{path: {smol}}}]"
    assert problems(load, models, *long, *compared, base="base_evaluation") == [
        sampled, sampled.replace(smol, llama).replace("8192", "4096"),
    ]  # fmt: skip
    asked = ["critique.max_input_tokens=8000", "critique.max_critique_tokens=500"]
    assert problems(load, f"policy.path={smol}", *asked, base="base_critique") == [
        f"critique.max_input_tokens + critique.max_critique_tokens is 8500, but {smol} reads at most 8192 tokens"
    ]
    assert problems(load, f"policy.path={smol}", *long, base="base_critique") == [sampled]
    given = ["data.max_prompt_tokens=8000", "rollout.max_response_tokens=500", "data.response_column=response"]
    assert problems(load, f"policy.path={smol}", *given, base="base_critique") == []


def test_engines_of_a_critique_have_room_for_its_questions(load):
    """1,024 tokens of a question and 256 of a critique are 1,280, more than with a response of 64; one block of 128 is the
    engine's own. Qwen2.5 0.5B: 2 x 24 layers x 2 heads x 64 x 2 bytes a token."""
    words = [
        "cluster.device=cuda",
        "cluster.nodes=[{gpus: 1}]",
        "policy.path=Qwen/Qwen2.5-0.5B",
        "rollout.kv_cache_gib=1",
    ]
    usage = make_plan(load(*words, base="base_critique")).usage
    assert usage is not None and usage.engines[0].least == (1280 + 128) * 2 * 24 * 2 * 64 * 2


def test_the_largest_of_the_models_that_are_compared_is_found_in_host_memory_too(load):
    """With their parameters in host memory none has any on its GPU; a layer with 10^9 numbers at most is there."""
    small, large = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"
    words = ["cluster.device=cuda", "measure.zero_stage=3", "measure.offload_parameters=cpu", "measure.ranks=2"]
    for paths in ((small, large), (large, small)):
        models = f"models=[{{path: {paths[0]}}}, {{path: {paths[1]}}}]"
        config = load(*words, models, base="base_evaluation")
        shapes = {model.path: model.shape for model in known_models(config).models["model"]}
        held = HeldModels.of(config, "model", known_models(config).models["model"]).states
        assert held.parameters == 0 and held.host["parameters"] >= 1_543_714_304  # b P / N
        alone = [frozen_bytes(shape, "bfloat16", 2, zero_stage=3, offloaded=True) for shape in shapes.values()]
        assert held.forward_buffers == max(one.forward_buffers for one in alone) and held.loading == 2 * 151_936 * 1536


def test_experts_travel_one_by_one(load):
    """The buckets of Mixtral 8x7B are those that are made of its checkpoint's tensors: none with all experts of a layer."""
    name = "mistralai/Mixtral-8x7B-v0.1"
    config = transformers.MixtralConfig(**{**_catalogue()[name.lower()], "num_hidden_layers": 1})
    with torch.device("meta"):
        layout = weight_layout(transformers.MixtralForCausalLM(config))
    words = ["cluster.device=cuda", f"policy.path={name}", "policy.ranks=2", "critic.path=Qwen/Qwen2.5-0.5B"]
    for mib in (16, 1024):
        real = plan_buckets(layout, bucket_bytes=mib * 2**20, dtype="bfloat16")
        largest = max(sum(entry.nbytes for entry in bucket) for bucket in real)
        transfer = make_plan(load(*words, f"rollout.weight_bucket_mib={mib}")).transfer
        assert transfer is not None
        assert transfer.bucket_bytes == max(largest, mib * 2**20) < 1.1 * 2**30
