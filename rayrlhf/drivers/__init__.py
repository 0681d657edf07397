"""The loops, and what they run on."""

from __future__ import annotations

from rayrlhf.drivers.run import Run, launch

__all__ = ["Run", "launch"]
