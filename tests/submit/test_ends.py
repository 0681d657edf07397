"""How the ends of a job, Ctrl-C and wrong arguments become messages and exit codes; with a stand-in for the cluster."""

from __future__ import annotations

import io
import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.drivers import submit as module
from rayrlhf.drivers import submit_cluster
from rayrlhf.drivers.submit import JobLeft, Watching, _conclude, _entrypoint, _watch
from rayrlhf.drivers.submit_cluster import Dashboard, Said
from rayrlhf.drivers.submit_command import run_submit
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring.relay import event_text
from tests.conftest import ROOT


def info(status: str, code: int | None = None, error_type: str | None = None, node: str | None = "f0", **more: str):
    """What Ray's client gives of a job; ``node`` is where its driver was started, which Ray knows from then on."""
    found = {"status": status, "driver_exit_code": code, "error_type": error_type, "driver_node_id": node}
    return JobDetails(type=JobType.SUBMISSION, entrypoint="true", message="no space left", metadata=more, **found)


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
            info("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", None),
            RunFailed,
            "never started: RUNTIME_ENV_SETUP_FAILURE: no space left",
        ),
        (info("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", None), RunFailed, "never started"),
        (info("FAILED", None, "JOB_ENTRYPOINT_COMMAND_START_ERROR"), RunFailed, "never started"),
        (
            info("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED"),
            RunFailed,
            r"was lost while it ran \(.*--resume\): JOB_SUPERVISOR_ACTOR_DIED: no space left",
        ),
        # Ray's word where a head that comes back finds a job without the process that watched over it.
        (info("FAILED", None, "JOB_SUPERVISOR_ACTOR_START_FAILURE"), RunFailed, "was lost while it ran"),
    ],
)
def test_ends(end, error, words):
    if error is None:
        _conclude(end, "a-1")
    else:
        with pytest.raises(error, match=words) as raised:
            _conclude(end, "a-1")
        assert getattr(raised.value, "started", True), "nobody says that nothing was started"


class Cluster:
    """Stands in for the dashboard and a job's log: the job writes a line and runs until it is stopped, if that helps."""

    def __init__(self, said: list[Said], *, obeys: bool = True, **metadata: str):
        self.metadata = metadata
        self.queue: queue.Queue[Said] = queue.Queue()
        for piece in said:
            self.queue.put(piece)
        self.stopped = 0
        self.obeys = obeys
        self.failures = {"stop": 0, "info": 0}
        """How many requests fail."""
        self.requests = {"stop": 0, "info": 0}
        self.interrupts: list[str] = []
        """At what each Ctrl-C comes."""

    patiently = Dashboard.patiently

    def at(self, moment: str) -> None:
        if self.interrupts[:1] == [moment]:
            del self.interrupts[0]
            signal.raise_signal(signal.SIGINT)

    def log(self, job: str):
        self.at("log")
        return self

    def get(self, timeout: float) -> Said:
        if self.stopped:
            self.at("log of what is stopped")
        return self.queue.get(timeout=timeout)

    def request(self, kind: str) -> None:
        self.requests[kind] += 1
        self.at(f"{kind} {self.requests[kind]}")
        self.failures[kind] -= 1
        if self.failures[kind] >= 0:
            raise RunFailed("502 Bad Gateway")

    def stop(self, job: str) -> None:
        self.request("stop")
        self.stopped += 1
        if self.obeys:
            self.queue.put(Said("end"))

    def info(self, job: str):
        self.request("info")
        return info("STOPPED", **self.metadata) if self.stopped else info("SUCCEEDED", 0)


ONCE = ("log",)
"""As soon as the log is watched."""


def watch(
    cluster: Cluster, on_interrupt: str = "ask", *, interrupts: Sequence[str] = (), printed: io.StringIO | None = None
) -> str:
    """Watch a job, with Ctrl-C at these moments; gives what was printed."""
    console = Console(file=printed or io.StringIO(), width=200)
    cluster.interrupts = list(interrupts)
    try:
        _watch(cluster, "a-1", Watching("http://head:8265", on_interrupt, console))
    finally:
        assert cluster.interrupts == []
    return console.file.getvalue()


def test_a_job_is_shown_to_its_end():
    assert watch(Cluster([Said("text", "hel"), Said("text", "lo\n"), Said("end")])) == "hello\n"


LOG = "starting" + event_text(0.0, {"open": {"mode": "lines", "total_steps": 200, "run_dir": None, "history": []}})
LOG += "\nphase" + event_text(1.0, {"phase": "rollout"}) + "\n"


@pytest.mark.parametrize(
    ("said", "obeys", "on_interrupt", "end"),
    [
        ([], True, "leave", "which goes on"),
        ([Said("lost", "no route")], True, "leave", "lost sight"),
        ([], False, "stop", "was told to stop, and runs on"),
        ([Said("end", "the rest of the log can't be read: no route")], True, "leave", None),
        ([Said("end")], True, "leave", None),
    ],
)
def test_a_run_has_failed_only_where_its_log_ends_so(monkeypatch, said, obeys, on_interrupt, end):
    monkeypatch.setattr(module, "_KILLED_WITHIN", 0)
    cluster, printed = Cluster([Said("text", LOG), *said], obeys=obeys, stop_seconds="0"), io.StringIO()
    if end is None:
        watch(cluster, printed=printed)
        assert said[0].text in printed.getvalue()
    else:
        with pytest.raises((JobLeft, RunFailed), match=end):
            watch(cluster, on_interrupt, interrupts=() if said else ONCE, printed=printed)
    assert "phase: rollout" in printed.getvalue()
    assert ("failed: 0 of 200 steps" in printed.getvalue()) == (said == [Said("end")])


@pytest.mark.parametrize(("kind", "interrupts"), [("stop", ONCE), ("info", ONCE), ("info", ())])
def test_requests_that_fail_are_repeated(monkeypatch, kind, interrupts):
    monkeypatch.setattr(submit_cluster, "PAUSE_SECONDS", (0.05, 0.1))
    cluster = Cluster([] if interrupts else [Said("end")])
    cluster.failures[kind] = 2
    if interrupts:
        with pytest.raises(RunFailed, match="was stopped"):
            watch(cluster, "stop", interrupts=ONCE)
    else:
        watch(cluster)
    monkeypatch.setattr(submit_cluster, "LOST_SECONDS", 0.2)
    cluster = Cluster([] if interrupts else [Said("end")])
    cluster.failures[kind] = 1000
    words = "may run on, though it was to stop" if interrupts else "has ended, and how isn't known"
    with pytest.raises(RunFailed, match=f"job a-1 {words}: 502 Bad Gateway.*rayrlhf submit --follow a-1"):
        watch(cluster, "stop", interrupts=interrupts)


def test_ctrl_c_ends_the_repetitions():
    cluster = Cluster([])
    cluster.failures["stop"] = 1000
    with pytest.raises(JobLeft, match="Left job a-1 while it was being stopped"):
        watch(cluster, "stop", interrupts=["log", "stop 2"])
    cluster = Cluster([Said("end")])
    cluster.failures["info"] = 1000
    with pytest.raises(JobLeft, match=r"Left job a-1\. Watch it with"):
        watch(cluster, interrupts=["info 2"])


def test_a_job_that_is_out_of_sight():
    with pytest.raises(RunFailed, match=r"lost sight of job a-1, which may go on: no route.*--follow a-1"):
        watch(Cluster([Said("lost", "no route")]))


@pytest.mark.parametrize("choice", ["leave", "ask"])
def test_ctrl_c_leaves_it(choice):
    cluster = Cluster([])
    with pytest.raises(JobLeft, match=r"which goes on.*rayrlhf submit --follow a-1 --address http://head:8265"):
        watch(cluster, choice, interrupts=ONCE)  # no terminal here: there is nobody to ask
    assert cluster.stopped == 0


def test_ctrl_c_stops_it_and_another_one_leaves():
    cluster = Cluster([])
    with pytest.raises(RunFailed, match="was stopped"):
        watch(cluster, "stop", interrupts=ONCE)
    assert cluster.stopped == 1
    with pytest.raises(JobLeft, match="while it was being stopped"):
        watch(Cluster([], obeys=False), "stop", interrupts=["log", "log of what is stopped"])


def test_a_job_that_does_not_stop(monkeypatch):
    """It has as long as it was promised when it was submitted, whoever stops it."""
    monkeypatch.setattr(module, "_KILLED_WITHIN", 0.5)
    begun = time.monotonic()
    with pytest.raises(RunFailed, match="was told to stop, and runs on"):
        watch(Cluster([], obeys=False, stop_seconds="1"), "stop", interrupts=ONCE)
    assert time.monotonic() - begun >= 1.5
    monkeypatch.setattr(module, "STOP_SECONDS", 0)
    with pytest.raises(RunFailed, match="was told to stop, and runs on"):
        watch(Cluster([], obeys=False), "stop", interrupts=ONCE)


@pytest.mark.parametrize(("answers", "left", "stopped"), [("x\nl\n", True, 0), ("s\n", False, 1), ("", True, 0)])
def test_on_a_terminal_it_asks(monkeypatch, answers, left, stopped):
    monkeypatch.setattr(module, "has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
    cluster = Cluster([])
    with pytest.raises(JobLeft if left else RunFailed):
        watch(cluster, "ask", interrupts=ONCE)
    assert cluster.stopped == stopped


def test_on_a_terminal_it_can_go_on(monkeypatch):
    monkeypatch.setattr(module, "has_terminal", lambda: True)
    cluster = Cluster([])

    class Answers(io.StringIO):
        def readline(self, *size: int) -> str:
            cluster.queue.put(Said("end"))
            return super().readline(*size)

    monkeypatch.setattr(sys, "stdin", Answers("w\n"))
    assert "leave it running, stop it, watch on?" in watch(cluster, "ask", interrupts=ONCE)


@pytest.mark.parametrize("accepted", [False, True])
def test_ctrl_c_while_a_job_is_sent_says_that_it_may_run(monkeypatch, tmp_path, accepted):
    """Also in the moment between the dashboard's word and the first look at the log."""

    class Sending:
        def __init__(self, *_):
            pass

        def submit(self, job: str, archive: Path, *, env_vars: dict[str, str], metadata: dict[str, str], **__):
            self.asked.append((job, archive))
            assert env_vars["RAY_JOB_STOP_WAIT_TIME_S"] == metadata["stop_seconds"] == "270" and archive.exists()
            if not accepted:
                raise KeyboardInterrupt

        asked: list[tuple[str, Path]] = []  # noqa: RUF012

    class Impatient(Console):
        def print(self, *objects, **kwargs):
            super().print(*objects, **kwargs)
            if str(objects[0]).endswith("is accepted"):
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "Dashboard", Sending)
    monkeypatch.setattr(module, "check_dashboard", lambda url: {})
    (tmp_path / "data").mkdir()
    config = load_config(
        ROOT / "tests" / "config" / "base.yaml", [f"run_dir={tmp_path}/run", f"data.prompts={tmp_path}/data"]
    )
    watching = Watching("http://head:8265", "ask", Impatient(file=io.StringIO(), width=200))
    with pytest.raises(JobLeft) as left:
        module.submit(config, watching, root=tmp_path, stop_seconds=270, wait=False)
    ((job, archive),) = Sending.asked
    assert not archive.exists()
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
