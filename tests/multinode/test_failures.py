"""Starts that fail on a cluster of several nodes, and nodes that leave: what is told, how soon, and what is given back."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.ray_placement import reserve
from rayrlhf.cluster.start import start_groups
from rayrlhf.planning.placement import Claim
from tests.cluster.toy_setup import SETTINGS, running, toy
from tests.multinode.fake_cluster import fake_cluster, held, until_free
from tests.multinode.test_placement import with_gpus

SOON = 30.0
"""Seconds between a death and the error: 10 on idle cores, which other tests may be using."""


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one GPU, and a head without any."""
    with fake_cluster(1, 1) as cluster:
        yield cluster


@pytest.fixture
def passing(cluster):
    """A node of two GPUs that will leave."""
    node = cluster.add_node(num_cpus=1, num_gpus=2)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node, allow_graceful=False)
    end = time.monotonic() + 60  # Ray's own word that it is gone, or the next test would count its GPUs
    while held() or any(n["NodeID"] == node.node_id and n["Alive"] for n in ray.nodes()):
        assert time.monotonic() < end
        time.sleep(0.2)


def absent(ranks: int, how: str, mark: Path):
    return toy("policy", ranks, "Absent", gpus=1, how=how, mark=str(mark))


def when(mark: Path, what) -> threading.Thread:
    """Do something as soon as a file is there."""

    def wait() -> None:
        while not mark.exists():
            time.sleep(0.02)
        what()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "how, says",
    [
        ("raise", "policy rank 1 failed to start: FileNotFoundError: no weights in /nowhere/model"),
        ("kill", "policy rank 1 died while starting: .*SIGKILL"),
    ],
)
def test_a_rank_that_never_comes_to_the_rendezvous_ends_the_start(cluster, tmp_path, how, says):
    mark = tmp_path / "absent"
    with pytest.raises(RoleFailed, match=says) as caught:
        start_groups([absent(2, how, mark)], executor="ray", settings=SETTINGS)
    assert time.time() - mark.stat().st_mtime < SOON
    error = caught.value
    assert (error.role, error.rank, error.phase) == ("policy", 1, "start")
    assert error.log is not None and error.log in str(error)
    if how == "raise":
        assert 'raise FileNotFoundError("no weights in /nowhere/model")' in str(error)
    until_free()


def test_a_node_that_leaves_while_a_role_comes_up_there(cluster, passing, tmp_path):
    mark = tmp_path / "hanging"
    when(mark, lambda: cluster.remove_node(passing, allow_graceful=False))
    # two ranks, and only the node that leaves has two GPUs: both hang in their constructors
    spec = toy("policy", 2, gpus=1, hang_rank=0, mark=str(mark))
    with pytest.raises(RoleFailed, match="policy rank [01] died while starting: its node .* left the cluster"):
        start_groups([spec], executor="ray", settings=SETTINGS)
    assert time.time() - mark.stat().st_mtime < SOON


def test_a_node_that_leaves_later_is_named_by_the_next_call_and_nothing_waits_for_it(cluster, passing):
    groups = start_groups([with_gpus("policy", 2)], executor="ray", settings=SETTINGS)
    waiting = groups["policy"].broadcast_async("sleep", seconds=60)
    time.sleep(0.5)
    cluster.remove_node(passing, allow_graceful=False)
    began = time.monotonic()
    with pytest.raises(RoleFailed, match="policy rank [01] died in sleep: its node .* left the cluster"):
        waiting.result()
    with pytest.raises(RoleFailed, match="left the cluster"):
        groups["policy"].broadcast("ping")
    groups.close()
    assert time.monotonic() - began < 2 * SOON


def test_a_node_that_left_a_moment_ago_is_not_counted(cluster, passing):
    cluster.remove_node(passing, allow_graceful=False)
    reservation = reserve([Claim("policy", 2, 1)], "colocated", SETTINGS)
    try:
        assert passing.node_id not in {node.id for node in reservation.nodes.values()}
        assert len(reservation.nodes) == 2
    finally:
        reservation.release()
    until_free()


def test_ctrl_c_during_the_start_gives_everything_back(cluster, tmp_path):
    mark = tmp_path / "hanging"
    when(mark, lambda: os.kill(os.getpid(), signal.SIGINT))
    spec = toy("policy", 1, gpus=1, hang_rank=0, mark=str(mark))
    with pytest.raises(KeyboardInterrupt):
        start_groups([spec], executor="ray", settings=SETTINGS)
    assert time.time() - mark.stat().st_mtime < SOON
    until_free()


def test_runs_come_one_after_the_other_and_each_ends_with_its_processes(cluster):
    """Also with those that are slow to end, as two are here, each on a node of its own; Ray calls them dead at once."""
    for number in range(2):
        with start_groups([with_gpus("policy", 2)], executor="ray", settings=SETTINGS) as groups:
            assert len(groups["policy"].broadcast("ping")) == 2
            until_free(2)
            pids = groups["policy"].pids
            if number == 1:
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        assert not any(running(pid) for pid in pids)
        until_free()
