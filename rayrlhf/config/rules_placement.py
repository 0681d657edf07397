"""Rules across keys: which roles share GPUs, how models are spread over ranks, what is offloaded, how weights travel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rayrlhf.config.derive import LORA_RANKS, needs_gpu, roles_of
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.config.roots import EVERY, JOBS, TRAINED, AnyConfig, TrainedRoot
from rayrlhf.config.rulebook import Violation, rule
from rayrlhf.config.schema import Config

__all__: list[str] = []

_SENDS = (Config, PreferenceConfig)
"""Those whose policy sends its weights to engines."""
_GENERATES = (*_SENDS, *JOBS)

# -- placement --------------------------------------------------------------------------------------------------


@rule(of=EVERY)
def _placement_names_roles(config: AnyConfig) -> Iterator[Violation]:
    """The lists of `cluster.placement` name roles that the run starts and that use GPUs, each at most once."""
    lists = config.cluster.placement
    if isinstance(lists, str):
        return
    roles, seen = roles_of(config), set()
    legal = ", ".join(role for role in roles if needs_gpu(config, role))
    for k in range(len(lists)):
        for role in lists[k]:
            if role not in roles:
                why = "which this run doesn't start"
            elif not needs_gpu(config, role):
                why = "which needs no GPU: it scores by functions and services"
            elif role in seen:
                why = "which stands there twice"
            else:
                seen.add(role)
                continue
            yield Violation((f"cluster.placement.{k}", "cluster.placement"), f"found {role!r}, {why}; legal: {legal}")


@rule(of=EVERY)
def _inline_shares_everything(config: AnyConfig) -> Iterator[Violation]:
    """`cluster.executor: inline` needs `cluster.placement: colocated`: all roles are in one process."""
    if config.cluster.executor == "inline" and config.cluster.placement != "colocated":
        yield Violation(
            ("cluster.placement", "cluster.executor"),
            "found roles with GPUs of their own, but cluster.executor inline runs every role in the driver's one process;"
            " legal: colocated, or the executor ray",
        )


# -- ranks ------------------------------------------------------------------------------------------------------


@rule("policy", "critic", of=TRAINED)
def _ranks_hold_whole_groups(config: TrainedRoot, role: str) -> Iterator[Violation]:
    """`sequence_parallel` * `tensor_parallel` divides `ranks`, and at most one of the two is above 1."""
    section = getattr(config, role)
    if section is None:
        return
    sequence, tensor = section.sequence_parallel, section.tensor_parallel
    if sequence > 1 and tensor > 1:
        yield Violation(
            (f"{role}.tensor_parallel", f"{role}.sequence_parallel"),
            f"found {tensor} with {role}.sequence_parallel {sequence}: a layer's weights are spread over ranks, or a long"
            f" sequence is, not both; legal: 1, or {role}.sequence_parallel 1",
        )
    elif section.ranks % (sequence * tensor):
        key, size = ("sequence_parallel", sequence) if sequence > 1 else ("tensor_parallel", tensor)
        divisors = [str(d) for d in range(1, section.ranks + 1) if section.ranks % d == 0]
        yield Violation(
            (f"{role}.{key}", f"{role}.ranks"),
            f"found {size}, which doesn't divide {role}.ranks {section.ranks}; legal: {', '.join(divisors)}",
        )


@rule("policy", "critic", of=TRAINED)
def _one_way_to_spread_weights(config: TrainedRoot, role: str) -> Iterator[Violation]:
    """`tensor_parallel` above 1 needs `zero_stage` 1 or 2, and no `lora`."""
    section = getattr(config, role)
    if section is None or section.tensor_parallel == 1:
        return
    found = f"found {section.tensor_parallel}"
    if section.zero_stage == 3:
        yield Violation(
            (f"{role}.tensor_parallel", f"{role}.zero_stage"),
            f"{found} with {role}.zero_stage 3, which spreads each layer's weights over all ranks already; legal: 1, or"
            " zero_stage 1 or 2",
        )
    if section.lora is not None:
        yield Violation(
            (f"{role}.tensor_parallel", f"{role}.lora"),
            f"{found} with {role}.lora: adapters aren't spread over ranks; legal: 1, or lora: null",
        )


@rule(of=_GENERATES)
def _vllm_spreads_weights(config: Any) -> Iterator[Violation]:
    """`rollout.tensor_parallel` above 1 needs `rollout.engine: vllm` and `cluster.executor: ray`."""
    found = config.rollout.tensor_parallel
    if found > 1 and config.rollout.engine != "vllm":
        yield Violation(
            ("rollout.tensor_parallel", "rollout.engine"),
            f"found {found}, but an engine of {config.rollout.engine} is one process; legal: 1, or the engine vllm",
        )
    if found > 1 and config.cluster.executor == "inline":
        yield Violation(
            ("rollout.tensor_parallel", "cluster.executor"),
            f"found {found}, but cluster.executor inline runs every role in the driver's one process; legal: 1, or the"
            " executor ray",
        )


# -- offload ----------------------------------------------------------------------------------------------------


@rule("policy", "critic", "reference", "reward", "measure", "scores", of=EVERY)
def _offloaded_parameters_are_spread(config: AnyConfig, role: str) -> Iterator[Violation]:
    """`offload_parameters` other than `none` needs `zero_stage` 3: only its layers come and go one by one."""
    section = getattr(config, role)
    if getattr(section, "offload_parameters", "none") != "none" and section.zero_stage != 3:
        yield Violation(
            (f"{role}.offload_parameters", f"{role}.zero_stage"),
            f"found {section.offload_parameters} with {role}.zero_stage {section.zero_stage}; legal: none, or zero_stage 3",
        )


@rule("policy", "critic", of=TRAINED)
def _nvme_has_a_folder(config: TrainedRoot, role: str) -> Iterator[Violation]:
    """`nvme_path` and an offload to `nvme` go together."""
    section = getattr(config, role)
    if section is None:
        return
    on_disk = [name for name in ("offload_optimizer", "offload_parameters") if getattr(section, name) == "nvme"]
    if on_disk and section.nvme_path is None:
        yield Violation(
            (f"{role}.nvme_path", *(f"{role}.{name}" for name in on_disk)),
            f"found null, but {role}.{on_disk[0]} nvme needs a folder on a disk of each machine; legal: a folder",
        )
    if not on_disk and section.nvme_path is not None:
        yield Violation(
            (f"{role}.nvme_path", f"{role}.offload_optimizer"),
            f"found {section.nvme_path!r}, which nothing is offloaded to; legal: null, or {role}.offload_optimizer nvme",
        )


@rule("policy", "critic", of=TRAINED)
def _nvme_takes_what_is_spread(config: TrainedRoot, role: str) -> Iterator[Violation]:
    """`offload_optimizer: nvme` needs `zero_stage` 3: DeepSpeed's other stages know no disk."""
    section = getattr(config, role)
    if section is not None and section.offload_optimizer == "nvme" and section.zero_stage != 3:
        yield Violation(
            (f"{role}.offload_optimizer", f"{role}.zero_stage"),
            f"found nvme with {role}.zero_stage {section.zero_stage}; legal: none or cpu, or zero_stage 3",
        )


# -- weight transfer --------------------------------------------------------------------------------------------


@rule(of=_SENDS)
def _adapters_travel_where_there_are_some(config: Any) -> Iterator[Violation]:
    """`rollout.lora_transfer: adapter` needs `policy.lora`."""
    if config.rollout.lora_transfer == "adapter" and config.policy.lora is None:
        yield Violation(
            ("rollout.lora_transfer", "policy.lora"),
            "found adapter, but the policy has none (policy.lora: null); legal: merged, or policy.lora",
        )


@rule(of=_SENDS)
def _adapters_fit_into_their_engine(config: Any) -> Iterator[Violation]:
    """`rollout.lora_transfer: adapter` with vLLM takes a `policy.lora.rank` of at most 512, for which vLLM makes room."""
    rollout, lora = config.rollout, config.policy.lora
    if rollout.lora_transfer == "adapter" and rollout.engine == "vllm" and lora and lora.rank > LORA_RANKS[-1]:
        yield Violation(
            ("policy.lora.rank", "rollout.lora_transfer", "rollout.engine"),
            f"found {lora.rank}, but vLLM applies adapters up to rank {LORA_RANKS[-1]}; legal: up to that, or"
            " rollout.lora_transfer merged",
        )


@rule(of=_SENDS)
def _transport_has_its_wire(config: Any) -> Iterator[Violation]:
    """`rollout.weight_transport`: `nccl` and `ipc` need `cluster.device: cuda`; `shared_memory` needs one machine; and
    `cluster.executor: inline` has no other than `shared_memory`."""
    found, cluster = config.rollout.weight_transport, config.cluster
    machines = sum(cluster.nodes[k].count for k in range(len(cluster.nodes)))
    if cluster.executor == "inline" and found not in ("auto", "shared_memory"):
        yield Violation(
            ("rollout.weight_transport", "cluster.executor"),
            f"found {found}, but with cluster.executor inline both ends are one process; legal: auto or shared_memory, or the"
            " executor ray",
        )
    elif found in ("nccl", "ipc") and cluster.device != "cuda":
        yield Violation(
            ("rollout.weight_transport", "cluster.device"),
            f"found {found}, which goes from GPU to GPU, but cluster.device is {cluster.device}; legal: auto, shared_memory or"
            " gloo, or the device cuda",
        )
    elif found == "shared_memory" and machines > 1:
        yield Violation(
            ("rollout.weight_transport", "cluster.nodes"),
            f"found shared_memory, which stays on one machine, but cluster.nodes has {machines}; legal: auto or gloo, or one"
            " machine",
        )


def _engines_share_with_the_policy(config: Any) -> bool:
    placement = config.cluster.placement
    if isinstance(placement, str):
        return placement == "colocated"
    return any({"policy", "rollout"} <= set(placement[k]) for k in range(len(placement)))


@rule(of=_SENDS)
def _ipc_shares_gpus(config: Any) -> Iterator[Violation]:
    """`rollout.weight_transport: ipc` needs a `cluster.placement` in which rollout and policy share GPUs, and a rank of the
    policy for each GPU of the engines: `policy.ranks` is at least `rollout.engines` * `rollout.tensor_parallel`."""
    if config.rollout.weight_transport != "ipc":
        return
    gpus = config.rollout.engines * config.rollout.tensor_parallel
    if not _engines_share_with_the_policy(config):
        yield Violation(
            ("rollout.weight_transport", "cluster.placement"),
            "found ipc, but rollout and policy have GPUs of their own; legal: auto or nccl, or a cluster.placement in which"
            " they share",
        )
    elif config.policy.ranks < gpus:
        yield Violation(
            ("rollout.weight_transport", "policy.ranks", "rollout.engines", "rollout.tensor_parallel"),
            f"found ipc, but only {config.policy.ranks} of the engines' {gpus} GPUs hold a rank of the policy; legal: auto or"
            f" gloo, or policy.ranks of at least {gpus}",
        )


@rule(of=_SENDS)
def _nccl_goes_between_gpus(config: Any) -> Iterator[Violation]:
    """`rollout.weight_transport: nccl` needs a `cluster.placement` in which rollout and policy have GPUs of their own: NCCL takes
    no two processes on one GPU."""
    nccl = config.rollout.weight_transport == "nccl" and config.cluster.device == "cuda"
    if nccl and _engines_share_with_the_policy(config):
        yield Violation(
            ("rollout.weight_transport", "cluster.placement"),
            "found nccl, but rollout and policy share GPUs, and NCCL takes no two processes on one; legal: auto, ipc or gloo, or"
            " a cluster.placement in which they don't share",
        )
