"""A configuration from a YAML file and overrides: checked as a whole, every problem told at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, cast, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rayrlhf.config.base import JobConfig
from rayrlhf.config.choosing import foreign, given_root
from rayrlhf.config.dump import dump_config
from rayrlhf.config.fields import choices, element_of, field_at, kinds, legal, nearest_keys, section_of
from rayrlhf.config.roots import ROOTS, AnyConfig, Root, keys_of
from rayrlhf.config.rules import broken_rules
from rayrlhf.config.source import COMMAND_LINE, Node, Place, Problem, apply_overrides, read_file
from rayrlhf.config.trainers import Section
from rayrlhf.config.wording import NOTHING, hint, is_number, shown
from rayrlhf.errors import InputRefused

__all__ = ["PATH_KEYS", "check_tree", "dump_config", "in_order", "is_text", "load_config"]

Path = tuple[str, ...]

PATH_KEYS = {
    ("run_dir",),
    ("policy", "path"),
    ("policy", "tokenizer"),
    ("policy", "chat_template"),
    ("critic", "path"),
    ("reference",),
    ("reference", "path"),
    ("reward", "sources", "0", "model"),
    ("reward", "gold", "model"),
    ("scores", "reward", "model"),
    ("scores", "safety", "model"),
    ("scores", "helpfulness", "model"),
    ("models", "0", "path"),
    ("models", "0", "tokenizer"),
    ("models", "0", "chat_template"),
    ("judge", "prompt"),
    ("critique", "principles"),
    ("critique", "critique_prompt"),
    ("critique", "revise_prompt"),
    ("data", "prompts"),
    ("data", "eval_prompts"),
    ("data", "train"),
    ("data", "train", "0", "path"),
    ("data", "validation"),
    ("data", "validation", "0", "path"),
}
"""Keys of files and folders, with 0 for every index."""


def load_config(path: str | FilePath, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read a configuration: that of the algorithm which it names, of PPO where it names none.

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
    apply_overrides(tree, list(overrides), is_text, problems)
    config = check_tree(tree, Place(str(path)), problems)
    if config is None or problems:
        raise InputRefused([str(problem) for problem in in_order(problems, str(path))])
    return config


def check_tree(
    tree: Node, place: Place, problems: list[Problem], root: type[JobConfig] | None = None
) -> AnyConfig | None:
    """The configuration that a tree holds, as far as one can be made; what is wrong with it is added to ``problems``.

    Args:
        tree: a mapping. An illegal algorithm in it is replaced by the one that was probably meant.
        place: where what is missing at its top level is reported.
        problems: those of the reader; their keys begin at ``tree``.
        root: the class of the configuration; by default that of the algorithm which the tree names.
    """
    found = given_root(tree, place, problems) if root is None else cast(Root, root)
    return None if found is None else _Checker(tree, found, place, problems).check()


def in_order(problems: list[Problem], path: str) -> list[Problem]:
    """By line of the file, then those of the command line; each once."""
    order = sorted(problems, key=lambda p: (p.place.source != path, p.place.line or 0))
    return list(dict.fromkeys(order))


def is_text(path: Path) -> bool:
    """Whether a key takes nothing but a text (or null): the value of its override is then taken as it was written.

    Which algorithm it is isn't known yet: the key is a text wherever it is legal.
    """
    element = len(path) > 1 and path[-1].isdecimal()
    found = [field for root in ROOTS.values() if (field := field_at(path[:-1] if element else path, root)) is not None]
    annotations = [field.info.annotation for field in found]
    if element:
        return bool(found) and all(kinds(a) == {list} and section_of(a) is None for a in annotations)
    return bool(found) and all(kinds(a) <= {str, None} and not choices(a) for a in annotations)


def _is_path(path: Path) -> bool:
    return tuple("0" if part.isdecimal() else part for part in path) in PATH_KEYS


class _Checker:
    """One pass over the tree: structure and kinds here, values by pydantic, then the rules across keys.

    A field with a problem is `bad`: the rules which read it are not applied, all others are.
    """

    def __init__(self, tree: Node, root: Root, file: Place, problems: list[Problem]):
        self.tree = tree
        self.root = root
        self.file = file
        self.problems = problems
        self.nodes: dict[Path, Node] = {}
        # An illegal algorithm has been replaced in the tree by the one that was probably meant.
        self.bad: set[Path] = {tuple(p.key.split(".")) for p in problems if p.key not in ("", "algorithm")}

    def check(self) -> AnyConfig | None:
        """The configuration as far as it can be made, its problems added to the list; None where nothing can be."""
        plain = self._section(self.tree, self.root, ())
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
        for name, info in keys_of(cls).items():
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
            legal_key = field_at((*path, *name.split(".")), self.root)
            nested = f"write it nested, {name.split('.')[0]}: and below it {name.split('.', 1)[1]}:"
            self._report(here, f"dotted keys are for the command line; {nested if legal_key else 'nest the keys'}")
            if legal_key:
                self.bad.add((*path, *name.split(".")))
            return
        other = foreign(here, self.root, self.tree)
        meant = nearest_keys(here, self.root, misspelt=other is None)
        section = ".".join(path) or "the top level"
        if meant:
            advice = f"did you mean {' or '.join(meant)}?"
        else:
            advice = f"legal in {section}: {', '.join(keys_of(cls))}"
        self._report(here, f"{other or 'there is no such key'}; {advice}")
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
        if section is None or not isinstance(node.value, dict | list):
            return self._texts(node, info.annotation, path)
        if isinstance(node.value, dict):
            return self._section(node, section, path)
        items = []
        for index, item in enumerate(node.value):
            here = (*path, str(index))
            self.nodes[here] = item
            if isinstance(item.value, dict):
                items.append(self._section(item, section, here))
            else:
                self._report(here, f"found {shown(item)}; legal: {legal(section)}{hint(item, section, '.'.join(here))}")
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
            refused |= NOTHING.fullmatch(value) is not None
        if refused:
            self._wrong(path, node, annotation, metadata)
        elif isinstance(value, str) and _is_path(path) and re.search(r"\$\{.*\}|^\$\w", value):
            self._report(
                path,
                f"found {shown(node)}; variables are not filled in: write the path itself, or let the shell do it",
            )
        else:
            return True
        return False

    def _wrong(self, path: Path, node: Node, annotation: Any, metadata: list[Any] | None = None) -> None:
        meant = hint(node, annotation, ".".join(path))
        self._report(path, f"found {shown(node)}; legal: {legal(annotation, metadata)}{meant}")

    def _texts(self, node: Node, annotation: Any, path: Path) -> Any:
        """A leaf's value; a number where a text is meant is taken as it was written (``split: 2023``)."""
        allowed = kinds(annotation)
        if isinstance(node.value, list):
            for index, item in enumerate(node.value):
                self.nodes[(*path, str(index))] = item
            if get_origin(annotation) is tuple and any(isinstance(item.value, bool) for item in node.value):
                self._wrong(path, node, annotation)
            as_written = get_origin(annotation) is list
            return [item.text if as_written and is_number(item.value) else item.plain() for item in node.value]
        if is_number(node.value) and str in allowed and not choices(annotation):
            return node.text
        if isinstance(node.value, str) and _is_path(path) and node.value.startswith("~/"):
            return str(FilePath.home() / node.value[2:])
        if isinstance(node.value, str) and int in allowed and choices(annotation) and node.value.isdecimal():
            return int(node.value)
        return node.value

    # -- values -------------------------------------------------------------------------------------------------

    def _validated(self, plain: dict[str, Any]) -> AnyConfig | None:
        """The configuration. Where values are refused, they are reported, and stand-ins take their place."""
        for _ in range(2):
            stand_in(plain, self.root, (), self.bad)
            try:
                return self.root.model_validate(plain)
            except ValidationError as error:
                told = {self._path_of(detail["loc"]): detail["msg"] for detail in error.errors(include_url=False)}
                for path, message in told.items():
                    # Of a union, what is wrong inside a value that is of one of its kinds says more.
                    if not any(other[: len(path)] == path for other in told if other != path):
                        self._translate(path, message)
        return None

    def _path_of(self, loc: Sequence[str | int]) -> Path:
        """The key that one of pydantic's locations is about: without the names of types, which stand in it for unions."""
        path: Path = ()
        for part in map(str, loc):
            if (*path, part) in self.nodes:
                path = (*path, part)
        return path

    def _translate(self, path: Path, message: str) -> None:
        """Report one of pydantic's errors."""
        if any(path[:n] in self.bad for n in range(1, len(path) + 1)):
            return
        field = field_at(path, self.root)
        if field is not None:
            self._wrong(path, self.nodes[path], field.info.annotation, field.info.metadata)
            return
        parent = field_at(path[:-1], self.root) if path else None
        element = element_of(parent.info.annotation) if parent is not None else None
        if parent is None or element is None:
            self._report(path or ("configuration",), f"isn't legal: {message[:1].lower()}{message[1:]}", self.file)
            return
        node = self.nodes[path]
        meant = hint(node, element, ".".join(path))
        self._report(path, f"found {shown(node)}; legal in {parent.key}: {parent.legal}{meant}")
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
            allowed = kinds(info.annotation)
            if str in allowed:
                plain[name] = next(iter(choices(info.annotation)), "?")
            elif section:
                self_made: dict[str, Any] = {}
                stand_in(self_made, section, here, bad | {(*here, key) for key in section.model_fields})
                plain[name] = [self_made] if list in allowed else self_made
            else:
                plain[name] = 1
