"""How the ends of a job, Ctrl-C and wrong arguments become messages and exit codes; with a stand-in for the cluster."""

from __future__ import annotations

import io
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.drivers import submit as module
from rayrlhf.drivers.submit import JobLeft, Watching, _conclude, _entrypoint, _watch
from rayrlhf.drivers.submit_cluster import Said
from rayrlhf.drivers.submit_command import run_submit
from rayrlhf.errors import InputRefused, RunFailed
from tests.conftest import ROOT


def info(
    status: str, code: int | None = None, message: str = "", error_type: str | None = None, **more
) -> SimpleNamespace:
    found = {"status": status, "driver_exit_code": code, "message": message, "error_type": error_type, "metadata": more}
    return SimpleNamespace(**found)


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (info("SUCCEEDED", 0), None, ""),
        (info("FAILED", 1), RunFailed, "ended with exit code 1"),
        (info("FAILED", 2), InputRefused, "refused its input"),
        (info("FAILED", -9), RunFailed, "killed by signal 9"),
        (info("FAILED", 137), RunFailed, "killed by signal 9"),
        (info("STOPPED"), RunFailed, "was stopped"),
        (
            info("FAILED", None, "no space left", "RUNTIME_ENV_SETUP_FAILURE"),
            RunFailed,
            "never started: RUNTIME_ENV_SETUP_FAILURE: no space left",
        ),
    ],
)
def test_ends(end, error, words):
    if error is None:
        _conclude(end, "a-1")
    else:
        with pytest.raises(error, match=words):
            _conclude(end, "a-1")


class Cluster:
    """Stands in for the dashboard: a job that writes a line and runs until it is stopped, if that helps."""

    def __init__(self, said: list[Said], *, obeys: bool = True, **metadata: str):
        self.metadata = metadata
        self.queue: queue.Queue[Said] = queue.Queue()
        for piece in said:
            self.queue.put(piece)
        self.stopped = 0
        self.obeys = obeys

    def log(self, job: str):
        return self.queue

    def stop(self, job: str) -> None:
        self.stopped += 1
        if self.obeys:
            self.queue.put(Said("end"))

    def info(self, job: str):
        return info("STOPPED", **self.metadata) if self.stopped else info("SUCCEEDED", 0)


def watch(cluster: Cluster, on_interrupt: str = "ask", *, interrupts: int = 0) -> str:
    """Watch a job, with Ctrl-C so many times; gives what was printed."""
    console = Console(file=io.StringIO(), width=200)
    timers = [threading.Timer(0.4 + k, os.kill, (os.getpid(), signal.SIGINT)) for k in range(interrupts)]
    for timer in timers:
        timer.start()
    try:
        _watch(cluster, "a-1", Watching("http://head:8265", on_interrupt, console))
    finally:
        for timer in timers:
            timer.cancel()
    return console.file.getvalue()


def test_a_job_is_shown_to_its_end():
    assert watch(Cluster([Said("text", "hel"), Said("text", "lo\n"), Said("end")])) == "hello\n"


def test_a_job_that_is_out_of_sight():
    with pytest.raises(RunFailed, match=r"lost sight of job a-1, which may go on: no route.*--follow a-1"):
        watch(Cluster([Said("lost", "no route")]))


@pytest.mark.parametrize("choice", ["leave", "ask"])
def test_ctrl_c_leaves_it(choice):
    cluster = Cluster([])
    with pytest.raises(JobLeft, match=r"which goes on.*rayrlhf submit --follow a-1 --address http://head:8265"):
        watch(cluster, choice, interrupts=1)  # no terminal here: there is nobody to ask
    assert cluster.stopped == 0


def test_ctrl_c_stops_it_and_another_one_leaves():
    cluster = Cluster([])
    with pytest.raises(RunFailed, match="was stopped"):
        watch(cluster, "stop", interrupts=1)
    assert cluster.stopped == 1
    with pytest.raises(JobLeft, match="while it was being stopped"):
        watch(Cluster([], obeys=False), "stop", interrupts=2)


def test_a_job_that_does_not_stop(monkeypatch):
    """It has as long as it was promised when it was submitted, whoever stops it."""
    monkeypatch.setattr(module, "_KILLED_WITHIN", 0.5)
    begun = time.monotonic()
    with pytest.raises(RunFailed, match="was told to stop, and runs on"):
        watch(Cluster([], obeys=False, stop_seconds="1"), "stop", interrupts=1)
    assert time.monotonic() - begun >= 1.5
    monkeypatch.setattr(module, "STOP_SECONDS", 0)
    with pytest.raises(RunFailed, match="was told to stop, and runs on"):
        watch(Cluster([], obeys=False), "stop", interrupts=1)


@pytest.mark.parametrize(("answers", "left", "stopped"), [("x\nl\n", True, 0), ("s\n", False, 1), ("", True, 0)])
def test_on_a_terminal_it_asks(monkeypatch, answers, left, stopped):
    monkeypatch.setattr(module, "has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
    cluster = Cluster([])
    with pytest.raises(JobLeft if left else RunFailed):
        watch(cluster, "ask", interrupts=1)
    assert cluster.stopped == stopped


def test_on_a_terminal_it_can_go_on(monkeypatch):
    monkeypatch.setattr(module, "has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w\n"))
    cluster = Cluster([])
    end = threading.Timer(1.5, cluster.queue.put, (Said("end"),))
    end.start()
    assert "leave it running, stop it, watch on?" in watch(cluster, "ask", interrupts=1)


def test_ctrl_c_while_a_job_is_sent_says_that_it_may_run(monkeypatch, tmp_path):
    class Sending:
        def __init__(self, *_):
            pass

        def submit(self, *_, submission_id: str, env_vars: dict[str, str], metadata: dict[str, str], **__):
            self.asked.append(submission_id)
            assert env_vars["RAY_JOB_STOP_WAIT_TIME_S"] == metadata["stop_seconds"] == "270"
            raise KeyboardInterrupt

        asked: list[str] = []  # noqa: RUF012

    monkeypatch.setattr(module, "Dashboard", Sending)
    monkeypatch.setattr(module, "check_dashboard", lambda url: {})
    (tmp_path / "data").mkdir()
    config = load_config(
        ROOT / "tests" / "config" / "base.yaml", [f"run_dir={tmp_path}/run", f"data.prompts={tmp_path}/data"]
    )
    watching = Watching("http://head:8265", "ask", Console(file=io.StringIO(), width=200))
    with pytest.raises(JobLeft) as left:
        module.submit(config, watching, root=tmp_path, stop_seconds=270)
    (job,) = Sending.asked
    assert f"job {job} was sent; it may run" in str(left.value) and f"--follow {job}" in str(left.value)


def test_the_entrypoint_takes_the_python_that_has_ray(tmp_path):
    """The job's shell command, run as Ray runs it: in the archive's folder, with this Python, or the machine's own."""
    package = tmp_path / "archive" / "rayrlhf"
    (package / "drivers").mkdir(parents=True)
    for name in ("__init__.py", "drivers/__init__.py"):
        (package / name).touch()
    (package / "drivers" / "submit_folder.py").write_text("print('10.0.0.1:6379')")
    (package / "cli.py").write_text("import os, sys\nprint(os.getcwd(), os.environ['RAY_ADDRESS'], sys.argv[1:])")
    own = tmp_path / "bin" / "python"
    own.parent.mkdir()
    own.write_text(f'#!/bin/sh\necho own >> {tmp_path}/taken\nexec {shlex.quote(sys.executable)} "$@"\n')
    own.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": f"{package.parent}:/other", "PATH": f"{own.parent}:{os.environ['PATH']}"}

    def run(command: str) -> str:
        done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, cwd="/", timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = _entrypoint("train", True, Console(file=io.StringIO()))
    expected = f"{package.parent} 10.0.0.1:6379 ['train', '.rayrlhf/config.yaml', '--resume']\n"
    assert run(command) == expected
    assert not (tmp_path / "taken").exists()
    elsewhere = command.replace(shlex.quote(sys.executable), "/nowhere/python")
    assert run(elsewhere) == expected
    assert (tmp_path / "taken").exists()


def test_arguments_are_refused_together(tmp_path):
    (tmp_path / "p.yaml").write_text("algorithm: pipeline\n")
    given = {"address": None, "resume": False, "on_interrupt": "run", "wait": True, "env": [], "follow": None}
    with pytest.raises(InputRefused) as refused:
        run_submit(None, [], **given)
    text = "\n".join(refused.value.problems)
    assert all(word in text for word in ("--address is missing", "--on-interrupt: found 'run'", "CONFIG is missing"))
    with pytest.raises(InputRefused, match="found pipeline"):
        run_submit(tmp_path / "p.yaml", [], **{**given, "address": "http://head", "on_interrupt": "ask"})
    for more in ({"overrides": ["a=b"]}, {"overrides": [], "stop_seconds": 5}):
        with pytest.raises(InputRefused, match="--follow watches a job as it is"):
            run_submit(None, **{**given, "address": "http://head", "on_interrupt": "ask", "follow": "a-1", **more})
