"""The bytes on each GPU and each machine, phase by phase, where the roles are placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayrlhf.config.derive import generated_lengths
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.config.schema import Config
from rayrlhf.planning.claims import started_roles, starts_of
from rayrlhf.planning.memory import (
    CONTEXT,
    ENGINE_WORKSPACE,
    HOST_PROCESS,
    HOST_PROCESS_CPU,
    KV_BLOCK,
    WORKSPACE,
    cache_bytes,
    engine_adapter_bytes,
    engine_backup_bytes,
    engine_bytes,
    itemsize_of,
)
from rayrlhf.planning.models import HeldModels, Known
from rayrlhf.planning.placement import Machine, Placement, Seat
from rayrlhf.planning.shapes import Shape, numel
from rayrlhf.planning.transfer import Transfer

__all__ = ["START", "EngineBytes", "GpuUsage", "HostUsage", "Usage", "engine_of", "phases_of", "usage_of"]

Level = Literal["none", "weights", "all"]
Parts = Counter[str]

START = "start"
"""The phase before the first one: models are read, and roles built."""

BLOCK = {"cuda": 16, "cpu": KV_BLOCK}
"""Tokens of a block of vLLM's KV cache, for most models."""


def phases_of(config: Any) -> dict[str, dict[str, Level]]:
    """What each phase of a run needs on the devices, by role. What its start needs, which comes before all of them, depends on
    the order in which roles are built."""
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
        later = [role for role in started_roles(config) if role != "rollout"]
        return found | ({"score": dict.fromkeys(later, "weights")} if later else {})
    phases: dict[str, dict[str, Level]] = {"update": {"policy": "all"}}
    if isinstance(config, PreferenceConfig):
        phases = {"score": {"policy": "weights", "reference": "weights"}, **phases}
        if "rollout" in started_roles(config):
            phases |= {"rollout": {"rollout": "all"}, "transfer": {"policy": "weights", "rollout": "weights"}}
    return phases


# -- engines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineBytes:
    """What an engine holds on one of its GPUs."""

    weights: int
    """With the room for an adapter that is sent alone."""
    kv_cache: int
    """Below 0 where weights and workspace leave nothing of the engine's share."""
    workspace: int
    backup: int
    """Host memory for its weights while it sleeps, at most."""
    least: int
    """KV cache with which one of the longest sequences fits."""
    sequences: int
    """How many of the longest sequences fit, at most ``rollout.max_num_seqs`` are decoded at a time."""
    gpu_memory: int | None
    """Of the GPU; None where it isn't known, or there is none."""


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
    room = _adapter_room(config, shape, dtype)
    weights = engine_bytes(shape, dtype, tp) + room
    workspace = ENGINE_WORKSPACE if cuda and rollout.engine == "vllm" else 0
    # A size that is given is refused by the role, which knows no GPU's blocks: `rayrlhf.actors.rollout_vllm.kv_cache_bytes`.
    block = BLOCK[config.cluster.device] if rollout.kv_cache_gib is None else KV_BLOCK
    longest = max(generated_lengths(config).values())
    token = shape.kv_bytes_per_token(itemsize_of(dtype), tp)
    least = cache_bytes(1, longest, token, block)
    if rollout.kv_cache_gib is not None:
        # The whole engine's, spread over its GPUs.
        cache = int(rollout.kv_cache_gib * 2**30) // tp
    elif cuda and gpu_memory is not None and rollout.engine == "vllm":
        cache = int(rollout.gpu_memory_fraction * gpu_memory) - weights - workspace
    else:
        cache = cache_bytes(rollout.max_num_seqs, longest, token, block)
    backup = engine_backup_bytes(shape, dtype, tp) + room
    sequences = max(0, cache - block * token) // (least - block * token)
    return EngineBytes(weights, cache, workspace, backup, least, sequences, gpu_memory if cuda else None)


def _adapter_room(config: Any, shape: Shape, dtype: str) -> int:
    """What an engine that gets adapters alone keeps for one, on each of its GPUs."""
    lora = getattr(config.policy, "lora", None) if hasattr(config, "policy") else None
    if lora is None or config.rollout.lora_transfer != "adapter":
        return 0
    if config.rollout.engine == "vllm":
        return engine_adapter_bytes(shape, lora.rank, dtype, config.rollout.tensor_parallel)
    return itemsize_of(dtype) * numel(shape.adapters(lora))


# -- devices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuUsage:
    """The bytes on one GPU."""

    machine: int
    gpu: int
    roles: tuple[str, ...]
    limit: int | None
    phases: Mapping[str, Mapping[str, int]]
    """By phase and part. Of the start it is the moment with the most bytes."""
    before_engine: int | None = None
    """What others have there when the engine on it is built; None where there is none."""

    @property
    def peak(self) -> tuple[str, int]:
        """The phase with the most bytes, and these; the start only where it has more than all others."""
        totals = {phase: sum(parts.values()) for phase, parts in self.phases.items()}
        phase = max(totals, key=lambda name: (totals[name], name != START))
        return phase, totals[phase]


@dataclass(frozen=True)
class HostUsage:
    """The host memory of one machine, at its most."""

    machine: int
    limit: int | None
    phases: Mapping[str, Mapping[str, int]]
    """By part, of ``start`` (its moment with the most bytes) and ``run``."""

    @property
    def parts(self) -> Mapping[str, int]:
        """The most of each part."""
        found: Parts = Counter()
        for parts in self.phases.values():
            found |= Counter(parts)
        return found

    @property
    def total(self) -> int:
        """The most at one time."""
        return max(sum(parts.values()) for parts in self.phases.values())


@dataclass(frozen=True)
class Usage:
    """The bytes of a run."""

    gpus: tuple[GpuUsage, ...]
    """None where models run on CPUs."""
    hosts: tuple[HostUsage, ...]
    engines: tuple[EngineBytes, ...]
    """By kind of GPU that engines have; one on CPUs."""


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
    starts: Sequence[Sequence[str]]
    """The roles of each start, in the order in which those that share GPUs are built."""
    engines: dict[int | None, EngineBytes | None]
    """By the memory of their GPUs."""

    @property
    def inline(self) -> bool:
        """Whether all roles are one process."""
        return self.config.cluster.executor == "inline"

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
        if role != "rollout" and role in started_roles(config) and role not in known.misfits
    }
    cluster = config.cluster
    needed = phases_of(config)
    turns = _turns(needed, placement) if cluster.device == "cuda" and cluster.offload_idle else {}
    starts = [roles if cluster.executor == "inline" else roles[::-1] for roles in starts_of(config)]
    run = _Run(config, known, placement, transfer, held, needed, turns, starts, {})
    gpus: list[GpuUsage] = []
    if config.cluster.device == "cuda":
        seats: dict[tuple[int, int], list[Seat]] = {}
        for seat in placement.seats:
            for gpu in seat.gpus:
                seats.setdefault((seat.machine, gpu), []).append(seat)
        same: dict[Any, tuple[dict[str, Parts], int | None]] = {}
        for (m, gpu), sitting in sorted(seats.items()):
            roles = tuple(dict.fromkeys(seat.role for seat in sitting))
            # What a process holds depends on its role and its machine, and on whether it is the first.
            key = (roles, placement.machines[m].gpu_memory_bytes, tuple(seat.rank == 0 for seat in sitting))
            if key not in same:
                same[key] = _phases_on_gpu(run, sitting)
            gpus.append(GpuUsage(m, gpu, roles, placement.machines[m].gpu_memory_bytes, *same[key]))
    seated = [placement.machines[seat.machine] for seat in placement.of("rollout")]
    used = dict.fromkeys(seated or placement.machines[:1])
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


def _phases_on_gpu(run: _Run, sitting: Sequence[Seat]) -> tuple[dict[str, Parts], int | None]:
    """The bytes on a GPU by phase; and what others have there when its engine is built."""
    start: Parts = Counter()
    before_engine = None
    for seat, others in _builds(run, {seat.role: seat for seat in sitting}):
        if seat.role == "rollout":
            before_engine = sum(others.values())
        moment = others + _built(run, seat)
        start = max(start, moment, key=lambda parts: sum(parts.values()))
    return {START: start, **{phase: _in_phase(run, sitting, phase) for phase in run.phases}}, before_engine


def _builds(run: _Run, seats: Mapping[str, Seat]) -> Iterator[tuple[Seat, Parts]]:
    """The roles on a GPU in the order in which they are built, each with what the earlier ones have there then.

    On Ray each leaves before the next one is built; inline they stay, but for what an evaluation starts first: that leaves
    before a model's own roles are built. Of the process inline nothing is counted here, as it is also that of the role built.
    """
    offloads = run.config.cluster.offload_idle and len(seats) > 1
    by_itself = Counter({"other": 0 if run.inline else CONTEXT})
    left: Parts = Counter()
    for roles in run.starts:
        staying: Parts = Counter()
        for role in roles:
            if role not in seats:
                continue
            yield seats[role], left + staying
            staying += by_itself
            if not offloads or run.inline:
                staying += _kept(run, seats[role])
        left += sum((by_itself for role in roles if role in seats), Counter()) if offloads else staying


def _kept(run: _Run, seat: Seat) -> Parts:
    """What a role has on a GPU while it doesn't work and everything of it is there, beside its process."""
    parts: Parts = Counter()
    if seat.role == "rollout":
        engine = run.engine(run.placement.machines[seat.machine])
        if engine is not None:
            parts += Counter({"parameters": engine.weights, "kv_cache": max(0, engine.kv_cache)})
            parts += Counter({"other": engine.workspace})
    elif (held := run.held.get(seat.role)) is not None:
        states = held.states
        parts += Counter(
            {"parameters": states.parameters, "gradients": states.gradients, "optimizer": states.optimizer}
        )
    return parts


def _built(run: _Run, seat: Seat) -> Parts:
    """What a role and its process have on a GPU at the end of its construction, at most: everything, and under ZeRO-3 the
    parameters that its first forwards gather."""
    held = run.held.get(seat.role)
    gathered = 0 if held is None else held.states.forward_buffers
    return _kept(run, seat) + Counter({"other": CONTEXT + WORKSPACE, "buffers": gathered})


def _in_phase(run: _Run, sitting: Sequence[Seat], phase: str) -> Parts:
    """The bytes on a GPU in a phase, with those that its processes take by being there and by working."""
    working = sum(seat.role in run.phases[phase] for seat in sitting)
    processes = len(sitting)
    if run.inline:
        working, processes = min(1, working), 1
    parts = Counter({"other": CONTEXT * processes + WORKSPACE * working})
    return sum((_on_gpu(run, seat, phase) for seat in sitting), parts)


def _on_gpu(run: _Run, seat: Seat, phase: str) -> Parts:
    """What one role has on one of its GPUs in a phase, beside its process."""
    level = run.level(seat.role, phase)
    works = seat.role in run.phases[phase]
    parts: Parts = Counter()
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
    """Two buckets at each end of a transfer from GPU to GPU; with ``ipc`` the engines read the policy's. All ranks of a policy
    whose parameters are spread over them have some whole for a while. Of the largest transfer: the base of an adapter, say."""
    transfer = run.transfer
    if transfer is None:
        return 0
    bucket = transfer.largest_bucket
    if seat.role == "rollout":
        return 2 * bucket if transfer.transport == "nccl" else 0
    sends = transfer.transport == "ipc" or transfer.transport == "nccl" and seat.rank == 0
    return (2 * bucket if sends else 0) + transfer.most_gathered


# -- host memory ------------------------------------------------------------------------------------------------------


def _hosts(run: _Run) -> list[HostUsage]:
    """Host memory of each machine: each process by itself (inline they are one), what is offloaded, idle states, buckets of a
    transfer over host memory; and in the start the whole copy of its model that each rank reads, unless ZeRO-3 spreads it as
    it is read."""
    machines = run.placement.machines
    held: list[dict[str, Counter[str]]] = [{} for _ in machines]
    same: dict[Any, Parts] = {}
    for role, processes in started_roles(run.config).items():
        seats = run.placement.of(role)
        # Without GPUs Ray puts processes where it likes; all are counted on the first machine.
        where = [seat.machine for seat in seats] or [0] * processes
        for rank, m in enumerate(where):
            if machines:
                key = (role, rank == 0, machines[m].gpu_memory_bytes)
                if key not in same:
                    same[key] = _in_host(run, role, rank, machines[m])
                held[m].setdefault(role, Counter()).update(same[key])
                if run.inline and len(held[m]) > 1:
                    del held[m][role]["processes"]
    pools = [pool.roles for pool in run.placement.pools]
    return [
        HostUsage(m, machine.memory_bytes, {START: _start_in_host(run, held[m], pools), "run": _run_in_host(held[m])})
        for m, machine in enumerate(machines)
        if held[m]
    ]


def _run_in_host(held: Mapping[str, Parts]) -> Parts:
    """Between and in the phases: idle states keep their place."""
    found: Parts = sum(held.values(), Counter())
    del found["loading"]
    return found


def _start_in_host(run: _Run, held: Mapping[str, Parts], pools: Sequence[Sequence[str]]) -> Parts:
    """While roles are built: those that share GPUs one after the other, others at the same time.

    What one reads is gone from host memory when its states are elsewhere, there or on its GPU.
    """
    total: Parts = Counter({"processes": sum(parts["processes"] for parts in held.values())})
    queues = [[role for roles in run.starts for role in roles if role in pool] for pool in pools]
    queues += [[role] for role in held if not any(role in queue for queue in queues)]
    for queue in queues:
        before: Parts = Counter()
        worst: Parts = Counter()
        for role in queue:
            parts = held.get(role, Counter())
            stays = Counter({part: parts[part] for part in ("models", "offloaded", "pinning")})
            stays += Counter({"idle": 0 if run.inline else parts["idle"]})
            for moment in (before + Counter({"loading": parts["loading"]}), before + stays):
                worst = max(worst, moment, key=lambda found: sum(found.values()))
            before += stays
        total += worst
    return total


def _in_host(run: _Run, role: str, rank: int, machine: Machine) -> Parts:
    config, cuda = run.config, run.config.cluster.device == "cuda"
    each = HOST_PROCESS if cuda else HOST_PROCESS_CPU
    parts: Parts = Counter({"processes": each * (config.rollout.tensor_parallel if role == "rollout" else 1)})
    transfer = run.transfer
    if transfer is not None and transfer.transport in ("gloo", "shared_memory"):
        if role == "rollout" and transfer.transport == "gloo":
            parts["transfer"] = 2 * transfer.largest_bucket * config.rollout.tensor_parallel
        if role == "policy" and rank == 0:
            parts["transfer"] = 2 * transfer.largest_bucket
    if role == "rollout":
        engine, size = run.engine(machine), config.rollout.tensor_parallel
        if engine is not None and not cuda:
            parts["models"] = (engine.weights + max(0, engine.kv_cache)) * size
        elif engine is not None and role in run.turns:
            parts["idle"] = engine.weights * size
            if config.rollout.engine == "vllm":
                parts["pinning"] = max(0, engine.backup - engine.weights) * size
        return parts
    held = run.held.get(role)
    if held is None:
        return parts
    states = held.states
    parts["offloaded"], parts["loading"] = sum(states.host.values()), states.loading
    if not cuda:
        trains = role in run.phases.get("update", {})
        working = states.buffers + held.training if trains else states.forward_buffers + held.forward
        parts["models"] = states.resident + max(working, states.step_buffers)
        return parts
    parts["pinning"] = states.pinning
    if role in run.turns:
        parts["idle"] = states.resident
        parts["pinning"] += max(0, states.away - states.resident)
    return parts
