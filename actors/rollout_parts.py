"""Which part of each tensor an engine's process holds, and whether it is what the trainer sent.

The trainer sends whole tensors under the checkpoint's names. An engine may hold several of them as one parameter, and a
tensor-parallel one only a share of each. What that share must be is worked out here from shapes alone, and not by what
vLLM loads weights with, so that a comparison of the two proves something.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rayrlhf.actors.rollout_common import ModelFacts
from rayrlhf.errors import RunFailed
from rayrlhf.models.export import named_weights
from rayrlhf.weights import Entry, Manifest, checksum, differing
from rayrlhf.weights.bucket import torch_dtype
from rayrlhf.weights.checksums import listed

__all__ = ["Comparison", "Held", "Parts", "WholeParts", "region"]

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<member>\w+)\.weight")
OUTPUT = "lm_head"
GATE, UP, DOWN = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")


@dataclass(frozen=True)
class Held:
    """A part of a whole tensor, as an engine has it."""

    local: Tensor
    """The engine's memory."""
    where: tuple[slice, ...]
    """Which part of the whole tensor it is."""


def region(
    whole: tuple[int, ...], local: tuple[int, ...], rank: int, size: int, padded: bool = False
) -> tuple[slice, ...] | None:
    """The part of a whole tensor that one of ``size`` processes holds, by its shape; None where the shapes don't tell.

    A dimension is held whole, or in ``size`` equal shares, or (key-value heads of which there are fewer than processes)
    in fewer shares, each held by as many neighbours.

    Args:
        whole: shape of the whole tensor.
        local: shape of the process's part, padding included.
        rank: the process, from 0 on.
        size: processes.
        padded: the rows are a vocabulary, which is padded before it is cut: the last processes hold fewer rows that count,
            or none.
    """
    if len(whole) != len(local):
        return None
    if padded:
        if whole[1:] != local[1:] or local[0] * size < whole[0]:
            return None
        start = min(rank * local[0], whole[0])
        return slice(start, min(start + local[0], whole[0])), *(slice(n) for n in whole[1:])
    found = []
    for rows, own in zip(whole, local, strict=True):
        if own == rows:
            found.append(slice(rows))
            continue
        if own == 0 or rows % own or size % (rows // own):
            return None
        share = rank // (size * own // rows)
        found.append(slice(share * own, (share + 1) * own))
    return tuple(found)


class Parts:
    """The tensors of a model in an engine's process, by the names under which they travel.

    Args:
        model: vLLM's, or one of transformers.
        facts: of the whole model.
        rank: which of the engine's processes this is.
        size: processes over which the engine spreads its weights.
    """

    def __init__(self, model: Any, facts: ModelFacts, rank: int = 0, size: int = 1):
        self._model, self._facts, self._rank, self._size = model, facts, rank, size
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._packed = getattr(model, "packed_modules_mapping", {})

    def find(self, entry: Entry) -> Held | None:
        """The part of this tensor that is held here; None where it can't be told."""
        own = self._parameters.get(entry.name)
        own = self._member(entry.name) if own is None else own
        own = self._expert(entry.name) if own is None else own
        if own is None:
            return None
        padded = entry.name == self._facts.embedding or entry.name.split(".")[-2:-1] == [OUTPUT]
        where = region(entry.shape, tuple(own.shape), self._rank, self._size, padded)
        if where is None:
            return None
        # Without the padded rows of a vocabulary.
        return Held(own.detach()[: where[0].stop - (where[0].start or 0)] if where else own.detach(), where)

    def where(self, entry: Entry) -> tuple[slice, ...] | None:
        """Which part of this tensor is held here; None where it can't be told."""
        held = self.find(entry)
        return None if held is None else held.where

    def checksums(self, entries: Iterable[Entry]) -> dict[str, int]:
        """CRC-32 of the parts that are held here, in the types in which the tensors travel; those not found are missing."""
        found = {entry.name: (entry, held) for entry in entries if (held := self.find(entry)) is not None}
        return {name: checksum(held.local.to(torch_dtype(entry.dtype))) for name, (entry, held) in found.items()}

    def has_output_layer(self) -> bool:
        """Whether there is an output layer beside the embedding, be it tied or not."""
        return any(name.rsplit(".", 1)[-1] == OUTPUT for name, _ in self._model.named_modules(remove_duplicate=False))

    def _member(self, name: str) -> Tensor | None:
        """A part of a parameter that several were made one of, such as queries, keys and values."""
        *parents, module, kind = name.split(".")
        for fused, members in self._packed.items():
            whole = self._parameters.get(".".join([*parents, fused, kind]))
            if module in members and whole is not None:
                rows = self._rows([self._facts.shapes[".".join([*parents, m, kind])][0] for m in members], len(whole))
                index = members.index(module)
                return whole[sum(rows[:index]) : sum(rows[: index + 1])]
        return None

    def _rows(self, whole: list[int], held: int) -> list[int]:
        """How the ``held`` rows of a fused parameter are dealt out to its members."""
        even = [rows // self._size for rows in whole]
        if sum(even) == held:
            return even
        # Fewer key-value heads than processes: queries are spread, keys and values are repeated.
        return [even[0], *[(held - even[0]) // (len(whole) - 1)] * (len(whole) - 1)]

    def _expert(self, name: str) -> Tensor | None:
        """A part of one expert of a mixture; all experts of a layer lie in two parameters."""
        match = EXPERT.fullmatch(name)
        if match is None:
            return None
        kind = "w2_weight" if match["member"] in DOWN else "w13_weight"
        parents = (match["experts"], match["experts"] + ".routed_experts")
        stacked = next((p for n in parents if (p := self._parameters.get(f"{n}.{kind}")) is not None), None)
        if stacked is None:
            return None
        expert = stacked[int(match["number"])]
        if match["member"] in DOWN:
            return expert
        half = len(expert) // 2
        return {GATE: expert[:half], UP: expert[half:]}[GATE if match["member"] in GATE else UP]


class WholeParts:
    """The tensors of a model of transformers, all of them whole, by the names that a checkpoint has for them."""

    def __init__(self, model: Any, facts: ModelFacts):
        self._model, self._facts = model, facts

    def where(self, entry: Entry) -> tuple[slice, ...] | None:
        """The whole tensor, where the model has one of that name."""
        known = entry.name in self._facts.shapes or entry.name == self._facts.tied
        return tuple(slice(n) for n in entry.shape) if known else None

    def checksums(self, entries: Iterable[Entry]) -> dict[str, int]:
        """As `Parts.checksums`."""
        types = {entry.name: torch_dtype(entry.dtype) for entry in entries}
        found = {n: checksum(t.to(types[n])) for n, t in named_weights(self._model, zero_stage=0) if n in types}
        if self._facts.tied in types:
            output = self._model.get_output_embeddings().weight.detach()
            found[self._facts.tied] = checksum(output.to(types[self._facts.tied]))
        return found

    def has_output_layer(self) -> bool:
        """Always: transformers has one even where it is tied."""
        return True


class Comparison:
    """Compares what a process holds after a transfer with what came in, tensor by tensor, by CRC-32.

    Args:
        parts: the process's own. Another may take its place before `check`.
        facts: of the whole model.
    """

    def __init__(self, parts: Parts | WholeParts, facts: ModelFacts):
        self.parts, self._facts = parts, facts
        self._expected: dict[str, int] = {}
        self._entries: list[Entry] = []
        self._unread: list[str] = []

    def watch(self, manifest: Manifest, named_tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors; each one's own part is noted on its way."""
        for entry, (name, tensor) in zip(manifest.entries(), named_tensors, strict=True):
            self._note(entry, tensor)
            if name == self._facts.embedding and self._facts.tied and self.parts.has_output_layer():
                self._note(replace(entry, name=self._facts.tied), tensor)
            yield name, tensor

    def _note(self, entry: Entry, tensor: Tensor) -> None:
        where = self.parts.where(entry)
        if where is None:
            self._unread.append(entry.name)
        else:
            self._entries.append(entry)
            self._expected[entry.name] = checksum(tensor[where])

    def check(self, version: int, who: str) -> None:
        """Read the process's parameters again.

        Args:
            version: of the weights, for messages.
            who: holds them.

        Raises:
            RunFailed: where a part differs, or can't be found; tensors are named.
        """
        if self._unread:
            raise RunFailed(
                f"the weights of {who} can't be verified: it doesn't tell where it keeps {listed(self._unread)}"
            )
        wrong = differing(self._expected, self.parts.checksums(self._entries))
        if wrong:
            raise RunFailed(
                f"after the transfer of version {version} {who} holds other weights than the trainer sent: {listed(wrong)}"
            )
