"""Senders and receivers by the name of their transport."""

from __future__ import annotations

import torch

from rayrlhf.weights.collective import CollectiveReceiver, CollectiveSender
from rayrlhf.weights.control import Address, Control
from rayrlhf.weights.ipc import CudaMemory, IpcReceiver, IpcSender
from rayrlhf.weights.shared_memory import SharedMemoryReceiver, SharedMemorySender
from rayrlhf.weights.transport import Receiver, Sender

__all__ = ["TRANSPORTS", "join_sender", "open_receiver", "open_sender"]

TRANSPORTS = ("shared_memory", "gloo", "nccl", "ipc")
"""Those that ``rollout.weight_transport`` may name; ``auto`` is decided by who places the roles."""


def open_sender(
    transport: str,
    *,
    run: str,
    receivers: int,
    version: int,
    device: torch.device | str,
    timeout_s: float,
    host: str = "127.0.0.1",
    per_engine: int = 1,
    senders: int = 1,
    keep_all: bool = False,
) -> Sender:
    """The end of a weight group that sends, in the trainer's process. Receivers open theirs with its ``address``.

    Args:
        transport: one of `TRANSPORTS`.
        run: name of the run.
        receivers: how many processes load the weights.
        version: of the group, 1 or more; a group in which an engine was replaced has another one.
        device: where the weights are.
        timeout_s: deadline of each bucket, in seconds.
        host: this machine's address, as receivers reach it.
        per_engine: receivers of each engine, for messages.
        senders: ranks of the policy.
        keep_all: receivers come afterwards, in this very thread; with ``shared_memory`` only.

    Raises:
        ValueError: for a transport that there is none of, or that can't ``keep_all``.
        RunFailed: where this machine hasn't got what the transport needs.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"there is no weight transport {transport!r}; legal ones are {', '.join(TRANSPORTS)}")
    if keep_all and transport != "shared_memory":
        raise ValueError(f"with the weight transport {transport} both sides run at the same time")
    device = torch.device(device)
    control = Control.host(transport, f"{run}-{version}", receivers, timeout_s, host, per_engine)
    if transport == "shared_memory":
        return SharedMemorySender(control, run=run, keep_all=keep_all)
    if transport == "ipc":
        return IpcSender(control, 0, senders, CudaMemory(device))
    return CollectiveSender(control, "nccl" if transport == "nccl" else "gloo", device)


def join_sender(address: Address, rank: int, device: torch.device | str) -> Sender:
    """The end of another rank of the trainer, for a transport with which each of them sends: ``ipc``.

    Args:
        address: that of rank 0.
        rank: of the policy, 1 or more.
        device: where the weights are.
    """
    if address.transport != "ipc":
        raise ValueError(f"with the weight transport {address.transport} rank 0 alone sends")
    control = Control.join_as_sender(address, rank)
    return IpcSender(control, rank, None, CudaMemory(torch.device(device)))


def open_receiver(address: Address, index: int, device: torch.device | str) -> Receiver:
    """The end that receives, in the process that loads the weights.

    Args:
        address: the sender's.
        index: which of the receivers this is, from 0 on.
        device: where the weights are wanted. ``shared_memory`` and ``gloo`` give them on the CPU all the same.
    """
    if address.transport == "shared_memory":
        return SharedMemoryReceiver(address, index)
    if address.transport == "ipc":
        return IpcReceiver(address, index, CudaMemory(torch.device(device)))
    return CollectiveReceiver(address, index, "nccl" if address.transport == "nccl" else "gloo", torch.device(device))
