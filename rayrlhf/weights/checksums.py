"""Checksums of tensors, and the sentence that says which ones differ."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

from torch import Tensor

from rayrlhf.weights.bucket import as_bytes

__all__ = ["checksum", "differing", "listed"]


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the tensor's bytes, row by row, in its own type."""
    return zlib.crc32(as_bytes(tensor.cpu()).numpy())  # type: ignore[arg-type]


def differing(expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Names whose checksum isn't the expected one, or is missing, in the order of ``expected``."""
    return [name for name, value in expected.items() if found.get(name) != value]


def listed(names: Iterable[str], most: int = 8) -> str:
    """The names in one line: the first ``most``, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
