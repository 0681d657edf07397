"""Which algorithm a configuration is for, and whose keys are in the wrong place."""

from __future__ import annotations

from typing import Literal

from rayrlhf.config.fields import all_fields, choices, legal, nearest_choice, owners
from rayrlhf.config.roots import DEFAULT, ROOTS, Root
from rayrlhf.config.source import Node, Place, Problem
from rayrlhf.config.wording import shown

__all__ = ["ALGORITHM", "PIPELINE", "foreign", "given_root"]

ALGORITHM = Literal["ppo", "sft", "reward_model", "dpo", "sampling", "critique", "evaluation"]
PIPELINE = "pipeline"
"""The algorithm of a file with stages."""


def _listed(names: list[str], word: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"


def _fitting(tree: Node) -> list[str]:
    """The algorithms that have all of the file's keys which any of them has."""
    known = [key for key in tree.value if key != "algorithm" and owners((key,))]
    return [name for name in ROOTS if known and all(name in owners((key,)) for key in known)]


def _variant(word: str) -> str | None:
    """The algorithm of whose own section a word is a choice, as kto is one of ``dpo.loss``."""
    for name, root in ROOTS.items():
        for field in all_fields(root).values():
            if field.path[0] == name and word in choices(field.info.annotation):
                return f"{name} with {field.key} {word}"
    return None


def given_root(tree: Node, file: Place, problems: list[Problem]) -> Root | None:
    """The root class that follows from ``algorithm``; None where none can be told.

    An illegal or missing one is added to the problems. All else is then checked as if the algorithm were the one that
    was probably meant, which is put into the tree.
    """
    node = tree.value.get("algorithm")
    fitting = _fitting(tree)
    if node is None:
        if DEFAULT in fitting or not fitting:
            return ROOTS[DEFAULT]
        telling = _telling(tree)
        keys = f"the key {telling[0]} belongs" if len(telling) == 1 else f"the keys {_listed(telling, 'and')} belong"
        text = f"is missing; legal: {legal(ALGORITHM)}; {keys} to {_listed(fitting, 'or')}"
        problems.append(Problem(file, "algorithm", text))
        meant = fitting[0] if len(fitting) == 1 else None
    elif isinstance(node.value, str) and node.value in ROOTS:
        return ROOTS[node.value]
    else:
        word = node.text.lower()
        meant = nearest_choice(word, ALGORITHM)
        advice = _variant(word) or meant
        if word == PIPELINE:
            text = f"found {PIPELINE}, whose command is rayrlhf pipeline; legal here: {legal(ALGORITHM)}"
            problems.append(Problem(node.place, "algorithm", text))
            return None
        advised = f"; did you mean {advice}?" if advice else ""
        problems.append(Problem(node.place, "algorithm", f"found {shown(node)}; legal: {legal(ALGORITHM)}{advised}"))
        meant = advice.split()[0] if advice else fitting[0] if len(fitting) == 1 else None
    if meant is None:
        return None
    tree.value["algorithm"] = Node(meant, file if node is None else node.place, meant)
    return ROOTS[meant]


def _telling(tree: Node) -> list[str]:
    """The file's keys that the default algorithm doesn't have."""
    return [key for key in tree.value if owners((key,)) and DEFAULT not in owners((key,))]


def foreign(path: tuple[str, ...], root: Root, tree: Node) -> str | None:
    """Whose key it is, where another algorithm has one at this path; None where none has."""
    names = owners(path)
    if not names:
        return None
    own = next((name for name, other in ROOTS.items() if other is root), PIPELINE)
    given = "" if "algorithm" in tree.value else ", as none is named"
    several = "s" if len(names) > 1 else ""
    return f"belongs to the algorithm{several} {_listed(names, 'and')}; this file has algorithm {own}{given}"
