"""Two hosts with addresses of their own: what is saved is whole across them, roles meet, and a host that loses its network is
named. On the second host lies another disk at two places of the first one's."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.drivers.offline_runs import OfflineWorld
from tests.multinode.hosts import HOSTS, Host, ip, two_hosts, wait_for
from tests.support.tiny import save_tiny_model

pytestmark = pytest.mark.timeout(420)

PORT = 6398
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OfflineWorld:
    folder = tmp_path_factory.mktemp("hosts")
    save_tiny_model(folder / "model")
    return OfflineWorld(folder)


@pytest.fixture(scope="module")
def hosts(world: OfflineWorld) -> Iterator[list[Host]]:
    """A Ray of two hosts. On the second one lie other folders at the places of two: all of one run, another's checkpoints."""
    other = {
        world.folder / "apart": world.folder / "disk-1",
        world.folder / "torn/checkpoints": world.folder / "disk-2",
    }
    for folder in (*other.keys(), *other.values()):
        folder.mkdir(parents=True)
    mounts = " && ".join(f"mount --bind {disk} {place}" for place, disk in other.items())
    temporary = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))  # the paths of Ray's sockets are short
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=1"]
    try:
        with two_hosts() as (first, second):
            try:
                ip("netns", "exec", second.name, "sh", "-c", mounts)  # they go with this process
            except subprocess.CalledProcessError as error:
                pytest.skip(f"folders can't be mounted here: {error.stderr}")
            logs = [world.folder / f"{host.name}.log" for host in (first, second)]
            at = f"--node-ip-address={first.address}"
            first.popen(*ray, "--head", f"--port={PORT}", at, "--include-dashboard=false", f"--temp-dir={temporary}",
                        log=logs[0], env=ENVIRONMENT)  # fmt: skip
            wait_for("Ray runtime started", logs[0])
            joins = shlex.join([*ray, f"--address={first.address}:{PORT}", f"--node-ip-address={second.address}"])
            second.popen("sh", "-c", f"{mounts} && exec {joins}", log=logs[1], env=ENVIRONMENT)
            wait_for("Ray runtime started", logs[1])
            yield [first, second]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def train(hosts: list[Host], world: OfflineWorld, name: str) -> tuple[int, str]:
    """Exit code and output of a run whose two ranks are on the two hosts."""
    line = [
        sys.executable, "-m", "rayrlhf.cli", "train", str(world.config_file(name, "sft", {})), "policy.ranks=2",
        "cluster.executor=ray", f"cluster.address={hosts[0].address}:{PORT}", "cluster.nodes=[{count: 2, gpus: 1}]",
    ]  # fmt: skip
    log = world.folder / f"{name}.log"
    code = hosts[0].popen(*line, log=log, env=ENVIRONMENT).wait(timeout=200)
    return code, log.read_text()


def test_a_run_folder_that_is_another_one_on_a_host_is_refused_before_any_step(hosts: list[Host], world: OfflineWorld):
    code, said = train(hosts, world, "apart")
    assert code == 2, said
    folder = world.folder / "apart"
    said = " ".join(said.split())
    assert f"run_dir: {folder} is not the same folder on node {HOSTS[1]}, where policy rank 1 would" in said, said
    assert "shared file system" in said and HOSTS[0] not in said.split("Refused")[1] and "Traceback" not in said
    assert not (folder / "metrics.jsonl").exists() and not list(folder.glob("shared-*"))


def test_a_checkpoint_of_which_a_host_has_a_part_does_not_count(hosts: list[Host], world: OfflineWorld):
    code, said = train(hosts, world, "torn")
    assert code == 1, said
    said = " ".join(said.split())
    assert "the checkpoint of step 3 could not be written" in said, said
    assert (
        f"policy rank 1 on node {HOSTS[1]} wrote policy/state/" in said
        and "--resume" in said
        and "make room" not in said
    )
    assert list((world.folder / "torn/checkpoints").iterdir()) == []
    steps = [json.loads(line)["step"] for line in (world.folder / "torn/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]  # it ends there, and not after all the training
    # Where that rank's part went.
    assert any((world.folder / "disk-2").rglob("*optim_states.pt"))


def test_roles_on_two_hosts_meet_and_a_host_without_network_ends_the_start(hosts: list[Host], tmp_path: Path):
    """The last one here: the second host is gone then."""
    head, worker = hosts
    line = [sys.executable, "-m", "tests.multinode.two_hosts_driver", f"{head.address}:{PORT}", str(tmp_path)]
    driver = head.popen(*line, log=tmp_path / "driver.log", env=ENVIRONMENT)
    while not (tmp_path / "hanging").exists():
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()
        time.sleep(0.1)
    ip("-n", worker.name, "link", "set", worker.interface, "down")
    (tmp_path / "cut").touch()
    driver.wait(timeout=120)
    said = (tmp_path / "driver.log").read_text()
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert sorted(found["addresses"]) == HOSTS and found["machines"] == found["addresses"]
    assert found["total"] == [found["expected"]] * 3
    assert "policy rank 1 died while starting: its node" in found["error"] and "left the cluster" in found["error"]
    assert found["seconds"] < 30
