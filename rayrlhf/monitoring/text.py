"""How numbers, times and foreign text look on a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from rayrlhf.monitoring.metrics import plain_number

__all__ = ["can_draw", "duration", "finite", "fixed", "number_or_none", "printable", "sparkline"]

_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "_.-~=+*#"


def number_or_none(value: Any) -> float | None:
    """``value`` as a float, NaN and infinities included; None for None and whatever is no number. Never raises."""
    try:
        number = plain_number("", value)
        return None if number is None else float(number)
    except (TypeError, ValueError, OverflowError):
        return None


def finite(value: Any) -> float | None:
    """``value`` as a finite float, else None."""
    number = number_or_none(value)
    return number if number is not None and math.isfinite(number) else None


def fixed(value: Any, decimals: int, *, sign: bool = False) -> str:
    """With so many decimals, or in scientific notation where these would show nothing or too much; "-": no number."""
    number = number_or_none(value)
    if number is None:
        return "-"
    if not math.isfinite(number):
        return str(number)
    plus = "+" if sign else ""
    magnitude = abs(number)
    if magnitude >= 1e5 or 0 < magnitude < 0.5 * 10**-decimals:
        return f"{number:{plus}.1e}"
    return f"{number + 0.0:{plus}.{decimals}f}"


def duration(seconds: float | None) -> str:
    """h:mm:ss, with days in front where there are any; "-" where it isn't known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def can_draw(console: Console) -> bool:
    """Whether the console's encoding has block characters."""
    return console.encoding.lower().startswith("utf")


def printable(text: str, console: Console) -> str:
    """Foreign text (a model's response) made harmless: no control characters, nothing that the encoding lacks."""
    shown = "".join(_visible(character) for character in text.replace("\r\n", "\n"))
    return shown.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _visible(character: str) -> str:
    code = ord(character)
    # Spaces beyond ASCII (no-break, ideographic) aren't "printable", but harmless; below 0xA0 there are controls.
    # Zero-width joiners hold emoji and some scripts together.
    if character in "\n\t\u200c\u200d" or character.isprintable() or (character.isspace() and code >= 0xA0):
        return character
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def sparkline(values: Sequence[float | None], width: int, *, ascii_only: bool = False) -> str:
    """At most ``width`` characters, each for the mean of its share of ``values``; a blank where that has no number."""
    count = min(width, len(values))
    means: list[float | None] = []
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        known = [x for x in part if x is not None and math.isfinite(x)]
        means.append(math.fsum(known) / len(known) if known else None)
    shown = [x for x in means if x is not None]
    if not shown:
        return ""
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    low, span = min(shown), max(shown) - min(shown)
    top = len(levels) - 1

    def level(x: float) -> str:
        return levels[round((x - low) / span * top)] if span > 0 else levels[top // 2]

    return "".join(" " if x is None else level(x) for x in means)
