"""What the roles of a configuration ask for, and the machines that it names."""

from __future__ import annotations

import os
from typing import Any

from rayrlhf.config.base import ClusterConfig, JobConfig
from rayrlhf.config.derive import needs_gpu, roles_of
from rayrlhf.config.jobs import ModelEvaluationConfig
from rayrlhf.planning.placement import Claim, Machine, Sharing, fits, pools_of

__all__ = [
    "GIB",
    "assumed_machines",
    "claims_of",
    "machines_of",
    "places_roles",
    "started_roles",
    "starts_of",
]

GIB = 2**30
GB = 1e9
USUAL_GPUS = 8
"""GPUs of a machine, where a configuration names none."""


def places_roles(config: JobConfig) -> bool:
    """Whether the roles are placed on GPUs: real ones, or those that `cluster.nodes` says a test's machines have."""
    return config.cluster.device == "cuda" or any(node.gpus for node in config.cluster.nodes)


def started_roles(config: JobConfig) -> dict[str, int]:
    """The processes of every role that a run starts, in the order of planning.

    What only the data says isn't known here, and such a role is among them: an evaluation's reference whose tokens no model
    reads, engines for held-out prompts of which there turn out to be none.
    """
    roles = dict(roles_of(config))
    if isinstance(config, ModelEvaluationConfig) and all(_is_reference(config, model) for model in config.models):
        roles.pop("model")
    return roles


def _is_reference(config: ModelEvaluationConfig, model: Any) -> bool:
    """Whether the reference's processes stand for a model too: the same files, and the same tokens."""

    def where(path: str) -> str:
        return os.path.realpath(path)

    wanted = config.models[0].path if config.reference is None else config.reference
    first = next((one for one in config.models if where(one.path) == where(wanted)), None)
    if first is None or model is first:
        return first is not None
    # A .gguf file is made into a folder for each model that it stands for.
    folder = not (model.path.endswith(".gguf") or model.path.startswith("package:"))
    return folder and where(model.path) == where(wanted) and model.tokenizer == first.tokenizer


def starts_of(config: JobConfig) -> list[list[str]]:
    """The roles of each start, in the order in which one process would build them; an evaluation starts twice: what stays for
    all models (where they have the same tokens), and what a model has of its own.

    Engines come last. On Ray those that share GPUs are built in turns, the last one first.
    """
    order = ("policy", "reward", "critic", "scores", "reference", "model", "rollout")
    roles = sorted(started_roles(config), key=order.index)
    if isinstance(config, ModelEvaluationConfig):
        shared = [role for role in roles if role in ("scores", "reference")]
        return [shared, [role for role in roles if role not in shared]]
    return [roles]


def claims_of(config: JobConfig) -> list[Claim]:
    """Every role that a run starts, by the name under which it starts, in the order in which it is planned.

    A role that computes nothing on a GPU (rewards by functions and services) claims none; neither does any role where no
    GPUs are placed at all.
    """
    placed = places_roles(config)
    claims = []
    for role, processes in started_roles(config).items():
        gpus = config.rollout.tensor_parallel if role == "rollout" else 1  # type: ignore[attr-defined]
        claims.append(Claim(role, processes, gpus if placed and needs_gpu(config, role) else 0))
    return claims


def machines_of(cluster: ClusterConfig) -> list[Machine]:
    """The machines that a configuration names, ``node 0`` first; none where it names none."""
    machines: list[Machine] = []
    for kind in cluster.nodes:
        machines += [
            Machine(
                name=f"node {len(machines) + k}",
                gpus=kind.gpus,
                gpu_memory_bytes=int(kind.gpu_memory_gib * GIB),
                memory_bytes=int(kind.memory_gib * GIB),
                gpu_link_bytes_per_s=kind.gpu_link_gb_per_s * GB,
                network_bytes_per_s=kind.network_gb_per_s * GB,
            )
            for k in range(kind.count)
        ]
    return machines


def assumed_machines(claims: list[Claim], sharing: Sharing) -> list[Machine]:
    """Machines for a configuration that names none: of 8 GPUs each, or of an engine's where that is more, just enough.

    Nothing is known of their memory and their wires.
    """
    each = max([USUAL_GPUS, *(claim.gpus for claim in claims)])
    needed = sum(max(claim.processes * claim.gpus for claim in pool) for pool in pools_of(claims, sharing))
    machines = [Machine(f"node {k}", each) for k in range(needed // each)]  # that many at least
    while not fits(claims, sharing, machines):
        machines.append(Machine(f"node {len(machines)}", each))
    return machines
