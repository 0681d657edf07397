"""Ray clusters of several nodes on this machine, with GPUs in name only."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

from rayrlhf.cluster.nodes import all_nodes, free_gpus
from tests.conftest import ROOT

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def fake_cluster(*gpus: int) -> Iterator[Cluster]:
    """A head node without GPUs, and a node for each number of GPUs. This process is connected to it."""
    assert not ray.is_initialized(), "another test left its Ray behind"
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    try:
        for count in gpus:
            cluster.add_node(wait=False, num_cpus=1, num_gpus=count)
        cluster.wait_for_nodes(60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def gpus_of(node_id: str) -> int:
    """How many GPUs a node has."""
    return next(node.gpus for node in all_nodes() if node.id == node_id)


def held() -> int:
    """GPUs that somebody holds, in the whole cluster."""
    nodes = all_nodes()
    return sum(node.gpus for node in nodes) - sum(free_gpus(nodes).values())


def until_free(count: int = 0) -> None:
    """Until exactly so many GPUs are held; what Ray says of it lags behind."""
    end = time.monotonic() + 60
    while held() != count:
        assert time.monotonic() < end, f"{held()} GPUs are held, not {count}"
        time.sleep(0.05)
