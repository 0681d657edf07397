"""AdamW (Loshchilov & Hutter 2019) by torch's fused kernel, wherever its states are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rayrlhf.config.trainers import OptimizerConfig

__all__ = ["DiskAdamW", "make_adamw"]


class DiskAdamW(torch.optim.Optimizer):
    """AdamW whose states can go to a disk between steps: DeepSpeed writes every tensor of them as one of the parameter's size, so
    the number of steps is no tensor here, as it is in torch's.

    Args:
        parameters: what is trained.
        lr, betas, eps, weight_decay: as torch's AdamW has them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                adamw(
                    [parameter],
                    [parameter.grad],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [torch.tensor(float(state["step"]), device=parameter.device)],
                    fused=True,
                    amsgrad=False,
                    maximize=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                )
                state["step"] += 1


def make_adamw(parameters: Sequence[Tensor], config: OptimizerConfig, *, on_disk: bool) -> torch.optim.Optimizer:
    """The optimizer as configured.

    It is torch's also where its states are in host memory: its kernel for a CPU needs no compiler, as DeepSpeed's own does, and
    a run computes the same wherever the states are.

    Args:
        parameters: what is trained.
        config: learning rate, moments, decay.
        on_disk: whether DeepSpeed keeps the states on a disk between steps.
    """
    numbers = (config.lr, config.betas, config.eps, config.weight_decay)
    return DiskAdamW(parameters, *numbers) if on_disk else torch.optim.AdamW(parameters, *numbers, fused=True)
