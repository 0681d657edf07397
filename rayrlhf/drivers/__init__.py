"""The loops, and what they run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrlhf.drivers.run import Run, launch

__all__ = ["Run", "launch"]


def __getattr__(name: str) -> Any:
    """Import the run at its first use: a command that only speaks with a cluster does without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rayrlhf.drivers import run

    return getattr(run, name)
