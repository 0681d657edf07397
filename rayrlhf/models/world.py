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
    """Processes of the role."""
    master_addr: str
    """Address of rank 0, where the group meets."""
    master_port: int
    """Port of rank 0."""
    device: Literal["cpu", "cuda"]
    """Where the role's tensors live."""
    threads: int | None
    """Threads for computation on a CPU; None: torch's own choice."""
    ranks_per_shard: int = 1
    """So many neighbouring ranks work on the same samples: they share a sequence, or each layer's weights."""

    @property
    def shard(self) -> int:
        """Which part of the samples is this rank's."""
        return self.rank // self.ranks_per_shard

    @property
    def shards(self) -> int:
        """Parts into which samples are split: the data-parallel size."""
        return self.size // self.ranks_per_shard
