"""Bringing up all roles of a run at the same time, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Literal

from rayrlhf.cluster.group import Group
from rayrlhf.cluster.inline_group import start_inline
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.config.base import ClusterConfig
from rayrlhf.planning.placement import Claim, Machine, Placement, Sharing, place

if TYPE_CHECKING:
    from rayrlhf.cluster.ray_placement import Reservation

__all__ = ["Groups", "start_groups"]


class Groups(dict[str, Group]):
    """The groups of a run by name. As a context manager it ends them all.

    Attributes:
        placement: which process sits on which GPU; None where no role has GPUs.
    """

    def __init__(
        self,
        groups: Mapping[str, Group] = MappingProxyType({}),
        placement: Placement | None = None,
        reservation: Reservation | None = None,
        owned: bool = True,
    ):
        super().__init__(groups)
        self.placement = placement
        self.reservation, self._owned = reservation, owned

    def close(self) -> None:
        """End all roles, the last one started first, and give their GPUs back."""
        try:
            while self:
                _, group = self.popitem()
                group.close()
        finally:
            if self.reservation is not None and self._owned:
                self.reservation.release()

    def __enter__(self) -> Groups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_groups(
    specs: Sequence[RoleSpec],
    *,
    executor: Literal["ray", "inline"],
    settings: ClusterConfig,
    sharing: Sharing | None = None,
    claims: Sequence[Claim] | None = None,
    beside: Groups | None = None,
    tell: Callable[[str], object] | None = None,
) -> Groups:
    """Bring up every role.

    With ``ray`` all processes start at the same time, in the session of `rayrlhf.cluster.session`; the first failure of
    any of them ends the start and all other processes. Roles with GPUs are placed on real machines, and hold their GPUs from
    before the start until they are closed. Those that share GPUs, and can leave them (`RoleSpec.rest`), are built one after the
    other, the last one first. With ``inline`` the roles are built in this process, where they share one GPU and stay there, in
    the order given, and Ray is not imported.

    Args:
        sharing: which roles share GPUs; by default cluster.placement.
        claims: what the whole run asks for, where further roles start later ``beside`` these; by default what these roles
            ask for.
        beside: groups whose start claimed GPUs for these roles too. They keep them when these roles end.
        tell: gets a line where machines or GPUs must be waited for; by default it goes to the log alone.

    Raises:
        InputRefused: where the roles can't be placed: several ranks inline, or more GPUs than the cluster has, or gets until
            cluster.placement_timeout_s; or where roles refuse what they were given, in `check_role` or when they are built.
        RunFailed: where others hold the GPUs for longer than cluster.placement_timeout_s.
        RoleFailed: with the role, the rank, its own exception and its log, where one fails to start or is too late.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise ValueError(f"the names of roles must differ, found {names}")
    wanted = claims_of_specs(specs) if claims is None else claims
    if executor == "inline":
        return Groups(start_inline(specs, settings), on_one_gpu(wanted))
    from rayrlhf.cluster.ray_placement import reserve
    from rayrlhf.cluster.ray_start import check_session, start_on_ray

    check_session()
    reservation = beside.reservation if beside is not None else None
    if reservation is None and any(claim.gpus for claim in wanted):
        reservation = reserve(wanted, settings.placement if sharing is None else sharing, settings, tell)
    owned = beside is None or beside.reservation is None
    try:
        groups = start_on_ray(specs, settings, reservation, () if beside is None else beside.values())
    except BaseException:
        if reservation is not None and owned:
            reservation.release()
        raise
    return Groups(groups, reservation.placement if reservation is not None else None, reservation, owned)


def claims_of_specs(specs: Sequence[RoleSpec]) -> list[Claim]:
    """What roles ask for."""
    return [Claim(spec.name, spec.ranks, spec.gpus_per_rank) for spec in specs]


def on_one_gpu(claims: Sequence[Claim]) -> Placement | None:
    """Where roles with GPUs sit that are all in this process: on the first GPU that it sees. None where no role has any."""
    return place(claims, "colocated", [Machine("this machine", 1)]) if any(claim.gpus for claim in claims) else None
