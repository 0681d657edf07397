# ruff: noqa: E501
"""Where processes sit: against layouts drawn by hand, and properties that hold for every one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.errors import InputRefused
from rayrlhf.planning.claims import assumed_machines, claims_of, machines_of, places_roles
from rayrlhf.planning.placement import Claim, Machine, fits, place


def machines(*gpus: int) -> list[Machine]:
    return [Machine(f"node {k}", count) for k, count in enumerate(gpus)]


def seats(placement, role):
    return [(seat.machine, seat.gpus) for seat in placement.of(role)]


CLAIMS = [Claim("policy", 4, 1), Claim("critic", 2, 1), Claim("reward", 1, 0), Claim("rollout", 2, 2)]


def test_colocated_roles_take_the_first_gpus_of_one_machine():
    placed = place(CLAIMS, "colocated", machines(4, 4))
    assert seats(placed, "policy") == [(0, (0,)), (0, (1,)), (0, (2,)), (0, (3,))]
    assert seats(placed, "critic") == [(0, (0,)), (0, (1,))]
    assert seats(placed, "rollout") == [(0, (0, 1)), (0, (2, 3))]
    assert seats(placed, "reward") == []
    assert placed.sharing("policy") == {"critic", "rollout"}


def test_roles_of_their_own_sit_side_by_side():
    # 4 + 2 + 4 GPUs: engines fill the small machine, policy and critic the large one.
    placed = place(CLAIMS, "disaggregated", machines(4, 6))
    assert seats(placed, "rollout") == [(0, (0, 1)), (0, (2, 3))]
    assert seats(placed, "policy") == [(1, (k,)) for k in range(4)]
    assert seats(placed, "critic") == [(1, (4,)), (1, (5,))]
    assert placed.sharing("policy") == frozenset()


def test_lists_share_and_others_are_alone():
    placed = place(CLAIMS, [["policy", "critic"]], machines(8))
    assert seats(placed, "rollout") == [(0, (0, 1)), (0, (2, 3))]
    assert seats(placed, "policy") == [(0, (4,)), (0, (5,)), (0, (6,)), (0, (7,))]
    assert seats(placed, "critic") == [(0, (4,)), (0, (5,))]


def test_one_machine_is_preferred_and_the_smallest_that_does():
    placed = place(CLAIMS, "disaggregated", machines(8, 12, 10))
    assert {seat.machine for seat in placed.seats} == {2}


def test_ranks_are_packed_by_machine():
    placed = place([Claim("policy", 12, 1), Claim("rollout", 3, 4)], "colocated", machines(8, 8))
    assert [seat.machine for seat in placed.of("policy")] == [0] * 8 + [1] * 4
    assert seats(placed, "rollout") == [(0, (0, 1, 2, 3)), (0, (4, 5, 6, 7)), (1, (0, 1, 2, 3))]


def test_an_engine_stays_on_one_machine():
    # One GPU of each machine of three is of no use to engines over two.
    placed = place([Claim("rollout", 3, 2), Claim("policy", 3, 1)], "disaggregated", machines(3, 3, 3))
    assert sorted(seat.machine for seat in placed.of("rollout")) == [0, 1, 2]
    assert [seat.gpus for seat in placed.of("rollout")] == [(0, 1)] * 3
    assert seats(placed, "policy") == [(0, (2,)), (1, (2,)), (2, (2,))]


def test_odd_gpus_are_left_to_those_who_can_use_them():
    """Of each 6 GPUs an engine has 4. A policy that filled a machine would leave 2 GPUs, those beside the other engine; on 4 and 4
    it leaves 2 and 2, which critic and reference need."""
    claims = [Claim("policy", 8, 1), Claim("rollout", 2, 4), Claim("critic", 4, 1), Claim("reference", 4, 1)]
    sharing = [["policy", "rollout"], ["critic", "reference"]]
    placed = place(claims, sharing, machines(6, 6))
    assert [seat.machine for seat in placed.of("policy")] == [0] * 4 + [1] * 4
    assert seats(placed, "rollout") == [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3))]
    assert seats(placed, "critic") == seats(placed, "reference") == [(0, (4,)), (0, (5,)), (1, (4,)), (1, (5,))]
    # With a rank more the policy takes an odd one, and the critic has too few.
    assert not fits([Claim("policy", 9, 1), *claims[1:]], sharing, machines(6, 6))
    assert fits([Claim("policy", 9, 1), *claims[1:2], Claim("critic", 3, 1)], sharing, machines(6, 6))


@pytest.mark.parametrize(
    ("claims", "sharing", "gpus", "said"),
    [
        (CLAIMS, "disaggregated", (4, 4), ["10 are needed", "2 too few", "cluster.placement colocated", "policy.ranks at most 2", "1 more machine of 4 GPUs"]),
        ([Claim("rollout", 1, 8)], "colocated", (4, 4), ["an engine over 8 GPUs", "stays on one machine", "rollout.tensor_parallel 4"]),
        ([Claim("rollout", 2, 2)], "colocated", (3, 1), ["keeps each engine on one machine", "rollout.engines at most 1", "rollout.tensor_parallel 1"]),
        ([Claim("policy", 4, 1)], "colocated", (), ["found no GPUs", "a machine of 4 GPUs"]),
        ([Claim("rollout", 1, 1), Claim("model", 4, 1), Claim("reference", 4, 1)], "disaggregated", (5,), ["4 too few", "measure.ranks at most 2"]),
        ([Claim("rollout", 1, 1), Claim("reference", 4, 1)], "colocated", (2,), ["2 too few", "do: measure.ranks at most 2, or"]),
        ([Claim("policy", 1, 1), Claim("reference", 4, 1)], "colocated", (2,), ["2 too few", "do: reference.ranks at most 2, or"]),
        ([Claim("policy", 16, 1), Claim("rollout", 16, 1)], "disaggregated", (8,), ["24 too few", "3 more machines of 8 GPUs"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_what_would_do(claims, sharing, gpus, said):
    with pytest.raises(InputRefused) as refused:
        place(claims, sharing, machines(*gpus))
    (message,) = refused.value.problems
    assert all(words in message for words in said), message


def test_a_change_that_is_named_does():
    """Each of the named changes alone makes room."""
    small = machines(4, 4)
    assert not fits(CLAIMS, "disaggregated", small)
    assert fits(CLAIMS, "colocated", small)
    assert fits([Claim("policy", 2, 1), *CLAIMS[1:]], "disaggregated", small)
    assert not fits([Claim("policy", 3, 1), *CLAIMS[1:]], "disaggregated", small)
    assert fits(CLAIMS, "disaggregated", machines(4, 4, 4))


ROLES = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0, 1, 1, 2, 4])), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    ROLES, st.sampled_from(["colocated", "disaggregated", "lists"]), st.lists(st.integers(0, 9), min_size=1, max_size=5)
)
def test_every_placement_is_sound(roles, sharing, gpus):
    claims = [Claim(f"r{k}", count, each) for k, (count, each) in enumerate(roles)]
    rule = [["r0", "r1"]] if sharing == "lists" else sharing
    try:
        placed = place(claims, rule, machines(*gpus))
    except InputRefused:
        # A single machine with room for all is never refused.
        needed = sum(c.processes * c.gpus for c in claims)
        assert max(gpus) < needed
        return
    assert placed == place(claims, rule, machines(*gpus))
    owners: dict = {}
    for claim in claims:
        found = placed.of(claim.role)
        assert [s.rank for s in found] == (list(range(claim.processes)) if claim.gpus else [])
        taken = [(s.machine, g) for s in found for g in s.gpus]
        assert len(set(taken)) == claim.processes * claim.gpus  # no GPU twice within a role
        assert all(0 <= g < gpus[m] for m, g in taken)
        assert [s.machine for s in found] == sorted(s.machine for s in found)
        for spot in taken:
            owners.setdefault(spot, set()).add(claim.role)
    for roles_there in owners.values():
        if rule == "disaggregated":
            assert len(roles_there) == 1
        if isinstance(rule, list):
            assert len(roles_there) == 1 or roles_there <= {"r0", "r1"}
    if rule == "colocated":
        assert len(placed.pools) <= 1


# -- claims -----------------------------------------------------------------------------------------------------------


def found(config):
    return {claim.role: (claim.processes, claim.gpus) for claim in claims_of(config)}


def test_claims_of_each_algorithm(load):
    gpu = "cluster.device=cuda"
    ppo = load(
        gpu, "policy.ranks=4", "critic.ranks=2", "rollout.engines=2", "rollout.tensor_parallel=2", "reward.ranks=3"
    )
    assert found(ppo) == {"policy": (4, 1), "critic": (2, 1), "reference": (1, 1), "reward": (3, 0), "rollout": (2, 2)}
    assert [claim.role for claim in claims_of(ppo)] == ["policy", "critic", "reference", "reward", "rollout"]
    assert found(load(gpu, "reward.gold={model: rm}"))["reward"] == (1, 1)
    assert "reference" not in found(load(gpu, "policy.lora={}"))
    assert found(load(gpu, "policy.ranks=2", base="base_sft")) == {"policy": (2, 1)}
    assert found(load(gpu, base="base_dpo")) == {"policy": (1, 1), "reference": (1, 1), "rollout": (1, 1)}
    assert found(load(gpu, base="base_sampling")) == {"rollout": (1, 1), "reward": (1, 0)}
    evaluation = load(gpu, "scores.reward={model: rm}", "measure.ranks=2", base="base_evaluation")
    assert found(evaluation) == {"rollout": (1, 1), "model": (2, 1), "reference": (2, 1), "scores": (1, 1)}


def test_without_gpus_nobody_claims_any(load):
    assert not places_roles(load()) and {gpus for _, gpus in found(load()).values()} == {0}
    # Machines with GPUs in the configuration place processes of a CPU too: that is how many nodes are tried on one machine.
    fake = load("cluster.nodes=[{count: 2, gpus: 2}]", "rollout.tensor_parallel=2")
    assert places_roles(fake) and found(fake)["rollout"] == (1, 2)
    assert not places_roles(load("cluster.nodes=[{gpus: 0}]"))


def test_machines_of_a_configuration(load):
    cluster = load("cluster.nodes=[{count: 2, gpus: 4, gpu_memory_gib: 40}, {gpus: 1, network_gb_per_s: 25}]").cluster
    found = machines_of(cluster)
    assert [(m.name, m.gpus) for m in found] == [("node 0", 4), ("node 1", 4), ("node 2", 1)]
    assert found[0].gpu_memory_bytes == 40 * 2**30 and found[2].network_bytes_per_s == 25e9
    assert machines_of(load().cluster) == []


def test_assumed_machines_are_just_enough():
    assert len(assumed_machines([Claim("policy", 16, 1), Claim("rollout", 4, 4)], "colocated")) == 2
    assert len(assumed_machines([Claim("policy", 16, 1), Claim("rollout", 4, 4)], "disaggregated")) == 4
    assert [m.gpus for m in assumed_machines([Claim("rollout", 1, 16)], "colocated")] == [16]
