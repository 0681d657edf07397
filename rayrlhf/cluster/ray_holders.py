"""Who holds the GPUs of a Ray cluster, as far as Ray tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from rayrlhf.cluster.nodes import Node

__all__ = ["holders"]

JOB_DIGITS = 8
"""The last digits of a placement group's id are those of the job that made it."""
LONGEST_COMMAND = 120


def holders(nodes: Sequence[Node], free: Mapping[str, int]) -> list[str]:
    """A line for each placement group with GPUs, with its job, and one for what is held without a group.

    Args:
        nodes: those of interest.
        free: GPUs that nobody holds, by node id.
    """
    names = {node.id: node.name for node in nodes}
    jobs: dict[str, dict[str, Any]] = {job["JobID"]: job for job in ray._private.state.jobs()}
    in_groups, lines = dict.fromkeys(names, 0), []
    for group in placement_group_table().values():
        held = _held(group, names)
        for where, count in held.items():
            in_groups[where] += count
        if held:
            all_of_it = ", ".join(f"{count} of {names[where]}" for where, count in held.items())
            lines.append(f"held: {all_of_it}, by {_job(jobs, group['placement_group_id'][-JOB_DIGITS:])}")
    for node in nodes:
        alone = node.gpus - free[node.id] - in_groups[node.id]
        if alone > 0:
            lines.append(f"held: {alone} of {node.name}, by actors or tasks without a placement group")
    return lines


def _held(group: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """GPUs of a placement group, by node id."""
    held: dict[str, int] = {}
    if group["state"] != "CREATED":
        return held
    for bundle, resources in group["bundles"].items():
        node, count = group["bundles_to_node_id"][bundle], int(resources.get("GPU", 0))
        if count and node in names:
            held[node] = held.get(node, 0) + count
    return held


def _job(jobs: Mapping[str, Mapping[str, Any]], number: str) -> str:
    job = jobs.get(number)
    if job is None:
        return f"job {number}"
    command = " ".join(str(job.get("Entrypoint", "")).split())
    if len(command) > LONGEST_COMMAND:
        command = command[: LONGEST_COMMAND - 3] + "..."
    return f"job {number} (process {job['DriverPid']} on {job['DriverIPAddress']}: {command or 'command unknown'})"
