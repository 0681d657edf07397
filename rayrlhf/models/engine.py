"""A model in training: DeepSpeed ZeRO, one optimizer step over any number of micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.checkpoint import sizes_on_disk
from rayrlhf.config.trainers import OptimizerConfig, TrainedConfig
from rayrlhf.models.adamw import make_adamw
from rayrlhf.models.distributed import all_max, all_sum, device_of, infer_together, join_group, nothing_wanted
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.parallel import check_sharing, mark_shares, weight_sharing_settings
from rayrlhf.models.residence import Residence
from rayrlhf.models.sequence import share_sequences
from rayrlhf.models.world import World
from rayrlhf.models.zero import (
    Partitioner,
    base_settings,
    cast,
    count_elements,
    import_deepspeed,
    offload_settings,
    partitioner_of,
    register_output_layer,
    replaced,
)

__all__ = ["StepOutcome", "TrainEngine", "learning_rate", "partitioner_for"]

Forward = Callable[[ModelInput], tuple[Tensor, ...]]
Loss = Callable[[ModelInput, tuple[Tensor, ...]], tuple[Tensor, dict[str, Tensor]]]


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (the first is 0): linear warm-up, then the configured schedule."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    span = max(1, total_steps - optimizer.warmup_steps)
    done = min(1.0, (step - optimizer.warmup_steps) / span)
    shape = 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.lr * (optimizer.min_lr_ratio + (1.0 - optimizer.min_lr_ratio) * shape)


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    applied: bool
    """False where the gradient wasn't finite: neither weights nor optimizer nor schedule moved."""
    grad_norm: float
    """Norm over all ranks before clipping; infinite where the step was skipped."""
    lr: float
    """Learning rate of the step."""
    sums: dict[str, float]
    """The loss function's statistics, added up over micro-batches and ranks."""


class TrainEngine:
    """Forward, backward and update of one model, spread over ``world.size`` ranks.

    Args:
        model: on the CPU, or spread over the ranks by `partitioner_for`; called with a `ModelInput` first, returns a tuple of
            tensors.
        config: how it is trained.
        world: this process's place in the group.
        total_steps: optimizer steps of the whole run, for the schedule.
        timeout_s: deadline of collective operations.
        role: name of the role, for messages.

    Raises:
        InputRefused: where states shall live on a disk and can't (`disk_folder`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainedConfig,
        world: World,
        *,
        total_steps: int,
        timeout_s: float,
        role: str = "policy",
    ):
        self.config, self.world, self.total_steps = config, world, total_steps
        self.device = device_of(world)
        self.steps_done = 0
        self.lr_scale = 1.0
        join_group(world, timeout_s)
        if world.ranks_per_shard != config.sequence_parallel * config.tensor_parallel:
            raise ValueError(
                f"{world.ranks_per_shard} ranks work on the same samples, but sequence_parallel is "
                f"{config.sequence_parallel} and tensor_parallel {config.tensor_parallel}"
            )
        if world.ranks_per_shard > 1:
            check_sharing(model.transformer.config, config, role)  # type: ignore[union-attr]
        if config.sequence_parallel > 1:
            key = f"{role}.sequence_parallel"
            share_sequences(model, world, config.sequence_parallel, key=key, timeout_s=timeout_s)
        if config.gradient_checkpointing:
            modules: Iterable[Any] = model.modules()
            for module in modules:
                if hasattr(module, "gradient_checkpointing_enable"):
                    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                    break
        self.engine = self._wrap(model, role)
        self.engine.train()
        self.residence = Residence(role, self.engine.module, self.engine.optimizer, self.device)

    def _wrap(self, model: Any, role: str) -> Any:
        deepspeed = import_deepspeed(self.world)
        if self.config.zero_stage == 3:
            cast(model.parameters(), torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_adamw(trained, self.config.optimizer, on_disk=self.config.offload_optimizer == "nvme")
        settings = self._deepspeed_config(trained, role)
        if self.config.tensor_parallel > 1:
            settings["tensor_parallel"] = weight_sharing_settings(model, self.config.tensor_parallel)
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=trained, config=settings
        )
        if self.config.tensor_parallel > 1:
            mark_shares(engine, model, self.config.tensor_parallel)
        if self.config.zero_stage == 3 and hasattr(model, "lm"):
            register_output_layer(model)
        # DeepSpeed looks for non-finite gradients in some types only; a skipped step must be a skipped step in all.
        engine.optimizer.check_grad_overflow = True
        return engine

    def _deepspeed_config(self, trained: Sequence[Tensor], role: str) -> dict[str, Any]:
        # A reduction bucket is allocated whole, so it is no larger than there is to reduce.
        sizes = [count_elements(p) for p in trained]
        bucket = min(max(max(sizes), 2**24), max(sum(sizes), 1))
        zero = {
            "stage": self.config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": self.world.size > 1,
            "reduce_bucket_size": bucket,
            **offload_settings(self.config, role, self.world),
        }
        settings = base_settings(self.world, self.config.dtype, zero) | {
            "gradient_clipping": self.config.optimizer.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.config.dtype == "bfloat16":
            # Float32 master weights and moments stay in the ZeRO optimizer; gradients are added up in float32 too.
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        return settings

    # -- use ----------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        return self.engine.module

    @torch.no_grad()
    def infer(self, inputs: Sequence[ModelInput], forward: Forward) -> list[tuple[Tensor, ...]]:
        """Forward without gradient, results on the CPU."""
        self.residence.require("weights", "a forward")
        return infer_together(inputs, forward, self.device, self.config.zero_stage == 3)

    def optimizer_step(self, inputs: Sequence[ModelInput], forward: Forward, loss: Loss) -> StepOutcome:
        """One optimizer step over this rank's micro-batches, together with the other ranks.

        The gradient is that of the sum of all losses over all micro-batches and all ranks: whoever makes the loss
        divides by the step's global denominator. So neither the number of micro-batches nor of ranks matters.

        Args:
            inputs: this rank's micro-batches; may be fewer than another rank's, or none.
            forward: runs ``self.engine`` on one of them.
            loss: (input, outputs) -> this micro-batch's share of the loss, and statistics to be added up.
        """
        self.residence.require("all", "an optimizer step")
        rounds = all_max(len(inputs), self.device)
        if rounds == 0:
            raise ValueError("an optimizer step needs at least one sample")
        totals: dict[str, Tensor] = {}
        for k in range(rounds):
            self.engine.set_gradient_accumulation_boundary(k == rounds - 1)
            # Where another rank has more to do, this one takes part in its reductions with nothing.
            micro = (inputs[k] if k < len(inputs) else nothing_wanted()).to(self.device)
            outputs = forward(micro)
            value, stats = loss(micro, outputs)
            for name, amount in stats.items():
                so_far = totals.get(name, torch.zeros((), dtype=torch.float64))
                totals[name] = so_far + amount.detach().double().cpu()
            # Where a clamp stands in between, a loss that isn't finite can have a gradient of 0. The step must be skipped
            # all the same, on every rank, so its gradient is made non-finite too; otherwise 0 is added.
            value = value + value.detach() * 0.0 * outputs[0].sum()
            # DeepSpeed takes the mean over the ranks that hold the same weights; the loss is a sum. Ranks that share rows
            # each have a part of a shard's gradient, ranks that share weights have all of it.
            self.engine.backward(value * (self.world.size // self.config.tensor_parallel), scale_wrt_gas=False)
        lr = self.lr_scale * learning_rate(self.config.optimizer, self.steps_done, self.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        applied = not bool(self.engine.optimizer.overflow)
        self.steps_done += int(applied)
        norm = self.engine.get_global_grad_norm()
        return StepOutcome(applied, float(norm) if norm is not None else math.nan, lr, self._over_ranks(totals))

    def _over_ranks(self, totals: dict[str, Tensor]) -> dict[str, float]:
        if self.world.size == 1:
            return {name: float(total) for name, total in totals.items()}
        gathered: list[Any] = [None] * self.world.size
        mine = {name: float(total) for name, total in totals.items()} if self._speaks else {}
        torch.distributed.all_gather_object(gathered, mine)
        names = sorted({name for part in gathered for name in part})
        return {name: math.fsum(part.get(name, 0.0) for part in gathered) for name in names}

    @property
    def _speaks(self) -> bool:
        """Whether this rank's numbers count: of ranks that work on the same samples, those of the first."""
        return self.world.rank % self.world.ranks_per_shard == 0

    def global_counts(self, *counts: int) -> list[int]:
        """Counts added up over the ranks; of ranks that work on the same samples, the first one's count."""
        mine = torch.tensor(counts, dtype=torch.int64, device=self.device)
        return all_sum(mine if self._speaks else torch.zeros_like(mine)).tolist()

    def global_sums(self, *values: float) -> list[float]:
        """Numbers added up over the ranks, in float64; of ranks that work on the same samples, the first one's."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        return all_sum(mine if self._speaks else torch.zeros_like(mine)).tolist()

    # -- state --------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> dict[str, int]:
        """Weights, optimizer and schedule of this rank; all ranks call it with the same folder.

        Returns:
            What this rank wrote, and is on its disk: bytes by the file's name below ``folder``.
        """
        self.residence.require("all", "saving the training state")
        files: list[Path] = []
        writer = self.engine.checkpoint_engine
        write = writer.save

        def noting(state_dict: Any, path: str) -> None:
            write(state_dict, path)
            files.append(Path(path))

        with replaced(writer, "save", noting):
            self.engine.save_checkpoint(
                folder,
                tag="state",
                client_state={"optimizer_steps": self.steps_done, "lr_scale": self.lr_scale},
                save_latest=False,
                exclude_frozen_parameters=self.config.lora is not None,
            )
        return sizes_on_disk(Path(folder), files)

    def load(self, folder: str) -> None:
        """What `save` wrote, into an engine with as many ranks.

        Raises:
            RuntimeError: where the folder holds no state for this number of ranks; where the optimizer's states live on a disk.
        """
        self.residence.require("all", "loading the training state")
        if self.config.offload_optimizer == "nvme":
            # It brings the master weights back, and begins with moments of 0 and a step of 0 (DeepSpeedEngine.load_checkpoint).
            raise RuntimeError(
                f"{folder} can't be gone on from: with offload_optimizer nvme DeepSpeed doesn't read the optimizer's moments "
                "back. Runs that shall go on from a checkpoint need offload_optimizer none or cpu"
            )
        saved = len(list(Path(folder, "state").glob("*optim_states.pt")))
        if saved != self.world.size:
            raise RuntimeError(f"{folder} was saved by {saved} ranks and can't be loaded by {self.world.size}")
        path, client_state = self.engine.load_checkpoint(
            folder, tag="state", load_lr_scheduler_states=False, load_module_strict=self.config.lora is None
        )
        if path is None:
            raise RuntimeError(f"{folder} holds no state that DeepSpeed can load")
        self.steps_done, self.lr_scale = client_state["optimizer_steps"], client_state["lr_scale"]


def partitioner_for(config: TrainedConfig, world: World, role: str, timeout_s: float) -> Partitioner | None:
    """What spreads a model over the ranks while it is read, where it is trained under ZeRO-3; the ranks meet here.

    Args:
        config: how the model is trained.
        world: this process's place in the group.
        role: its name, which is the configuration's section too.
        timeout_s: deadline of collective operations.

    Raises:
        InputRefused: where parameters shall live on a disk and can't (`disk_folder`).
    """
    if config.zero_stage != 3:
        return None
    settings = base_settings(world, config.dtype, {"stage": 3, **offload_settings(config, role, world)})
    return partitioner_of(world, settings, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32, timeout_s)
