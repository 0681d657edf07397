"""The stages of a pipeline's file: repetitions written out, and references to other stages looked up."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from rayrlhf.config.load import PATH_KEYS
from rayrlhf.config.source import COMMAND_LINE, Node, Place, Problem
from rayrlhf.config.wording import shown

__all__ = ["Draft", "drafts", "link", "nearest", "path_leaves"]

Path = tuple[str, ...]

STAGE, PREVIOUS = "stage:", "previous:"
RESERVED = ("replaced",)
"""Folders of the pipeline's own, which no stage can have."""
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_BLOCK_KEYS = ("repeat", "start", "stages")


@dataclass
class Draft:
    """A stage before its configuration is checked."""

    name: str
    key: str
    """Where it stands in the file, such as ``stages.rounds.stages.dpo``."""
    node: Node
    """Its keys; references in it are replaced by `link`."""
    round: int | None = None
    """In a repetition, which time it is, counted from 1."""
    near: dict[str, str] = field(default_factory=dict)
    """Stages of the same round by the names that they have in their block."""
    before: dict[str, Node] = field(default_factory=dict)
    """What ``previous:NAME`` stands for, by NAME; a text with ``stage:`` or a path."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Which stage's output stands at which key of this one."""


@dataclass
class _Block:
    """A repetition."""

    name: str
    key: str
    stages: dict[str, Node]
    start: dict[str, Node]
    repeat: int


def nearest(word: str, names: Iterable[str]) -> str:
    """A sentence with the name that a word may have meant, else with all."""
    known = list(dict.fromkeys(names))
    close = difflib.get_close_matches(word, known, 1, 0.6)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known) or 'none'}"


# -- repetitions written out ------------------------------------------------------------------------------------


def drafts(tree: Node, given: Iterable[str], problems: list[Problem]) -> tuple[list[Draft], dict[str, str]]:
    """All stages in the order of the file, and further names of some: ``BLOCK.NAME`` is NAME in BLOCK's last round.

    Args:
        tree: the section ``stages``.
        given: dotted keys of the stages that the file itself has: the command line adds none.
    """
    found: list[Draft] = []
    aliases: dict[str, str] = {}
    for name, node in _mappings(tree, "stages", list(given), problems):
        if not any(word in node.value for word in ("repeat", "stages")):
            found.append(Draft(name, f"stages.{name}", node))
            continue
        block = _block(name, node, list(given), problems)
        if block is not None:
            found += _rounds(block)
            aliases |= {f"{name}.{inner}": f"{name}-{block.repeat}-{inner}" for inner in block.stages}
    _unique(found, problems)
    return found, aliases


def _mappings(tree: Node, key: str, given: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, Node]]:
    """The named sections of a section, as far as they are sections with legal names."""
    known = [k.rpartition(".")[2] for k in given if k.rpartition(".")[0] == key]
    for name, node in tree.value.items():
        here = f"{key}.{name}"
        if here not in given and node.place.source == COMMAND_LINE:
            problems.append(Problem(node.place, here, f"there is no such stage; {nearest(name, known)}"))
        elif not _NAME.fullmatch(name) or name in RESERVED:
            legal = "letters, digits, - and _, with a letter or _ first" + f"; not {', '.join(RESERVED)}"
            problems.append(Problem(node.place, here, f"isn't a legal name of a stage; legal: {legal}"))
        elif not isinstance(node.value, dict):
            problems.append(Problem(node.place, here, f"found {shown(node)}; legal: a section with a stage's keys"))
        else:
            yield name, node


def _block(name: str, node: Node, given: Sequence[str], problems: list[Problem]) -> _Block | None:
    key, keys = f"stages.{name}", node.value
    for other in [k for k in keys if k not in _BLOCK_KEYS]:
        text = f"there is no such key in a repetition; {nearest(other, _BLOCK_KEYS)}"
        problems.append(Problem(keys[other].place, f"{key}.{other}", text))
    repeat = keys.get("repeat")
    if repeat is None or type(repeat.value) is not int or repeat.value < 1:
        found = "is missing" if repeat is None else f"found {shown(repeat)}"
        text = f"{found}; legal: a whole number of at least 1, the rounds of this repetition"
        problems.append(Problem((repeat or node).place, f"{key}.repeat", text))
    inside = keys.get("stages")
    if inside is None or not isinstance(inside.value, dict) or not inside.value:
        text = "legal: a section with the stages of one round, each under its name"
        problems.append(Problem((inside or node).place, f"{key}.stages", text))
        return None
    stages = dict(_mappings(inside, f"{key}.stages", given, problems))
    for inner, stage in list(stages.items()):
        if "stages" in stage.value or "repeat" in stage.value:
            text = "a repetition can't stand in a repetition; legal: a section with a stage's keys"
            problems.append(Problem(stage.place, f"{key}.stages.{inner}", text))
            del stages[inner]
    start = _start(keys.get("start"), f"{key}.start", list(stages), problems)
    rounds = repeat.value if repeat is not None and type(repeat.value) is int else 1
    return _Block(name, key, stages, start, max(1, min(rounds, 1000)))


def _start(node: Node | None, key: str, names: list[str], problems: list[Problem]) -> dict[str, Node]:
    if node is None:
        return {}
    if not isinstance(node.value, dict):
        text = f"found {shown(node)}; legal: for stages of the round what previous:NAME is in the first one"
        problems.append(Problem(node.place, key, text))
        return {}
    usable = {}
    for name, value in node.value.items():
        if name not in names:
            text = f"there is no such stage in this repetition; {nearest(name, names)}"
            problems.append(Problem(value.place, f"{key}.{name}", text))
        elif not isinstance(value.value, str) or value.value.startswith(PREVIOUS):
            text = f"found {shown(value)}; legal: stage:NAME, or the path of a model or a data file"
            problems.append(Problem(value.place, f"{key}.{name}", text))
        else:
            usable[name] = value
    return usable


def _rounds(block: _Block) -> Iterator[Draft]:
    for r in range(1, block.repeat + 1):
        near = {inner: f"{block.name}-{r}-{inner}" for inner in block.stages}
        for inner, node in block.stages.items():
            if r == 1:
                before = block.start
            else:
                earlier = {other: f"{STAGE}{block.name}-{r - 1}-{other}" for other in block.stages}
                before = {other: Node(text, node.place, text) for other, text in earlier.items()}
            yield Draft(near[inner], f"{block.key}.stages.{inner}", copy.deepcopy(node), r, near, before)


def _unique(found: list[Draft], problems: list[Problem]) -> None:
    first: dict[str, Draft] = {}
    for draft in found:
        for name in {draft.name, draft.key.rpartition(".")[2]}:
            other = first.get(name)
            if other is not None and other.key != draft.key and name in (draft.name, other.name):
                text = f"the name {name} is that of {other.key} too; give it another"
                problems.append(Problem(draft.node.place, draft.key, text))
        first.setdefault(draft.name, draft)
        first.setdefault(draft.key.rpartition(".")[2], draft)


# -- references -------------------------------------------------------------------------------------------------


def path_leaves(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every text that stands where a path may, with its keys."""
    children: list[tuple[str, Node]] = []
    if isinstance(node.value, dict):
        children = list(node.value.items())
    elif isinstance(node.value, list):
        children = [(str(i), child) for i, child in enumerate(node.value)]
    elif isinstance(node.value, str) and tuple("0" if p.isdecimal() else p for p in path) in PATH_KEYS:
        yield path, node
    for name, child in children:
        yield from path_leaves(child, (*path, name))


def link(
    draft: Draft, names: list[str], aliases: dict[str, str], outputs: dict[str, FilePath], problems: list[Problem]
) -> None:
    """Put the paths of other stages' outputs in place of a stage's references, and note them in ``draft.inputs``."""
    for path, node in path_leaves(draft.node):
        text, key = node.value, f"{draft.key}.{'.'.join(path)}"
        place: Place = node.place
        if text.startswith(PREVIOUS):
            start = _previous(draft, text, key, place, problems)
            if start is None:
                continue
            text = start.value
        if not text.startswith(STAGE):
            node.value = node.text = text
            continue
        name = text.removeprefix(STAGE)
        target = draft.near.get(name) or aliases.get(name) or (name if name in names else None)
        if target is None:
            known = [*draft.near, *(n for n in [*names, *aliases] if n not in draft.near.values())]
            problems.append(Problem(place, key, f"found {text}, but there is no such stage; {nearest(name, known)}"))
            continue
        draft.inputs[".".join(path)] = target
        node.value = node.text = str(outputs.get(target, FilePath(target)))


def _previous(draft: Draft, text: str, key: str, place: Place, problems: list[Problem]) -> Any:
    name = text.removeprefix(PREVIOUS)
    if draft.round is None:
        text = f"found {text}, but this stage isn't repeated; legal: stage:NAME, or previous: in a repetition"
    elif name not in draft.near:
        text = f"found {text}, but there is no such stage in this repetition; {nearest(name, draft.near)}"
    elif name not in draft.before:
        block = draft.key.rpartition(".stages.")[0]
        text = f"found {text}, but {block}.start.{name} isn't given; legal: there, what it is in the first round"
    else:
        return draft.before[name]
    problems.append(Problem(place, key, text))
    return None
