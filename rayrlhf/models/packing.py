"""Where samples are packed into one row instead of being padded."""

from __future__ import annotations

from rayrlhf.config.trainers import ModelConfig

__all__ = ["VARIABLE_LENGTHS", "packs"]

VARIABLE_LENGTHS = ("flash_attention_2", "varlen")
"""Attention whose work is that of the samples, however they stand in rows."""


def packs(model: ModelConfig) -> bool:
    """The configured choice; by default only with variable-length attention.

    With a block-diagonal mask (sdpa) a packed row costs attention over all pairs of its tokens, which is more than
    padding to like lengths costs.
    """
    return model.packing if model.packing is not None else model.attention in VARIABLE_LENGTHS
