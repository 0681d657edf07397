"""A plan as one document for programs, and the rows that say what to ask Ray for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.planning.memory import CONTEXT, ENGINE_WORKSPACE, HOST_PROCESS, WORKSPACE
from rayrlhf.planning.plan import Plan
from rayrlhf.planning.transfer import GPU_BYTES_PER_S, HOST_BYTES_PER_S, Crossing, Transfer

__all__ = ["document", "resources_of"]

VERSION = 1


def document(plan: Plan) -> dict[str, Any]:
    """The plan in plain values: bytes, seconds, counts. Its keys stay as they are; new ones may come.

    - ``version``, ``algorithm``, ``ok``, ``problems``, ``notes``: ``ok`` where there are no problems.
    - ``unseen``: models that couldn't be looked at, of which ``ok`` says nothing: ``key``, ``path``, ``why``, ``counted_as``.
    - ``batch``: rows of ``section``, ``name``, ``value``, ``how``.
    - ``roles``: by role ``processes``, ``gpus_each``, and ``models`` with ``key``, ``path``, ``parameters``, ``source``.
    - ``placement``: ``assumed``, ``machines``, ``pools``, ``seats``; null where the roles can't be placed.
    - ``memory``: ``gpus`` (``machine``, ``gpu``, ``roles``, ``limit_bytes``, ``peak_phase``, ``peak_bytes``, ``phases``: bytes by
      phase and part), ``machines`` (``name``, ``limit_bytes``, ``total_bytes``, ``parts``, ``phases``), ``assumed``.
    - ``transfers``: ``transport``, ``what``, ``when``, ``bytes``, ``bucket_bytes``, ``gathered_bytes``, ``seconds``, and ``send``
      and ``gather`` with ``wire``, ``bytes``, ``bytes_per_s``, ``seconds``. The one of each step, then what is sent once.
    - ``resources``: ``GPU``, ``CPU``, ``nodes``, ``gpus_by_node``: what the run asks Ray for.
    """
    return {
        "version": VERSION,
        "algorithm": plan.config.algorithm,
        "ok": not plan.problems,
        "unseen": [model._asdict() for model in plan.known.unseen],
        "problems": plan.problems,
        "notes": plan.notes,
        "batch": [row._asdict() for row in plan.rows],
        "roles": _roles(plan),
        "placement": _placement(plan),
        "memory": _memory(plan),
        "transfers": _transfers(plan),
        "resources": resources_of(plan),
    }


def _roles(plan: Plan) -> dict[str, Any]:
    return {
        claim.role: {
            "processes": claim.processes,
            "gpus_each": claim.gpus,
            "models": [
                {
                    "key": model.key,
                    "path": model.path,
                    "parameters": model.shape.parameters(head=model.head, layers=model.layers),
                    "source": model.shape.source,
                }
                for model in plan.known.models.get(claim.role, [])
            ],
        }
        for claim in plan.claims
    }


def _placement(plan: Plan) -> dict[str, Any] | None:
    placement = plan.placement
    if placement is None:
        return None
    return {
        "assumed": plan.assumed,
        "machines": [
            {
                "name": machine.name,
                "gpus": machine.gpus,
                "gpu_memory_bytes": machine.gpu_memory_bytes,
                "memory_bytes": machine.memory_bytes,
                "gpu_link_bytes_per_s": machine.gpu_link_bytes_per_s,
                "network_bytes_per_s": machine.network_bytes_per_s,
            }
            for machine in placement.machines
        ],
        "pools": [{"roles": list(pool.roles), "gpus": [list(gpu) for gpu in pool.gpus]} for pool in placement.pools],
        "seats": [
            {"role": seat.role, "rank": seat.rank, "machine": seat.machine, "gpus": list(seat.gpus)}
            for seat in placement.seats
        ],
    }


def _memory(plan: Plan) -> dict[str, Any] | None:
    usage, placement = plan.usage, plan.placement
    if usage is None or placement is None:
        return None
    gpus = []
    for gpu in usage.gpus:
        phase, peak = gpu.peak
        gpus.append(
            {
                "machine": gpu.machine,
                "gpu": gpu.gpu,
                "roles": list(gpu.roles),
                "limit_bytes": gpu.limit,
                "peak_phase": phase,
                "peak_bytes": peak,
                "phases": {name: dict(parts) for name, parts in gpu.phases.items()},
            }
        )
    machines = [
        {
            "name": placement.machines[host.machine].name,
            "limit_bytes": host.limit,
            "total_bytes": host.total,
            "parts": dict(host.parts),
            "phases": {name: dict(parts) for name, parts in host.phases.items()},
        }
        for host in usage.hosts
    ]
    assumed = {
        "gpu_bytes_of_each_process": CONTEXT,
        "gpu_bytes_of_each_working_process": WORKSPACE,
        "gpu_bytes_of_an_engines_workspace": ENGINE_WORKSPACE,
        "host_bytes_of_each_process": HOST_PROCESS,
        "host_copy_bytes_per_s": HOST_BYTES_PER_S,
        "gpu_copy_bytes_per_s": GPU_BYTES_PER_S,
    }
    return {"gpus": gpus, "machines": machines, "assumed": assumed}


def _transfers(plan: Plan) -> list[dict[str, Any]]:
    transfer = plan.transfer
    if transfer is None:
        return []
    base = [] if transfer.base is None else [_sending(transfer.base, "once, before the first")]
    return [_sending(transfer, "each step"), *base]


def _sending(transfer: Transfer, when: str) -> dict[str, Any]:
    return {
        "transport": transfer.transport,
        "what": transfer.what,
        "when": when,
        "bytes": transfer.nbytes,
        "bucket_bytes": transfer.bucket_bytes,
        "gathered_bytes": transfer.gathered_bytes,
        "seconds": transfer.seconds,
        "send": _crossing(transfer.send),
        "gather": None if transfer.gather is None else _crossing(transfer.gather),
    }


def _crossing(crossing: Crossing) -> dict[str, Any]:
    return {
        "wire": crossing.wire,
        "bytes": crossing.nbytes,
        "bytes_per_s": crossing.bytes_per_s,
        "seconds": crossing.seconds,
    }


def resources_of(plan: Plan) -> Mapping[str, Any] | None:
    """What a run asks Ray for: GPUs, by machine; its processes ask for no CPUs of their own. None where it can't be placed."""
    placement = plan.placement
    if placement is None:
        return None
    by_node: dict[str, int] = {}
    for machine, _ in sorted({(seat.machine, gpu) for seat in placement.seats for gpu in seat.gpus}):
        name = placement.machines[machine].name
        by_node[name] = by_node.get(name, 0) + 1
    return {"GPU": sum(by_node.values()), "CPU": 0, "nodes": len(by_node) or 1, "gpus_by_node": by_node}
