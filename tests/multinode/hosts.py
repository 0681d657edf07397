"""Two hosts with addresses of their own, made of network namespaces, for a Ray head on one and a worker on the other."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

NET = f"10.231.{os.getpid() % 250}"
HOSTS = [f"{NET}.1", f"{NET}.2"]


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


def wait_for(text: str, log: Path) -> None:
    """Until a command has written something into its log."""
    end = time.monotonic() + 90
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)
