"""rayrlhf: reinforcement learning from human feedback on Ray, from a laptop's CPU to a cluster of GPU nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Batch", "Config", "InputRefused", "Run", "RunFailed", "__version__", "launch", "load_config"]

if TYPE_CHECKING:
    from rayrlhf.batch import Batch
    from rayrlhf.config import Config, load_config
    from rayrlhf.drivers import Run, launch
    from rayrlhf.errors import InputRefused, RunFailed

_HOMES = {
    "Batch": "rayrlhf.batch",
    "Config": "rayrlhf.config",
    "load_config": "rayrlhf.config",
    "Run": "rayrlhf.drivers",
    "launch": "rayrlhf.drivers",
    "InputRefused": "rayrlhf.errors",
    "RunFailed": "rayrlhf.errors",
}


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that the command line and the configuration start without torch and ray.
    if name not in _HOMES:
        raise AttributeError(f"module 'rayrlhf' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
