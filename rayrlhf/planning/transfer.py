"""One transfer of the policy's weights to the engines: over which wire, how many bytes, how long at the wire's speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayrlhf.config.base import JobConfig
from rayrlhf.config.offline import PreferenceConfig
from rayrlhf.config.schema import Config
from rayrlhf.planning.claims import assumed_machines, claims_of, machines_of, started_roles
from rayrlhf.planning.memory import itemsize_of
from rayrlhf.planning.placement import Placement, place
from rayrlhf.planning.shapes import Shape, Weight, numel

__all__ = ["Crossing", "Transfer", "gpus_of", "sends_weights", "transfer_of", "transport_of"]

MIB = 2**20
GROUP_BYTES = 2**28
"""Parameters under ZeRO-3 are gathered in groups of about so many bytes."""
HOST = "the machine's memory"
HOST_BYTES_PER_S = 10e9
"""Assumed: one process copies so many bytes a second within a machine's memory."""
GPU_BYTES_PER_S = 1e12
"""Assumed: a GPU copies so many bytes a second within its memory."""


@dataclass(frozen=True)
class Crossing:
    """Bytes over a wire."""

    wire: str
    """In words."""
    nbytes: int
    """What goes over its slowest part."""
    bytes_per_s: float | None
    """Its speed; None where it isn't known."""

    @property
    def seconds(self) -> float | None:
        """At the wire's speed: a lower bound."""
        return None if self.bytes_per_s is None else self.nbytes / self.bytes_per_s


@dataclass(frozen=True)
class Transfer:
    """One transfer."""

    transport: str
    what: str
    """``merged`` weights, or the ``adapter`` alone, or the ``base`` that it belongs to."""
    nbytes: int
    """What each engine receives, all of its GPUs together."""
    bucket_bytes: int
    """One bucket; there are two at a time."""
    send: Crossing
    """From the policy to the engines."""
    gather: Crossing | None
    """From all ranks of a policy under ZeRO-3, or under AutoTP from those that share its weights, to those that send."""
    gathered_bytes: int = 0
    """What a rank of the policy has of whole parameters at one time while they are gathered."""
    base: Transfer | None = None
    """What is sent once, before the first one: the model that an adapter belongs to."""

    @property
    def largest_bucket(self) -> int:
        """Of this one and its base."""
        return max(self.bucket_bytes, 0 if self.base is None else self.base.bucket_bytes)

    @property
    def most_gathered(self) -> int:
        """`gathered_bytes`, of this one or its base."""
        return max(self.gathered_bytes, 0 if self.base is None else self.base.gathered_bytes)

    @property
    def seconds(self) -> float | None:
        """Bucket k + 1 is gathered while k is sent: together they take as long as the longer one, or one after the other where
        both go over the same wire."""
        if self.gather is None:
            return self.send.seconds
        send, gather = self.send.seconds, self.gather.seconds
        if send is None or gather is None:
            return None
        return send + gather if self.send.wire == self.gather.wire else max(send, gather)


def sends_weights(config: JobConfig) -> bool:
    """Whether a run has engines which receive weights."""
    return isinstance(config, Config | PreferenceConfig) and "rollout" in started_roles(config)


def transport_of(config: Any, placement: Placement | None = None) -> str:
    """The transport that ``auto`` stands for.

    From GPU to GPU it is ``ipc`` where each GPU of an engine has a rank of the policy too, else ``nccl``; ``gloo`` where an
    engine sits on the GPU of the rank that sends, as NCCL takes no two processes on one. On CPUs it is ``shared_memory``,
    unless the run joins a cluster or names several machines: then ``gloo``.

    Args:
        config: of a run that `sends_weights`.
        placement: of its roles; by default on the machines that are named, or on usual ones.

    Raises:
        InputRefused: where the roles can't be placed.
    """
    if config.rollout.weight_transport != "auto":
        return config.rollout.weight_transport
    cluster = config.cluster
    if cluster.executor == "inline":
        return "shared_memory"
    if cluster.device == "cuda":
        if placement is None:
            claims, sharing = claims_of(config), cluster.placement
            placement = place(claims, sharing, machines_of(cluster) or assumed_machines(claims, sharing))
        engines, sender = gpus_of(placement, "rollout"), placement.of("policy")[0]
        if engines <= gpus_of(placement, "policy"):
            return "ipc"
        return "gloo" if engines & {(sender.machine, gpu) for gpu in sender.gpus} else "nccl"
    several = cluster.address is not None or sum(node.count for node in cluster.nodes) > 1
    return "gloo" if several else "shared_memory"


def gpus_of(placement: Placement, role: str) -> set[tuple[int, int]]:
    """(machine, GPU) of each GPU of a role."""
    return {(seat.machine, gpu) for seat in placement.of(role) for gpu in seat.gpus}


def transfer_of(config: Any, shape: Shape, placement: Placement | None) -> Transfer:
    """Bytes and wires of one transfer.

    Merged weights are all parameters, and an adapter is r (in + out) numbers a linear layer; they travel in the engines' type.
    With ``rollout.lora_transfer: adapter`` all parameters are sent once, before the first adapter.
    ``ipc`` copies within each GPU. ``nccl`` sends once over each link: a broadcast in a ring is bound by its slowest link,
    whatever the number of receivers. ``gloo`` broadcasts in a tree: the sender sends log2 of the processes' number copies.
    ``shared_memory`` writes once and reads once an engine's process.

    Parameters are gathered in the policy's own type. Under ZeRO-3 all shares but its own come to each rank, (N - 1) / N of all,
    in groups of 256 MiB; under AutoTP over t ranks (t - 1) / t of each linear weight, one at a time, in parts that are then put
    together: twice its size. See `rayrlhf.models.export.named_weights`.
    """
    policy, rollout = config.policy, config.rollout
    transport = transport_of(config, placement)
    whole = _transfer(config, "merged", shape.weights(), transport, placement)
    if rollout.lora_transfer != "adapter":
        return whole
    adapter = _transfer(config, "adapter", shape.adapters(policy.lora), transport, placement)
    return replace(adapter, base=replace(whole, what="base"))


def _transfer(
    config: Any, what: str, tensors: Sequence[Weight], transport: str, placement: Placement | None
) -> Transfer:
    policy, rollout = config.policy, config.rollout
    size, own = itemsize_of(rollout.dtype or policy.dtype), itemsize_of(policy.dtype)
    nbytes, largest = size * numel(tensors), size * max(map(_sent_numel, tensors))
    bucket = min(nbytes, max(int(rollout.weight_bucket_mib * MIB), largest))
    gather, gathered = None, 0
    if policy.zero_stage == 3 and policy.ranks > 1:
        machines = _machines(["policy"], placement)
        gather = _across(own * numel(tensors) * (policy.ranks - 1) // policy.ranks, machines, placement)
        gathered = _largest_group([own * w.numel for w in tensors])
    elif policy.tensor_parallel > 1:
        t = policy.tensor_parallel
        divided = [w for w in tensors if w.linear and "lm_head" not in w.name]
        gather = _across(own * numel(divided) * (t - 1) // t, _machines_of_a_group(t, placement), placement)
        gathered = 2 * own * max(w.numel for w in divided)
    send = _sent(transport, nbytes, rollout.engines * rollout.tensor_parallel, placement)
    return Transfer(transport, what, nbytes, bucket, send, gather, gathered)


def _sent_numel(weight: Weight) -> int:
    """Numbers of the largest tensor as which a parameter travels: each expert by itself, its gate apart from its up
    (`rayrlhf.models.export.weight_layout`)."""
    if len(weight.shape) < 3:
        return weight.numel
    return weight.numel // weight.shape[0] // (2 if weight.name.endswith("gate_up_proj") else 1)


def _largest_group(sizes: Sequence[int]) -> int:
    """The most bytes of a group of neighbouring tensors, which is full with the one that makes it 256 MiB or more."""
    largest = count = 0
    for size in sizes:
        count += size
        largest = max(largest, count)
        count = 0 if count >= GROUP_BYTES else count
    return largest


def _sent(transport: str, nbytes: int, receivers: int, placement: Placement | None) -> Crossing:
    if transport == "ipc":
        return Crossing("each GPU's own memory", nbytes, GPU_BYTES_PER_S)
    if transport == "shared_memory":
        return Crossing(HOST, nbytes * (1 + receivers), HOST_BYTES_PER_S)
    copies = 1 if transport == "nccl" else receivers.bit_length()  # of receivers and the sender: log2, rounded up
    machines = _machines(["policy", "rollout"], placement)
    return _across(nbytes * copies, machines, placement, from_host=transport == "gloo")


def _machines(roles: Sequence[str], placement: Placement | None) -> list[int]:
    """On which the processes of some roles sit."""
    return [] if placement is None else sorted({seat.machine for role in roles for seat in placement.of(role)})


def _machines_of_a_group(size: int, placement: Placement | None) -> list[int]:
    """The machines of those neighbouring ranks of the policy, of so many that share its weights, which sit on most of them."""
    seats = [] if placement is None else placement.of("policy")
    groups = [sorted({seat.machine for seat in seats[k : k + size]}) for k in range(0, len(seats), size)]
    return max(groups, key=len, default=[])


def _across(nbytes: int, machines: Sequence[int], placement: Placement | None, *, from_host: bool = False) -> Crossing:
    """Bytes between processes on some machines."""
    if placement is None or not machines:
        return Crossing(HOST, nbytes, HOST_BYTES_PER_S)
    if len(machines) > 1:
        speeds = [placement.machines[m].network_bytes_per_s for m in machines]
        known = [speed for speed in speeds if speed is not None]
        return Crossing("the network between machines", nbytes, min(known) if len(known) == len(speeds) else None)
    if from_host:
        return Crossing(HOST, nbytes, HOST_BYTES_PER_S)
    return Crossing("links between GPUs of a machine", nbytes, placement.machines[machines[0]].gpu_link_bytes_per_s)
