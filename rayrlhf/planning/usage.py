"""The bytes on each GPU and each machine, phase by phase, where the roles are placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayrlhf.config.derive import roles_of
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.config.schema import Config
from rayrlhf.planning.memory import (
    CONTEXT,
    ENGINE_WORKSPACE,
    HOST_PROCESS,
    HOST_PROCESS_CPU,
    WORKSPACE,
    engine_bytes,
    itemsize_of,
)
from rayrlhf.planning.models import HeldModels, Known
from rayrlhf.planning.placement import Machine, Placement, Seat
from rayrlhf.planning.transfer import Transfer

__all__ = ["EngineBytes", "GpuUsage", "HostUsage", "Usage", "engine_of", "phases_of", "usage_of"]

Level = Literal["none", "weights", "all"]
Parts = Counter[str]

BLOCK = {"cuda": 16, "cpu": 128}
"""Tokens of a block of vLLM's KV cache."""


def phases_of(config: Any) -> dict[str, dict[str, Level]]:
    """What each phase of a run needs on the devices, by role."""
    if isinstance(config, Config):
        scorers: dict[str, Level] = dict.fromkeys(("policy", "critic", "reference", "reward"), "weights")
        return {
            "rollout": {"rollout": "all"},
            "score": scorers,
            "update": {"policy": "all", "critic": "all"},
            "transfer": {"policy": "weights", "rollout": "weights"},
        }
    if isinstance(config, SamplingConfig | CritiqueConfig | ModelEvaluationConfig):
        found: dict[str, dict[str, Level]] = {"rollout": {"rollout": "all"}}
        later = [role for role in roles_of(config) if role != "rollout"]
        return found | ({"score": dict.fromkeys(later, "weights")} if later else {})
    phases: dict[str, dict[str, Level]] = {"update": {"policy": "all"}}
    if isinstance(config, PreferenceConfig):
        phases = {"score": {"policy": "weights", "reference": "weights"}, **phases}
        if config.guard.kl_prompts > 0:
            phases |= {"rollout": {"rollout": "all"}, "transfer": {"policy": "weights", "rollout": "weights"}}
    return phases


# -- engines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineBytes:
    """What an engine holds on one of its GPUs."""

    weights: int
    kv_cache: int
    """Below 0 where weights and workspace leave nothing of the engine's share."""
    workspace: int
    sequence: int
    """KV cache of the longest sequence."""
    sequences: int
    """How many of the longest sequences fit, at most ``rollout.max_num_seqs`` are decoded at a time."""


def engine_of(config: Any, known: Known, gpu_memory: int | None) -> EngineBytes | None:
    """What an engine holds on a GPU of so many bytes; None where nothing is known of its model.

    KV cache: 2 * layers * key-value heads * head dimension * bytes of a number for each token, in whole blocks
    (Kwon et al. 2023, section 4). Its size is ``rollout.kv_cache_gib``; else on a GPU what is left of
    ``rollout.gpu_memory_fraction`` of its memory, and on a CPU, or where the GPU's memory isn't known, room for
    ``rollout.max_num_seqs`` of the longest sequences.
    """
    models = known.models.get("rollout")
    if not models:
        return None
    rollout, cuda = config.rollout, config.cluster.device == "cuda"
    default = config.policy.dtype if hasattr(config, "policy") else config.measure.dtype
    dtype, tp = rollout.dtype or default, rollout.tensor_parallel
    shape = max((model.shape for model in models), key=lambda shape: shape.parameters())
    weights = engine_bytes(shape, dtype, tp)
    workspace = ENGINE_WORKSPACE if cuda and rollout.engine == "vllm" else 0
    block = BLOCK[config.cluster.device]
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    sequence = -(-longest // block) * block * shape.kv_bytes_per_token(itemsize_of(dtype), tp)
    if rollout.kv_cache_gib is not None:
        # The whole engine's, spread over its GPUs.
        cache = int(rollout.kv_cache_gib * 2**30) // tp
    elif cuda and gpu_memory is not None and rollout.engine == "vllm":
        cache = int(rollout.gpu_memory_fraction * gpu_memory) - weights - workspace
    else:
        cache = rollout.max_num_seqs * sequence
    return EngineBytes(weights, cache, workspace, sequence, max(0, cache) // sequence)


# -- devices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuUsage:
    """The bytes on one GPU."""

    machine: int
    gpu: int
    roles: tuple[str, ...]
    limit: int | None
    phases: Mapping[str, Mapping[str, int]]
    """By phase and part."""

    @property
    def peak(self) -> tuple[str, int]:
        """The phase with the most bytes, and these."""
        totals = {phase: sum(parts.values()) for phase, parts in self.phases.items()}
        phase = max(totals, key=lambda name: totals[name])
        return phase, totals[phase]


@dataclass(frozen=True)
class HostUsage:
    """The host memory of one machine, at its most."""

    machine: int
    limit: int | None
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Loading and idle states are never there at the same time."""
        apart = ("loading", "idle")
        return sum(n for part, n in self.parts.items() if part not in apart) + max(self.parts.get(p, 0) for p in apart)


@dataclass(frozen=True)
class Usage:
    """The bytes of a run."""

    gpus: tuple[GpuUsage, ...]
    """None where models run on CPUs."""
    hosts: tuple[HostUsage, ...]
    engines: tuple[EngineBytes, ...]
    """By kind of GPU that engines have."""


@dataclass
class _Run:
    """All that the sums need."""

    config: Any
    known: Known
    placement: Placement
    transfer: Transfer | None
    held: Mapping[str, HeldModels]
    phases: Mapping[str, Mapping[str, Level]]
    turns: Mapping[str, Mapping[str, Level]]
    """What the roles that take turns on GPUs have there, by role and phase."""
    engines: dict[int | None, EngineBytes | None]
    """By the memory of their GPUs."""

    def level(self, role: str, phase: str) -> Level:
        """What a role has on its device in a phase: all where it has the device to itself."""
        return self.turns[role][phase] if role in self.turns else "all"

    def engine(self, machine: Machine) -> EngineBytes | None:
        memory = machine.gpu_memory_bytes
        if memory not in self.engines:
            self.engines[memory] = engine_of(self.config, self.known, memory)
        return self.engines[memory]


def usage_of(config: Any, known: Known, placement: Placement, transfer: Transfer | None) -> Usage:
    """The bytes of all processes, on their GPUs by phase and in their machines' memory."""
    held = {
        role: HeldModels.of(config, role, models)
        for role, models in known.models.items()
        if role != "rollout" and role in roles_of(config)
    }
    cluster = config.cluster
    needed = phases_of(config)
    turns = _turns(needed, placement) if cluster.device == "cuda" and cluster.offload_idle else {}
    run = _Run(config, known, placement, transfer, held, needed, turns, {})
    gpus: list[GpuUsage] = []
    if config.cluster.device == "cuda":
        seats: dict[tuple[int, int], list[Seat]] = {}
        for seat in placement.seats:
            for gpu in seat.gpus:
                seats.setdefault((seat.machine, gpu), []).append(seat)
        same: dict[Any, dict[str, Parts]] = {}
        for (m, gpu), sitting in sorted(seats.items()):
            roles = tuple(dict.fromkeys(seat.role for seat in sitting))
            # What a process holds depends on its role and its machine, and on whether it is the first.
            key = (roles, placement.machines[m].gpu_memory_bytes, tuple(seat.rank == 0 for seat in sitting))
            if key not in same:
                same[key] = {phase: sum((_on_gpu(run, s, phase) for s in sitting), Counter()) for phase in run.phases}
            phases = same[key]
            gpus.append(GpuUsage(m, gpu, roles, placement.machines[m].gpu_memory_bytes, phases))
    used = dict.fromkeys(placement.machines[seat.machine] for seat in placement.of("rollout"))
    engines = dict.fromkeys(engine for machine in used if (engine := run.engine(machine)) is not None)
    return Usage(tuple(gpus), tuple(_hosts(run)), tuple(engines))


def _turns(phases: Mapping[str, Mapping[str, Level]], placement: Placement) -> dict[str, dict[str, Level]]:
    """What roles that share GPUs have there, by role and phase, once the run goes round.

    As `rayrlhf.drivers.turns.Turns.take` has it: only where somebody has to come in, those who share its GPUs go.
    """
    height: dict[Level, int] = {"none": 0, "weights": 1, "all": 2}
    present: dict[str, Level] = {r: "none" for pool in placement.pools if len(pool.roles) > 1 for r in pool.roles}
    found: dict[str, dict[str, Level]] = {role: {} for role in present}
    for phase, wanted in [*phases.items()] * 2:
        coming = {role for role in present if height[present[role]] < height[wanted.get(role, "none")]}
        for role in coming.union(*(placement.sharing(role) for role in coming)):
            present[role] = wanted.get(role, "none")
        for role, level in present.items():
            found[role][phase] = level
    return found


def _on_gpu(run: _Run, seat: Seat, phase: str) -> Parts:
    """What one process has on one of its GPUs in a phase."""
    level = run.level(seat.role, phase)
    works = seat.role in run.phases[phase]
    parts = Counter({"other": CONTEXT + (WORKSPACE if works else 0)})
    if phase == "transfer" and works:
        parts["transfer"] = _transfer_buffers(run, seat)
    if seat.role == "rollout":
        engine = run.engine(run.placement.machines[seat.machine])
        if engine is not None and level != "none":
            parts += Counter({"parameters": engine.weights})
            if level == "all":
                parts += Counter({"kv_cache": max(0, engine.kv_cache), "other": engine.workspace})
        return parts
    held = run.held.get(seat.role)
    if held is None or level == "none":
        return parts
    states = held.states
    parts += Counter({"parameters": states.parameters})
    if level == "all":
        parts += Counter({"gradients": states.gradients, "optimizer": states.optimizer})
    if not works:
        return parts
    if phase == "update" and level == "all":
        # Forward and backward, or the step: whichever needs more.
        if states.buffers + held.training >= states.step_buffers:
            return parts + Counter({"buffers": states.buffers, "activations": held.training})
        return parts + Counter({"buffers": states.step_buffers})
    if phase == "score":
        parts += Counter({"buffers": states.forward_buffers, "activations": held.forward})
    return parts


def _transfer_buffers(run: _Run, seat: Seat) -> int:
    """Two buckets at each end of a transfer from GPU to GPU; with ``ipc`` the engines read the policy's. Ranks that only help to
    gather hold a bucket's worth of whole parameters."""
    transfer = run.transfer
    if transfer is None:
        return 0
    if seat.role == "rollout":
        return 2 * transfer.bucket_bytes if transfer.transport == "nccl" else 0
    sends = transfer.transport == "ipc" or transfer.transport == "nccl" and seat.rank == 0
    return 2 * transfer.bucket_bytes if sends else transfer.bucket_bytes if transfer.gather is not None else 0


# -- host memory ------------------------------------------------------------------------------------------------------


def _hosts(run: _Run) -> list[HostUsage]:
    """Host memory of each machine: each process by itself, what is offloaded, idle states, buckets of a transfer over host
    memory, and the whole copy of its model that each rank reads at first, unless ZeRO-3 spreads it as it is read."""
    machines = run.placement.machines
    sums: list[Parts] = [Counter() for _ in machines]
    same: dict[Any, Parts] = {}
    for role, processes in roles_of(run.config).items():
        seats = run.placement.of(role)
        # Without GPUs Ray puts processes where it likes; all are counted on the first machine.
        where = [seat.machine for seat in seats] or [0] * processes
        for rank, m in enumerate(where):
            if machines:
                key = (role, rank == 0, machines[m].gpu_memory_bytes)
                if key not in same:
                    same[key] = _in_host(run, role, rank, machines[m])
                sums[m].update(same[key])
    return [HostUsage(m, machine.memory_bytes, sums[m]) for m, machine in enumerate(machines) if sums[m]]


def _in_host(run: _Run, role: str, rank: int, machine: Machine) -> Parts:
    config, cuda = run.config, run.config.cluster.device == "cuda"
    each = HOST_PROCESS if cuda else HOST_PROCESS_CPU
    parts: Parts = Counter({"processes": each * (config.rollout.tensor_parallel if role == "rollout" else 1)})
    transfer = run.transfer
    if transfer is not None and transfer.transport in ("gloo", "shared_memory"):
        if role == "rollout" and transfer.transport == "gloo":
            parts["transfer"] = 2 * transfer.bucket_bytes * config.rollout.tensor_parallel
        if role == "policy" and rank == 0:
            parts["transfer"] = 2 * transfer.bucket_bytes
    if role == "rollout":
        engine = run.engine(machine)
        if engine is not None and not cuda:
            parts["models"] = (engine.weights + max(0, engine.kv_cache)) * config.rollout.tensor_parallel
        elif engine is not None and role in run.turns:
            parts["idle"] = engine.weights * config.rollout.tensor_parallel
        return parts
    held = run.held.get(role)
    if held is None:
        return parts
    states = held.states
    parts["offloaded"] = sum(states.host.values())
    if not cuda:
        trains = role in run.phases.get("update", {})
        working = states.buffers + held.training if trains else states.forward_buffers + held.forward
        parts["models"] = states.resident + max(working, states.step_buffers)
        return parts
    if role in run.turns:
        parts["idle"] = states.resident
    section = getattr(config, {"model": "measure"}.get(role, role), None)
    if getattr(section, "zero_stage", 0) != 3:
        parts["loading"] = states.parameters
    return parts
