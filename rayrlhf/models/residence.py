"""Models and their training states between a device and host memory, so that roles can take turns on it.

What moves are storages, not tensors: a storage's bytes are copied to host memory and its own memory is freed, while it stays
the same storage for all tensors over it. So DeepSpeed's flat buffers, the parameters that are views into them, and every
other view, found or not, are the same views afterwards.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rayrlhf.errors import RunFailed

__all__ = ["LEVELS", "Level", "Residence", "tensors_within"]

Level = Literal["none", "weights", "all"]
"""What of a role is on its device: nothing; parameters and buffers; optimizer states, master weights and gradients too."""

LEVELS: tuple[Level, ...] = ("none", "weights", "all")
"""From the least to the most."""

FOLLOWED = ("deepspeed.", "torch.optim.")
"""Modules whose objects' attributes are looked into for tensors."""

PIECE = 2**26
"""Bytes of host memory that are taken at once. torch rounds pinned memory up to a power of two: a storage of 4.4 GB in one piece
would take 8.6 GB of it."""


def tensors_within(*roots: Any) -> Iterator[Tensor]:
    """All tensors that can be reached from some objects: in containers, in attributes of DeepSpeed's objects and of torch's
    optimizers, and in those of tensors (gradients, DeepSpeed's shards). What a model holds besides isn't looked into."""
    seen: set[int] = set()
    waiting: deque[Any] = deque(roots)
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
            if found.is_leaf and found.grad is not None:
                waiting.append(found.grad)
            waiting.extend(vars(found).values())
        elif isinstance(found, Mapping):
            waiting.extend(found.keys())
            waiting.extend(found.values())
        elif isinstance(found, list | tuple | set | frozenset | deque):
            waiting.extend(found)
        elif type(found).__module__.startswith(FOLLOWED) and not isinstance(found, type | nn.Module):
            waiting.extend(getattr(found, "__dict__", {}).values())


class Residence:
    """Where a model and its training states are, and the way between.

    Host memory is taken when states leave for the first time (pinned for a GPU), and kept: they will leave again.

    Args:
        role: name of the role, for messages.
        model: its parameters and buffers are the weights; of one that ZeRO-3 spreads over the ranks, this rank's shards.
        states: what holds everything else: DeepSpeed's optimizer, or nothing.
        device: what moves lies on it; states that DeepSpeed keeps in host memory don't move.
        moves: whether anything moves; else the level is only kept in mind. By default on a GPU: on a CPU there is no other
            memory to go to.
    """

    def __init__(self, role: str, model: nn.Module, states: Any, device: torch.device, *, moves: bool | None = None):
        self.role, self.model, self.states, self.device = role, model, states, device
        self.moves = device.type != "cpu" if moves is None else moves
        self.level: Level = "all"
        self._away: dict[Level, list[tuple[torch.UntypedStorage, list[Tensor]]]] = {"weights": [], "all": []}
        self._free: dict[int, list[Tensor]] = {}

    def set(self, level: Level) -> None:
        """Go to a level.

        Raises:
            ValueError: for a level that there isn't.
        """
        if level not in LEVELS:
            raise ValueError(f"residence {level!r}: legal are {', '.join(LEVELS)}")
        wanted, now = LEVELS.index(level), LEVELS.index(self.level)
        if self.moves and wanted < now:
            self._leave([part for part in LEVELS[wanted + 1 : now + 1] if part != "none"])
        if self.moves and wanted > now:
            self._come_back(LEVELS[now + 1 : wanted + 1])
        self.level = level

    def require(self, level: Level, what: str) -> None:
        """Refuse what needs more than is on the device.

        Raises:
            RunFailed: naming role, level and what was wanted.
        """
        if LEVELS.index(self.level) < LEVELS.index(level):
            raise RunFailed(
                f"{self.role}: {what} needs residence {level!r}, but its residence is {self.level!r}; "
                f"set_residence({level!r}) comes first"
            )

    # -- moving -------------------------------------------------------------------------------------------------

    def _leave(self, parts: Iterable[Level]) -> None:
        self._synchronize()
        weights = self._storages(self._weights())
        for part in parts:
            found = weights if part == "weights" else self._storages(tensors_within(self.states, self._parameters()))
            leaving = [
                (storage, self._host_memory(storage.nbytes()))
                for key, storage in found.items()
                if part == "weights" or key not in weights
            ]
            for storage, pieces in leaving:
                for piece, place in zip(pieces, _bytes_of(storage).split(PIECE), strict=True):
                    piece.copy_(place, non_blocking=True)
            self._synchronize()
            for storage, _ in leaving:
                storage.resize_(0)
            self._away[part] = leaving
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _come_back(self, parts: Iterable[Level]) -> None:
        for part in parts:
            for storage, pieces in self._away[part]:
                storage.resize_(sum(piece.numel() for piece in pieces))
                for piece, place in zip(pieces, _bytes_of(storage).split(PIECE), strict=True):
                    place.copy_(piece, non_blocking=True)
            self._synchronize()
            # Kept by size, not by storage: gradients, say, may have freed theirs before they leave again.
            for _, pieces in self._away[part]:
                for piece in pieces:
                    self._free.setdefault(piece.numel(), []).append(piece)
            self._away[part] = []

    def _host_memory(self, size: int) -> list[Tensor]:
        """So many bytes in pieces, each taken anew only where none of its size are free."""
        sizes = [min(PIECE, size - begin) for begin in range(0, size, PIECE)]
        return [free.pop() if (free := self._free.get(n)) else self._new_piece(n) for n in sizes]

    def _new_piece(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def _weights(self) -> Iterator[Tensor]:
        """What a forward needs. With ZeRO-3 a parameter itself is empty, or gathered, and this rank's share is beside it."""
        yield from self.model.buffers()
        for parameter in self._parameters():
            yield parameter
            if isinstance(share := getattr(parameter, "ds_tensor", None), Tensor):
                yield share
        for module in self.model.modules():
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))

    def _storages(self, tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
        """Storages on the device that hold anything and can be freed (a file's, mapped into memory, can't), each once."""
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            if tensor.device == self.device and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.resizable():
                    found[storage._cdata] = storage
        return found

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """uint8 [bytes], over the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
