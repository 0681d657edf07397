"""launch/onprem.sh: what it starts on which machine, and that it ends that and nothing else; with stand-ins for ray and ssh."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

RAY = """#!/bin/bash
echo "$(cat "$STATE/host" 2>/dev/null) ray $* mode=$RAY_AUTH_MODE token=$(cat "$RAY_AUTH_TOKEN_PATH" 2>/dev/null)" >> "$LOG"
if [ "$1" = get-auth-token ]; then mkdir -p "$HOME/.ray"; echo made > "$HOME/.ray/auth_token"; exit 0; fi
if [ -n "$RAY_FAILS" ]; then echo "port in use"; exit 1; fi
trap 'echo "ended $*" >> "$LOG"; exit 0' TERM
echo "Ray runtime started."
while true; do sleep 0.1; done
"""
# "Another machine" is this one with a home and a state of its own.
SSH = """#!/bin/bash
while [[ "$1" == -* ]]; do shift 2; done
host=$1; shift
export HOME="$HOMES/$host" STATE="$HOMES/$host/state"
mkdir -p "$STATE"; echo "$host" > "$STATE/host"
exec bash -c "$*"
"""


@pytest.fixture
def machines(tmp_path):
    """The environment of a first machine, from which ssh reaches others."""
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("ray", RAY), ("ssh", SSH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    yield {
        **kept,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "HOMES": str(tmp_path / "homes"),
        "STATE": str(tmp_path / "state"),
        "LOG": str(tmp_path / "log"),
        "FOLDER": str(tmp_path),
        "VENV": "env",
        "RAY_FAILS": "",
    }
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(programs) in " ".join(process.cmdline()):
                process.kill()


def onprem(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    script = str(ROOT / "launch" / "onprem.sh")
    return subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_up_and_down_over_ssh(machines):
    done = onprem(machines, "up", "node-1", "node-2")
    assert done.returncode == 0, done.stderr
    assert "the dashboard: http://node-1:8265" in done.stdout
    log = Path(machines["LOG"]).read_text().splitlines()
    assert "get-auth-token --generate" in log[0]
    started = "ray start --block"
    assert (
        log[1]
        == f"node-1 {started} --head --port=6379 --dashboard-host=0.0.0.0 --dashboard-port=8265 mode=token token=made"
    )
    assert log[2] == f"node-2 {started} --address=node-1:6379 mode=token token=made"
    for node in ("node-1", "node-2"):
        token = Path(machines["HOMES"]) / node / ".ray" / "auth_token"
        assert token.read_text() == "made\n" and token.stat().st_mode & 0o077 == 0
    again = onprem(machines, "up", "node-1")
    assert again.returncode == 1 and "runs on" in again.stderr and "already" in again.stderr
    assert onprem(machines, "down", "node-1", "node-2").returncode == 0
    ended = [line for line in Path(machines["LOG"]).read_text().splitlines() if line.startswith("ended")]
    assert len(ended) == 2


def test_a_start_that_fails_says_why(machines):
    Path(machines["HOME"], ".ray").mkdir(parents=True)
    Path(machines["HOME"], ".ray", "auth_token").write_text("secret")
    failed = onprem({**machines, "RAY_FAILS": "1"}, "head")
    assert failed.returncode == 1 and "port in use" in failed.stderr
    assert not Path(machines["STATE"], "pid").exists()
    missing = onprem({**machines, "VENV": "nothing"}, "head")
    assert missing.returncode == 1 and "set FOLDER and VENV" in missing.stderr


def test_wrong_arguments(machines):
    for arguments in ([], ["worker"], ["up"], ["stop"]):
        done = onprem(machines, *arguments)
        assert done.returncode == 2 and done.stderr.startswith("bash launch/onprem.sh up node-1")
        assert done.stderr.endswith("no other Ray.\n") and "set -" not in done.stderr
    with open(ROOT / "launch" / "onprem.sh") as script:  # as it comes over ssh
        piped = subprocess.run(
            ["bash", "-s", "--", "stop"], env=machines, stdin=script, capture_output=True, text=True, timeout=60
        )
    assert (piped.returncode, piped.stderr) == (2, done.stderr)
    assert not Path(machines["LOG"]).exists()
