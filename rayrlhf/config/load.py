"""A configuration from a YAML file and overrides: checked as a whole, every problem told at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rayrlhf.config.dump import dump_config
from rayrlhf.config.fields import choices, field_at, kinds, legal, nearest_choice, nearest_keys, section_of
from rayrlhf.config.rules import broken_rules
from rayrlhf.config.schema import Config
from rayrlhf.config.source import COMMAND_LINE, Node, Place, Problem, apply_overrides, read_file
from rayrlhf.config.trainers import Section
from rayrlhf.errors import InputRefused

__all__ = ["dump_config", "load_config"]

Path = tuple[str, ...]

_NOTHING = re.compile(r"none|nil|null|undefined", re.IGNORECASE)
_PATH_KEYS = {
    ("run_dir",),
    ("policy", "path"),
    ("policy", "tokenizer"),
    ("policy", "chat_template"),
    ("critic", "path"),
    ("reference", "path"),
    ("reward", "sources", "0", "model"),
    ("data", "prompts"),
    ("data", "eval_prompts"),
}


def load_config(path: str | FilePath, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with dotted keys, as in ``ppo.kl_coef=0.1`` or ``reward.sources.0.weight=2``. The value
            is YAML and replaces the file's; of two for one key the later one counts.

    Raises:
        InputRefused: with every problem of the file and the overrides: where it is, the key, what was found, what is
            legal.
    """
    problems: list[Problem] = []
    tree = read_file(path, problems)
    apply_overrides(tree, list(overrides), _is_text, problems)
    checker = _Checker(tree, Place(str(path)), problems)
    config = checker.check()
    if config is None or problems:
        raise InputRefused([str(problem) for problem in _in_order(problems, str(path))])
    return config


def _in_order(problems: list[Problem], path: str) -> list[Problem]:
    """By line of the file, then those of the command line; each once."""
    order = sorted(problems, key=lambda p: (p.place.source != path, p.place.line or 0))
    return list(dict.fromkeys(order))


def _is_text(path: Path) -> bool:
    """Whether a key takes nothing but a text (or null): the value of its override is then taken as it was written."""
    if len(path) > 1 and path[-1].isdecimal():
        parent = field_at(path[:-1])
        return (
            parent is not None
            and kinds(parent.info.annotation) == {list}
            and section_of(parent.info.annotation) is None
        )
    field = field_at(path)
    return field is not None and kinds(field.info.annotation) <= {str, None} and not choices(field.info.annotation)


def _is_path(path: Path) -> bool:
    return tuple("0" if part.isdecimal() else part for part in path) in _PATH_KEYS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(node: Node) -> str:
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


def _hint(node: Node, annotation: Any, key: str) -> str:
    """What the writer of a wrong value may have meant, empty where nothing comes to mind."""
    value, legal_kinds = node.value, kinds(annotation)
    if isinstance(value, str) and _NOTHING.fullmatch(value) and None in legal_kinds:
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
        return f"; did you mean {nearest}?" if nearest else "" if section_of(annotation) else f"; write [{node.text}]"
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


class _Checker:
    """One pass over the tree: structure and kinds here, values by pydantic, then the rules across keys.

    A field with a problem is `bad`: the rules which read it are not applied, all others are.
    """

    def __init__(self, tree: Node, file: Place, problems: list[Problem]):
        self.tree = tree
        self.file = file
        self.problems = problems
        self.nodes: dict[Path, Node] = {}
        self.bad: set[Path] = {tuple(p.key.split(".")) for p in problems if p.key}

    def check(self) -> Config | None:
        """The configuration as far as it can be made, its problems added to the list; None where nothing can be."""
        plain = self._section(self.tree, Config, ())
        config = self._validated(plain)
        if config is not None:
            for violation in broken_rules(config, self.bad):
                self.problems.append(Problem(self._place_of(violation.keys), violation.keys[0], violation.message))
        return config

    def _place_of(self, keys: Sequence[str]) -> Place:
        """Where the first key stands; else where another was given, on the command line rather than in the file; else
        the first key's section."""
        given = [self.nodes[path].place for path in (tuple(key.split(".")) for key in keys) if path in self.nodes]
        if given and tuple(keys[0].split(".")) not in self.nodes:
            given.sort(key=lambda place: place.source != COMMAND_LINE)
        if given:
            return given[0]
        path = tuple(keys[0].split("."))
        return next((self.nodes[path[:n]].place for n in range(len(path), 0, -1) if path[:n] in self.nodes), self.file)

    def _report(self, path: Path, text: str, place: Place | None = None) -> None:
        self.problems.append(Problem(place or self.nodes[path].place, ".".join(path), text))
        self.bad.add(path)

    # -- structure ----------------------------------------------------------------------------------------------

    def _section(self, node: Node, cls: type[Section], path: Path) -> dict[str, Any]:
        """The values of a section's legal keys, its nested sections included."""
        given: dict[str, Node] = dict(node.value)
        for name in [name for name in given if name not in cls.model_fields]:
            self._unknown(given, name, cls, path)
        plain: dict[str, Any] = {}
        for name, info in cls.model_fields.items():
            here = (*path, name)
            if name in given:
                self.nodes[here] = given[name]
                if given[name].value is None and here in self.bad:
                    continue  # the reader has said why there is no value
                if self._legal_kind(given[name], info.annotation, info.metadata, here):
                    plain[name] = self._value(given[name], info, here)
            elif info.is_required() and here not in self.bad:
                doc = " ".join((info.description or "").split()).split(". ")[0].rstrip(".")
                place = node.place if path else self.file
                self._report(here, f"is missing; legal: {legal(info.annotation, info.metadata)} ({doc})", place)
        return plain

    def _unknown(self, given: dict[str, Node], name: str, cls: type[Section], path: Path) -> None:
        """Report an unknown key. Where it is a misspelling of a sibling that isn't given, go on as if it were that."""
        node = given.pop(name)
        here = (*path, name)
        self.nodes[here] = node
        if "." in name and node.place.source != COMMAND_LINE:
            legal_key = field_at((*path, *name.split(".")))
            nested = f"write it nested, {name.split('.')[0]}: and below it {name.split('.', 1)[1]}:"
            self._report(here, f"dotted keys are for the command line; {nested if legal_key else 'nest the keys'}")
            if legal_key:
                self.bad.add((*path, *name.split(".")))
            return
        meant = nearest_keys(here)
        section = ".".join(path) or "the top level"
        if meant:
            advice = f"did you mean {' or '.join(meant)}?"
        else:
            advice = f"legal in {section}: {', '.join(cls.model_fields)}"
        self._report(here, f"there is no such key; {advice}")
        sibling = (
            meant[0].rpartition(".")[2]
            if len(meant) == 1 and meant[0] == ".".join((*path, meant[0].rpartition(".")[2]))
            else None
        )
        if sibling in cls.model_fields and sibling not in given:
            given[sibling] = node
        else:
            self.bad.update(tuple(key.split(".")) for key in meant if not self._is_given(key))

    def _is_given(self, key: str) -> bool:
        node: Node | None = self.tree
        for part in key.split("."):
            value = node.value if node is not None else None
            if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                node = value[int(part)]
            else:
                node = value.get(part) if isinstance(value, dict) else None
        return node is not None

    def _value(self, node: Node, info: FieldInfo, path: Path) -> Any:
        section = section_of(info.annotation)
        if section is None:
            return self._texts(node, info.annotation, path)
        if isinstance(node.value, dict):
            return self._section(node, section, path)
        if not isinstance(node.value, list):
            return node.value
        items = []
        for index, item in enumerate(node.value):
            here = (*path, str(index))
            self.nodes[here] = item
            if isinstance(item.value, dict):
                items.append(self._section(item, section, here))
            else:
                self._report(
                    here, f"found {_shown(item)}; legal: {legal(section)}{_hint(item, section, '.'.join(here))}"
                )
                items.append({})
        return items

    # -- kinds --------------------------------------------------------------------------------------------------

    def _legal_kind(self, node: Node, annotation: Any, metadata: list[Any], path: Path) -> bool:
        """Report what pydantic would take for something else: truth values as numbers, 'None' as a text, and so on."""
        value, allowed = node.value, kinds(annotation)
        words = [str(choice) for choice in choices(annotation)]
        refused = isinstance(value, bool) and bool not in allowed
        refused |= value is None and (None not in allowed or Section in allowed and node.text == "")
        refused |= isinstance(value, dict) and Section not in allowed
        refused |= isinstance(value, list) and list not in allowed
        refused |= Section in allowed and not isinstance(value, dict | list | None)
        if isinstance(value, str) and None in allowed and not node.quoted and value not in words:
            refused |= _NOTHING.fullmatch(value) is not None
        if refused:
            self._wrong(path, node, annotation, metadata)
        elif isinstance(value, str) and _is_path(path) and re.search(r"\$\{.*\}|^\$\w", value):
            self._report(
                path,
                f"found {_shown(node)}; variables are not filled in: write the path itself, or let the shell do it",
            )
        elif section_of(annotation) is not None and isinstance(value, dict) and get_origin(annotation) is list:
            self._wrong(path, node, annotation, metadata)
        else:
            return True
        return False

    def _wrong(self, path: Path, node: Node, annotation: Any, metadata: list[Any] | None = None) -> None:
        hint = _hint(node, annotation, ".".join(path))
        self._report(path, f"found {_shown(node)}; legal: {legal(annotation, metadata)}{hint}")

    def _texts(self, node: Node, annotation: Any, path: Path) -> Any:
        """A leaf's value; a number where a text is meant is taken as it was written (``split: 2023``)."""
        allowed = kinds(annotation)
        if isinstance(node.value, list):
            for index, item in enumerate(node.value):
                self.nodes[(*path, str(index))] = item
            if get_origin(annotation) is tuple and any(isinstance(item.value, bool) for item in node.value):
                self._wrong(path, node, annotation)
            as_written = get_origin(annotation) is list
            return [item.text if as_written and _is_number(item.value) else item.plain() for item in node.value]
        if _is_number(node.value) and str in allowed and not choices(annotation):
            return node.text
        if isinstance(node.value, str) and _is_path(path) and node.value.startswith("~/"):
            return str(FilePath.home() / node.value[2:])
        if isinstance(node.value, str) and int in allowed and choices(annotation) and node.value.isdecimal():
            return int(node.value)
        return node.value

    # -- values -------------------------------------------------------------------------------------------------

    def _validated(self, plain: dict[str, Any]) -> Config | None:
        """The configuration. Where values are refused, they are reported, and stand-ins take their place."""
        for _ in range(2):
            stand_in(plain, Config, (), self.bad)
            try:
                return Config.model_validate(plain)
            except ValidationError as error:
                for detail in error.errors(include_url=False):
                    self._translate(tuple(str(part) for part in detail["loc"]), detail["msg"])
        return None

    def _translate(self, loc: Path, message: str) -> None:
        """Report one of pydantic's errors, whose location may go on below the key, into an element or a type's name."""
        path = next(loc[:n] for n in range(len(loc), -1, -1) if loc[:n] in self.nodes or n == 0)
        if any(path[:n] in self.bad for n in range(1, len(path) + 1)):
            return
        field = field_at(path)
        if field is not None:
            self._wrong(path, self.nodes[path], field.info.annotation, field.info.metadata)
            return
        parent = field_at(path[:-1]) if path else None
        if parent is None or not get_args(parent.info.annotation):
            self._report(path or ("configuration",), f"isn't legal: {message[:1].lower()}{message[1:]}", self.file)
            return
        node = self.nodes[path]
        self._report(path, f"found {_shown(node)}; legal in {parent.key}: {parent.legal}")
        self.bad.add(path[:-1])


def stand_in(plain: dict[str, Any], cls: type[Section], path: Path, bad: set[Path]) -> None:
    """Take bad values out of ``plain``, putting some legal value where one is required."""
    for name, info in cls.model_fields.items():
        here = (*path, name)
        section = section_of(info.annotation)
        value = plain.get(name)
        if here in bad and not (section and isinstance(value, dict | list) and value):
            plain.pop(name, None)
        if isinstance(plain.get(name), dict) and section:
            stand_in(plain[name], section, here, bad)
        elif isinstance(plain.get(name), list) and section:
            for index, item in enumerate(plain[name]):
                stand_in(item, section, (*here, str(index)), bad)
        elif name not in plain and info.is_required() and here in bad:
            if get_origin(info.annotation) is list:
                plain[name] = [{}]
            elif section:
                self_made: dict[str, Any] = {}
                stand_in(self_made, section, here, bad | {(*here, key) for key in section.model_fields})
                plain[name] = self_made
            else:
                plain[name] = 1 if int in kinds(info.annotation) else "?"
