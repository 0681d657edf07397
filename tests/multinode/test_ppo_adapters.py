"""PPO with LoRA under ZeRO-3 on two nodes, whose adapter goes to a vLLM engine on a third."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.drivers.conftest import world  # noqa: F401
from tests.drivers.runs import Finished, TinyWorld
from tests.multinode.fake_cluster import fake_cluster, until_free

pytestmark = pytest.mark.timeout(900)

SETTINGS = [
    *["ppo.steps=2", "evaluation.prompts=0", "checkpoint.every_steps=0", "rollout.engine=vllm"],
    *["rollout.kv_cache_gib=0.05", "rollout.max_num_seqs=8", "rollout.verify_weights=always"],
    *[
        "policy.lora={rank: 4, alpha: 8}",
        "reference={}",
        "rollout.lora_transfer=adapter",
        "policy.optimizer.lr=0.003",
    ],
]
ON_THREE_NODES = [
    *["cluster.executor=ray", "cluster.nodes=[{count: 3, gpus: 1}]", "cluster.placement=[[policy, critic]]"],
    *["policy.ranks=2", "policy.zero_stage=3", "cluster.start_timeout_s=600"],
]


@pytest.fixture(scope="module")
def runs(world: TinyWorld) -> tuple[Finished, Finished]:  # noqa: F811
    """On one rank in this process, and on three nodes."""
    pytest.importorskip("vllm")
    inline = world.train("inline", *SETTINGS)
    with fake_cluster(1, 1, 1):
        on_nodes = world.train("on-nodes", *SETTINGS, *ON_THREE_NODES)
        until_free()
    return inline, on_nodes


def test_adapters_learn_as_on_one_rank(runs: tuple[Finished, Finished], world: TinyWorld):  # noqa: F811
    inline, on_nodes = runs
    before = load_file(world.folder / "model" / "model.safetensors")
    moved = max(float((weight - before[name]).abs().max()) for name, weight in inline.weights.items())
    assert moved > 5e-4  # two steps of learning, fifty times what may differ
    assert on_nodes.weights.keys() == inline.weights.keys()
    for name, weight in on_nodes.weights.items():
        torch.testing.assert_close(
            weight, inline.weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_engines_sampled_with_the_adapter_of_each_step(runs: tuple[Finished, Finished]):
    """The second step's responses come from a policy that has moved: an engine without its adapter would differ by more."""
    for run in runs:
        first, second = run.numbers
        assert first["rollout_mismatch/max_abs"] < 1e-4 and second["rollout_mismatch/max_abs"] < 1e-4
        model = sum(weight.nbytes for weight in run.weights.values())
        assert all(0 < row["sync/bytes"] < 0.2 * model for row in run.numbers)  # the adapter alone
