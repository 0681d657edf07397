"""Which process gets which GPU on a cluster of several nodes, and what is said where it gets none."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from rayrlhf.cluster import ray_placement, session
from rayrlhf.cluster.nodes import all_nodes
from rayrlhf.cluster.ray_placement import Reservation
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.cluster.start import Groups, start_groups
from rayrlhf.config.base import NodeConfig
from rayrlhf.cores import usable_cores
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.planning.placement import Claim
from tests.cluster.toy_setup import SETTINGS, toy
from tests.multinode.fake_cluster import fake_cluster, gpus_of, until_free

QUICK = SETTINGS.model_copy(update={"placement_timeout_s": 2.0})


@pytest.fixture(scope="module")
def cluster():
    """Nodes of 1, 1 and 2 GPUs, and a head without any."""
    with fake_cluster(1, 1, 2) as cluster:
        yield cluster


def with_gpus(name: str, ranks: int, gpus: int = 1) -> RoleSpec:
    return toy(name, ranks, gpus=gpus)


def start(specs, settings=SETTINGS, **more) -> Groups:
    return start_groups(specs, executor="ray", settings=settings, **more)


@contextmanager
def held_for(claims: list[Claim], settings=SETTINGS, sharing="colocated", tell=None) -> Iterator[Reservation]:
    """The GPUs of roles, without their processes."""
    reservation = ray_placement.reserve(claims, sharing, settings, tell)
    try:
        yield reservation
    finally:
        reservation.release()


def kept_for(reservation: Reservation, role: str) -> list[tuple[str, str]]:
    """Node and GPUs of each rank that is to come."""
    seats = reservation.placement.of(role)
    return [(reservation.node(role, seat.rank).id, reservation.devices(role, seat.rank)) for seat in seats]


def seats_of(groups: Groups, role: str) -> list[tuple[str, str]]:
    """Node and GPUs of each rank, as the processes themselves see it."""
    found = groups[role].broadcast("seat")
    assert [seat["rank"] for seat in found] == list(range(len(found)))
    assert all(seat["visible"] == seat["at_import"] for seat in found)
    return [(seat["node"], seat["visible"]) for seat in found]


def test_roles_with_gpus_of_their_own(cluster):
    specs = [with_gpus("policy", 2), with_gpus("rollout", 1, gpus=2), toy("reward")]
    with start(specs, sharing="disaggregated") as groups:
        policy, rollout = seats_of(groups, "policy"), seats_of(groups, "rollout")
        # an engine over two GPUs has both of one machine; the policy gets the rest
        assert [gpus for _, gpus in rollout] == ["0,1"] and gpus_of(rollout[0][0]) == 2
        assert [gpus for _, gpus in policy] == ["0", "0"]
        assert [gpus_of(node) for node, _ in policy] == [1, 1] and len(set(policy)) == 2
        assert groups["reward"].broadcast("ping") == [(0, 1, None)]
        names = {node.id: node.name for node in all_nodes()}
        placement = groups.placement
        for role, seats in (("policy", policy), ("rollout", rollout)):
            assert [placement.machines[s.machine].name for s in placement.of(role)] == [names[n] for n, _ in seats]
        assert placement.of("reward") == [] and placement.sharing("policy") == frozenset()
        until_free(4)
    until_free()


def test_roles_share_gpus_and_ranks_are_packed_by_node(cluster):
    with start([with_gpus("policy", 3), with_gpus("rollout", 1, gpus=2)], sharing="colocated") as groups:
        policy, rollout = (seats_of(groups, role) for role in ("policy", "rollout"))
        assert len(set(policy)) == 3
        counts = [sum(node == other for other, _ in policy) for node in dict.fromkeys(node for node, _ in policy)]
        assert sorted(counts) == [1, 2]
        assert [node for node, _ in policy] == sorted((n for n, _ in policy), key=[n for n, _ in policy].index)
        covered = [(node, gpu) for node, gpus in rollout for gpu in gpus.split(",")]
        assert len(covered) == 2 and set(covered) < set(policy)
        assert groups.placement.sharing("policy") == {"rollout"}
        until_free(3)
    until_free()


def test_some_roles_share(cluster):
    names = ("policy", "critic", "reference", "reward")
    sharing = [["policy", "critic"], ["reference", "reward"]]
    with held_for([Claim(name, 1, 1) for name in names], sharing=sharing) as reservation:
        policy, critic, reference, reward = (kept_for(reservation, name) for name in names)
        assert policy == critic and reference == reward and not set(policy) & set(reference)
    until_free()


def test_the_machines_that_are_named_are_the_ones_used(cluster):
    """Two machines of one GPU: as planned, though one of two would do."""
    settings = SETTINGS.model_copy(update={"nodes": [NodeConfig(count=2, gpus=1)]})
    with held_for([Claim("policy", 2, 1)], settings) as reservation:
        seats = kept_for(reservation, "policy")
        assert [gpus for _, gpus in seats] == ["0", "0"]
        assert all(gpus_of(node) == 1 for node, _ in seats)
    until_free()


def test_roles_that_start_later_take_the_seats_claimed_for_them(cluster):
    claims = [Claim("reference", 1, 1), Claim("model", 1, 1), Claim("rollout", 1, 2)]
    with start([with_gpus("reference", 1)], sharing="disaggregated", claims=claims) as shared:
        until_free(4)
        for more in ([with_gpus("rollout", 1, gpus=2)], []):
            with start([with_gpus("model", 1), *more], beside=shared) as own:
                assert own.placement is shared.placement
                assert not set(seats_of(own, "model")) & set(seats_of(shared, "reference"))
                assert not more or seats_of(own, "rollout")[0][1] == "0,1"
            until_free(4)  # they are the first groups'
        assert len(seats_of(shared, "reference")) == 1
    until_free()


def test_more_than_the_cluster_has_is_refused_with_what_each_machine_has(cluster):
    with pytest.raises(InputRefused) as caught:
        start([with_gpus("policy", 5)])
    text = str(caught.value)
    assert "5 are needed (policy 5): 1 too few" in text
    assert text.count("): 1,") + text.count("): 1)") == 2 and text.count("): 2") == 1  # each node with its GPUs
    with pytest.raises(InputRefused, match=r"an engine over 4 GPUs .* stays on one machine"):
        start([with_gpus("rollout", 1, gpus=4)])
    until_free()


def test_machines_that_are_named_and_not_there(cluster):
    settings = QUICK.model_copy(update={"nodes": [NodeConfig(count=2, gpus=2)]})
    says = "cluster.nodes names 2 machines of 2 GPUs, the Ray cluster has 1 machine of 2 GPUs and 2 machines of 1 GPU"
    told = []
    with pytest.raises(
        InputRefused, match=f"{says}.*no more machines joined within 2 s .deadline cluster.placement_timeout_s"
    ):
        start([with_gpus("policy", 1)], settings, tell=told.append)
    assert len(told) == 1 and "\n" not in told[0]
    assert re.match(r"waiting up to \d+ s for machines to join the Ray cluster: ", told[0]) and says in told[0]
    # What the planned machines themselves lack, no other machine cures.
    told.clear()
    with pytest.raises(InputRefused, match="5 are needed"):
        start([with_gpus("policy", 5)], settings, tell=told.append)
    assert told == []


def test_machines_that_are_on_their_way_are_waited_for(cluster):
    """As after `ray up`, which returns when the head is up."""
    settings = SETTINGS.model_copy(update={"nodes": [NodeConfig(count=2, gpus=2)]})
    told, added = [], []

    def tell(line: str) -> None:
        told.append(line)
        added.append(cluster.add_node(wait=False, num_cpus=1, num_gpus=2))

    try:
        with held_for([Claim("policy", 4, 1)], settings, tell=tell) as reservation:
            assert len({node for node, _ in kept_for(reservation, "policy")}) == 2
        assert len(told) == 1 and "the Ray cluster has 1 machine of 2 GPUs" in told[0]
    finally:
        for node in added:
            cluster.remove_node(node)
        end = time.monotonic() + 60
        while len(all_nodes()) > 4:  # Ray's own word that it is gone, or the next test would count its GPUs
            assert time.monotonic() < end
            time.sleep(0.2)
    until_free()


def test_where_no_machine_can_join_it_is_refused_at_once(cluster, monkeypatch):
    told = []
    named = SETTINGS.model_copy(update={"nodes": [NodeConfig(count=2, gpus=2)]})
    joined = SETTINGS.model_copy(update={"address": "auto", "placement_timeout_s": 1.0})
    with pytest.raises(InputRefused):  # an address was given: it may grow
        start([with_gpus("policy", 5)], joined, tell=told.append)
    assert len(told) == 1 and "5 are needed (policy 5): 1 too few" in told[0]
    monkeypatch.setattr(session, "is_private", lambda: True)
    for settings in (named, joined):
        with pytest.raises(InputRefused):
            ray_placement.reserve(
                [Claim("policy", 5 if settings is joined else 1, 1)], "colocated", settings, told.append
            )
    assert len(told) == 1


# -- threads ----------------------------------------------------------------------------------------------------------


def test_processes_divide_the_cores_of_their_own_machine(cluster, monkeypatch):
    """All nodes are at one address here: one machine. What the driver may use itself, doesn't matter, nor what Ray left in the
    environment of a job's driver."""
    cores = usable_cores()
    settings = SETTINGS.model_copy(update={"threads": None})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}}')
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    try:
        with start([toy("one")], settings) as groups:
            assert threads_of(groups["one"]) == [cores]
            with start([toy("two")], settings, beside=groups) as more:
                assert threads_of(more["two"]) == [max(1, cores // 2)]
        with start([toy("one"), with_gpus("three", 2)], settings) as groups:
            assert threads_of(groups["one"]) + threads_of(groups["three"]) == [max(1, cores // 3)] * 3
    finally:
        os.sched_setaffinity(0, usable)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with start([toy("one", 2)], settings) as groups:  # outside a job it is the user's
        assert [rank["threads"][:2] for rank in groups["one"].broadcast("describe")] == [(5, "5"), (5, "5")]
    until_free()


def threads_of(group) -> list[int]:
    """Threads of each rank, which its class, torch and the environment agree on."""
    found = []
    for rank in group.broadcast("describe"):
        threads, variable, _ = rank["threads"]
        assert str(threads) == variable and rank["torch_threads"] == threads
        found.append(threads)
    return found


# -- GPUs that others hold --------------------------------------------------------------------------------------------


@pytest.fixture
def others(cluster):
    """Somebody with the node of 2 GPUs in a placement group, and an actor with one GPU without any."""
    group = placement_group([{"GPU": 2}], "STRICT_PACK", name="others")
    assert group.wait(60)

    class Holder:
        def here(self) -> None:
            return None

    actor = ray.remote(Holder).options(num_cpus=0, num_gpus=1).remote()
    ray.get(actor.here.remote())
    until_free(3)
    yield group
    remove_placement_group(group)
    ray.kill(actor)
    until_free()


def test_gpus_that_others_hold_are_waited_for_no_longer_than_the_deadline(others):
    began = time.monotonic()
    with pytest.raises(RunFailed) as caught:
        start([with_gpus("policy", 3)], QUICK)
    assert not isinstance(caught.value, InputRefused) and time.monotonic() - began < 60
    text = str(caught.value)
    assert "3 GPUs" in text and "policy 3" in text and "cluster.placement_timeout_s" in text
    assert "0 of 2 GPUs free" in text and "1 of 1 GPUs free" in text
    assert "held: 2 of" in text and "held: 1 of" in text and "without a placement group" in text
    assert "pytest" in text  # the command of the job that holds them
    until_free(3)


def test_a_run_starts_beside_others_where_there_is_room_and_as_soon_as_there_is(others):
    with held_for([Claim("rollout", 1, 1)]) as reservation:
        assert len(kept_for(reservation, "rollout")) == 1
        until_free(4)
    until_free(3)
    giving_back = threading.Timer(1.5, remove_placement_group, [others])
    giving_back.start()
    with start([with_gpus("rollout", 1, gpus=2)]) as groups:
        assert seats_of(groups, "rollout")[0][1] == "0,1"
    giving_back.join()


def test_half_of_what_is_needed_is_given_back(others, monkeypatch):
    """What Ray says is free may be gone by then: a second run has just taken it, and waits for the rest as we do."""
    monkeypatch.setattr(ray_placement, "free_gpus", lambda nodes: {node.id: node.gpus for node in nodes})
    monkeypatch.setattr(ray_placement, "ATTEMPT_SECONDS", 0.5)
    given_back, remove = [], ray_placement._remove

    def noting(groups) -> None:
        end = time.monotonic() + 60
        while not any(ray_placement._held(group) for group in groups):  # it gets the one that is free, sooner or later
            assert time.monotonic() < end
            time.sleep(0.05)
        until_free(4)
        given_back.append(sorted(ray_placement._held(group) for group in groups))
        remove(groups)
        until_free(3)

    monkeypatch.setattr(ray_placement, "_remove", noting)
    with pytest.raises(RunFailed, match="were not free at the same time within 2 s"):
        start([with_gpus("policy", 4)], QUICK)
    assert given_back and all(held == [False, False, True] for held in given_back)


def test_two_runs_that_want_the_same_gpus_get_them_one_after_the_other(cluster):
    got, began = [], time.monotonic()

    def run(number: int) -> None:
        reservation = ray_placement.reserve([Claim(f"policy-{number}", 3, 1)], "colocated", SETTINGS)
        got.append(("has", number))
        time.sleep(1.0)
        got.append(("gives", number))
        reservation.release()

    threads = [threading.Thread(target=run, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [what for what, _ in got] == ["has", "gives", "has", "gives"], got
    assert {number for _, number in got} == {0, 1} and time.monotonic() - began < 60
    until_free()
