"""Bringing up all roles of a run at the same time, or none."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Literal

from rayrlhf.cluster.group import Group
from rayrlhf.cluster.inline_group import start_inline
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.config.base import ClusterConfig

__all__ = ["Groups", "start_groups"]


class Groups(dict[str, Group]):
    """The groups of a run by name. As a context manager it ends them all."""

    def close(self) -> None:
        """End all roles, the last one started first."""
        while self:
            _, group = self.popitem()
            group.close()

    def __enter__(self) -> Groups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_groups(specs: Sequence[RoleSpec], *, executor: Literal["ray", "inline"], settings: ClusterConfig) -> Groups:
    """Bring up every role.

    With ``ray`` all processes start at the same time, in the session of `rayrlhf.cluster.session`; the first failure of
    any of them ends the start and all other processes. With ``inline`` the roles are built in this process, and Ray is
    not imported.

    Raises:
        InputRefused: where the roles can't be placed: several ranks inline, or more GPUs than the cluster has.
        RoleFailed: with the role, the rank, its own exception and its log, where one fails to start or is too late.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError(f"the names of roles must differ, found {names}")
    if executor == "inline":
        return Groups(start_inline(specs, settings))
    from rayrlhf.cluster.ray_start import start_on_ray

    return Groups(start_on_ray(specs, settings))
