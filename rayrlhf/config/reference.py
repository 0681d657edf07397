"""The reference of all keys as Markdown: ``python -m rayrlhf.config.reference > docs/configuration.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from pydantic_core import PydanticUndefined

from rayrlhf.config.dump import scalar
from rayrlhf.config.fields import Field, all_fields
from rayrlhf.config.rules import RULES
from rayrlhf.config.trainers import Section

__all__ = ["render"]

_HEAD = """\
# Configuration

A run is described by one YAML file. `rayrlhf.config.load_config(path, overrides)` reads it, checks all of it before
anything starts, and lists every problem in one message. The run's folder gets the configuration as resolved, with all
defaults.

- Sizes of batches are said in prompts, samples or tokens, for the whole cluster. What falls to one device is derived,
  and shown before the run.
- Units are part of the key's name (`_s` seconds, `_gib`, `_mib`, `_tokens`, `_samples`, `_steps`); a value is a number
  alone.
- `null` means nothing. A section that may be null is left out with `critic: null`, and has its defaults with
  `critic: {}`, or where it isn't named.
- `1e-5` is a number; `no`, `on` and `12:30` are texts. A key that stands twice is an error.
- Relative paths begin at the current folder; `~/` at the home folder. Variables (`${HOME}`) are not filled in.
- On the command line, `ppo.kl_coef=0.1` replaces a value, `reward.sources.0.weight=2` one in a list, and
  `'policy.lora={rank: 8}'` a whole section. Of two for one key the later one counts.

This page is made by `python -m rayrlhf.config.reference > docs/configuration.md`.
"""


def render() -> str:
    """The page: a table for each section, then the rules between keys."""
    sections: dict[tuple[str, ...], list[Field]] = {}
    for field in all_fields().values():
        sections.setdefault(field.path[:-1], []).append(field)
    lines = [_HEAD]
    for path, fields in sections.items():
        lines += _table(path, fields)
    lines += ["## Rules between keys", "", "Each is checked before a run starts.", ""]
    lines += [f"- {rule.doc}" for rule in RULES]
    return "\n".join(lines) + "\n"


def _table(path: tuple[str, ...], fields: list[Field]) -> Iterator[str]:
    name = ".".join(path)
    yield f"## `{name}`" if path else "## Top level"
    yield ""
    about = all_fields().get(path if path[-1:] != ("0",) else path[:-1])
    if about is not None and about.doc:
        yield _inline(about.doc)
        yield ""
    yield "| key | legal | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for field in fields:
        yield f"| `{field.key}` | {_legal(field)} | {_default(field.info.default)} | {_cell(_inline(field.doc))} |"
    yield ""


def _legal(field: Field) -> str:
    if field.section is None:
        return _cell(field.legal)
    if field.legal.startswith("a list"):
        return "list of sections"
    return "section, or null" if field.legal.endswith("null") else "section"


def _default(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    return "see its table" if isinstance(default, Section) else f"`{scalar(default)}`"


def _inline(text: str) -> str:
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
