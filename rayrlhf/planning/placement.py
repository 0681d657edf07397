"""Which process of which role sits on which GPU of which machine: pure arithmetic, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from rayrlhf.errors import InputRefused

__all__ = [
    "Claim",
    "DoesNotFitError",
    "Machine",
    "Placement",
    "Pool",
    "Seat",
    "Sharing",
    "count_key",
    "fits",
    "place",
    "pools_of",
]

Sharing = Literal["colocated", "disaggregated"] | Sequence[Sequence[str]]
"""Which roles share GPUs: all, none, or those of one list."""


@dataclass(frozen=True)
class Machine:
    """One machine, as planned or as found in a cluster. What isn't known is None."""

    name: str
    """Such as ``node 0``, or its address."""
    gpus: int
    gpu_memory_bytes: int | None = None
    """Of one GPU."""
    memory_bytes: int | None = None
    """Host memory."""
    gpu_link_bytes_per_s: float | None = None
    """What one GPU sends to another one of the machine."""
    network_bytes_per_s: float | None = None
    """What the machine sends to others."""


@dataclass(frozen=True)
class Claim:
    """What a role asks for."""

    role: str
    processes: int
    gpus: int
    """GPUs of each process, all on one machine; 0: it needs none."""


@dataclass(frozen=True)
class Seat:
    """Where one process of a role sits."""

    role: str
    rank: int
    machine: int
    """Index of the machine."""
    gpus: tuple[int, ...]
    """Numbers of its GPUs among those which the run uses on that machine: 0, 1, ..."""


@dataclass(frozen=True)
class Pool:
    """GPUs, and the roles that share them."""

    roles: tuple[str, ...]
    gpus: tuple[tuple[int, int], ...]
    """(machine, GPU), in the order in which ranks take them."""


@dataclass(frozen=True)
class Placement:
    """All processes with GPUs. Roles without GPUs have no seats."""

    machines: tuple[Machine, ...]
    pools: tuple[Pool, ...]
    seats: tuple[Seat, ...]

    def of(self, role: str) -> list[Seat]:
        """The seats of a role, by rank."""
        return sorted((seat for seat in self.seats if seat.role == role), key=lambda seat: seat.rank)

    def sharing(self, role: str) -> frozenset[str]:
        """The other roles on the GPUs of a role."""
        return frozenset(r for pool in self.pools if role in pool.roles for r in pool.roles) - {role}


class DoesNotFitError(InputRefused):
    """Roles that can't be placed.

    Attributes:
        problem: what is needed and what is there, without what would do.
    """

    def __init__(self, problem: str, changes: Sequence[str]):
        super().__init__(f"cluster: {problem}; what would do: {', or '.join(changes)}")
        self.problem = problem


def place(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine]) -> Placement:
    """Give each process of each role its GPUs.

    The GPUs of one process are on one machine. Ranks are packed: neighbours are on the same machine as far as it goes, and
    a role takes the first GPUs of its pool. A pool stays on one machine where it can, and all of them where they can.
    The same claims and machines always give the same placement.

    Raises:
        DoesNotFitError: where the machines are too small, with what is missing and the nearest change that would do, as far as
            GPUs go: what else a configuration asks of its numbers isn't known here.
    """
    pools = pools_of(claims, sharing)
    taken = _fit(pools, machines)
    if taken is None:
        raise DoesNotFitError(_why_not(claims, sharing, machines), _changes(claims, sharing, machines))
    return _seated(pools, taken, machines)


def fits(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine]) -> bool:
    """Whether `place` would succeed."""
    return _fit(pools_of(claims, sharing), machines) is not None


def pools_of(claims: Sequence[Claim], sharing: Sharing) -> list[list[Claim]]:
    """The roles that need GPUs, by whom they share them with, in the order of the claims."""
    pools: dict[object, list[Claim]] = {}
    for claim in claims:
        if claim.gpus == 0 or claim.processes == 0:
            continue
        key: object = "all" if sharing == "colocated" else claim.role
        if not isinstance(sharing, str):
            key = next((k for k, roles in enumerate(sharing) if claim.role in roles), claim.role)
        pools.setdefault(key, []).append(claim)
    return list(pools.values())


# -- which machine gives how many GPUs to which pool ----------------------------------------------------------------

_Taken = list[list[int]]
"""By pool and machine: GPUs."""


def _fit(pools: Sequence[Sequence[Claim]], machines: Sequence[Machine]) -> _Taken | None:
    """GPUs of each machine for each pool; None where they aren't found.

    The problem is one of packing bins. One machine for all is tried first, the smallest that does; then several orders in
    which pools choose and in which machines are offered, the tidiest first; and at last the same without a machine's odd GPUs.
    """
    rooms = [machine.gpus for machine in machines]
    for one in sorted(range(len(machines)), key=lambda m: (rooms[m], m)):
        alone = [room if m == one else 0 for m, room in enumerate(rooms)]
        found = _deal(pools, alone, _BY_UNIT, _emptiest, whole=False)
        if found is not None:
            return found
    for whole, order, offer in product((False, True), (_BY_UNIT, _BY_SIZE, _AS_GIVEN), (_tightest, _emptiest, _first)):
        found = _deal(pools, rooms, order, offer, whole=whole)
        if found is not None:
            return found
    return None


def _size(pool: Sequence[Claim]) -> int:
    return max(claim.processes * claim.gpus for claim in pool)


_Order = Callable[[Sequence[Claim]], tuple[int, ...]]
_Offer = Callable[[Sequence[int], Sequence[Claim]], list[int]]

_BY_UNIT: _Order = lambda pool: (-max(claim.gpus for claim in pool), -_size(pool))  # noqa: E731
_BY_SIZE: _Order = lambda pool: (-_size(pool),)  # noqa: E731
_AS_GIVEN: _Order = lambda pool: ()  # noqa: E731


def _tightest(rooms: Sequence[int], pool: Sequence[Claim]) -> list[int]:
    """The smallest machine that holds the whole pool; else the emptiest ones first, so that it sits on few."""
    whole = [m for m, room in enumerate(rooms) if all(room // c.gpus >= c.processes for c in pool)]
    return [min(whole, key=lambda m: (rooms[m], m))] if whole else _emptiest(rooms, pool)


def _emptiest(rooms: Sequence[int], pool: Sequence[Claim]) -> list[int]:
    return sorted(range(len(rooms)), key=lambda m: (-rooms[m], m))


def _first(rooms: Sequence[int], pool: Sequence[Claim]) -> list[int]:
    return list(range(len(rooms)))


def _deal(
    pools: Sequence[Sequence[Claim]], rooms: Sequence[int], order: _Order, offer: _Offer, *, whole: bool
) -> _Taken | None:
    """Let one pool after the other take what it needs; None where one doesn't get it.

    Args:
        whole: a pool takes whole multiples of its widest process's GPUs first, and a machine's odd ones only where it still lacks
            some: what its small processes leave of them is another pool's.
    """
    free = list(rooms)
    taken: _Taken = [[0] * len(rooms) for _ in pools]
    for index in sorted(range(len(pools)), key=lambda k: (*order(pools[k]), k)):
        pool, mine = pools[index], taken[index]
        for grain in (max(c.gpus for c in pool), 1) if whole else (1,):
            for m in offer(free, pool):
                # No more than any of its roles can use: a machine's odd GPU is of no use to an engine over two.
                there = mine[m] + free[m] // grain * grain
                used = [min(_left(c, mine) + mine[m] // c.gpus, there // c.gpus) * c.gpus for c in pool]
                more = max(0, *(gpus - mine[m] for gpus in used))
                mine[m] += more
                free[m] -= more
        if any(_left(c, mine) > 0 for c in pool):
            return None
    return taken


def _left(claim: Claim, taken: Sequence[int]) -> int:
    """Processes that don't fit on so many GPUs of each machine; below 0 where more would."""
    return claim.processes - sum(gpus // claim.gpus for gpus in taken)


def _seated(pools: Sequence[Sequence[Claim]], taken: _Taken, machines: Sequence[Machine]) -> Placement:
    """Numbers for the GPUs of each pool, and seats on them. Pools of larger processes get the lower numbers."""
    used = [0] * len(machines)
    numbers: list[list[tuple[int, int]]] = [[] for _ in pools]
    for index in sorted(range(len(pools)), key=lambda k: (*_BY_UNIT(pools[k]), k)):
        for m, count in enumerate(taken[index]):
            numbers[index] += [(m, used[m] + k) for k in range(count)]
            used[m] += count
    seats = []
    for pool, gpus in zip(pools, numbers, strict=True):
        for claim in pool:
            free = [
                (m, tuple(on[k * claim.gpus : (k + 1) * claim.gpus]))
                for m in range(len(machines))
                for on in [[number for machine, number in gpus if machine == m]]
                for k in range(len(on) // claim.gpus)
            ]
            seats += [Seat(claim.role, rank, *free[rank]) for rank in range(claim.processes)]
    return Placement(
        tuple(machines),
        tuple(Pool(tuple(c.role for c in pool), tuple(gpus)) for pool, gpus in zip(pools, numbers, strict=True)),
        tuple(seats),
    )


# -- why it doesn't fit -----------------------------------------------------------------------------------------------


def _why_not(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine]) -> str:
    """What is needed, what is there, and what is missing."""
    pools = pools_of(claims, sharing)
    needed, there = sum(_size(pool) for pool in pools), sum(machine.gpus for machine in machines)
    widest, largest = max(c.gpus for pool in pools for c in pool), max((m.gpus for m in machines), default=0)
    wants = "; ".join(_wants(pool) for pool in pools)
    has = _has(machines)
    if widest > largest > 0:
        return f"an engine over {widest} GPUs (rollout.tensor_parallel) stays on one machine, but found {has}"
    if needed > there:
        return f"found {has}, but {needed} are needed ({wants}): {needed - there} too few"
    return f"found {has}, but no way to deal out {needed} of them ({wants}) keeps each engine on one machine"


def _wants(pool: Sequence[Claim]) -> str:
    parts = [f"{c.role} {c.processes}" + (f" x {c.gpus}" if c.gpus > 1 else "") for c in pool]
    return f"{' and '.join(parts)} on the same {_size(pool)}" if len(parts) > 1 else parts[0]


def _has(machines: Sequence[Machine]) -> str:
    if sum(machine.gpus for machine in machines) == 0:
        return "no GPUs"
    kinds: dict[int, int] = {}
    for machine in machines:
        kinds[machine.gpus] = kinds.get(machine.gpus, 0) + 1
    parts = [f"{n} machine{'s' if n > 1 else ''} of {g} GPU{'s' if g != 1 else ''}" for g, n in kinds.items()]
    return " and ".join(parts)


def _changes(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine]) -> list[str]:
    """Changes of one thing each with which the claims fit, the smallest first."""
    found = []
    if sharing != "colocated" and fits(claims, "colocated", machines):
        found.append("cluster.placement colocated")
    for key in dict.fromkeys(count_key(claim.role, claims) for claim in claims if claim.gpus):
        if (count := _fewer(claims, sharing, machines, key)) is not None:
            found.append(f"{key} at most {count}")
    narrower = _narrower(claims, sharing, machines)
    if narrower is not None:
        found.append(f"rollout.tensor_parallel {narrower}")
    largest = max(machines, key=lambda machine: machine.gpus, default=None)
    if largest is not None and largest.gpus:
        more = _more(claims, sharing, machines, largest)
        if more is not None:
            found.append(f"{more} more machine{'s' if more > 1 else ''} of {largest.gpus} GPUs")
    if not found:
        found = _one_share(claims, sharing, machines)
    return found


def _fewer(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine], key: str) -> int | None:
    """The most processes of the roles that a key counts with which all fit; None where even one is too many."""
    counted = [count_key(claim.role, claims) == key for claim in claims]
    most = max(claim.processes for claim, is_counted in zip(claims, counted, strict=True) if is_counted)
    for count in range(most - 1, 0, -1):
        less = [
            replace(claim, processes=min(count, claim.processes)) if is_counted else claim
            for claim, is_counted in zip(claims, counted, strict=True)
        ]
        if fits(less, sharing, machines):
            return count
    return None


def _narrower(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine]) -> int | None:
    """The widest engine below the one asked for with which all fit, as many engines as before."""
    for k, claim in enumerate(claims):
        if claim.role != "rollout":
            continue
        for gpus in (width for width in range(claim.gpus - 1, 0, -1) if claim.gpus % width == 0):
            if fits([*claims[:k], replace(claim, gpus=gpus), *claims[k + 1 :]], sharing, machines):
                return gpus
    return None


def _more(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine], like: Machine) -> int | None:
    """How many more machines like one would do."""
    if max((claim.gpus for claim in claims), default=0) > like.gpus:
        return None
    more = 1
    while not fits(claims, sharing, [*machines, *[like] * more]):
        more += 1
    return more


def _one_share(claims: Sequence[Claim], sharing: Sharing, machines: Sequence[Machine]) -> list[str]:
    """Where no single change does: the most GPUs a role with which all of them fit, or what one machine must have."""
    most = max((machine.gpus for machine in machines), default=0)
    for count in range(max((c.processes for c in claims), default=0), 0, -1):
        small = [replace(c, processes=min(c.processes, count), gpus=min(c.gpus, 1)) for c in claims]
        if most and fits(small, sharing, machines):
            return [f"at most {count} rank{'s' if count > 1 else ''} a role, and rollout.tensor_parallel 1"]
    needed = sum(_size(pool) for pool in pools_of(claims, sharing))
    return [f"a machine of {max(needed, max(c.gpus for c in claims))} GPUs"]


def count_key(role: str, claims: Sequence[Claim]) -> str:
    """The key with the number of a role's processes. An evaluation, which alone has a reference but no policy, has one for the
    model that it measures and its reference."""
    if role == "model" or role == "reference" and all(claim.role != "policy" for claim in claims):
        return "measure.ranks"
    return "rollout.engines" if role == "rollout" else f"{role}.ranks"
