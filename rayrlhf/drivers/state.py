"""What the driver itself has to remember."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayrlhf.algorithms import RunningMoments

__all__ = ["RunState"]


@dataclass
class RunState:
    """The driver's state between two steps. Nothing else in it changes from step to step but the place in the data."""

    kl_coef: float
    """Present factor of the KL penalty."""
    moments: RunningMoments | None
    """Moments of all scores so far, where scores are normalised."""
    step: int = 0
    """Steps that are done."""
    weight_version: int = 0
    """Version of the weights that the engines have; it only rises."""

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "kl_coef": self.kl_coef,
            "moments": None if self.moments is None else self.moments.state_dict(),
            "step": self.step,
            "weight_version": self.weight_version,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> RunState:
        """What `to_dict` gave."""
        moments = stored["moments"]
        return cls(
            stored["kl_coef"],
            None if moments is None else RunningMoments.from_state_dict(moments),
            stored["step"],
            stored["weight_version"],
        )
