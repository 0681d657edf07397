"""Configuration text as a tree of values that know where they stand: YAML files and overrides from the command line.

YAML is read by the rules of YAML 1.2's core schema, not PyYAML's 1.1: ``1e-5`` is a number; ``no``, ``on``, ``12:30``
and ``2024-01-01`` are texts; a key that stands twice is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.errors import InputRefused

__all__ = ["COMMAND_LINE", "Node", "Place", "Problem", "apply_overrides", "parse", "read_file"]

COMMAND_LINE = "command line"
_TAG = "tag:yaml.org,2002:"
_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
_SYNTAX_HINTS = (
    (
        "mapping values are not allowed",
        "a ':' stands where none can: is this line indented as its neighbours, or does a text need quotes?",
    ),
    ("could not find expected ':'", "a key needs a ':' and a space after it"),
    ("expected <block end>", "this line's indentation fits no line above it, or a quote or bracket isn't closed"),
    ("found unexpected end of stream", "a quote or bracket isn't closed"),
    ("expected ',' or", "a bracket isn't closed, or a comma is missing"),
    (
        "found undefined alias",
        "*name refers to a value that was marked &name above; a text that begins with * needs quotes",
    ),
    ("cannot start any token", "a text that begins with %, @ or ` needs quotes"),
    ("found unknown escape character", "in \"double quotes\" a backslash begins an escape: use 'single quotes'"),
    ("expected a single document", "the file holds several documents ('---'); one is legal"),
)

# Errors that PyYAML finds at the end of something: the line where it begins is the one to mend.
_UNFINISHED = ("could not find expected ':'", "unexpected end of stream", "expected ',' or")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(
        _TAG + _name, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )


@dataclass(frozen=True)
class Place:
    """Where a value stands: a line of a file, or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """What is wrong at a place; `key` is dotted, empty where it isn't about one key."""

    place: Place
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.text}" if self.key else f"{self.place}: {self.text}"


@dataclass
class Node:
    """A value of the tree: a scalar, ``dict[str, Node]`` or ``list[Node]``.

    ``place`` is that of its key. ``text`` is a scalar as it was written, ``quoted`` whether in quotes.
    """

    value: Any
    place: Place
    text: str = ""
    quoted: bool = False

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


def read_file(path: str | Path, problems: list[Problem]) -> Node:
    """The tree of a YAML file, its duplicate and illegal keys added to ``problems``.

    Raises:
        InputRefused: where nothing in the file can be checked: it can't be read, isn't UTF-8 or YAML, is empty or has
            no keys.
    """
    place = Place(str(path))
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputRefused(f"{place}: there is no such file (the current folder is {Path.cwd()})") from None
    except IsADirectoryError:
        raise InputRefused(f"{place}: this is a folder; a YAML file is needed") from None
    except (OSError, ValueError) as error:
        raise InputRefused(f"{place}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    encoding = _ENCODINGS.get(data[:2])
    if encoding:
        raise InputRefused(f"{place}: the file is {encoding}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputRefused(
            f"{place}:{line}: byte {error.object[error.start]:#04x} isn't UTF-8; save the file as UTF-8"
        ) from None
    tree = parse(text, str(path), problems)
    if tree is None or tree.value is None:
        raise InputRefused(
            f"{place}: the file is empty; a configuration with keys such as 'policy:' and 'ppo:' is needed"
        )
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else f"the text {tree.text!r}"
        raise InputRefused(f"{place}:{tree.place.line}: the file holds {kind} where 'key: value' lines are needed")
    return tree


def parse(text: str, source: str, problems: list[Problem]) -> Node | None:
    """The tree of a YAML text, None for an empty one. Lines are given for files, not for the command line.

    Raises:
        InputRefused: where the text isn't YAML, with the line and what may be the cause.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise InputRefused(_syntax_problem(error, text, source)) from None
    except RecursionError:
        raise InputRefused(f"{source}: values are nested too deeply") from None
    if root is None:
        return None
    return _Builder(source, problems).build(root, _line(root), (), ())


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_problem(error: yaml.YAMLError, text: str, source: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        position = getattr(error, "position", 0)
        character = text[position : position + 1]
        return f"{Place(source, text.count(chr(10), 0, position) + 1)}: the character {character!r} isn't legal in YAML"
    begun = any(sign in f"{error.problem}" for sign in _UNFINISHED)
    mark = (error.context_mark if begun else None) or error.problem_mark or error.context_mark
    place = Place(source, mark.line + 1 if mark and source != COMMAND_LINE else None)
    lines = text.splitlines()
    shown = lines[mark.line].rstrip() if mark and mark.line < len(lines) else ""
    what = f"{error.problem or ''}".replace(", but found another document", "")
    if "'\\t'" in what or "\t" in shown[: len(shown) - len(shown.lstrip())]:
        return f"{place}: a tab stands at column {mark.column + 1 if mark else 1}; YAML is indented with spaces only"
    reasons = f"{error.context or ''} {what}"
    hint = next((hint for sign, hint in _SYNTAX_HINTS if sign in reasons), what)
    found = f", found {shown.strip()!r}" if shown.strip() else ""
    return f"{place}: this isn't YAML{found}: {hint}"


class _Builder:
    """Makes `Node`s of PyYAML's nodes, collecting what is wrong with keys and tags."""

    def __init__(self, source: str, problems: list[Problem]):
        self.source = source
        self.problems = problems

    def _place(self, line: int) -> Place:
        return Place(self.source, None if self.source == COMMAND_LINE else line)

    def _report(self, line: int, path: tuple[str, ...], text: str) -> None:
        self.problems.append(Problem(self._place(line), ".".join(path), text))

    def build(self, node: yaml.Node, line: int, path: tuple[str, ...], within: tuple[int, ...]) -> Node:
        """The tree under ``node``; ``within`` are the nodes that it lies in."""
        place = self._place(line)
        if id(node) in within:
            self._report(line, path, "an alias (*name) refers to the value that it stands in")
            return Node(None, place)
        within = (*within, id(node))
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, path, within), place)
        if isinstance(node, yaml.SequenceNode):
            items = [self.build(item, _line(item), (*path, str(i)), within) for i, item in enumerate(node.value)]
            return Node(items, place)
        assert isinstance(node, yaml.ScalarNode)
        return Node(self._scalar(node, path), place, node.value, node.style is not None)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...], within: tuple[int, ...]) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            line = _line(key_node)
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._report(
                    line, path, "a key is a list or a mapping; keys are plain words (a text in {{...}} needs quotes)"
                )
                continue
            key = key_node.value
            if key in own:
                self._report(line, (*path, key), f"the key stands twice, first at {own[key].place}; remove one")
                continue
            own[key] = self.build(value_node, line, (*path, key), within)
        for mapping in merged:
            tree = self.build(mapping, _line(mapping), path, within)
            if isinstance(tree.value, dict):
                own = {**tree.value, **own}
            else:
                self._report(_line(mapping), path, "'<<' takes a mapping that was marked &name")
        return own

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("str", "merge"):
            return text
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                digits = text.replace("_", "")
                return int(digits, 0 if re.match("0[xo]", digits) else 10)
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)", r"\1", text.replace("_", ""), flags=re.IGNORECASE))
        except (ValueError, KeyError):
            self._report(_line(node), path, f"{text!r} isn't a {kind}")
            return None
        self._report(_line(node), path, f"the YAML tag {node.tag!r} isn't legal here; write the plain value")
        return None


def apply_overrides(tree: Node, overrides: list[str], is_text: Any, problems: list[Problem]) -> None:
    """Set the values ``key=value`` in the tree, in their order; a later one wins. Missing sections are made.

    Args:
        is_text: says of a path of keys whether its value is a text: such a value is taken as it was written, so that
            ``data.system_prompt=Answer: briefly`` isn't read as a mapping.
    """
    for override in overrides:
        for problem in _apply_one(tree, override, is_text, problems):
            problems.append(Problem(Place(COMMAND_LINE), "", problem))


def _apply_one(tree: Node, override: str, is_text: Any, problems: list[Problem]) -> Iterator[str]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        yield f"{override!r} isn't an override; write key=value, as in ppo.kl_coef=0.1"
        return
    path = tuple(key.split("."))
    if not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
        yield (
            f"{override!r}: {key!r} isn't a dotted key; write key=value without spaces, dashes or signs before the key"
            " and with the"
            " names of sections joined by single dots, as in ppo.kl_coef=0.1"
        )
        return
    if not text.strip():
        yield f"{override!r} has no value; write {key}=null for nothing, or {key}='\"\"' for an empty text"
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        yield f"{key}: the value isn't UTF-8"
        return
    before = len(problems)
    try:
        node = parse(text, COMMAND_LINE, problems)
    except InputRefused as refusal:
        if not is_text(path):
            yield f"{key}: found {text!r}; {refusal.problems[0].removeprefix(COMMAND_LINE + ': ')}"
            return
        node = None
    if is_text(path) and (
        node is None or isinstance(node.value, dict | list) or node.value is not None and not node.quoted
    ):
        del problems[before:]
        node = Node(text, Place(COMMAND_LINE), text)
    problem = _set(tree, path, node or Node(None, Place(COMMAND_LINE)))
    if problem:
        yield f"{key}: {problem}"


def _set(tree: Node, path: tuple[str, ...], node: Node) -> str | None:
    """Put ``node`` into the tree; what hinders it, if anything does."""
    here = tree
    for depth, name in enumerate(path):
        last = depth == len(path) - 1
        dotted = ".".join(path[:depth])
        if isinstance(here.value, list):
            size = len(here.value)
            if not name.isdecimal() or int(name) >= size:
                legal = f"0 to {size - 1}" if size > 1 else "0" if size else f"none; set the whole list: {dotted}=[...]"
                return f"{dotted} is a list of {size}; {name!r} isn't one of its indices ({legal})"
            if last:
                here.value[int(name)] = node
            else:
                here = here.value[int(name)]
            continue
        if here.value is None:
            here.value, here.place = {}, Place(COMMAND_LINE)
        if not isinstance(here.value, dict):
            return f"{dotted} has no keys: it is {here.plain()!r} ({here.place})"
        if last:
            here.value[name] = node
        else:
            here = here.value.setdefault(name, Node(None, Place(COMMAND_LINE)))
    return None
