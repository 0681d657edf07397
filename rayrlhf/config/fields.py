"""What the schema says about its keys, in words: legal values, docs, and the nearest legal key or value."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rayrlhf.config.roots import ROOTS, Root, keys_of
from rayrlhf.config.trainers import Section
from rayrlhf.config.words import CHOICE_SYNONYMS, KEY_SYNONYMS

__all__ = [
    "Field",
    "all_fields",
    "choices",
    "element_of",
    "field_at",
    "holds_list",
    "holds_lists",
    "kinds",
    "legal",
    "nearest_choice",
    "nearest_keys",
    "owners",
    "section_of",
]

Path = tuple[str, ...]


class Field:
    """A key of the schema: its dotted path (list indices are 0), pydantic's field and the section that it is in."""

    def __init__(self, path: Path, info: FieldInfo, owner: type[Section]):
        self.path = path
        self.info = info
        self.owner = owner

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def legal(self) -> str:
        return legal(self.info.annotation, self.info.metadata)

    @property
    def section(self) -> type[Section] | None:
        return section_of(self.info.annotation)

    @property
    def doc(self) -> str:
        return " ".join((self.info.description or "").split())


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    """``Annotated[int, Field(ge=1)]`` as ``int`` and its constraints."""
    if get_origin(annotation) is not Annotated:
        return annotation, []
    base, *metadata = get_args(annotation)
    return base, [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def section_of(annotation: Any) -> type[Section] | None:
    """The section class of ``Section``, ``Section | None`` and ``list[Section]``, alone or in a union; None of all
    else."""
    base, _ = _unwrap(annotation)
    if _is_union(base) or get_origin(base) is list:
        return next((section for part in get_args(base) if (section := section_of(part)) is not None), None)
    return base if isinstance(base, type) and issubclass(base, Section) else None


def element_of(annotation: Any) -> Any:
    """What the elements of a list are, alone or in a union; None where there is no list."""
    base, _ = _unwrap(annotation)
    if _is_union(base):
        return next((found for part in get_args(base) if (found := element_of(part)) is not None), None)
    return get_args(base)[0] if get_origin(base) in (list, tuple) else None


def holds_lists(annotation: Any) -> bool:
    """Whether the elements of a list may be lists themselves."""
    element = element_of(annotation)
    return element is not None and get_origin(_unwrap(element)[0]) is list


def holds_list(annotation: Any) -> bool:
    """Whether a value may be a list of sections or of other values."""
    return list in kinds(annotation)


def kinds(annotation: Any) -> set[Any]:
    """The types that a value may have: bool, int, float, str, list, None and `Section` (for all sections)."""
    base, _ = _unwrap(annotation)
    if _is_union(base):
        return set().union(*(kinds(part) for part in get_args(base)))
    origin = get_origin(base)
    if origin is Literal:
        return {type(choice) for choice in get_args(base)}
    if origin in (list, tuple):
        return {list}
    if base is None or base is type(None):
        return {None}
    return {Section if issubclass(base, Section) else base}


def choices(annotation: Any) -> list[Any]:
    """The values of all literals in the annotation."""
    base, _ = _unwrap(annotation)
    if _is_union(base):
        return [choice for part in get_args(base) for choice in choices(part)]
    return list(get_args(base)) if get_origin(base) is Literal else []


def _bounds(metadata: list[Any], whole: bool) -> str:
    limits = {
        name: getattr(m, name)
        for m in metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(m, name, None) is not None
    }
    if whole and "lt" in limits:
        limits["le"] = limits.pop("lt") - 1
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']} to {limits['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{words[name]} {limits[name]}" for name in ("ge", "gt", "le", "lt") if name in limits]
    return " " + " and ".join(parts) if parts else ""


def legal(annotation: Any, metadata: list[Any] | None = None) -> str:
    """What an annotation accepts, in words: "a whole number of at least 1, or null"."""
    base, own = _unwrap(annotation)
    constraints = [*own, *(metadata or [])]
    if _is_union(base):
        parts = [legal(p, constraints) for p in get_args(base) if p is not type(None)]
        if type(None) in get_args(base):
            parts.append("null")
        return ", or ".join(parts)
    if get_origin(base) is Literal:
        words = [str(choice) for choice in get_args(base)]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if get_origin(base) is list:
        least = max((m.min_length for m in constraints if hasattr(m, "min_length")), default=0)
        inside, within = _unwrap(get_args(base)[0])
        if get_origin(inside) is list:
            fewest = max((m.min_length for m in within if hasattr(m, "min_length")), default=0)
            return f"a list of lists, each of at least {fewest} texts"
        options = [str(choice) for choice in choices(get_args(base)[0])]
        inner = "sections" if section_of(base) else f"any of {', '.join(options)}" if options else "texts"
        return f"a list of {'at least one of ' if least else ''}{inner}"
    if get_origin(base) is tuple:
        return f"a list of {len(get_args(base))}: each {legal(get_args(base)[0])}"
    if base is bool:
        return "true or false"
    if base is int:
        return "a whole number" + _bounds(constraints, whole=True)
    if base is float:
        return "a number" + _bounds(constraints, whole=False)
    if base is str:
        return "a text that isn't empty" if any(getattr(m, "min_length", 0) for m in constraints) else "a text"
    own_keys = [name for name in base.model_fields if name in base.__annotations__] or list(base.model_fields)
    return f"a section with keys such as {', '.join(own_keys[:3])}"


def _walk(owner: type[Section], prefix: Path) -> Iterator[Field]:
    for name, info in keys_of(owner).items():
        path = (*prefix, name)
        yield Field(path, info, owner)
        section = section_of(info.annotation)
        if section is not None:
            yield from _walk(section, (*path, "0") if holds_list(info.annotation) else path)


@lru_cache(maxsize=len(ROOTS))
def all_fields(root: Root) -> dict[Path, Field]:
    """Every key of an algorithm's configuration, sections included, in its order. The elements of a list of sections
    have index 0."""
    return {field.path: field for field in _walk(root, ())}


def _with_zeros(path: Path) -> Path:
    return tuple("0" if part.isdecimal() else part for part in path)


def field_at(path: Path, root: Root) -> Field | None:
    """The field at a path whose list indices are whatever they are."""
    return all_fields(root).get(_with_zeros(path))


def owners(path: Path) -> list[str]:
    """The algorithms whose configuration has a key at a path."""
    return [name for name, root in ROOTS.items() if field_at(path, root) is not None]


def nearest_choice(value: Any, annotation: Any) -> Any:
    """The literal that a wrong value may have meant, or None."""
    options = {str(choice): choice for choice in choices(annotation)}
    word = str(value).lower().removeprefix("torch.").split(":")[0].replace("-", "_")
    synonym = CHOICE_SYNONYMS.get(word)
    if synonym in options:
        return options[synonym]
    close = difflib.get_close_matches(word, list(options), 1, 0.6)
    return options[close[0]] if close else None


def _normal(word: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower().replace("-", "_")


def _shared(a: Path, b: Path) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def nearest_keys(path: Path, root: Root, misspelt: bool = True) -> list[str]:
    """The legal keys of an algorithm that an unknown key may have meant, at most three, likeliest first.

    Looked for in this order: the same word with other dashes or capitals, the same word in another section, a close
    misspelling in the same section, another trainer's word for it, and a misspelling anywhere; where it can't be
    misspelt, without the misspellings.
    """
    parent = _with_zeros(path[:-1])
    word = _normal(path[-1])
    fields = all_fields(root)
    siblings = {p[-1]: ".".join((*path[:-1], p[-1])) for p in fields if p[:-1] == parent}
    if word in siblings:
        return [siblings[word]]
    elsewhere = [f.key for f in fields.values() if f.path[-1] == word or f.key == word]
    elsewhere.sort(key=lambda key: -_shared(tuple(key.split(".")), parent))
    if parent and elsewhere:
        most = _shared(tuple(elsewhere[0].split(".")), parent)
        elsewhere = [key for key in elsewhere if _shared(tuple(key.split(".")), parent) == most]
    near = difflib.get_close_matches(word, list(siblings), 1, 0.8) if misspelt else []
    found = [siblings[name] for name in near] + elsewhere
    for name in (f"{parent[-1]}_{word}" if parent else word, word):
        if not found and name in KEY_SYNONYMS:
            found = [key for key in KEY_SYNONYMS[name] if tuple(key.split(".")) in fields]
            inside = [key for key in found if _shared(tuple(key.split(".")), parent)]
            found = inside or found
    if not found and misspelt:
        found = [siblings[name] for name in difflib.get_close_matches(word, list(siblings), 1, 0.65)]
    if not found and misspelt:
        named: dict[str, list[str]] = {}
        for field in fields.values():
            for name in {field.path[-1], field.key}:
                named.setdefault(name, []).append(field.key)
        found = [key for name in difflib.get_close_matches(word, list(named), 1, 0.75) for key in named[name]]
    return list(dict.fromkeys(found))[:3]
