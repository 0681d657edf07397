"""Reward functions of the user's own, before anything heavy is loaded: whether they are there, and fit the data."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection
from typing import Any

from rayrlhf.errors import InputRefused

__all__ = ["check_signature", "import_function"]


def import_function(path: str) -> Callable[..., Any]:
    """The function at ``package.module:name``.

    Raises:
        InputRefused: where the module can't be imported, or has no such function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputRefused(
            f"reward function {path!r}: importing {module_name} fails: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        near = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise InputRefused(
            f"reward function {path!r}: {module_name} has no function {name!r}; it has: {near or 'none'}"
        )
    return function


def check_signature(path: str, columns: Collection[str]) -> None:
    """Whether the data has every column that a reward function can't do without.

    Raises:
        InputRefused: naming the columns that are missing, and those that are there.
    """
    wanted = [
        p.name
        for p in inspect.signature(import_function(path)).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in wanted if name not in ("prompts", "responses") and name not in columns]
    if missing:
        raise InputRefused(
            f"reward function {path!r} wants {', '.join(missing)}, which the data has no column for; "
            f"its columns are: {', '.join(sorted(columns)) or 'none besides the prompt'}"
        )
