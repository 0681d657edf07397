"""Which rank of which group a process is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """The place of a process in its role's group."""

    rank: int
    """0 to size - 1."""
    size: int
    """Data-parallel ranks of the role."""
    master_addr: str
    """Address of rank 0, where the group meets."""
    master_port: int
    """Port of rank 0."""
    device: Literal["cpu", "cuda"]
    """Where the role's tensors live."""
    threads: int | None
    """Threads for computation on a CPU; None: torch's own choice."""
