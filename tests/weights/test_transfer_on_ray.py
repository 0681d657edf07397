"""The driver's part, with real processes: the first failure is told soon, and the other side isn't left waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from rayrlhf.cluster import Group, RoleFailed, start_groups
from rayrlhf.cluster.session import ray_session
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.config import Config
from rayrlhf.config.base import ClusterConfig
from rayrlhf.drivers.transfer import connect_weights, transfer_weights
from tests.conftest import ROOT
from tests.weights.weight_roles import weights_of_version

SETTINGS = ClusterConfig(threads=1, start_timeout_s=200, call_timeout_s=120)


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with ray_session(SETTINGS):
        yield


@contextmanager
def running(
    engines: int, trouble: dict[tuple[int, int], str], timeout_s: float = 100.0, **policy: Any
) -> Iterator[tuple[Group, Group]]:
    env = {"PYTHONPATH": str(ROOT)}
    roles = "tests.weights.weight_roles"
    specs = [
        RoleSpec("policy", f"{roles}:Sends", {"timeout_s": timeout_s, **policy}, 1, env),
        RoleSpec("rollout", f"{roles}:Receives", {"trouble": trouble}, engines, env),
    ]
    with ExitStack() as stack:
        groups = start_groups(specs, executor="ray", settings=SETTINGS)
        for group in groups.values():
            stack.callback(group.close)
        yield groups["policy"], groups["rollout"]


def config(**rollout: Any) -> Config:
    values: dict[str, Any] = {
        "run_dir": "nowhere",
        "policy": {"path": "nowhere"},
        "reward": {"sources": [{"function": "nowhere:nothing"}]},
        "data": {"prompts": "nowhere.jsonl"},
        "rollout": rollout,
        "ppo": {"steps": 1, "prompts_per_step": 8, "minibatch_samples": 8},
    }
    return Config.model_validate(values)


def test_gloo_from_process_to_processes_and_its_metrics() -> None:
    with running(2, {}) as (policy, rollout):
        connect_weights(policy, rollout, config(weight_transport="gloo"), None)
        for version in (1, 2):
            metrics = transfer_weights(policy, rollout, version, version == 1)
            expected = sum(float(t.double().sum()) for _, t in weights_of_version(version))
            assert rollout.broadcast("sum", version=version) == [expected] * 2
            checksums = 4 * 6 if version == 1 else 0
            assert metrics["sync/bytes"] == 6 * 50 * 40 * 4 + checksums and metrics["sync/buckets"] == 6
            assert metrics["sync/gb_per_s"] == metrics["sync/bytes"] / metrics["sync/seconds"] / 1e9 > 0
        connect_weights(policy, rollout, config(weight_transport="gloo"), None, group_version=2)
        transfer_weights(policy, rollout, 3, False)
        rollout.broadcast("sum", version=3)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("die", "rollout rank 1 died in receive_weights"),
        ("raise", "rollout rank 1 failed in receive_weights: RunFailed: the"),
    ],
)
def test_an_engine_that_fails_is_told_soon_and_the_policy_goes_on(trouble: str, said: str) -> None:
    with running(2, {(1, 2): trouble}) as (policy, rollout):
        connect_weights(policy, rollout, config(), None)
        transfer_weights(policy, rollout, 1, True)
        started = time.monotonic()
        with pytest.raises(RoleFailed, match=said):
            transfer_weights(policy, rollout, 2, True)
        assert time.monotonic() - started < 60, "long before the deadline of 100 s"
        assert policy.broadcast("alive", timeout_s=20) == [True]


def test_a_policy_that_fails_is_told_and_not_the_engines_that_waited_for_it() -> None:
    with running(2, {}, fails=1) as (policy, rollout):
        connect_weights(policy, rollout, config(), None)
        with pytest.raises(RoleFailed, match="policy rank 0 failed in publish_weights: ValueError: the disk is full"):
            transfer_weights(policy, rollout, 1, True)


def test_an_engine_that_dies_before_the_rendezvous_is_told_soon() -> None:
    with running(2, {(1, 0): "die"}) as (policy, rollout):
        started = time.monotonic()
        with pytest.raises(RoleFailed, match="rollout rank 1 died in connect_weights"):
            connect_weights(policy, rollout, config(weight_transport="gloo"), None)
        assert time.monotonic() - started < 60
        assert policy.broadcast("alive", timeout_s=20) == [True]


def test_an_engine_that_hangs_is_named_after_the_deadline() -> None:
    with running(2, {(1, 1): "hang"}, timeout_s=10.0) as (policy, rollout):
        connect_weights(policy, rollout, config(), None)
        with pytest.raises(
            RoleFailed, match=r"policy rank 0 .*rollout rank 1 did not take bucket 3 of 6 \(layer2.weight\)"
        ):
            transfer_weights(policy, rollout, 1, False)
