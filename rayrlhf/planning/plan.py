"""The plan of a run: what it does, where it sits, what it holds, what it sends, and all that can't work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from rayrlhf.config.base import JobConfig
from rayrlhf.config.derive import PlanRow, generated_lengths
from rayrlhf.planning.changes import Advice, Change, engine_shortfall, placed
from rayrlhf.planning.claims import assumed_machines, claims_of, machines_of, places_roles
from rayrlhf.planning.dimensions import odd_sizes, other_problems
from rayrlhf.planning.models import Known, known_models
from rayrlhf.planning.placement import Claim, DoesNotFitError, Machine, Placement, place
from rayrlhf.planning.rows import plan_rows
from rayrlhf.planning.transfer import Transfer, gpus_of, sends_weights
from rayrlhf.planning.usage import START, EngineBytes, GpuUsage, HostUsage, Usage

__all__ = ["Plan", "check_plan", "make_plan", "memory_notes"]

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    config: Any
    rows: list[PlanRow]
    """Batch arithmetic and processes."""
    claims: list[Claim]
    known: Known
    placement: Placement | None
    """None where the roles can't be placed; without seats where none needs a GPU."""
    assumed: bool
    """Whether the machines are assumed: the configuration names none."""
    transfer: Transfer | None
    usage: Usage | None
    """None where the roles can't be placed."""
    problems: list[str]
    """All that can't work, each with the nearest change that would."""
    notes: list[str]
    """What was assumed, and what isn't used. What couldn't be looked at stands in ``known.unseen``."""


def make_plan(config: JobConfig, *, online: bool = True) -> Plan:
    """Plan a run. Starts nothing and loads no weights.

    Args:
        config: of any algorithm, whose rules hold.
        online: whether the hub may be asked for the dimensions of a model that is in no folder, cache or catalogue.
    """
    claims, known = claims_of(config), known_models(config, online=online)
    problems = [*known.missing, *_model_problems(config, known), *other_problems(config, known)]
    notes: list[str] = []
    machines = machines_of(config.cluster)
    assumed = not machines
    if assumed:
        machines = assumed_machines(claims, config.cluster.placement) or [Machine("this machine", 0)]
    placement = transfer = usage = None
    try:
        placement = place(claims, config.cluster.placement, machines)
    except DoesNotFitError as refused:
        problems.append(_unplaced(config, known, refused))
    if placement is not None:
        transfer, usage = placed(config, known, placement)
        notes += _placement_notes(config, placement, assumed)
        # On machines that are assumed the roles may come to sit in another way.
        (notes if assumed else problems).extend(_transport_problems(config, placement))
        no_cache, too_much = _memory_problems(config, known, placement, usage)
        problems += no_cache
        # On CPUs the estimate adds up peaks that needn't come at the same time.
        (problems if config.cluster.device == "cuda" else notes).extend(too_much)
    return Plan(config, plan_rows(config), claims, known, placement, assumed, transfer, usage, problems, _once(notes))


def _once(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def check_plan(config: JobConfig) -> list[str]:
    """What keeps a run from starting, however much memory there is: heads that can't be dealt out, adapters of modules that
    aren't there, roles that can't be placed on the machines that are named, or sit so that their weights can't travel.

    Asks nobody; of models whose dimensions aren't at hand nothing is said.
    """
    known = known_models(config, online=False)
    problems = _model_problems(config, known)
    machines = machines_of(config.cluster)
    if machines and places_roles(config) and config.cluster.executor == "ray":
        try:
            problems += _transport_problems(config, place(claims_of(config), config.cluster.placement, machines))
        except DoesNotFitError as refused:
            problems.append(_unplaced(config, known, refused))
    return problems


def memory_notes(config: JobConfig) -> list[str]:
    """Which GPUs and machines will probably not have the memory that a run wants: estimates, so a run isn't refused for them.

    Asks nobody; nothing is said where nothing is known, or where the roles can't be placed.
    """
    machines = machines_of(config.cluster)
    if not machines or config.cluster.device != "cuda":
        return []
    known = known_models(config, online=False)
    try:
        placement = place(claims_of(config), config.cluster.placement, machines)
    except DoesNotFitError:
        return []
    no_cache, too_much = _memory_problems(config, known, placement, placed(config, known, placement)[1])
    return [*no_cache, *too_much]


def _model_problems(config: Any, known: Known) -> list[str]:
    sizes = [f"{odd.text}; {Advice(config, known).for_size(odd.key, odd.legal)}" for odd in odd_sizes(config, known)]
    return [*sizes, *known.misfits.values()]


def _transport_problems(config: Any, placement: Placement) -> Iterator[str]:
    """Engines on GPUs without a rank of the policy, from which ``ipc`` would bring the weights."""
    if config.cluster.device != "cuda" or not sends_weights(config) or config.rollout.weight_transport != "ipc":
        return
    bare = sorted(gpus_of(placement, "rollout") - gpus_of(placement, "policy"))
    if bare:
        machine = bare[0][0]
        first = ", ".join(str(gpu) for at, gpu in bare if at == machine)
        others = len({at for at, _ in bare}) - 1
        yield (
            "rollout.weight_transport: found ipc, but engines have GPUs without a rank of the policy"
            f" ({placement.machines[machine].name} GPU {first}{_and_more(others)}); legal: auto or gloo, or numbers of GPUs,"
            " policy.ranks and rollout.tensor_parallel with which each of them has one"
        )


def _unplaced(config: Any, known: Known, refused: DoesNotFitError) -> str:
    return f"cluster: {refused.problem}; {Advice(config, known).for_placement()}"


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory_problems(config: Any, known: Known, placement: Placement, usage: Usage) -> tuple[list[str], Iterator[str]]:
    """Engines without room for one sequence, which no device lets start; and memory of which too much is needed."""
    tight = min((e for e in usage.engines if e.sequences == 0), key=lambda e: e.kv_cache, default=None)
    first = [] if tight is None else [*_larger_caches(config, known, tight)]
    advice = Advice(config, known)
    no_cache = [] if tight is None else [f"{_no_room_for_cache(config, tight)}; {advice.for_cache(first)}"]
    return no_cache, _too_much(config, placement, usage, cache(lambda: advice.for_memory(first)))


def _too_much(config: Any, placement: Placement, usage: Usage, help_once: Callable[[], str]) -> Iterator[str]:
    for gpus in _alike(usage.gpus):
        phase, peak = gpus[0].peak
        limit = gpus[0].limit
        short = engine_shortfall(config, gpus[0]) if gpus[0].before_engine else 0
        if short:
            yield f"{_no_room_for_engine(config, gpus, placement, short)}; {help_once()}"
        if limit is not None and peak > limit and not (short and phase == START):
            parts = gpus[0].phases[phase]
            largest = sorted(parts, key=lambda part: -parts[part])[:2]
            most = ", ".join(f"{part} {parts[part] / GIB:.1f}" for part in largest)
            yield (
                f"{_named(gpus, placement)} ({', '.join(gpus[0].roles)}): {peak / GIB:.1f} GiB in the phase {phase},"
                f" {(peak - limit) / GIB:.1f} more than the {limit / GIB:.1f} there are ({most}); {help_once()}"
            )
    kinds: dict[tuple[int, int], list[HostUsage]] = {}
    for host in usage.hosts:
        if host.limit is not None and host.total > host.limit:
            kinds.setdefault((host.limit, host.total), []).append(host)
    for (limit, total), hosts in kinds.items():
        host, names = hosts[0], [placement.machines[host.machine].name for host in hosts]
        when, parts = max(host.phases.items(), key=lambda item: (sum(item[1].values()), item[0] != START))
        most = ", ".join(f"{part} {parts[part] / GIB:.0f}" for part in sorted(parts, key=lambda part: -parts[part])[:2])
        yield (
            f"host memory of {names[0]}{_and_more(len(names) - 1)}: {total / GIB:.0f} GiB in the {when},"
            f" {(total - limit) / GIB:.0f} more than the {limit / GIB:.0f} there are ({most}); {help_once()}"
        )


def _no_room_for_engine(config: Any, gpus: list[GpuUsage], placement: Placement, short: int) -> str:
    others, limit, fraction = gpus[0].before_engine or 0, gpus[0].limit or 0, config.rollout.gpu_memory_fraction
    return (
        f"{_named(gpus, placement)} ({', '.join(gpus[0].roles)}): an engine starts only where rollout.gpu_memory_fraction"
        f" {fraction:g} of {limit / GIB:.1f} GiB is free, {fraction * limit / GIB:.1f}, but others have {others / GIB:.1f} when"
        f" it is built: {short / GIB:.1f} too little"
    )


def _cache_needs(engine: EngineBytes) -> tuple[int, int]:
    """What an engine needs on a GPU for one sequence, and the GPU's memory: as much, where that isn't known."""
    need = engine.weights + engine.workspace + engine.least
    return need, engine.gpu_memory or need


def _larger_caches(config: Any, known: Known, engine: EngineBytes) -> Iterator[Change]:
    """Changes with which an engine has a KV cache for one sequence at least."""
    rollout = config.rollout
    if rollout.kv_cache_gib is not None:
        yield {"rollout.kv_cache_gib": math.ceil(1000 * engine.least * rollout.tensor_parallel / GIB) / 1000}
        return
    need, memory = _cache_needs(engine)
    if need < memory:
        yield {"rollout.gpu_memory_fraction": math.ceil(100 * need / memory) / 100}
    for size in known.models["rollout"][0].shape.engine_sizes(8):
        if size > rollout.tensor_parallel:
            yield {"rollout.tensor_parallel": size}


def _no_room_for_cache(config: Any, engine: EngineBytes) -> str:
    rollout = config.rollout
    longest = max(generated_lengths(config).values())
    if rollout.kv_cache_gib is not None:
        least = engine.least * rollout.tensor_parallel / GIB
        return (
            f"rollout.kv_cache_gib: found {rollout.kv_cache_gib:g}, but one sequence of {longest} tokens needs"
            f" {least:.4g} GiB"
        )
    need, memory = _cache_needs(engine)
    return (
        f"rollout.gpu_memory_fraction: found {rollout.gpu_memory_fraction:g} of {memory / GIB:.1f} GiB, but an engine's weights"
        f" ({engine.weights / GIB:.1f}), its workspace ({engine.workspace / GIB:.1f}) and one sequence of {longest} tokens"
        f" ({engine.least / GIB:.2f}) need {need / GIB:.1f} GiB on each of its GPUs"
    )


def _alike(gpus: tuple[GpuUsage, ...]) -> list[list[GpuUsage]]:
    """GPUs by what is on them."""
    kinds: dict[Any, list[GpuUsage]] = {}
    for gpu in gpus:
        parts = tuple((phase, tuple(sorted(found.items()))) for phase, found in gpu.phases.items())
        kinds.setdefault((gpu.roles, gpu.limit, parts), []).append(gpu)
    return list(kinds.values())


def _named(gpus: list[GpuUsage], placement: Placement) -> str:
    """GPUs in words: ``node 0 GPU 0-7 and 7 more machines``."""
    first = [gpu.gpu for gpu in gpus if gpu.machine == gpus[0].machine]
    span = str(first[0]) if len(first) == 1 else f"{first[0]}-{first[-1]}"
    others = len({gpu.machine for gpu in gpus}) - 1
    return f"{placement.machines[gpus[0].machine].name} GPU {span}{_and_more(others)}"


def _and_more(others: int) -> str:
    return f" and {others} more machine{'s' if others > 1 else ''}" if others else ""


def _placement_notes(config: Any, placement: Placement, assumed: bool) -> Iterator[str]:
    used = {(seat.machine, gpu) for seat in placement.seats for gpu in seat.gpus}
    if assumed and used:
        yield (
            "cluster.nodes names no machines, so the roles are placed on machines of"
            f" {placement.machines[0].gpus} GPUs; their memory and wires aren't known"
        )
    idle = sum(machine.gpus for machine in placement.machines) - len(used)
    if idle and not assumed and used:
        yield f"{idle} of {len(used) + idle} GPUs have no role"
