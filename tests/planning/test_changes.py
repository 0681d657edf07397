"""What a plan names as a change that would do: each is put on the command line, and must do."""

from __future__ import annotations

import pytest

from rayrlhf.config import load_config
from rayrlhf.planning.plan import make_plan
from tests.planning.conftest import BASES

CUDA = "cluster.device=cuda"
SMALL, MIDDLE, LARGE = "policy.path=Qwen/Qwen2.5-0.5B", "policy.path=Qwen/Qwen2.5-1.5B", "policy.path=Qwen/Qwen2.5-7B"
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
    # 18.98 GiB of others and its own half leave 0.51 of the GPU, of which it would take 4 GiB.
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
