"""DeepSpeed ZeRO: its start, states in host memory or on a disk, and models that are read without a whole copy in each rank.

ZeRO (Rajbhandari et al. 2020) spreads optimizer states (stage 1), gradients (2) and parameters (3) over the ranks.
ZeRO-Offload (Ren et al. 2021) and ZeRO-Infinity (Rajbhandari et al. 2021) keep them in host memory or on NVMe.
"""

from __future__ import annotations

import atexit
import copy
import functools
import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rayrlhf.config.trainers import TrainedConfig
from rayrlhf.errors import InputRefused
from rayrlhf.importing import quick_imports
from rayrlhf.models.distributed import join_group
from rayrlhf.models.world import World

__all__ = [
    "Partitioner",
    "base_settings",
    "callable_in_parts",
    "cast",
    "check_disk",
    "count_elements",
    "disk_folder",
    "frozen_settings",
    "import_deepspeed",
    "offload_settings",
    "partitioner_of",
    "register_output_layer",
    "replaced",
    "whole",
]

Where = Literal["none", "cpu", "nvme"]

ASYNC_LOADING = "HF_DEACTIVATE_ASYNC_LOAD"
"""Environment variable of transformers: weights are read when their turn comes, not by threads that run ahead."""

FROZEN_TIMEOUT_S = 86400.0
"""Deadline of collective operations of a model that nothing trains: the driver's deadline of each call comes first."""


# -- start ------------------------------------------------------------------------------------------------------------


def import_deepspeed(world: World) -> Any:
    """The package, with its own process group started over the one that `join_group` made."""
    if world.device == "cpu":
        # DeepSpeed would compile a shared-memory collective on first use: over a minute, and it needs a C++ compiler.
        # (`import deepspeed.comm.torch as x` would give torch itself, which that package holds under the same name.)
        with quick_imports():
            communication = importlib.import_module("deepspeed.comm.torch")
        communication.build_shm_op = lambda: None  # type: ignore[attr-defined]
    with quick_imports():
        import deepspeed

        _load_muon()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if world.device == "cuda" else "gloo", verbose=False)
    return deepspeed


def _load_muon() -> None:
    """Load DeepSpeed's Muon optimizer, which it does itself only to ask whether another optimizer is one.

    Its module has functions compiled as it is imported, and torch loads its whole compiler for that: a second of processor
    time in each process. Nothing here uses Muon, so they are left as they are.
    """
    with suppress(ImportError, AttributeError):  # where another DeepSpeed has it elsewhere, it loads it itself
        compiler = importlib.import_module("deepspeed.runtime.compiler")
        with replaced(compiler, "compile", lambda *_, **__: lambda function: function):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


# -- settings ---------------------------------------------------------------------------------------------------------


def base_settings(world: World, dtype: str, zero: dict[str, Any]) -> dict[str, Any]:
    """What every engine's DeepSpeed configuration has in common."""
    settings: dict[str, Any] = {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
    if dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
    return settings


def offload_settings(config: TrainedConfig, role: str, world: World) -> dict[str, Any]:
    """The part of ``zero_optimization`` that says where optimizer states and parameters live.

    Args:
        config: of the trained model.
        role: name of the role, which is the configuration's section too.
        world: this process's place in the group.

    Raises:
        InputRefused: where they shall live on a disk and can't (`disk_folder`).
    """
    settings: dict[str, Any] = {}
    folder = disk_folder(config, role)
    pinned = world.device == "cuda"
    if config.offload_optimizer != "none":
        settings["offload_optimizer"] = {"device": config.offload_optimizer, "pin_memory": pinned}
    if config.offload_parameters != "none":
        settings["offload_param"] = {"device": config.offload_parameters, "pin_memory": pinned}
    for part in settings.values():
        if part["device"] == "nvme":
            part["nvme_path"] = folder
    return settings


def frozen_settings(world: World, dtype: str, offload: Where) -> dict[str, Any]:
    """The DeepSpeed configuration of a model that nothing trains, its parameters spread over the ranks."""
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": False}
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": world.device == "cuda"}
    return base_settings(world, dtype, zero)


def disk_folder(config: TrainedConfig, key: str) -> str | None:
    """A folder of this process's own for states that live on a disk; it goes when the process ends in good order.

    DeepSpeed empties the folder that it is given, and names files by numbers: no other process or role may use the same one.

    Args:
        config: of the trained model.
        key: the section of the configuration.

    Returns:
        None where nothing lives on a disk.

    Raises:
        InputRefused: see `check_disk`.
    """
    if not _on_disk(config):
        return None
    check_disk(config, key)
    assert config.nvme_path is not None
    return _own_folder(Path(config.nvme_path), key)


def _on_disk(config: TrainedConfig) -> list[str]:
    """The keys of a section that want states on a disk."""
    return [name for name in ("offload_optimizer", "offload_parameters") if getattr(config, name) == "nvme"]


def check_disk(config: TrainedConfig, key: str) -> None:
    """Whether states can live on a disk of this machine, where the configuration wants that.

    Args:
        config: of the trained model.
        key: the section of the configuration.

    Raises:
        InputRefused: where the ZeRO stage isn't 3, or the folder can't be written, or DeepSpeed's asynchronous I/O can't be
            built on this machine (it needs libaio's headers and a C++ compiler).
    """
    wanted = _on_disk(config)
    if not wanted:
        return
    names = " and ".join(f"{key}.{name}" for name in wanted)
    if config.zero_stage != 3:
        # DeepSpeed would keep them in host memory, without a word.
        raise InputRefused(
            f"{names}: nvme with {key}.zero_stage {config.zero_stage}; legal: zero_stage 3, or cpu in place of nvme"
        )
    if config.nvme_path is None:
        raise InputRefused(f"{key}.nvme_path: {names} is nvme, which needs a folder on a disk; found none")
    folder = Path(config.nvme_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputRefused(f"{key}.nvme_path: {folder} can't be written ({error.strerror})") from error
    from deepspeed.ops.op_builder import AsyncIOBuilder

    # Its own notes would go to the terminal, one a rank.
    with replaced(AsyncIOBuilder, "warning", lambda self, message: None):
        builds = AsyncIOBuilder().is_compatible(verbose=False)
    if not builds:
        raise InputRefused(
            f"{names} is nvme, but DeepSpeed's asynchronous I/O can't be built here: it needs libaio with its headers "
            "(apt install libaio-dev, or dnf install libaio-devel) and a C++ compiler; or set it to cpu"
        )


@functools.cache
def _own_folder(folder: Path, key: str) -> str:
    own = tempfile.mkdtemp(prefix=f"{key}-", dir=folder)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it ``owner.name`` is another one."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# -- partitioned parameters -------------------------------------------------------------------------------------------


def count_elements(parameter: Any) -> int:
    """Elements of a whole parameter, also of one that is spread over the ranks."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Within it every rank sees these parameters whole, those of them that are spread over the ranks. All ranks enter it."""
    spread_out = [p for p in parameters if hasattr(p, "ds_id")]
    if not spread_out:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread_out):
        yield


def register_output_layer(model: Any) -> None:
    """Let ZeRO-3 gather a language model's output layer once for a whole forward, whatever the number of chunks
    (see `rayrlhf.models.heads.output_logits`)."""
    import deepspeed

    for parameter in model.lm.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


@contextmanager
def callable_in_parts(model: nn.Module) -> Iterator[None]:
    """Within it a model can be called whose parameters are spread over the ranks, before DeepSpeed has wrapped it: each
    module's own parameters are gathered while it runs. All ranks make the same calls. Of a plain model nothing changes.
    """
    gathered: dict[nn.Module, ExitStack] = {}

    def before(module: nn.Module, _: Any) -> None:
        stack = ExitStack()
        stack.enter_context(whole(module.parameters(recurse=False)))
        gathered[module] = stack

    def after(module: nn.Module, _: Any, __: Any) -> None:
        gathered.pop(module).close()

    holders = [m for m in model.modules() if any(hasattr(p, "ds_id") for p in m.parameters(recurse=False))]
    hooks = [hook for m in holders for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for stack in gathered.values():  # of a forward that raised
            stack.close()


class Partitioner:
    """Spreads a model's parameters over the ranks while it is read: each rank keeps its share of every one.

    Every rank reads every tensor of the file, one at a time (where a family stores what one layer's parameter is made of in
    parts, those of one parameter), and keeps its share. What is shared by name (tied embeddings) stays whole until all is
    read. The files are mapped into memory, so ranks of one machine read each page from the disk once.

    Args:
        settings: DeepSpeed's, of the engine that the model is for.
        dtype: in which the parameters are computed with. Float32 master weights of a bfloat16 model begin at its values.
    """

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype):
        self.settings, self.dtype = settings, dtype
        self.init: Any = None

    def _begin(self, model: nn.Module) -> None:
        """Once the sizes of a model's parameters are known."""
        import deepspeed

        settings = copy.deepcopy(self.settings)
        offload = settings["zero_optimization"].get("offload_param", {})
        if offload.get("device") == "nvme":
            # Buffers between disk and device, each for a rank's share of any parameter.
            largest = max(count_elements(p) for p in model.parameters())
            offload["buffer_size"] = largest // settings["train_batch_size"] + 1
        # Its type comes from the settings: what is passed as ``dtype`` is only looked at where float16 can be computed.
        self.init = deepspeed.zero.Init(config_dict_or_path=settings)
        # So that a layer's gathered weight isn't kept for the backward pass; DeepSpeed's own engine does the same.
        self.init._enable_mem_efficient_linear()

    def partition(self, parameter: nn.Parameter) -> None:
        """Keep this rank's share of a whole parameter, which is the same on all ranks."""
        if hasattr(parameter, "ds_id"):
            return
        kept = parameter.data.to(self.dtype) if parameter.is_floating_point() else parameter.data
        parameter.data = kept.contiguous()
        self.init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        parameter.data = parameter.data.to(self.init.local_device)

    @contextmanager
    def reading(self, whole_parts: Iterable[str] = ()) -> Iterator[None]:
        """Within it models that transformers reads are partitioned weight by weight; `finish` does what is left.

        Args:
            whole_parts: names of submodules whose parameters stay whole, a scalar head's.
        """
        from transformers import core_model_loading

        stay = tuple(whole_parts)
        place = core_model_loading.set_param_for_module

        def place_and_partition(model: Any, name: str, *rest: Any) -> None:
            if self.init is None:
                self._begin(model)
            place(model, name, *rest)
            tied = getattr(model, "all_tied_weights_keys", {})
            if name.split(".")[0] in stay or name in tied.keys() or name in tied.values():
                return
            owner, _, last = name.rpartition(".")
            parameter = model.get_submodule(owner)._parameters.get(last)
            if parameter is not None and not parameter.is_meta:
                self.partition(parameter)

        before = os.environ.get(ASYNC_LOADING)
        os.environ[ASYNC_LOADING] = "1"
        try:
            with replaced(core_model_loading, "set_param_for_module", place_and_partition):
                yield
        finally:
            del os.environ[ASYNC_LOADING]
            if before is not None:
                os.environ[ASYNC_LOADING] = before

    def finish(self, model: nn.Module) -> None:
        """Partition what `reading` left whole of a model, and bring its buffers to the device."""
        for parameter in model.parameters():
            self.partition(parameter)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.init.local_device)


def partitioner_of(world: World, settings: dict[str, Any], dtype: torch.dtype, timeout_s: float) -> Partitioner:
    """A partitioner over the ranks of a group, which meet here.

    Raises:
        RuntimeError: see `join_group`.
    """
    join_group(world, timeout_s)
    import_deepspeed(world)
    return Partitioner(settings, dtype)


def cast(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Bring what isn't partitioned yet (adapters, heads) to the type that DeepSpeed wants of all parameters."""
    for parameter in parameters:
        if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
