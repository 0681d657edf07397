"""Ending the processes of roles on Ray, on whichever machine they are, and waiting until they are gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrlhf.cluster.nodes import lost_nodes

if TYPE_CHECKING:
    from rayrlhf.cluster.ray_process import ProcessInfo

__all__ = ["end_processes"]

END_SECONDS = 10.0

log = logging.getLogger(__name__)


def end_processes(processes: Sequence[tuple[Any, ProcessInfo | None]]) -> None:
    """Kill actors, and wait until their processes are gone: they hold memory and GPUs until then.

    Ray calls an actor dead once it was told to end, which a process with much memory takes seconds for. So each node is asked
    about its own processes: this one without a detour, each other one by a task, which waits there.
    """
    if not ray.is_initialized():
        return
    for handle, _ in processes:
        ray.kill(handle, no_restart=True)
    end = time.monotonic() + END_SECONDS
    lost = lost_nodes(info.node_id for _, info in processes if info is not None)
    there: dict[str, list[int]] = {}
    for _, info in processes:
        if info is not None and info.node_id not in lost:
            there.setdefault(info.node_id, []).append(info.pid)
    here = there.pop(ray.get_runtime_context().get_node_id(), [])
    asked = {_ask(node, pids): (node, pids) for node, pids in there.items()}
    for handle, info in processes:
        if info is not None and info.node_id in lost:
            continue  # Ray would only say so half a minute later
        if not _is_dead(handle, max(0.1, end - time.monotonic())):
            log.warning("%s was told to end and still runs after %g s", info or "a process", END_SECONDS)
    if left := _until_gone(here, end - time.monotonic()):
        log.warning("processes %s were told to end and still run after %g s", left, END_SECONDS)
    _hear(asked, end)


def _ask(node: str, pids: Sequence[int]) -> ray.ObjectRef:
    """Let a node wait until processes of its own are gone. Its Ray may have to start a process for that, which takes a second
    or two at first: meanwhile those that end are at it."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_until_gone).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
    return task.remote(pids, END_SECONDS)


def _hear(asked: Mapping[ray.ObjectRef, tuple[str, Sequence[int]]], end: float) -> None:
    """Wait until then for the answers to `_ask`. A node that goes meanwhile takes its processes with it."""
    for ref, (node, pids) in asked.items():
        try:
            left = ray.get(ref, timeout=max(0.0, end - time.monotonic()))
        except GetTimeoutError:
            ray.cancel(ref, force=True)
            log.warning("node %s didn't say within %g s whether its processes %s are gone", node, END_SECONDS, pids)
            continue
        except RayError as error:
            log.warning("node %s can't say whether its processes %s are gone: %s", node, pids, error)
            continue
        if left:
            log.warning(
                "processes %s of node %s were told to end, and weren't gone after %g s", left, node, END_SECONDS
            )


def _until_gone(pids: Sequence[int], seconds: float) -> list[int]:
    """Those processes of this machine which still run after so long; returns once there are none."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < end:
        time.sleep(0.01)
    return left


def _runs(pid: int) -> bool:
    """Whether the process of this number runs here; a zombie doesn't. Without /proc (macOS) Ray's word is enough."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _is_dead(handle: Any, timeout: float) -> bool:
    """Whether Ray knows that an actor is gone; it has several errors for that, one for each way to die."""
    try:
        ray.get(handle.describe.remote(), timeout=timeout)
    except GetTimeoutError:
        return False
    except RayError:
        return True
    return False
