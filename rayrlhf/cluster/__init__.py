"""Where roles run: groups of actors on Ray, or all of them in the driver's process, behind one interface."""

from __future__ import annotations

from rayrlhf.importing import quick_imports

with quick_imports():  # Ray and torch come with them, in each process of a role
    from rayrlhf.cluster.errors import RoleFailed
    from rayrlhf.cluster.group import Group, Pending, wait_any
    from rayrlhf.cluster.spec import RoleSpec
    from rayrlhf.cluster.start import Groups, start_groups

__all__ = ["Group", "Groups", "Pending", "RoleFailed", "RoleSpec", "start_groups", "wait_any"]
