"""Two hosts with addresses of their own, made of network namespaces: a Ray head on one, a worker on the other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

NET = f"10.231.{os.getpid() % 250}"
HOSTS = [f"{NET}.1", f"{NET}.2"]
PORT = 6399


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=True)


class Host:
    """A network namespace with one interface."""

    def __init__(self, name: str, interface: str, address: str):
        self.name, self.interface, self.address = name, interface, address

    def popen(self, *command: str, log: Path, env: dict[str, str]) -> subprocess.Popen:
        with log.open("w") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command], stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT
            )

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).stdout.split()]

    def end(self) -> None:
        """End what runs in it, and itself."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                try:
                    os.kill(pid, how)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + 5
            while self.pids() and time.monotonic() < end:
                time.sleep(0.1)
        ip("netns", "del", self.name)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    tag = f"{os.getpid() % 100000}"
    hosts = [Host(f"rlhf{tag}{x}", f"rl{tag}{x}", address) for x, address in zip("ab", HOSTS, strict=True)]
    made: list[Host] = []
    try:
        for host in hosts:
            ip("netns", "add", host.name)
            made.append(host)
        ip("link", "add", hosts[0].interface, "type", "veth", "peer", "name", hosts[1].interface)
        for host in hosts:
            ip("link", "set", host.interface, "netns", host.name)
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            ip("-n", host.name, "link", "set", host.interface, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
    except (OSError, subprocess.SubprocessError) as error:
        for host in made:
            host.end()
        said = getattr(error, "stderr", None) or error
        pytest.skip(f"network namespaces can't be made here: {said}")
    try:
        yield hosts
    finally:
        for host in hosts:
            host.end()


@pytest.mark.timeout(420)
def test_roles_on_two_hosts_meet_and_a_host_without_network_ends_the_start(tmp_path):
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_enable_metrics_collection": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))  # the paths of Ray's sockets are short
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=1"]
    try:
        with two_hosts() as (head, worker):
            at = f"{head.address}:{PORT}"
            head.popen(
                *ray, "--head", f"--port={PORT}", f"--node-ip-address={head.address}", "--include-dashboard=false",
                f"--temp-dir={folder}", log=tmp_path / "head.log", env=env,
            )  # fmt: skip
            wait_for("Ray runtime started", tmp_path / "head.log")
            worker.popen(
                *ray, f"--address={at}", f"--node-ip-address={worker.address}", log=tmp_path / "worker.log", env=env
            )
            wait_for("Ray runtime started", tmp_path / "worker.log")
            driver = head.popen(
                sys.executable, "-m", "tests.multinode.two_hosts_driver", at, str(tmp_path),
                log=tmp_path / "driver.log", env=env,
            )  # fmt: skip
            while not (tmp_path / "hanging").exists():
                assert driver.poll() is None, (tmp_path / "driver.log").read_text()
                time.sleep(0.1)
            ip("-n", worker.name, "link", "set", worker.interface, "down")
            (tmp_path / "cut").touch()
            driver.wait(timeout=120)
            said = (tmp_path / "driver.log").read_text()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert sorted(found["addresses"]) == HOSTS and found["machines"] == found["addresses"]
    assert found["total"] == [found["expected"]] * 3
    assert "policy rank 1 died while starting: its node" in found["error"] and "left the cluster" in found["error"]
    assert found["seconds"] < 10


def wait_for(text: str, log: Path) -> None:
    """Until a command has written something into its log."""
    end = time.monotonic() + 90
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
