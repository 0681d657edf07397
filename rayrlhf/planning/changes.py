"""Changes of a configuration with which it can run: each is tried, on the configuration's rules and on the plan itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rayrlhf.config.derive import longest_of
from rayrlhf.config.jobs import ModelEvaluationConfig
from rayrlhf.config.rules import broken_rules
from rayrlhf.planning.claims import assumed_machines, claims_of, machines_of, started_roles
from rayrlhf.planning.dimensions import odd_sizes, other_problems
from rayrlhf.planning.memory import CONTEXT
from rayrlhf.planning.models import Known, longest_sample
from rayrlhf.planning.placement import Machine, Placement, count_key, fits, place
from rayrlhf.planning.transfer import Transfer, sends_weights, transfer_of
from rayrlhf.planning.usage import GpuUsage, Usage, usage_of

__all__ = ["Advice", "Change", "engine_shortfall", "placed"]

Change = Mapping[str, Any]
"""New values by key."""

MOST_CHANGES = 4
"""So many changes together are still named."""
MOST_NAMED = 3
"""So many ways out are named."""
MOST_TRIED = 6
"""Numbers of one key whose memory is planned."""


def placed(config: Any, known: Known, placement: Placement) -> tuple[Transfer | None, Usage]:
    """The transfer and the bytes of a run whose roles are placed."""
    policy = None if "policy" in known.misfits else known.one("policy")
    transfer = transfer_of(config, policy.shape, placement) if sends_weights(config) and policy is not None else None
    return transfer, usage_of(config, known, placement, transfer)


def engine_shortfall(config: Any, gpu: GpuUsage) -> int:
    """What a GPU has too little of when an engine of vLLM is built on it beside others: it refuses to start where less is free
    than ``rollout.gpu_memory_fraction`` of the whole, whatever it then takes (`request_memory` in vllm/v1/worker/utils.py)."""
    if not gpu.before_engine or gpu.limit is None or config.rollout.engine != "vllm":
        return 0
    wanted = math.ceil(config.rollout.gpu_memory_fraction * gpu.limit)
    return max(0, gpu.before_engine + CONTEXT + wanted - gpu.limit)


class Advice:
    """Finds changes that would do.

    A change does where the changed configuration breaks no rule, can be placed, fits into all memory, and has no problem with
    the models' dimensions that there isn't now.

    Args:
        config: whose rules hold.
        known: its models.
    """

    def __init__(self, config: Any, known: Known):
        self._config, self._known = config, known
        self._odd = self._dimensions(config)

    def for_memory(self, firsts: Iterable[Change] = ()) -> str:
        """What would do where something doesn't fit into memory.

        Args:
            firsts: changes one of which is needed in any case; none: any that saves memory.
        """
        needed = list(firsts)
        tried = [(change, self._excess(change)) for change in needed or self._savers({})]
        if does := [change for change, excess in tried if excess == 0]:
            return f"what would do: {', or '.join(map(_shown, does[:MOST_NAMED]))}"
        change: Change = {}
        excess = self._excess(change)
        if needed:
            possible = [(more, k) for k, (_, more) in enumerate(tried) if more is not None]
            if possible:
                excess, best = min(possible)
                change = tried[best][0]
        change, left = self._mended(change, excess)
        if change and left == 0:
            return f"what would do: {_shown(change)}"
        if change:
            return f"what would help, though it isn't enough: {_shown(change)}; more GPUs, or a smaller model"
        return "what would do: more GPUs, or a smaller model"

    def for_cache(self, firsts: Iterable[Change]) -> str:
        """What would do where an engine has no room for one sequence; on CPUs, whatever other memory there is.

        Args:
            firsts: changes one of which is needed in any case.
        """
        needed = list(firsts)
        if does := [change for change in needed if self._does(change)]:
            return f"what would do: {', or '.join(map(_shown, does[:MOST_NAMED]))}"
        return self.for_memory(needed)

    def for_placement(self) -> str:
        """What would do where roles can't be placed."""
        ways = [*self._ways(), self._all_smaller()]
        does: list[Change] = []
        roomy: list[Change] = []  # what leaves too little memory
        for way in ways[:-1]:
            self._try(way, does, roomy)
            if len(does) == MOST_NAMED:
                break
        if len(does) < MOST_NAMED:
            self._try(ways[-1], does, roomy)
        for change in [] if does else roomy:
            mended, left = self._mended(change, self._excess(change))
            if left == 0:
                does.append(mended)
        if does:
            return f"what would do: {', or '.join(map(_shown, does))}"
        return "what would do: a larger cluster, or a smaller model; fewer ranks and engines alone wouldn't"

    def for_size(self, key: str, legal: Iterable[int]) -> str:
        """What would do in place of a size that a model can't be dealt out over.

        Args:
            key: of the size.
            legal: sizes that the model allows.
        """
        sizes = list(legal)
        if does := [size for size in sizes if self._does({key: size})]:
            return f"what would do: {' or '.join(map(str, does))}"
        return f"the model allows {' or '.join(map(str, sizes))}, but other rules or the cluster don't"

    # -- trying -----------------------------------------------------------------------------------------------------

    def _dimensions(self, config: Any) -> set[str]:
        return {*(odd.text for odd in odd_sizes(config, self._known)), *other_problems(config, self._known)}

    def _does(self, change: Change) -> bool:
        excess = self._excess(change)
        # On CPUs memory is no reason to refuse a run.
        return excess == 0 or excess is not None and self._config.cluster.device != "cuda"

    def _excess(self, change: Change) -> int | None:
        """Bytes beyond all limits, the worst of each kind; None where it is illegal, or can't be placed, or an engine has no KV
        cache."""
        config = _changed(self._config, change)
        if broken_rules(config) or not self._dimensions(config) <= self._odd:
            return None
        claims, sharing, machines = claims_of(config), config.cluster.placement, _machines(config)
        if not fits(claims, sharing, machines):
            return None
        _, usage = placed(config, self._known, place(claims, sharing, machines))
        if any(engine.sequences == 0 for engine in usage.engines):
            return None
        over = [gpu.peak[1] - gpu.limit for gpu in usage.gpus if gpu.limit is not None]
        over_host = [host.total - host.limit for host in usage.hosts if host.limit is not None]
        engines = [engine_shortfall(config, gpu) for gpu in usage.gpus]
        return max(0, *over, 0) + max(0, *over_host, 0) + max(0, *engines, 0)

    def _try(self, changes: Iterable[Change], does: list[Change], roomy: list[Change]) -> None:
        """Put the first change that does among ``does``; where none does, the first one that is legal and leaves room for all
        roles among ``roomy``. Of those only so many are tried."""
        tried: list[Change] = []
        for change in changes:
            config = _changed(self._config, change)
            if broken_rules(config) or not fits(claims_of(config), config.cluster.placement, _machines(config)):
                continue
            if self._does(change):
                does.append(change)
                return
            tried.append(change)
            if len(tried) == MOST_TRIED:
                break
        roomy += [change for change in tried if self._excess(change) is not None][:1]

    def _mended(self, change: Change, before: int | None) -> tuple[Change, int | None]:
        """Several changes that take less memory, each time the one that helps most; and the bytes that are too many then."""
        steps = 0
        while before and steps < MOST_CHANGES:
            more = [{**change, **saver} for saver in self._savers(change)]
            better = [
                (left, k) for k, one in enumerate(more) if (left := self._excess(one)) is not None and left < before
            ]
            if not better:
                break
            before, best = min(better)
            change, steps = more[best], steps + 1
        return change, before

    # -- what is tried ----------------------------------------------------------------------------------------------

    def _savers(self, change: Change) -> Iterator[Change]:
        """Changes that take less memory, the cheapest first."""
        config = _changed(self._config, change)
        if config.cluster.executor == "inline" and config.cluster.device == "cuda":
            yield {"cluster.executor": "ray"}
        if not config.cluster.offload_idle:
            yield {"cluster.offload_idle": True}
        if hasattr(config, "rollout"):
            yield from self._left_for_engines(config)
        for role in ("policy", "critic"):
            if hasattr(getattr(config, role, None), "zero_stage"):
                yield from _trainer_savers(config, role)
        for key, section in _frozen(config).items():
            if section.zero_stage == 0 and section.ranks > 1:
                yield {f"{key}.zero_stage": 3}
        if hasattr(config, "rollout"):
            rollout = config.rollout
            if rollout.kv_cache_gib is None:
                for share in (0.9, 0.5):
                    yield {"rollout.gpu_memory_fraction": round(share * rollout.gpu_memory_fraction, 2)}
            if getattr(rollout, "weight_bucket_mib", 0) > 256:
                yield {"rollout.weight_bucket_mib": 256}
            yield {"rollout.tensor_parallel": 2 * rollout.tensor_parallel}
        if config.cluster.device == "cuda":
            yield from _parameters_away(config)

    def _left_for_engines(self, config: Any) -> Iterator[Change]:
        """The share of a GPU that others leave for an engine when it is built, where it asks for more."""
        claims, sharing, machines = claims_of(config), config.cluster.placement, _machines(config)
        if not fits(claims, sharing, machines):
            return
        _, usage = placed(config, self._known, place(claims, sharing, machines))
        left = [
            (gpu.limit - (gpu.before_engine or 0) - CONTEXT) / gpu.limit
            for gpu in usage.gpus
            if gpu.limit is not None and engine_shortfall(config, gpu)
        ]
        if left and min(left) >= 0.01:
            yield {"rollout.gpu_memory_fraction": math.floor(100 * min(left)) / 100}

    def _ways(self) -> Iterator[Iterator[Change]]:
        """Single changes that let more roles find room, by key; of each the smallest first."""
        config = self._config
        yield iter([{"cluster.placement": "colocated"}] if config.cluster.placement != "colocated" else [])
        claims = [claim for claim in claims_of(config) if claim.gpus]
        for key in dict.fromkeys(count_key(claim.role, claims) for claim in claims):
            yield iter([{key: count} for count in range(_at(config, key) - 1, 0, -1)])
        if hasattr(config, "rollout"):
            size = config.rollout.tensor_parallel
            yield ({"rollout.tensor_parallel": n} for n in range(size - 1, 0, -1) if size % n == 0)
        nodes = config.cluster.nodes
        if nodes and max(node.gpus for node in nodes):
            k = max(range(len(nodes)), key=lambda k: nodes[k].gpus)
            # At most as many as it would take with a machine for each process, and once more.
            most = nodes[k].count + 2 * sum(claim.processes for claim in claims)
            yield ({f"cluster.nodes.{k}.count": count} for count in range(nodes[k].count + 1, most + 1))

    def _all_smaller(self) -> Iterator[Change]:
        """Fewer processes of all roles at once, and smaller engines."""
        config = self._config
        claims = [claim for claim in claims_of(config) if claim.gpus]
        keys = dict.fromkeys(count_key(claim.role, claims) for claim in claims)
        size = config.rollout.tensor_parallel if hasattr(config, "rollout") else 1
        for count in range(max((claim.processes for claim in claims), default=0), 0, -1):
            fewer = {key: count for key in keys if _at(config, key) > count}
            for n in (n for n in range(size, 0, -1) if size % n == 0):
                change = fewer if n == size else {**fewer, "rollout.tensor_parallel": n}
                if len(change) > 1:  # single ones are tried before
                    yield change


def _frozen(config: Any) -> dict[str, Any]:
    """The sections of models that nothing trains, by their keys. An evaluation has one for its models and their reference."""
    roles = {"reference": "reference", "reward": "reward"}
    if isinstance(config, ModelEvaluationConfig):
        roles = {"measure": "reference", "scores": "scores"}
    started = started_roles(config)
    return {key: getattr(config, key) for key, role in roles.items() if role in started}


def _parameters_away(config: Any) -> Iterator[Change]:
    """Parameters in host memory. One rank alone has nothing else of ZeRO-3; several may have enough of it without."""
    trained = {role: getattr(config, role, None) for role in ("policy", "critic")}
    for key, section in {**trained, **_frozen(config)}.items():
        if getattr(section, "offload_parameters", "") == "none" and (section.zero_stage == 3 or section.ranks == 1):
            stage = {} if section.zero_stage == 3 else {f"{key}.zero_stage": 3}
            yield {**stage, f"{key}.offload_parameters": "cpu"}


def _trainer_savers(config: Any, role: str) -> Iterator[Change]:
    section = getattr(config, role)
    longest = longest_of(config, role)[0] if hasattr(config, "training") else longest_sample(config)
    if not section.gradient_checkpointing:
        yield {f"{role}.gradient_checkpointing": True}
    if section.zero_stage < 3 and section.ranks > 1 and section.tensor_parallel == 1:
        yield {f"{role}.zero_stage": 3}
    if section.tokens_per_micro_batch // 2 >= longest:
        yield {f"{role}.tokens_per_micro_batch": max(longest, section.tokens_per_micro_batch // 4)}
    if section.offload_optimizer == "none":
        yield {f"{role}.offload_optimizer": "cpu"}
    if section.logits_chunk_tokens > 512:
        yield {f"{role}.logits_chunk_tokens": 512}


def _machines(config: Any) -> list[Machine]:
    claims, sharing = claims_of(config), config.cluster.placement
    return machines_of(config.cluster) or assumed_machines(claims, sharing)


def _shown(change: Change) -> str:
    """In words: each part is what an override on the command line says, with a space for its equals sign."""
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in change.items()}
    return " with ".join(f"{key} {value}" for key, value in values.items())


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _changed(config: Any, change: Change) -> Any:
    for key, value in change.items():
        config = _with(config, key.split("."), value)
    return config


def _with(node: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    if isinstance(node, list):
        at = int(path[0])
        return [*node[:at], _with(node[at], path[1:], value), *node[at + 1 :]]
    return node.model_copy(update={path[0]: _with(getattr(node, path[0]), path[1:], value)})
