"""The arguments of ``rayrlhf submit``, checked as a whole before anything is asked of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.config.pipeline import is_pipeline
from rayrlhf.drivers.submit import STOP_SECONDS, JobLeft, OnInterrupt, Watching, submit
from rayrlhf.drivers.submit import follow as follow_job
from rayrlhf.errors import InputRefused

__all__ = ["run_submit"]


def run_submit(
    config: Path | None,
    overrides: Sequence[str],
    *,
    address: str | None,
    resume: bool,
    on_interrupt: str,
    wait: bool,
    env: Sequence[str],
    follow: str | None,
    stop_seconds: int | None = None,
) -> str | None:
    """Submit a configuration, or follow a job.

    Args:
        stop_seconds: of the job, None: the default; all others as of the command.

    Returns:
        What is to be said where the user left the job; None: it is done.

    Raises:
        InputRefused, RunFailed: as of `rayrlhf.drivers.submit.submit`.
    """
    problems = []
    if address is None:
        problems.append("--address is missing: the cluster's dashboard, such as http://HEAD:8265")
    if on_interrupt not in get_args(OnInterrupt):
        problems.append(f"--on-interrupt: found {on_interrupt!r}; legal: {', '.join(get_args(OnInterrupt))}")
    if follow is None and config is None:
        problems.append("CONFIG is missing: a YAML configuration, or --follow JOB")
    if follow is not None and (config is not None or overrides or resume or env or stop_seconds is not None):
        problems.append("--follow watches a job as it is: without CONFIG, keys, --resume, --env and --stop-seconds")
    if follow is not None and not wait:
        problems.append("--follow and --no-wait: to follow is to wait")
    if config is not None and is_pipeline(config):
        problems.append(
            f"algorithm: found pipeline in {config}; a job runs one configuration. Submit its stages one by one, or run "
            "`rayrlhf pipeline` on the cluster's head node with cluster.address=auto"
        )
    if problems or address is None:
        raise InputRefused(problems)
    watching = Watching(address, cast(OnInterrupt, on_interrupt), Console())
    try:
        if follow is not None:
            follow_job(follow, watching)
        elif config is not None:
            loaded = load_config(config, list(overrides))
            seconds = STOP_SECONDS if stop_seconds is None else stop_seconds
            submit(loaded, watching, resume=resume, wait=wait, environment=env, stop_seconds=seconds)
    except JobLeft as left:
        return str(left)
    return None
