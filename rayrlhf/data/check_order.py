"""Suspicions that chosen and rejected are swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from rayrlhf.data.findings import CheckedFile, Finding
from rayrlhf.data.records import Record
from rayrlhf.errors import InputRefused

__all__ = ["suspicions"]

_RATIO = 3
_LEAST_DIFFERENCE = 20
"""Characters by which the longer response must be longer: of short ones the ratio says nothing."""
_LEAST_WORDS = 10
_LEAST_LEAD = 0.5
"""Of the median distance of two scores."""


def suspicions(file: CheckedFile, score: Callable[[list[Any], list[str]], Sequence[float]] | None) -> Iterator[Finding]:
    """Pairs whose rejected response is the better one by a reward model, or without one by its looks.

    A reward model has to see the rejected one ahead by at least half the median distance of the file's pairs: of pairs that
    lie close together it orders many wrongly.
    """
    records = file.records if file.kind == "pairs" else []
    if score is None:
        for record in records:
            sign = _sign(*record.responses)
            if sign:
                text = f"suspicion: chosen and rejected may be swapped: {sign}"
                yield file.warning(record.number, "swapped", text)
        return
    if not records:
        return
    chosen, rejected = (_scores(score, records, which) for which in (0, 1))
    typical = median(abs(one - other) for one, other in zip(chosen, rejected, strict=True))
    for record, better, worse in zip(records, chosen, rejected, strict=True):
        if worse > better and worse - better >= _LEAST_LEAD * typical:
            text = f"suspicion: chosen and rejected may be swapped: the reward model gives {better:.3g} and {worse:.3g}"
            yield file.warning(record.number, "swapped", text)


def _scores(
    score: Callable[[list[Any], list[str]], Sequence[float]], records: Sequence[Record], which: int
) -> list[float]:
    asked = [record.text if record.messages is None else record.messages for record in records]
    given = score(asked, [record.responses[which] for record in records])
    scores = [float(value) for value in given]
    if len(scores) != len(records) or not np.isfinite(scores).all():
        raise InputRefused(
            f"the scorer gives {len(scores)} numbers, {int(np.isfinite(scores).sum())} of them finite, for "
            f"{len(records)} responses; legal: one finite number for each"
        )
    return scores


def _sign(chosen: str, rejected: str) -> str | None:
    """What makes the rejected response look like the better one."""
    one, other = chosen.strip(), rejected.strip()
    if other.startswith(one) and len(other) - len(one) >= _LEAST_DIFFERENCE:
        return "the chosen one is the rejected one cut short"
    if len(other) > _RATIO * len(one) and len(other) - len(one) >= _LEAST_DIFFERENCE:
        return f"the rejected one is {len(other) / len(one):.1f} times as long"
    if not any(c.isalnum() for c in one) and any(c.isalnum() for c in other):
        return "the chosen one has neither letters nor digits"
    if _repetitive(one) and not _repetitive(other):
        return "the chosen one says the same words again and again"
    return None


def _repetitive(text: str) -> bool:
    words = text.lower().split()
    return len(words) >= _LEAST_WORDS and len(set(words)) * 4 <= len(words)
