"""The process group of a role's data-parallel ranks."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from rayrlhf.models.world import World

__all__ = ["all_max", "all_sum", "device_of", "join_group"]


def device_of(world: World) -> torch.device:
    """Where this rank's tensors live. Each process sees its own GPU only, as number 0."""
    return torch.device("cuda", 0) if world.device == "cuda" else torch.device("cpu")


def join_group(world: World, timeout_s: float) -> None:
    """Meet the other ranks. Does nothing where this process has a group of that size already (the inline executor).

    Raises:
        RuntimeError: where the process belongs to a group of another size, or the others don't come in time.
    """
    if world.threads is not None:
        torch.set_num_threads(world.threads)
    if dist.is_initialized():
        if dist.get_world_size() != world.size:
            raise RuntimeError(f"this process is in a group of {dist.get_world_size()} ranks already, not {world.size}")
        return
    os.environ.update(
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(world.master_port),
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK="0",
    )
    dist.init_process_group(
        "nccl" if world.device == "cuda" else "gloo",
        init_method=f"tcp://{world.master_addr}:{world.master_port}",
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over the ranks."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_max(value: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    if dist.get_world_size() == 1:
        return value
    largest = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
