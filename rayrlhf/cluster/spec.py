"""What a role needs in order to come up."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.cluster.session import JOB_VARIABLE
from rayrlhf.config.base import ClusterConfig
from rayrlhf.cores import usable_cores
from rayrlhf.importing import quick_imports

__all__ = [
    "THREADS_VARIABLE",
    "RoleSpec",
    "load_class",
    "process_env",
    "thread_count",
    "wanted_threads",
]

THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class RoleSpec:
    """One role: its class, its arguments and its processes.

    The class is constructed once a rank as ``Class(world=World(...), **kwargs)``, and knows nothing of Ray.
    """

    name: str
    """Name of the group in messages and in the result of `start_groups`."""
    build: str
    """Import string ``module:Class``. The module is imported only in the role's own process."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the constructor, besides ``world``; must be picklable."""
    ranks: int = 1
    """Processes."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables which must be set before the module is imported."""
    gpus_per_rank: int = 0
    """GPUs of each process, all on one machine; 0: it needs none. Roles can share them: see `start_groups`."""
    ranks_per_shard: int = 1
    """So many neighbouring ranks get the same samples, and the first of them answers; divides ``ranks``."""
    rest: tuple[str, Mapping[str, Any]] | None = None
    """The method, and its arguments, with which the role leaves its GPUs to those that share them. On Ray such roles are built
    one after the other, and with cluster.offload_idle each is asked to leave before the next one is built."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"role {self.name!r}: ranks must be at least 1, found {self.ranks}")
        if self.ranks_per_shard < 1 or self.ranks % self.ranks_per_shard:
            raise ValueError(
                f"role {self.name!r}: ranks_per_shard must divide its {self.ranks} ranks, found {self.ranks_per_shard}"
            )
        if self.gpus_per_rank < 0 or self.gpus_per_rank != int(self.gpus_per_rank):
            raise ValueError(f"role {self.name!r}: gpus_per_rank must be a whole number, found {self.gpus_per_rank}")
        module, colon, name = self.build.partition(":")
        if not (module and colon and name):
            raise ValueError(f"role {self.name!r}: build must read 'module:Class', found {self.build!r}")


def load_class(build: str) -> Any:
    """Import ``module:Class``.

    Raises:
        ImportError: where the module can't be imported or has no such class.
    """
    module_name, _, name = build.partition(":")
    with quick_imports():
        module = importlib.import_module(module_name)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ImportError(f"module {module_name!r} has no class {name!r}") from error


def wanted_threads(settings: ClusterConfig, env: Mapping[str, str] = os.environ) -> int | None:
    """Threads of each process as the user wants them, in cluster.threads or else in OMP_NUM_THREADS; None: nothing is said.

    In a Ray job that variable counts only where it was given to the job itself: Ray sets it to 1 in the process from which a
    job's driver comes, and `ray up` on every machine.
    """
    if settings.threads is not None:
        return settings.threads
    if JOB_VARIABLE in env:
        env = (json.loads(env[JOB_VARIABLE]).get("runtime_env") or {}).get("env_vars") or {}
    wanted = env.get(THREADS_VARIABLE, "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else None


def thread_count(settings: ClusterConfig) -> int:
    """Threads of each process where all of them are on this machine, for this run alone: those that the user wants, else as many
    as there are cores. Roles mostly wait for each other, so they aren't divided."""
    return wanted_threads(settings) or usable_cores()


def process_env(spec: RoleSpec, settings: ClusterConfig, threads: int | None) -> dict[str, str]:
    """Environment of a role's process. OpenMP threads which spin at barriers take the cores away from other processes.

    Args:
        threads: of the process; None: it finds out itself.
    """
    variables = {} if threads is None else {THREADS_VARIABLE: str(threads)}
    if settings.executor == "ray":
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
    return {**variables, **spec.env}
