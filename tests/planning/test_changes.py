"""What a plan names as a change that would do: each is put on the command line, and must do."""

from __future__ import annotations

import pytest

from rayrlhf.config import load_config
from rayrlhf.planning.plan import make_plan
from tests.conftest import ROOT
from tests.planning.conftest import BASES

CUDA = "cluster.device=cuda"
SMALL, MIDDLE, LARGE = "policy.path=Qwen/Qwen2.5-0.5B", "policy.path=Qwen/Qwen2.5-1.5B", "policy.path=Qwen/Qwen2.5-7B"
TWO_MODELS = ["models=[{path: Qwen/Qwen2.5-7B}, {path: Qwen/Qwen2.5-0.5B}]", "measure.tokens_per_micro_batch=512"]
FOUR = ["policy.ranks=4", "critic.ranks=4", "reference.ranks=4", "rollout.engines=4"]

BAD = {
    "one machine for all": ["base", CUDA, SMALL, "cluster.nodes=[{gpus: 3}]", *FOUR],
    "an engine that divides heads": ["base", CUDA, SMALL, "cluster.nodes=[{count: 2, gpus: 4}]", "rollout.tensor_parallel=8"],
    "apart on too few": ["base", CUDA, SMALL, "cluster.nodes=[{gpus: 4}]", "cluster.placement=disaggregated", *FOUR],
    "in pairs on too few": [
        "base", CUDA, SMALL, "cluster.nodes=[{gpus: 4}]", "cluster.placement=[[policy, critic], [reference, rollout]]", *FOUR,
    ],
    "ranks that share sequences": [
        "base", CUDA, SMALL, "cluster.nodes=[{gpus: 3}]", "policy.ranks=4", "policy.sequence_parallel=2", "rollout.engines=2",
    ],
    "transfers within GPUs": [
        "base", CUDA, SMALL, "cluster.nodes=[{gpus: 3}]", *FOUR[:3], "rollout.engines=4", "rollout.weight_transport=ipc",
    ],
    "fewer ranks, and then too little memory": [
        "base", CUDA, MIDDLE, "cluster.nodes=[{gpus: 3, gpu_memory_gib: 24}]", *FOUR,
    ],
    "a GPU too small": ["base", CUDA, MIDDLE, "cluster.nodes=[{gpus: 4, gpu_memory_gib: 24}]", *FOUR, "critic.ranks=4"],
    "all at once": ["base", CUDA, MIDDLE, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 64}]", "cluster.offload_idle=false"],
    "no room for a cache": ["base_sampling", CUDA, LARGE, "cluster.nodes=[{gpus: 8, gpu_memory_gib: 24}]"],
    "a cache too small": ["base", CUDA, SMALL, "cluster.nodes=[{gpus: 1}]", "rollout.kv_cache_gib=0.0001"],
    # 17.48 GiB of others and the process's half leave 0.55 of the GPU, of which it would take 4 GiB.
    "an engine that takes less than it asks for": [
        "base", CUDA, SMALL, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 40}]", "cluster.executor=inline",
        "rollout.gpu_memory_fraction=0.6", "rollout.kv_cache_gib=1",
    ],
    # Half of the share would have the room, but not the model's 14.2 GiB and a cache.
    "a share too large": [
        "base_sampling", CUDA, LARGE, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 24}]", "rollout.gpu_memory_fraction=0.98",
    ],
    "an engine beside all others": [
        "base", CUDA, SMALL, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 40}]", "cluster.executor=inline",
        "rollout.gpu_memory_fraction=0.6",
    ],
    "examples": ["base_sft", CUDA, MIDDLE, "cluster.nodes=[{gpus: 2, gpu_memory_gib: 24}]", "policy.ranks=4"],
    "examples, too large": ["base_sft", CUDA, MIDDLE, "cluster.nodes=[{gpus: 4, gpu_memory_gib: 12}]", "policy.ranks=4"],
    "pairs": ["base_dpo", CUDA, SMALL, "cluster.nodes=[{gpus: 2}]", "policy.ranks=4", "reference.ranks=3"],
    # A forward of 1,024 tokens would have the room, and a sample has no more; but a pair's two stay together.
    "pairs, too large": [
        "base_dpo", CUDA, SMALL, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 14}]", "policy.tokens_per_micro_batch=2048",
        "reference.tokens_per_micro_batch=2048", "data.max_tokens=1024", "guard.kl_prompts=0", "guard.max_kl=null",
    ],
    "an evaluation": ["base_evaluation", CUDA, "models=[{path: Qwen/Qwen2.5-0.5B}, {path: Qwen/Qwen2.5-1.5B}]",
                      "cluster.nodes=[{gpus: 5}]", "cluster.placement=disaggregated", "measure.ranks=4"],
    # The reference stands for the model, too.
    "an evaluation of one model": [
        "base_evaluation", CUDA, "models=[{path: Qwen/Qwen2.5-0.5B}]", "cluster.nodes=[{gpus: 2}]", "measure.ranks=4",
    ],
    # Model and reference of 14.2 GiB each, in ranks of two GPUs; on one GPU, with a reward model of 14.2, too.
    "an evaluation, too large": [
        "base_evaluation", CUDA, *TWO_MODELS, "rollout.gpu_memory_fraction=0.7", "measure.ranks=2",
        "cluster.nodes=[{gpus: 2, gpu_memory_gib: 24}]",
    ],
    "scores, too large": [
        "base_evaluation", CUDA, *TWO_MODELS, "rollout.gpu_memory_fraction=0.5", "scores.tokens_per_micro_batch=512",
        "scores.reward={model: Qwen/Qwen2.5-7B}", "scores.dtype=bfloat16", "cluster.nodes=[{gpus: 1, gpu_memory_gib: 36}]",
    ],
    "parameters, too large": [
        "base_sft", CUDA, LARGE, "policy.ranks=2", "policy.zero_stage=3", "policy.offload_optimizer=cpu",
        "policy.gradient_checkpointing=true", "policy.tokens_per_micro_batch=512",
        "cluster.nodes=[{gpus: 2, gpu_memory_gib: 12}]",
    ],
    "engines on GPUs of two sizes": [
        "base_sampling", CUDA, LARGE, "rollout.engines=2",
        "cluster.nodes=[{gpus: 1, gpu_memory_gib: 80}, {gpus: 1, gpu_memory_gib: 24}]",
    ],
    # Nor would 16 GiB hold what is estimated, but that doesn't keep a run on CPUs from starting.
    "a cache too small, on CPUs": ["base", LARGE, "cluster.nodes=[{gpus: 0, memory_gib: 16}]", "rollout.kv_cache_gib=0.0001"],
    "heads": ["base", CUDA, LARGE, "rollout.tensor_parallel=3"],
    "heads on large GPUs": ["base", CUDA, LARGE, "rollout.tensor_parallel=8", "cluster.nodes=[{gpus: 8, gpu_memory_gib: 640}]"],
    "heads of ranks": ["base", CUDA, LARGE, "policy.ranks=8", "policy.sequence_parallel=8", "ppo.minibatch_samples=32"],
    "host memory": ["base_sft", CUDA, LARGE, "cluster.nodes=[{gpus: 8, memory_gib: 128}]", "policy.ranks=8"],
}  # fmt: skip


def named(problem: str) -> list[list[str]]:
    """The changes that a problem names, each as overrides."""
    _, named, after = problem.partition("what would do: ")
    assert named, problem
    if " or " in after and ", or " not in after:  # sizes of the key that the problem begins with
        return [[f"{problem.partition(':')[0]}={size}"] for size in after.split(" or ")]
    if after.isdigit():
        return [[f"{problem.partition(':')[0]}={after}"]]
    return [[part.replace(" ", "=", 1) for part in change.split(" with ")] for change in after.split(", or ")]


@pytest.mark.parametrize("name", BAD)
def test_each_change_that_is_named_does(name):
    base, *words = BAD[name]
    plan = make_plan(load_config(BASES / f"{base}.yaml", words))
    assert plan.problems
    for problem in plan.problems:
        for change in named(problem):
            changed = make_plan(load_config(BASES / f"{base}.yaml", [*words, *change]))
            assert changed.problems == [], (problem, change)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("an evaluation of one model", "measure.ranks 2, or cluster.nodes.0.count 2"),
        ("an evaluation, too large", "measure.zero_stage 3"),
        (
            "scores, too large",
            "measure.zero_stage 3 with measure.offload_parameters cpu,"
            " or scores.zero_stage 3 with scores.offload_parameters cpu",
        ),
        ("parameters, too large", "policy.offload_parameters cpu"),
        # By hand: weights 14.19, workspace 2 and a cache of 144 tokens x 57,344 bytes, 0.01, are 16.19 of 24: 0.68.
        ("engines on GPUs of two sizes", "rollout.gpu_memory_fraction 0.68"),
        # By hand: 128 tokens are a block, and vLLM has its own: 256 x 57,344 bytes = 0.0137 GiB.
        ("a cache too small, on CPUs", "rollout.kv_cache_gib 0.014"),
    ],
)
def test_what_would_do_is_named(name, changes):
    base, *words = BAD[name]
    problems = make_plan(load_config(BASES / f"{base}.yaml", words)).problems
    assert problems and all(problem.endswith(f"what would do: {changes}") for problem in problems), problems


def test_the_smaller_memory_is_told(load):
    (problem,) = make_plan(load(*BAD["engines on GPUs of two sizes"][1:], base="base_sampling")).problems
    assert problem.startswith("rollout.gpu_memory_fraction: found 0.4 of 24.0 GiB, but")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo_7b", ["cluster.nodes=[{gpus: 8, gpu_memory_gib: 28}]", "rollout.gpu_memory_fraction=0.62"]),
        ("reward_model_7b", ["cluster.nodes=[{gpus: 8, gpu_memory_gib: 23}]"]),
    ],
)
def test_a_micro_batch_of_one_pair_is_named(name, words):
    """Both have micro-batches of 8,192 tokens, and pairs of 2 x 2,048: half of the budget holds one, a quarter doesn't."""
    problems = make_plan(load_config(ROOT / f"configs/{name}.yaml", words)).problems
    assert problems and all("what would do: policy.tokens_per_micro_batch 4096" in problem for problem in problems)


def test_ranks_that_a_rule_refuses_are_not_named(load):
    """There is room for 3 ranks, but 2 of them share each sequence. Placing alone, without the rules, would name 3."""
    (problem,) = make_plan(load(*BAD["ranks that share sequences"][1:])).problems
    assert "what would do: policy.ranks 2, or " in problem and "policy.ranks 3" not in problem, problem


def test_where_nothing_would_do_nothing_is_named(load):
    """A 7B model on a GPU of 24 GiB: no number of ranks of one GPU helps."""
    words = [CUDA, LARGE, "cluster.nodes=[{gpus: 1, gpu_memory_gib: 8}]", "policy.ranks=2", "rollout.engines=2"]
    (problem,) = make_plan(load(*words)).problems
    assert problem.endswith(
        "what would do: a larger cluster, or a smaller model; fewer ranks and engines alone wouldn't"
    )
