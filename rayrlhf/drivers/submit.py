"""``rayrlhf submit``: a configuration as a job of a Ray cluster, watched from here."""

from __future__ import annotations

import os
import queue
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from rayrlhf import __version__
from rayrlhf.config import to_yaml
from rayrlhf.config.base import JobConfig, RunConfig
from rayrlhf.config.pipeline import COMMANDS
from rayrlhf.drivers.submit_cluster import Dashboard, Said, check_dashboard, dashboard_url
from rayrlhf.drivers.submit_folder import HOOK
from rayrlhf.drivers.submit_package import CONFIG_FILE, named_paths, shipped_files, write_archive
from rayrlhf.drivers.submit_view import Choice, Interrupts, JobView, ask, has_terminal
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring.relay import RELAY_VARIABLE
from rayrlhf.planning.plan import check_plan

__all__ = ["STOP_SECONDS", "JobLeft", "Watching", "follow", "submit"]

OnInterrupt = Literal["ask", "leave", "stop"]

STOP_SECONDS = 60
"""What a job has by default, when it is stopped, to save its last whole step before Ray kills it."""
_KILLED_WITHIN = 30.0
"""How long Ray may take for that."""
_STOP_KEY = "stop_seconds"
"""Under which a job's metadata say what it has: who comes back to it waits as long."""
_LOOK_SECONDS = 0.2
REFUSED_CODE = 2
_NOT_STARTED = "JOB_ENTRYPOINT_COMMAND_START_ERROR"
"""Ray's word for a job whose driver couldn't be started on the node that was chosen for it."""


class JobLeft(Exception):
    """The user left a job that goes on; says how to come back."""


@dataclass(frozen=True)
class Watching:
    """How a job is watched.

    Attributes:
        address: the dashboard, as the user gave it; for the command with which to come back.
        on_interrupt: what Ctrl-C does to the job; ``ask`` without a terminal is ``leave``.
    """

    address: str
    on_interrupt: OnInterrupt
    console: Console


def submit(
    config: JobConfig,
    watching: Watching,
    *,
    resume: bool = False,
    wait: bool = True,
    environment: Sequence[str] = (),
    stop_seconds: int = STOP_SECONDS,
    root: Path | None = None,
) -> None:
    """Send the folder and the configuration to a cluster, run there what the configuration names, and watch it to its end.

    Args:
        config: as resolved. Its ``cluster.address`` becomes ``auto``; a relative ``run_dir`` is taken from the folder
            here, and made absolute.
        resume: the job goes on from the last whole checkpoint.
        wait: false: return once the job is accepted.
        environment: ``NAME=VALUE``, or ``NAME`` alone for the value that it has here, for the job and its roles.
        stop_seconds: what the job has, when it is stopped, to save its last whole step.
        root: the folder that travels; by default the current one.

    Raises:
        InputRefused: before anything was sent; or where the job refused its input.
        RunFailed: where the job failed, or was stopped.
        JobLeft: after Ctrl-C.
    """
    root = (root or Path.cwd()).resolve()
    console = watching.console
    command = COMMANDS.get(config.algorithm, "train")
    variables = _variables(environment)
    there = _as_job(config, root, resume)
    if problems := check_plan(config):
        raise InputRefused(problems)
    files = shipped_files(root, named_paths(config, root), leave_out=[root / config.run_dir])
    url = dashboard_url(watching.address)
    dashboard = Dashboard(url, check_dashboard(url))
    _say_where(config, there, console)
    job = _name(config)
    with ExitStack() as packed:
        archive = Path(packed.enter_context(tempfile.TemporaryDirectory(prefix="rayrlhf-"))) / "job.zip"
        size = write_archive(archive, files, to_yaml(there))
        console.print(
            f"sending {len(files)} files of {root} ({size / (1 << 20):.1f} MiB packed) to {url}", soft_wrap=True
        )
        # From here on, Ctrl-C finds a job that may have been accepted.
        with _left_by_interrupt(f"Interrupted while job {job} was sent; it may run. {_come_back(job, watching)}"):
            dashboard.submit(
                job,
                archive,
                env_vars={**_for_stopping(stop_seconds), **variables},
                setup_hook=HOOK,
                entrypoint=_entrypoint(command, resume, console),
                metadata={"rayrlhf": __version__, "run_dir": there.run_dir, _STOP_KEY: str(stop_seconds)},
            )
            packed.close()
            console.print(f"job {job} is accepted", highlight=False)
            if wait:
                _watch(dashboard, job, watching)
            else:
                console.print(_come_back(job, watching), soft_wrap=True, highlight=False)


def follow(job: str, watching: Watching) -> None:
    """Watch a job that was submitted before, from the beginning of its log.

    Raises:
        InputRefused, RunFailed, JobLeft: as of `submit`.
    """
    url = dashboard_url(watching.address)
    dashboard = Dashboard(url, check_dashboard(url))
    dashboard.info(job)
    _watch(dashboard, job, watching)


# -- what is sent ------------------------------------------------------------------------------------------------


def _as_job(config: JobConfig, root: Path, resume: bool) -> JobConfig:
    """The configuration as the job has it.

    Raises:
        InputRefused: where it can't be a job.
    """
    problems = []
    if config.cluster.executor == "inline":
        problems.append("cluster.executor: found inline; a job's roles run on the cluster's machines: legal is ray")
    if resume and not isinstance(config, RunConfig):
        problems.append(f"--resume: {config.algorithm} has no checkpoints; without it, it begins anew")
    if problems:
        raise InputRefused(problems)
    cluster = config.cluster.model_copy(update={"address": "auto"})
    return config.model_copy(update={"cluster": cluster, "run_dir": str(root / config.run_dir)})


def _say_where(config: JobConfig, there: JobConfig, console: Console) -> None:
    """What becomes of a relative folder of the run."""
    if not Path(config.run_dir).is_absolute():
        console.print(
            f"run_dir {config.run_dir} is {there.run_dir} on the cluster: its machines must share that folder, or give "
            "run_dir=/a/shared/folder",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )


def _variables(given: Sequence[str]) -> dict[str, str]:
    """Environment variables that the user names.

    Raises:
        InputRefused: where one has no value here, or isn't a name.
    """
    found, problems = {}, []
    for item in given:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            problems.append(f"--env: found {item!r}; legal: NAME=VALUE, or NAME")
        elif not equals and name not in os.environ:
            problems.append(f"--env: {name} is not set here; give {name}=VALUE")
        else:
            found[name] = value if equals else os.environ[name]
    if problems:
        raise InputRefused(problems)
    return found


def _for_stopping(seconds: int) -> dict[str, str]:
    """Ray ends a stopped job as Ctrl-C would: what was trained is saved. (By default it has 3 s.)"""
    return {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(seconds)}


def _name(config: JobConfig) -> str:
    """Of the job: the run's folder and a few random letters."""
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(config.run_dir).name).strip("-") or config.algorithm
    return f"{word[:40]}-{secrets.token_hex(3)}"


def _entrypoint(command: str, resume: bool, console: Console) -> str:
    """The job's shell command: the Python of this command where the head node has it too (a shared folder), else its own."""
    settings = [f"{RELAY_VARIABLE}=1", "PYTHONIOENCODING=utf-8", f"COLUMNS={console.width}"]
    if console.is_terminal and not console.is_dumb_terminal:
        settings += ["FORCE_COLOR=1", "TERM=xterm-256color"]
    line = f"-m rayrlhf.cli {command} {CONFIG_FILE}" + (" --resume" if resume else "")
    steps = (
        # The archive's folder is the first of the import path.
        'cd "${PYTHONPATH%%:*}" || exit 1',
        f"P={shlex.quote(sys.executable or 'python')}",
        '"$P" -c "import ray" 2>/dev/null || P=python',
        'RAY_ADDRESS=$("$P" -m rayrlhf.drivers.submit_folder) || exit 1',
        f'export RAY_ADDRESS; exec env {" ".join(settings)} "$P" {line}',
    )
    return "; ".join(steps)


# -- watching ----------------------------------------------------------------------------------------------------


@contextmanager
def _left_by_interrupt(words: str) -> Iterator[None]:
    """Ctrl-C, where it isn't counted, leaves a job; these words say so."""
    try:
        yield
    except KeyboardInterrupt:
        raise JobLeft(words) from None


def _watch(dashboard: Dashboard, job: str, watching: Watching) -> None:
    """Show the job until its end, and turn that into ours."""
    view = JobView(watching.console)
    interrupts = Interrupts()
    with _left_by_interrupt(f"Left job {job}. {_come_back(job, watching)}"):
        try:
            with interrupts.counted():
                _show(dashboard, job, watching, view, interrupts)
        finally:
            view.leave()
        try:
            end = dashboard.patiently(lambda: dashboard.info(job))
        except (RunFailed, InputRefused) as error:
            raise RunFailed(f"job {job} has ended, and how isn't known: {error}. {_follow(job, watching)}") from error
        _conclude(end, job)


def _show(dashboard: Dashboard, job: str, watching: Watching, view: JobView, interrupts: Interrupts) -> None:
    said = dashboard.log(job)
    stop_by: float | None = None
    while True:
        piece = _next(said)
        if piece.kind == "text":
            view.feed(piece.text)
        elif piece.kind == "end":
            if piece.text:
                watching.console.print(piece.text, style="yellow", soft_wrap=True, highlight=False)
            else:
                view.end()
            return
        else:
            raise RunFailed(f"lost sight of job {job}, which may go on: {piece.text}. {_come_back(job, watching)}")
        if interrupts.take():
            if stop_by is not None:
                raise JobLeft(f"Left job {job} while it was being stopped. {_come_back(job, watching)}")
            stop_by = _interrupted(dashboard, job, watching, view, interrupts)
        if stop_by is not None and time.monotonic() > stop_by:
            raise RunFailed(f"job {job} was told to stop, and runs on. {_come_back(job, watching)}")


def _next(said: queue.Queue[Said]) -> Said:
    """The next piece of the log, or nothing yet."""
    try:
        return said.get(timeout=_LOOK_SECONDS)
    except queue.Empty:
        return Said("text")


def _interrupted(
    dashboard: Dashboard, job: str, watching: Watching, view: JobView, interrupts: Interrupts
) -> float | None:
    """After Ctrl-C: leave, stop, or watch on. Returns by when a job that is stopped must have ended; None: it goes on.

    Raises:
        JobLeft: where that is the answer, or the answer to another Ctrl-C.
        RunFailed: where it can't be told to stop.
    """
    choice: Choice
    if watching.on_interrupt != "ask":
        choice = watching.on_interrupt
    elif has_terminal():
        with view.paused(), interrupts.raised():
            choice = ask(watching.console)
    else:
        choice = "leave"
    if choice == "leave":
        raise JobLeft(f"Left job {job}, which goes on. {_come_back(job, watching)}")
    if choice == "watch":
        return None
    watching.console.print(f"stopping job {job} ...", highlight=False)

    def stop() -> float:
        dashboard.stop(job)
        return float((dashboard.info(job).metadata or {}).get(_STOP_KEY, STOP_SECONDS))

    left = f"Left job {job} while it was being stopped. {_come_back(job, watching)}"
    try:
        with _left_by_interrupt(left), interrupts.raised():
            given = dashboard.patiently(stop)
    except (RunFailed, InputRefused) as error:
        raise RunFailed(f"job {job} may run on, though it was to stop: {error}. {_come_back(job, watching)}") from error
    return time.monotonic() + given + _KILLED_WITHIN


def _conclude(info: Any, job: str) -> None:
    """The job's end as ours."""
    status, code = str(info.status), info.driver_exit_code
    if status == "SUCCEEDED":
        return
    if status == "STOPPED":
        raise RunFailed(f"job {job} was stopped; what it had written is in its run_dir")
    if code == REFUSED_CODE:
        raise InputRefused(f"job {job} refused its input: its message is above", started=True)
    if code is None and (info.driver_node_id is None or info.error_type == _NOT_STARTED):
        raise RunFailed(f"job {job} never started: {_why(info)}")
    if code is None:
        raise RunFailed(f"job {job} was lost while it ran (training goes on with --resume): {_why(info)}")
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        raise RunFailed(f"job {job} was killed by signal {number} on the head node (9: it may have run out of memory)")
    raise RunFailed(f"job {job} ended with exit code {code}: its message is above")


def _why(info: Any) -> str:
    message = (info.message or "Ray gives no reason").strip()
    return f"{info.error_type}: {message}" if info.error_type else message


def _follow(job: str, watching: Watching) -> str:
    return f"Watch it with `rayrlhf submit --follow {job} --address {shlex.quote(watching.address)}`"


def _come_back(job: str, watching: Watching) -> str:
    return f"{_follow(job, watching)}, stop it with `ray job stop {job} --address {shlex.quote(watching.address)}`"
