"""The process group of a role's data-parallel ranks."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.models.layout import ModelInput
from rayrlhf.models.world import World

__all__ = ["all_max", "all_sum", "device_of", "infer_together", "join_group", "nothing_wanted"]


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
    joined = dist.is_initialized()
    if joined and dist.get_world_size() != world.size:
        raise RuntimeError(f"this process is in a group of {dist.get_world_size()} ranks already, not {world.size}")
    # DeepSpeed reads them too, also where the group is another role's, or vLLM's.
    os.environ.update(
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(world.master_port),
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK="0",
    )
    if joined:
        return
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


def nothing_wanted() -> ModelInput:
    """A forward of two tokens of which none is wanted. Its graph is that of any other micro-batch, as ZeRO-3 needs it."""
    none = torch.zeros(0, dtype=torch.int64)
    return ModelInput(torch.zeros(1, 2, dtype=torch.int64), None, none, none, none, none, none)


def infer_together(
    inputs: Sequence[ModelInput],
    forward: Callable[[ModelInput], tuple[Tensor, ...]],
    device: torch.device,
    gathers: bool,
) -> list[tuple[Tensor, ...]]:
    """A forward for each input, results on the CPU.

    Args:
        inputs: this rank's; may be fewer than another rank's, or none.
        forward: runs the model on one of them.
        device: where it runs.
        gathers: whether all ranks gather parameters together. Then they agree on the rounds before the first one, and who has
            less to do takes part with nothing.
    """
    rounds = all_max(len(inputs), device) if gathers else len(inputs)
    outputs = [tuple(t.cpu() for t in forward(i.to(device))) for i in inputs]
    for _ in range(rounds - len(inputs)):
        forward(nothing_wanted().to(device))
    return outputs
