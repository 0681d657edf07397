"""Last words: how a process died, and what it wrote into its log."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import ray
from ray.exceptions import OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from rayrlhf.cluster.ray_process import ProcessInfo

__all__ = ["cause_of_death", "last_lines"]

LINES = 8
BYTES = 16384
REMOTE_SECONDS = 5.0

_NOISE = re.compile(r"^:(job_id|actor_name|task_name):|^\s*$|^Extension modules: ")
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "SIGSEGV": "SIGSEGV",
    "Fatal Python error: Aborted": "SIGABRT",
    "SIGABRT": "SIGABRT",
    "SIGBUS": "SIGBUS",
    "Bus error": "SIGBUS",
    "SIGFPE": "SIGFPE",
    "SIGILL": "SIGILL",
    "SIGTERM": "SIGTERM",
}


def read_tail(path: str) -> list[str]:
    """The last lines of stderr; where it is empty, of stdout beside it."""
    for name in (path, path.removesuffix(".err") + ".out"):
        if not os.path.exists(name):
            continue
        with open(name, "rb") as file:
            file.seek(max(0, os.path.getsize(name) - BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        lines = [line for line in lines if not _NOISE.search(line)]
        if lines:
            return lines[-LINES:] if not any("Fatal" in line for line in lines) else _around_fatal(lines)
    return []


def _around_fatal(lines: list[str]) -> list[str]:
    """A crash report is longest at its end, and most telling at its beginning."""
    first = next(i for i, line in enumerate(lines) if "Fatal" in line)
    return lines[first : first + LINES]


def last_lines(info: ProcessInfo | None) -> list[str]:
    """The last log lines of a process, from whichever node it is, or was, on; none where they can't be had in 5 s."""
    if info is None or info.log is None:
        return []
    if info.node_id == ray.get_runtime_context().get_node_id():
        return read_tail(info.log)
    where = NodeAffinitySchedulingStrategy(info.node_id, soft=False)
    tail = ray.remote(read_tail).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(info.log)
    try:
        return ray.get(tail, timeout=REMOTE_SECONDS)
    except RayError as error:  # the node may be gone along with the process
        return [f"(the log on node {info.address} can't be read: {type(error).__name__})"]


def cause_of_death(error: RayError, log_lines: list[str]) -> str:
    """How a process ended: from Ray's error and its last log lines, with exit code or signal where they are known."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        found = re.search(r"Memory on the node.*?limit", text, re.DOTALL)
        own = re.search(r"actual memory used=([\d.]+ ?[A-Z]+)", text)
        facts = [_one_line(found[0])] if found else []
        facts += [f"this process held {own[1]}"] if own else []
        return "Ray killed the process because the node ran out of memory (" + "; ".join(facts) + ")"
    code = re.search(r"exit code (-?\d+)", text)
    if code:
        return f"the process ended with exit code {code[1]}"
    if re.search(r"node (has )?died|NODE_DIED|node was terminated|node failure", text, re.IGNORECASE):
        return "its node died (" + _one_line(text)[-200:] + ")"
    for sign, signal in _SIGNALS.items():
        if any(sign in line for line in log_lines):
            return f"the process crashed with signal {signal}"
    if "connection error code 2" in text:
        return (
            "the process disappeared without an exit code: killed from outside (SIGKILL, which is also what the "
            "kernel's out-of-memory killer sends) or ended by os._exit"
        )
    return _one_line(text)[-500:]


def _one_line(text: str) -> str:
    return " ".join(text.split())
