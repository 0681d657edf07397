"""A configuration as a YAML file with the meaning of each key beside it."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.config.base import JobConfig
from rayrlhf.config.roots import keys_of
from rayrlhf.config.trainers import Section
from rayrlhf.errors import RunFailed

__all__ = ["dump_config", "scalar", "to_yaml"]


def dump_config(config: JobConfig, path: str | Path) -> None:
    """Write the configuration, defaults included, with each key's doc as a comment. Loading it gives an equal one.

    The file is there with all of its text or not at all.

    Raises:
        RunFailed: where it can't be written.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(to_yaml(config), encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunFailed(f"can't write the configuration to {target}: {error.strerror or error}") from error


def to_yaml(config: JobConfig) -> str:
    """The configuration as commented YAML."""
    return "\n".join(_section(config, 0)).lstrip("\n") + "\n"


def _section(section: Section, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, info in keys_of(type(section)).items():
        value = getattr(section, name)
        doc = " ".join((info.description or "").split()).replace("``", "")
        if depth == 0:
            yield ""
        yield from textwrap.wrap(doc, 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _section(value, depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            yield f"{indent}{name}:"
            for item in value:
                first = True
                for line in _section(item, depth + 2):
                    is_key = not line.lstrip().startswith("#")
                    yield f"{indent}  - {line.lstrip()}" if first and is_key else line
                    first = first and not is_key
        else:
            yield f"{indent}{name}: {scalar(value)}"


def scalar(value: Any) -> str:
    """A value that isn't a section, in YAML on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(scalar(item) for item in value)}]"
    if isinstance(value, str):
        text = yaml.dump(value, default_style='"', width=float("inf"), allow_unicode=True)
    else:
        text = yaml.safe_dump(value, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
