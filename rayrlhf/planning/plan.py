"""The plan of a run: what it does, where it sits, what it holds, what it sends, and all that can't work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from rayrlhf.config.base import JobConfig
from rayrlhf.config.derive import PlanRow, roles_of
from rayrlhf.config.rules import broken_rules
from rayrlhf.errors import InputRefused
from rayrlhf.planning.claims import assumed_machines, claims_of, machines_of, places_roles
from rayrlhf.planning.models import Known, known_models, longest_sample
from rayrlhf.planning.placement import Claim, Machine, Placement, place
from rayrlhf.planning.rows import plan_rows
from rayrlhf.planning.transfer import Transfer, sends_weights, transfer_of
from rayrlhf.planning.usage import GpuUsage, Usage, usage_of

__all__ = ["Plan", "check_plan", "make_plan", "memory_notes"]

GIB = 2**30
MOST_CHANGES = 4
"""So many changes together are still named."""


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
    """What was assumed, and what isn't used."""


def make_plan(config: JobConfig, *, online: bool = True) -> Plan:
    """Plan a run. Starts nothing and loads no weights.

    Args:
        config: of any algorithm, whose rules hold.
        online: whether the hub may be asked for the dimensions of a model that is in no folder, cache or catalogue.
    """
    claims, known = claims_of(config), known_models(config, online=online)
    problems = [*known.missing, *_shape_problems(config, known)]
    notes = list(known.unknown)
    machines = machines_of(config.cluster)
    assumed = not machines
    if assumed:
        machines = assumed_machines(claims, config.cluster.placement) or [Machine("this machine", 0)]
    placement = transfer = usage = None
    try:
        placement = place(claims, config.cluster.placement, machines)
    except InputRefused as refused:
        problems += refused.problems
    if placement is not None:
        policy = known.one("policy")
        if sends_weights(config) and policy is not None:
            transfer = transfer_of(config, policy.shape, placement)
        usage = usage_of(config, known, placement, transfer)
        tight = [*_memory_problems(config, known, placement, usage)]
        # On CPUs the estimate adds up peaks that needn't come at the same time.
        (problems if config.cluster.device == "cuda" else notes).extend(tight)
        notes += _placement_notes(config, placement, assumed)
    return Plan(config, plan_rows(config), claims, known, placement, assumed, transfer, usage, problems, _once(notes))


def _once(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def check_plan(config: JobConfig) -> list[str]:
    """What keeps a run from starting, however much memory there is: heads that can't be dealt out, roles that can't be placed
    on the machines that are named. Asks nobody; of models whose dimensions aren't at hand nothing is said."""
    known = known_models(config, online=False)
    problems = [*_engine_sizes(config, known), *_shared_heads(config, known)]
    machines = machines_of(config.cluster)
    if machines and places_roles(config) and config.cluster.executor == "ray":
        try:
            place(claims_of(config), config.cluster.placement, machines)
        except InputRefused as refused:
            problems += refused.problems
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
    except InputRefused:
        return []
    policy = known.one("policy")
    transfer = transfer_of(config, policy.shape, placement) if sends_weights(config) and policy is not None else None
    return [*_memory_problems(config, known, placement, usage_of(config, known, placement, transfer))]


# -- dimensions -------------------------------------------------------------------------------------------------------


def _shape_problems(config: Any, known: Known) -> list[str]:
    return [
        *_engine_sizes(config, known),
        *_shared_heads(config, known),
        *_lengths(config, known),
        *_layers(config, known),
    ]


def _engine_sizes(config: Any, known: Known) -> Iterator[str]:
    for model in known.models.get("rollout", []):
        size = config.rollout.tensor_parallel
        legal = model.shape.engine_sizes(model.shape.heads)
        if size not in legal:
            shape = model.shape
            yield (
                f"rollout.tensor_parallel: found {size}, but {model.path} has {shape.heads} heads, {shape.kv_heads} key-value"
                f" heads and an MLP of {shape.intermediate}, which can't be dealt out over {size} GPUs; what would do:"
                f" {_or(_nearest(legal, size))}"
            )


def _shared_heads(config: Any, known: Known) -> Iterator[str]:
    for role in ("policy", "critic"):
        model, section = known.one(role), getattr(config, role, None)
        if model is None or section is None:
            continue
        shape = model.shape
        divided = {
            "sequence_parallel": {"heads": shape.heads},
            "tensor_parallel": {
                "heads": shape.heads,
                "key-value heads": shape.kv_heads,
                "MLP columns": shape.intermediate,
            },
        }
        for name, numbers in divided.items():
            size = getattr(section, name, 1)
            odd = [f"{number} {what}" for what, number in numbers.items() if number % size]
            if size > 1 and odd:
                legal = [
                    n for n in range(1, section.ranks + 1) if not any(x % n for x in (section.ranks, *numbers.values()))
                ]
                yield (
                    f"{role}.{name}: found {size}, but {model.path} has {' and '.join(odd)}, which can't be dealt out over"
                    f" {size} ranks; what would do: {_or(_nearest(legal, size))}"
                )


def _lengths(config: Any, known: Known) -> Iterator[str]:
    model = known.one("policy") or known.one("rollout")
    wanted = longest_sample(config)
    if model is not None and model.shape.longest is not None and wanted > model.shape.longest:
        keys = (
            "data.max_tokens" if hasattr(config, "training") else "data.max_prompt_tokens + rollout.max_response_tokens"
        )
        yield f"{keys} is {wanted}, but {model.path} reads at most {model.shape.longest} tokens"


def _layers(config: Any, known: Known) -> Iterator[str]:
    model = known.one("critic")
    if model is not None and model.layers is not None and model.layers > model.shape.layers:
        yield f"critic.num_layers is {model.layers}, but {model.path} has {model.shape.layers} layers"


def _nearest(legal: list[int], size: int) -> list[int]:
    return [n for n in legal if n < size][-2:] + [n for n in legal if n > size][:1]


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory_problems(config: Any, known: Known, placement: Placement, usage: Usage) -> Iterator[str]:
    help_once = cache(lambda: _help(config, known))
    tight = next((engine for engine in usage.engines if engine.sequences == 0), None)
    if tight is not None:
        yield _no_room_for_cache(config, known, placement, tight)
    for gpus in _alike(usage.gpus):
        phase, peak = gpus[0].peak
        limit = gpus[0].limit
        if limit is not None and peak > limit:
            parts = gpus[0].phases[phase]
            largest = sorted(parts, key=lambda part: -parts[part])[:2]
            most = ", ".join(f"{part} {parts[part] / GIB:.1f}" for part in largest)
            yield (
                f"{_named(gpus, placement)} ({', '.join(gpus[0].roles)}): {peak / GIB:.1f} GiB in the phase {phase},"
                f" {(peak - limit) / GIB:.1f} more than the {limit / GIB:.1f} there are ({most}); {help_once()}"
            )
    for host in usage.hosts:
        if host.limit is not None and host.total > host.limit:
            largest = sorted(host.parts, key=lambda part: -host.parts[part])[:2]
            most = ", ".join(f"{part} {host.parts[part] / GIB:.0f}" for part in largest)
            yield (
                f"host memory of {placement.machines[host.machine].name}: {host.total / GIB:.0f} GiB,"
                f" {(host.total - host.limit) / GIB:.0f} more than the {host.limit / GIB:.0f} there are ({most});"
                f" {help_once()}"
            )


def _no_room_for_cache(config: Any, known: Known, placement: Placement, engine: Any) -> str:
    rollout = config.rollout
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    need = engine.weights + engine.workspace + engine.sequence
    if rollout.kv_cache_gib is not None:
        least = engine.sequence * rollout.tensor_parallel / GIB
        return (
            f"rollout.kv_cache_gib: found {rollout.kv_cache_gib:g}, but one sequence of {longest} tokens needs"
            f" {least:.4g} GiB; what would do: at least that"
        )
    memory = placement.machines[placement.of("rollout")[0].machine].gpu_memory_bytes or need
    model = known.models["rollout"][0]
    wider = [n for n in model.shape.engine_sizes(8) if n > rollout.tensor_parallel]
    changes = [f"rollout.gpu_memory_fraction of at least {need / memory:.2f}"] if need < memory else []
    changes += [f"rollout.tensor_parallel {wider[0]}"] if wider else []
    return (
        f"rollout.gpu_memory_fraction: found {rollout.gpu_memory_fraction:g} of {memory / GIB:.1f} GiB, but an engine's weights"
        f" ({engine.weights / GIB:.1f}), its workspace ({engine.workspace / GIB:.1f}) and one sequence of {longest} tokens"
        f" ({engine.sequence / GIB:.2f}) need {need / GIB:.1f} GiB on each of its GPUs; what would do:"
        f" {' or '.join(changes) or 'GPUs with more memory'}"
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
    more = f" and {others} more machine{'s' if others > 1 else ''}" if others else ""
    return f"{placement.machines[gpus[0].machine].name} GPU {span}{more}"


def _help(config: Any, known: Known) -> str:
    """Changes of one key with which all fits; else several that do together, each time the one that helps most."""
    before = _excess(config, known)
    found = _tried(config, known)
    if fitting := [text for text, _, after in found if after == 0]:
        return f"what would do: {', or '.join(fitting[:3])}"
    together: list[str] = []
    while before is not None and len(together) < MOST_CHANGES:
        better = [(after, k) for k, (_, _, after) in enumerate(found) if after is not None and after < before]
        if not better:
            break
        before, best = min(better)
        text, config, _ = found[best]
        together.append(text)
        if before == 0:
            return f"what would do: {' with '.join(together)}"
        found = _tried(config, known)
    if together:
        return f"what would help, though it isn't enough: {', '.join(together)}; more GPUs, or a smaller model"
    return "what would do: more GPUs, or a smaller model"


def _tried(config: Any, known: Known) -> list[tuple[str, Any, int | None]]:
    """Each change in words, the configuration with it, and what is too much then: None where it is illegal, or no way to go."""
    found = []
    for key, value in _changes(config):
        changed = _changed(config, key, value)
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        legal = not broken_rules(changed) and not (
            key == "rollout.tensor_parallel" and any(_engine_sizes(changed, known))
        )
        found.append((f"{key} {shown}", changed, _excess(changed, known) if legal else None))
    return found


def _changes(config: Any) -> Iterator[tuple[str, Any]]:
    """Changes that take less memory, the cheapest first."""
    if not config.cluster.offload_idle:
        yield "cluster.offload_idle", True
    trained = [role for role in ("policy", "critic") if hasattr(getattr(config, role, None), "zero_stage")]
    for role in trained:
        section = getattr(config, role)
        if not section.gradient_checkpointing:
            yield f"{role}.gradient_checkpointing", True
        if section.zero_stage < 3 and section.ranks > 1 and section.tensor_parallel == 1:
            yield f"{role}.zero_stage", 3
        if section.tokens_per_micro_batch // 2 >= longest_sample(config):
            yield f"{role}.tokens_per_micro_batch", max(longest_sample(config), section.tokens_per_micro_batch // 4)
        if section.offload_optimizer == "none":
            yield f"{role}.offload_optimizer", "cpu"
        if section.logits_chunk_tokens > 512:
            yield f"{role}.logits_chunk_tokens", 512
    for role in ("reference", "reward"):
        section = getattr(config, role, None)
        if (
            role in roles_of(config)
            and getattr(section, "zero_stage", 3) == 0
            and section is not None
            and section.ranks > 1
        ):
            yield f"{role}.zero_stage", 3
    if hasattr(config, "rollout"):
        if config.rollout.kv_cache_gib is None:
            yield "rollout.gpu_memory_fraction", round(config.rollout.gpu_memory_fraction / 2, 2)
        if getattr(config.rollout, "weight_bucket_mib", 0) > 256:
            yield "rollout.weight_bucket_mib", 256
        yield "rollout.tensor_parallel", 2 * config.rollout.tensor_parallel


def _changed(config: Any, key: str, value: Any) -> Any:
    section, name = key.split(".")
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def _excess(config: Any, known: Known) -> int | None:
    """Bytes beyond all limits, the worst of each kind; None where it can't be placed."""
    claims = claims_of(config)
    machines = machines_of(config.cluster)
    try:
        placement = place(claims, config.cluster.placement, machines)
    except InputRefused:
        return None
    policy = known.one("policy")
    transfer = transfer_of(config, policy.shape, placement) if sends_weights(config) and policy is not None else None
    usage = usage_of(config, known, placement, transfer)
    if any(engine.sequences == 0 for engine in usage.engines):
        return None
    over = [gpu.peak[1] - gpu.limit for gpu in usage.gpus if gpu.limit is not None]
    over_host = [host.total - host.limit for host in usage.hosts if host.limit is not None]
    return max(0, *over, 0) + max(0, *over_host, 0)


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
