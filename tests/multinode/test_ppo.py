"""PPO with its ranks and engines on different nodes is the run on one rank in one process."""

from __future__ import annotations

import pytest
import torch

from rayrlhf.cluster import Groups, start_groups
from rayrlhf.config import load_config
from rayrlhf.drivers import base
from rayrlhf.planning.placement import Placement
from rayrlhf.planning.transfer import transport_of
from tests.drivers.conftest import world  # noqa: F401
from tests.drivers.runs import Finished, TinyWorld
from tests.multinode.fake_cluster import fake_cluster, until_free

pytestmark = pytest.mark.timeout(600)

SETTINGS = [
    "ppo.steps=2",
    "evaluation.prompts=0",
    "policy.optimizer.lr=0.0003",
    "critic.optimizer.lr=0.0003",
    "checkpoint.every_steps=0",
]
ON_FOUR_NODES = [
    "cluster.executor=ray",
    "cluster.nodes=[{count: 4, gpus: 1}]",
    "cluster.placement=[[policy, critic, reference]]",
    "policy.ranks=2",
    "policy.zero_stage=3",
    "critic.ranks=2",
    "critic.zero_stage=2",
    "reference.ranks=2",
    "rollout.engines=2",
    "rollout.assignment=least_loaded",
    "cluster.start_timeout_s=500",
]


@pytest.fixture(scope="module")
def inline(world: TinyWorld) -> Finished:  # noqa: F811
    return world.train("inline", *SETTINGS)


@pytest.fixture(scope="module")
def placements() -> list[Placement]:
    """Of the groups that were started."""
    return []


@pytest.fixture(scope="module")
def on_nodes(world: TinyWorld, inline: Finished, placements: list[Placement]) -> Finished:  # noqa: F811
    def noting(*arguments, **more) -> Groups:
        groups = start_groups(*arguments, **more)
        placements.append(groups.placement)
        return groups

    with pytest.MonkeyPatch.context() as patched, fake_cluster(1, 1, 1, 1):
        patched.setattr(base, "start_groups", noting)
        done = world.train("on-nodes", *SETTINGS, *ON_FOUR_NODES)
        until_free()
        return done


def test_ranks_and_engines_are_on_nodes_of_their_own(on_nodes: Finished, placements: list[Placement], world: TinyWorld):  # noqa: F811
    (placement,) = placements
    seats = {(seat.role, seat.rank): placement.machines[seat.machine].name for seat in placement.seats}
    assert len({seats["policy", 0], seats["policy", 1], seats["rollout", 0], seats["rollout", 1]}) == 4
    assert seats["critic", 0] == seats["reference", 0] == seats["policy", 0]
    config = load_config(world.config_file("transport"), [*SETTINGS, *ON_FOUR_NODES])
    assert transport_of(config, placement) == "gloo"  # what goes to other machines


def test_two_ranks_under_zero_3_and_two_engines_on_four_nodes(inline: Finished, on_nodes: Finished, world: TinyWorld):  # noqa: F811
    from safetensors.torch import load_file

    before = load_file(world.folder / "model" / "model.safetensors")
    moved = max(float((weight - before[name]).abs().max()) for name, weight in inline.weights.items())
    assert moved > 5e-4  # two steps of learning, fifty times what may differ
    assert on_nodes.weights.keys() == inline.weights.keys()
    for name, weight in on_nodes.weights.items():
        torch.testing.assert_close(
            weight, inline.weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_their_metrics_are_the_same(inline: Finished, on_nodes: Finished):
    for mine, theirs in zip(on_nodes.numbers, inline.numbers, strict=True):
        for name in ("score/mean", "kl", "policy_loss", "value_loss", "entropy", "grad_norm", "critic/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert mine["samples"] == theirs["samples"] == 16.0
        assert mine["rollout_mismatch/max_abs"] < 1e-5  # the engines had the trainer's weights, over gloo
