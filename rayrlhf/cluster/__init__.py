"""Where roles run: groups of actors on Ray, or all of them in the driver's process, behind one interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrlhf.cluster.errors import RoleFailed
    from rayrlhf.cluster.group import Group, Pending, wait_any
    from rayrlhf.cluster.spec import RoleSpec
    from rayrlhf.cluster.start import Groups, start_groups

__all__ = ["Group", "Groups", "Pending", "RoleFailed", "RoleSpec", "start_groups", "wait_any"]

_HOMES = {
    "RoleFailed": "errors",
    "Group": "group",
    "Pending": "group",
    "wait_any": "group",
    "RoleSpec": "spec",
    "Groups": "start",
    "start_groups": "start",
}


def __getattr__(name: str) -> Any:
    # Loaded at first use: what runs on other nodes for a moment needs no torch, which takes two seconds to load.
    if name not in _HOMES:
        raise AttributeError(f"module 'rayrlhf.cluster' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rayrlhf.cluster.{_HOMES[name]}"), name)
