"""Which process of which role sits on which GPU of which machine: pure arithmetic, without Ray."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Claim", "Machine", "Placement", "Pool", "Seat"]


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
