"""Values of a configuration as messages show them, and what the writer of a wrong one may have meant."""

from __future__ import annotations

import re
from typing import Any

from rayrlhf.config.fields import choices, holds_lists, kinds, nearest_choice, section_of
from rayrlhf.config.source import Node
from rayrlhf.config.trainers import Section

__all__ = ["NOTHING", "hint", "is_number", "shown"]

NOTHING = re.compile(r"none|nil|null|undefined", re.IGNORECASE)
"""Other languages' words for null."""


def is_number(value: Any) -> bool:
    """Whether a value is a number; a truth value isn't."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(node: Node) -> str:
    """A value as a message shows it."""
    value = node.value
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 80 else value[:77] + '...'!r}"
    if isinstance(value, dict):
        return f"a section with the keys {', '.join(value)}" if value else "an empty section"
    if isinstance(value, list):
        text = str(node.plain())
        return f"the list {text}" if len(text) <= 60 else f"a list of {len(value)}"
    return node.text or str(value)


def hint(node: Node, annotation: Any, key: str) -> str:
    """What the writer of a wrong value may have meant, empty where nothing comes to mind."""
    value, legal_kinds = node.value, kinds(annotation)
    if isinstance(value, str) and NOTHING.fullmatch(value) and None in legal_kinds:
        return "; YAML's word for nothing is null, without quotes"
    if value is None:
        if Section in legal_kinds:
            without = ", null to do without it" if None in legal_kinds else ""
            return f"; are the lines below it not indented? Write {{}} for the defaults{without}"
        return (
            "; a lone ~ is null in YAML" if node.text == "~" else "; is its value missing?" if node.text == "" else ""
        )
    if isinstance(value, dict) and list in legal_kinds:
        return "; put '- ' before the first key to make it a list of one"
    if isinstance(value, dict):
        return "; a text with ': ' in it needs quotes" if str in legal_kinds else ""
    if list in legal_kinds and not isinstance(value, list):
        nearest = nearest_choice(value, annotation)
        of_texts = section_of(annotation) is None and not holds_lists(annotation)
        return f"; did you mean {nearest}?" if nearest else f"; write [{node.text}]" if of_texts else ""
    if choices(annotation):
        nearest = nearest_choice(value, annotation)
        return f"; did you mean {nearest}?" if nearest is not None and not isinstance(value, list) else ""
    if Section in legal_kinds:
        if value is False and None in legal_kinds:
            return "; write null to do without it"
        return f"; give its keys, indented below it, or {key}.KEY=VALUE on the command line"
    if isinstance(value, str) and legal_kinds & {int, float}:
        if re.fullmatch(r"\s*[-+]?\d+,\d+\s*", value):
            return "; the decimal sign is a point, and thousands are not separated (or by _)"
        if re.match(r"\s*[-+]?[\d.]+\s*%", value):
            return "; write a share as a number, 0.2 for 20%"
        if re.match(r"\s*[-+]?\d[\d.]*\s*[A-Za-z]", value):
            return "; write the number alone: the key has a fixed unit"
        if "*" in value or "/" in value:
            return "; write the result: nothing is computed in a configuration"
    return "; quotes make a text of it" if isinstance(value, bool) and str in legal_kinds else ""
