"""What a pipeline takes from outside, looked at before its first stage: models, data files, other files, functions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rayrlhf.actors.reward_function import import_function
from rayrlhf.config.pipeline import DATA, EITHER, FILE, FUNCTION
from rayrlhf.errors import InputRefused

__all__ = ["look"]

_DATA_FILES = (".jsonl", ".json", ".parquet", ".csv")


def look(wanted: str, name: str) -> str | None:
    """What is wrong with something that a stage names; None where nothing is, or only the stage itself can tell.

    Names of the Hugging Face hub are left to the stage: to look for them takes a network.
    """
    path = Path(name).expanduser()
    if wanted == FUNCTION:
        return _function(name)
    if wanted == FILE:
        return None if path.is_file() else f"found {name!r}; there is no such file"
    if wanted == DATA:
        named_file = path.suffix in _DATA_FILES or _is_local(name)
        return f"found {name!r}; there is no such file" if named_file and not path.exists() else None
    if name.startswith("package:"):
        return _package(name.removeprefix("package:"))
    if name.endswith(".gguf"):
        return None if path.is_file() else f"found {name!r}; there is no such file"
    if not path.exists():
        return f"found {name!r}; there is no such folder" if _is_local(name) else None
    if wanted != EITHER and not (path / "config.json").is_file():
        return f"found {name!r}, which holds no model: it has no config.json"
    return None


def _is_local(name: str) -> bool:
    """Whether a name can't be one of the hub, which are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name.partition("/")[0]).is_dir()


def _package(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    return None if spec is not None else f"found package:{name}; no Python package {name!r} is installed"


def _function(path: str) -> str | None:
    if ":" not in path:
        return None  # not an import path: the configuration's rules have said so
    try:
        import_function(path)
    except InputRefused as refused:
        return refused.problems[0]
    return None
