"""Where samples are packed into one row instead of being padded."""

from __future__ import annotations

from rayrlhf.config.trainers import ModelConfig

__all__ = ["packs"]


def packs(model: ModelConfig) -> bool:
    """The configured choice; by default only with variable-length attention.

    With a block-diagonal mask (sdpa) a packed row costs attention over all pairs of its tokens, which is more than
    padding to like lengths costs.
    """
    return model.packing if model.packing is not None else model.attention.startswith("flash")
