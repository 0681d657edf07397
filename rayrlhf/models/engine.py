"""A model in training: DeepSpeed ZeRO, one optimizer step over any number of micro-batches and ranks."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.config.trainers import OptimizerConfig, TrainedConfig
from rayrlhf.models.distributed import all_max, all_sum, device_of, join_group
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.world import World

__all__ = ["StepOutcome", "TrainEngine", "learning_rate"]

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
        model: on the CPU; called with a `ModelInput` first, returns a tuple of tensors.
        config: how it is trained.
        world: this process's place in the group.
        total_steps: optimizer steps of the whole run, for the schedule.
        timeout_s: deadline of collective operations.
    """

    def __init__(self, model: nn.Module, config: TrainedConfig, world: World, *, total_steps: int, timeout_s: float):
        self.config, self.world, self.total_steps = config, world, total_steps
        self.device = device_of(world)
        self.steps_done = 0
        self.lr_scale = 1.0
        join_group(world, timeout_s)
        if config.gradient_checkpointing:
            modules: Iterable[Any] = model.modules()
            for module in modules:
                if hasattr(module, "gradient_checkpointing_enable"):
                    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                    break
        self.engine = self._wrap(model)
        self.engine.train()

    def _wrap(self, model: Any) -> Any:
        deepspeed = _import_deepspeed(self.world)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=self.config.optimizer.lr,
            betas=self.config.optimizer.betas,
            eps=self.config.optimizer.eps,
            weight_decay=self.config.optimizer.weight_decay,
            fused=True,
        )
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=trained, config=self._deepspeed_config(trained)
        )
        if self.config.zero_stage == 3 and hasattr(model, "lm"):
            # Gathered once for the whole forward, whatever the number of chunks (see `output_logits`).
            for parameter in model.lm.get_output_embeddings().parameters():
                deepspeed.zero.register_external_parameter(model, parameter)
        # DeepSpeed looks for non-finite gradients in some types only; a skipped step must be a skipped step in all.
        engine.optimizer.check_grad_overflow = True
        return engine

    def _deepspeed_config(self, trained: Sequence[Tensor]) -> dict[str, Any]:
        # A reduction bucket is allocated whole, so it is no larger than there is to reduce.
        elements = sum(p.numel() for p in trained)
        bucket = min(max(max(p.numel() for p in trained), 2**24), max(elements, 1))
        config: dict[str, Any] = {
            "train_batch_size": self.world.size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.optimizer.max_grad_norm,
            "zero_optimization": {
                "stage": self.config.zero_stage,
                "overlap_comm": False,
                "contiguous_gradients": self.world.size > 1,
                "reduce_bucket_size": bucket,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if self.config.dtype == "bfloat16":
            # Float32 master weights and moments stay in the ZeRO optimizer; gradients are added up in float32 too.
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config

    # -- use ----------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        return self.engine.module

    @torch.no_grad()
    def infer(self, inputs: Sequence[ModelInput], forward: Forward) -> list[tuple[Tensor, ...]]:
        """Forward without gradient, results on the CPU."""
        # Under ZeRO-3 all ranks gather the parameters together: they agree on the rounds before the first one.
        rounds = all_max(len(inputs), self.device) if self.config.zero_stage == 3 else len(inputs)
        outputs = [tuple(t.cpu() for t in forward(i.to(self.device))) for i in inputs]
        for _ in range(rounds - len(inputs)):
            forward(_nothing_wanted().to(self.device))
        return outputs

    def optimizer_step(self, inputs: Sequence[ModelInput], forward: Forward, loss: Loss) -> StepOutcome:
        """One optimizer step over this rank's micro-batches, together with the other ranks.

        The gradient is that of the sum of all losses over all micro-batches and all ranks: whoever makes the loss
        divides by the step's global denominator. So neither the number of micro-batches nor of ranks matters.

        Args:
            inputs: this rank's micro-batches; may be fewer than another rank's, or none.
            forward: runs ``self.engine`` on one of them.
            loss: (input, outputs) -> this micro-batch's share of the loss, and statistics to be added up.
        """
        rounds = all_max(len(inputs), self.device)
        if rounds == 0:
            raise ValueError("an optimizer step needs at least one sample")
        totals: dict[str, Tensor] = {}
        for k in range(rounds):
            self.engine.set_gradient_accumulation_boundary(k == rounds - 1)
            # Where another rank has more to do, this one takes part in its reductions with nothing.
            micro = (inputs[k] if k < len(inputs) else _nothing_wanted()).to(self.device)
            outputs = forward(micro)
            value, stats = loss(micro, outputs)
            for name, amount in stats.items():
                so_far = totals.get(name, torch.zeros((), dtype=torch.float64))
                totals[name] = so_far + amount.detach().double().cpu()
            # Where a clamp stands in between, a loss that isn't finite can have a gradient of 0. The step must be skipped
            # all the same, on every rank, so its gradient is made non-finite too; otherwise 0 is added.
            value = value + value.detach() * 0.0 * outputs[0].sum()
            # DeepSpeed takes the mean over the ranks; the loss is a sum.
            self.engine.backward(value * self.world.size, scale_wrt_gas=False)
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
        torch.distributed.all_gather_object(gathered, {name: float(total) for name, total in totals.items()})
        names = sorted({name for part in gathered for name in part})
        return {name: math.fsum(part.get(name, 0.0) for part in gathered) for name in names}

    def global_counts(self, *counts: int) -> list[int]:
        """Counts added up over the ranks."""
        return all_sum(torch.tensor(counts, dtype=torch.int64, device=self.device)).tolist()

    def global_sums(self, *values: float) -> list[float]:
        """Numbers added up over the ranks, in float64."""
        return all_sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    # -- state --------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Weights, optimizer and schedule of this rank; all ranks call it with the same folder."""
        self.engine.save_checkpoint(
            folder,
            tag="state",
            client_state={"optimizer_steps": self.steps_done, "lr_scale": self.lr_scale},
            save_latest=False,
            exclude_frozen_parameters=self.config.lora is not None,
        )

    def load(self, folder: str) -> None:
        """What `save` wrote, into an engine with as many ranks.

        Raises:
            RuntimeError: where the folder holds no state for this number of ranks.
        """
        saved = len(list(Path(folder, "state").glob("*optim_states.pt")))
        if saved != self.world.size:
            raise RuntimeError(f"{folder} was saved by {saved} ranks and can't be loaded by {self.world.size}")
        path, client_state = self.engine.load_checkpoint(
            folder, tag="state", load_lr_scheduler_states=False, load_module_strict=self.config.lora is None
        )
        if path is None:
            raise RuntimeError(f"{folder} holds no state that DeepSpeed can load")
        self.steps_done, self.lr_scale = client_state["optimizer_steps"], client_state["lr_scale"]


def _nothing_wanted() -> ModelInput:
    """A forward of two tokens of which none is wanted. Its graph is that of any other micro-batch, as ZeRO-3 needs it."""
    none = torch.zeros(0, dtype=torch.int64)
    return ModelInput(torch.zeros(1, 2, dtype=torch.int64), None, none, none, none, none, none)


def _import_deepspeed(world: World) -> Any:
    if world.device == "cpu":
        # DeepSpeed would compile a shared-memory collective on first use: over a minute, and it needs a C++ compiler.
        # (`import deepspeed.comm.torch as x` would give torch itself, which that package holds under the same name.)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if world.device == "cuda" else "gloo", verbose=False)
    return deepspeed
