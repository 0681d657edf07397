"""What ranks do together to see what their training engines really hold."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.config.trainers import TrainedConfig
from rayrlhf.models.adapters import add_lora
from rayrlhf.models.engine import TrainEngine, partitioner_for
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.world import World
from rayrlhf.models.zero import replaced

_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
"""What DeepSpeed's optimizers call this rank's float32 master weights: of stages 1 and 2, of stage 1 in bfloat16, of stage 3."""


class FileHandle:
    """In the place of DeepSpeed's asynchronous I/O, which a C++ compiler has to make first: reads and writes at once."""

    def __init__(self, **_: Any):
        self.done = 0

    def new_cpu_locked_tensor(self, count: int, like: Tensor) -> Tensor:
        return torch.empty(count, dtype=like.dtype)

    def is_pinned(self, _: Tensor) -> bool:
        return True

    def async_pwrite(self, tensor: Tensor, file: str, _: int = 0) -> int:
        tensor.view(torch.uint8).numpy().tofile(file)
        self.done += 1
        return 0

    def async_pread(self, tensor: Tensor, file: str, _: int = 0) -> int:
        found = torch.from_file(file, size=tensor.nbytes, dtype=torch.uint8)
        tensor.view(torch.uint8).copy_(found)
        self.done += 1
        return 0

    sync_pwrite, sync_pread = async_pwrite, async_pread

    def wait(self) -> int:
        done, self.done = self.done, 0
        return done


class _Model(nn.Module):
    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, inputs: ModelInput) -> tuple[Tensor, ...]:
        return (self.lm(input_ids=inputs.input_ids, use_cache=False).logits,)


def _storages(tensors: Any) -> dict[int, int]:
    """Bytes by address, each storage once."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout == torch.strided and t.untyped_storage().nbytes()
    }


def _tensors() -> list[Tensor]:
    """All tensors of this process, with their gradients."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, Tensor) and not t.is_meta]
    return [*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)]


def _alive() -> dict[int, int]:
    return _storages(_tensors())


def held(world: World, settings: dict[str, Any], dimensions: dict[str, Any]) -> dict[str, int]:
    """The bytes that one rank holds of a model in training.

    Returns:
        ``parameters`` and ``optimizer`` (master weights and moments) while AdamW makes its step, ``gradients``: what came
        with the backward passes and is there until the step, ``peak``: all that is there before the step, or in it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = TrainedConfig.model_validate(settings)
    # What earlier cases have left stays until the end: what is made here must not get an address that was counted there.
    left = [(t, t.untyped_storage()) for t in _tensors() if t.layout == torch.strided]
    before = _storages(t for t, _ in left)
    torch.manual_seed(0)
    lm: Any = LlamaForCausalLM(LlamaConfig(**dimensions)).to(getattr(torch, config.dtype))
    if config.lora is not None:
        lm = add_lora(lm, config.lora, 0)
    engine = TrainEngine(_Model(lm), config, world, total_steps=10, timeout_s=60.0)
    zero = engine.engine.optimizer
    adamw, step, backward_done = zero.optimizer, zero.optimizer.step, engine.engine.step
    seen: dict[str, int] = {}

    def now() -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """Parameters, optimizer and all else, each storage once."""
        parameters = _storages(getattr(p, "ds_tensor", p) for p in engine.module.parameters())
        masters = next(getattr(zero, name) for name in _MASTERS if hasattr(zero, name))
        states = [
            v for state in adamw.state.values() for v in state.values() if isinstance(v, Tensor) and v.numel() > 1
        ]
        optimizer = {at: size for at, size in _storages([*masters, *states]).items() if at not in parameters}
        known = {*before, *parameters, *optimizer}
        return parameters, optimizer, {at: size for at, size in _alive().items() if at not in known}

    def before_step() -> Any:
        # What ZeRO-3 has for all of training: its bucket, and small parameters whole.
        kept = _storages([*_buckets(zero), *(p.data for p in engine.module.parameters() if hasattr(p, "ds_id"))])
        parameters, optimizer, rest = now()
        seen["gradients"] = sum(size for at, size in rest.items() if at not in kept)
        seen["peak"] = sum(sum(part.values()) for part in (parameters, optimizer, rest))
        return backward_done()

    def in_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        parameters, optimizer, rest = now()
        seen.update(parameters=sum(parameters.values()), optimizer=sum(optimizer.values()))
        seen["peak"] = max(seen["peak"], sum(sum(part.values()) for part in (parameters, optimizer, rest)))
        return result

    adamw.step, engine.engine.step = in_step, before_step
    none = torch.zeros(0, dtype=torch.int64)
    micro = ModelInput(torch.arange(2)[None], None, none, none, none, none, none)
    for _ in range(2):
        engine.optimizer_step([micro, micro], lambda i: engine.engine(i), lambda i, o: (o[0].float().sum() * 1e-3, {}))
    left.clear()
    return seen


def _buckets(zero: Any) -> list[Tensor]:
    """ZeRO-3's reduction buckets, which are there as long as the engine is."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        return []
    return [bucket.buffer for bucket in zero.ipg_buckets.values() if isinstance(bucket.buffer, Tensor)]


# -- what is page-locked ----------------------------------------------------------------------------------------------


def locked(world: World, settings: dict[str, Any], dimensions: dict[str, Any]) -> list[int]:
    """The bytes of each block of host memory for which DeepSpeed asks to be page-locked, until the second step is done.

    It is told to page-lock as for a GPU; on a CPU it gets a copy instead.
    """
    from deepspeed.accelerator import get_accelerator
    from transformers import LlamaConfig, LlamaForCausalLM

    from rayrlhf.models import engine as engines

    config = TrainedConfig.model_validate(settings)
    accelerator = type(get_accelerator())
    found: list[int] = []
    before, settings_of = accelerator.pin_memory, engines.offload_settings

    def pin_memory(self: Any, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        found.append(tensor.nbytes)
        return tensor.clone()

    def with_pinning(*arguments: Any) -> dict[str, Any]:
        return {key: {**part, "pin_memory": True} for key, part in settings_of(*arguments).items()}

    accelerator.pin_memory, engines.offload_settings = pin_memory, with_pinning
    try:
        torch.manual_seed(0)
        zero = partitioner_for(config, world, "policy", 60.0)
        lm: Any = LlamaForCausalLM(LlamaConfig(**dimensions)).to(getattr(torch, config.dtype))
        if zero is not None:
            zero._begin(lm)
            for parameter in lm.parameters():
                zero.partition(parameter)
        engine = TrainEngine(_Model(lm), config, world, total_steps=10, timeout_s=60.0)
        none = torch.zeros(0, dtype=torch.int64)
        micro = ModelInput(torch.arange(2)[None], None, none, none, none, none, none)
        for _ in range(2):
            engine.optimizer_step(
                [micro, micro], lambda i: engine.engine(i), lambda i, o: (o[0].float().sum() * 1e-3, {})
            )
    finally:
        accelerator.pin_memory, engines.offload_settings = before, settings_of
    return found


def swapped(world: World, settings: dict[str, Any], dimensions: dict[str, Any]) -> dict[str, list[int]]:
    """Bytes of what a new engine has in host memory, whose states and parameters are to be on a disk."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper, partitioned_param_swapper
    from transformers import LlamaConfig, LlamaForCausalLM

    config = TrainedConfig.model_validate(settings)
    files = SimpleNamespace(aio_handle=FileHandle)
    with ExitStack() as stack:
        for module in (partitioned_optimizer_swapper, partitioned_param_swapper):
            stack.enter_context(replaced(module.AsyncIOBuilder, "load", lambda *_, **__: files))
        stack.enter_context(replaced(type(get_accelerator()), "pin_memory", lambda _, tensor, *__, **___: tensor))
        zero = partitioner_for(config, world, "policy", 60.0)
        assert zero is not None
        lm: Any = LlamaForCausalLM(LlamaConfig(**dimensions)).to(getattr(torch, config.dtype))
        zero._begin(lm)
        for parameter in lm.parameters():
            zero.partition(parameter)
        engine = TrainEngine(_Model(lm), config, world, total_steps=10, timeout_s=60.0)
    optimizer = engine.engine.optimizer
    swapper = next(lm.parameters()).nvme_swapper
    return {
        "buffers": [b.nbytes for b in optimizer.optimizer_swapper.swap_buffer_manager.all_buffers]
        + [swapper.buffers.nbytes],
        "parameters": [b.nbytes for b in optimizer.param_groups_fp16_flat_cpu_memory],
    }
