"""The reference of all keys as Markdown: ``python -m rayrlhf.config.reference > docs/configuration.md``."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

from pydantic_core import PydanticUndefined

from rayrlhf.config.base import RunConfig
from rayrlhf.config.dump import scalar
from rayrlhf.config.fields import Field, all_fields
from rayrlhf.config.roots import ROOTS
from rayrlhf.config.rules import RULES
from rayrlhf.config.trainers import Section

__all__ = ["render"]

Path = tuple[str, ...]
_Row = tuple[str, str, str]
"""Legal values, default and meaning."""

_ALGORITHM = (
    "What is trained, and how: a policy by PPO or another policy gradient, a model on completions, a reward model, or a "
    "policy by DPO and its kin. It says which of the other keys there are."
)
_HEAD = """\
# Configuration

A run is described by one YAML file. `rayrlhf.config.load_config(path, overrides)` reads it, checks all of it before
anything starts, and lists every problem in one message. The run's folder gets the configuration as resolved, with all
defaults.

- `algorithm` says which keys there are. A word in italics, as in *ppo, dpo:*, names the algorithms which have a key, a
  default or a rule; without one all have it.
- A pipeline of stages, each with one of these algorithms, has a file of its own form: [pipeline.md](pipeline.md).
- Sizes of batches are said in prompts, examples, samples or tokens, for the whole cluster. What falls to one device is derived,
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
    """The page: a table for each section of any algorithm, then the rules between keys."""
    sections: dict[Path, dict[Path, dict[_Row, list[str]]]] = {}
    for algorithm, root in ROOTS.items():
        for path, field in all_fields(root).items():
            row = ("one of " + ", ".join(ROOTS), "`ppo`", _ALGORITHM) if path == ("algorithm",) else _row(field)
            rows = sections.setdefault(path[:-1], {}).setdefault(path, {})
            rows.setdefault(row, []).append(algorithm)
    lines = [_HEAD]
    order = list(sections[()])
    for path in sorted(sections, key=lambda path: _place(path, order)):
        lines += _table(path, dict(sorted(sections[path].items(), key=lambda item: _shared(item[0]))))
    lines += ["## Rules between keys", "", "Each is checked before a run starts.", ""]
    lines += [f"- {_only([name for name, root in ROOTS.items() if root in rule.of])}{rule.doc}" for rule in RULES]
    return "\n".join(lines) + "\n"


def _place(path: Path, order: list[Path]) -> tuple[bool, int]:
    """The sections by their first key."""
    return (_shared(path), order.index(path[:1]) if path else -1)


def _shared(path: Path) -> bool:
    """Whether it is one of what every run has besides its models, which comes last, as in a file."""
    return len(path) > 0 and path[0] in list(RunConfig.model_fields)[3:]


def _row(field: Field) -> _Row:
    return _legal(field), _default(field.info.default), _cell(_inline(field.doc))


def _only(algorithms: Collection[str], of: Collection[str] = tuple(ROOTS)) -> str:
    """Which algorithms something is for, where it isn't for all of them."""
    return "" if len(algorithms) == len(of) else f"*{', '.join(algorithms)}:* "


def _table(path: Path, keys: dict[Path, dict[_Row, list[str]]]) -> Iterator[str]:
    algorithms = [a for a in ROOTS if any(a in names for rows in keys.values() for names in rows.values())]
    yield f"## `{'.'.join(path)}`" if path else "## Top level"
    yield ""
    at = path if path[-1:] != ("0",) else path[:-1]
    about: dict[str, list[str]] = {}
    for algorithm, root in ROOTS.items():
        if path and at in all_fields(root):
            about.setdefault(_inline(all_fields(root)[at].doc), []).append(algorithm)
    for doc, names in about.items():
        yield f"{_only(names)}{doc}"
        yield ""
    yield "| key | legal | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, rows in keys.items():
        for (legal, default, meaning), names in rows.items():
            yield f"| `{'.'.join(key)}` | {legal} | {default} | {_only(names, algorithms)}{meaning} |"
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
