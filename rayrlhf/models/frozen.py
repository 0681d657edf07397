"""A model that nothing trains: whole on each rank, or under ZeRO-3 spread over all of them, or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rayrlhf.models.distributed import device_of, infer_together
from rayrlhf.models.layout import ModelInput
from rayrlhf.models.loading import DTYPES
from rayrlhf.models.residence import Level, Residence
from rayrlhf.models.world import World
from rayrlhf.models.zero import (
    FROZEN_TIMEOUT_S,
    Partitioner,
    cast,
    frozen_settings,
    import_deepspeed,
    partitioner_of,
    register_output_layer,
)

__all__ = ["FrozenModel"]

Reader = Callable[[Partitioner | None], Any]
"""Makes the model: whole, or in parts by a partitioner."""


class FrozenModel:
    """Forwards without gradient of a model that stays as it is.

    With ``zero_stage`` 3 each layer's parameters are gathered from all ranks when it runs (ZeRO-3 inference, Aminabadi et al.
    2022), so all ranks run as many forwards: who has fewer samples, or none, takes part with nothing.

    Args:
        role: name of the role, for messages.
        world: this process's place in the group.
        read: makes the model on the CPU; called once.
        zero_stage: 0: each rank holds all parameters. 3: its share of them.
        offload: "cpu": the parameters lie in host memory and come to the device layer by layer; with stage 3 only.
        dtype: "float32" or "bfloat16", of the parameters.
    """

    def __init__(
        self,
        role: str,
        world: World,
        read: Reader,
        *,
        zero_stage: Literal[0, 3],
        offload: Literal["none", "cpu"],
        dtype: Literal["float32", "bfloat16"],
    ):
        if world.threads is not None:
            torch.set_num_threads(world.threads)
        self.device, self.spread_out = device_of(world), zero_stage == 3
        if self.spread_out:
            settings = frozen_settings(world, dtype, offload)
            self.model = (
                read(partitioner_of(world, settings, DTYPES[dtype], FROZEN_TIMEOUT_S)).eval().requires_grad_(False)
            )
            self.run = self._wrapped(world, settings, DTYPES[dtype])
        else:
            self.model = self.run = read(None).to(self.device).eval().requires_grad_(False)
        self.residence = Residence(role, self.model, None, self.device)

    def _wrapped(self, world: World, settings: dict[str, Any], dtype: torch.dtype) -> Any:
        deepspeed = import_deepspeed(world)
        cast(self.model.parameters(), dtype)
        engine, _, _, _ = deepspeed.initialize(model=self.model, config=settings)
        if hasattr(self.model, "lm"):
            register_output_layer(self.model)
        engine.eval()
        return engine

    @torch.no_grad()
    def infer(self, inputs: Sequence[ModelInput], *arguments: Any) -> list[tuple[Tensor, ...]]:
        """The model's outputs for each input, called with it and ``arguments``; on the CPU.

        Raises:
            RunFailed: where the parameters aren't on the device.
        """
        self.residence.require("weights", "a forward")
        return infer_together(inputs, lambda i: self.run(i, *arguments), self.device, self.spread_out)

    def set_residence(self, level: Level) -> None:
        """See `Residence.set`; "weights" and "all" are the same here."""
        self.residence.set(level)
