"""The end of a run: what training changed, on the held-out prompts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rayrlhf.monitoring.text import finite, fixed, printable

__all__ = ["evaluation_line", "pair_samples", "render_comparison"]

Evaluation = Mapping[str, Any]
"""``prompts`` int; ``score/mean``, ``score/stderr``; ``kl/mean``, ``kl/stderr`` in nats a sequence; ``nll`` in nats a
token, or None; ``distinct_2``; ``response_length/mean`` in tokens; ``truncated_fraction``; ``samples``: list of
``{prompt, response, score}``."""
Sample = Mapping[str, Any]

_CAPTION = "± is one standard error; for a change, with the two evaluations taken as independent."
_LONGEST_TEXT = 800  # characters of a prompt or response that are shown
_CONTENTS = ("model", "metrics.jsonl", "samples.jsonl", "checkpoints", "config.yaml", "log.txt")
_SIDE_BY_SIDE = 110  # columns of the terminal from which on before and after stand beside each other


class _Row(NamedTuple):
    label: str
    value: str
    error: str | None
    decimals: int
    better: int
    """1: more is better, -1: less is, 0: neither by itself."""
    percent: bool = False


_ROWS = (
    _Row("score", "score/mean", "score/stderr", 3, 1),
    _Row("KL to the reference (nats a sequence)", "kl/mean", "kl/stderr", 2, 0),
    _Row("held-out NLL (nats a token)", "nll", None, 3, -1),
    _Row("distinct-2", "distinct_2", None, 3, 0),
    _Row("response length (tokens)", "response_length/mean", None, 1, 0),
    _Row("cut by the length limit", "truncated_fraction", None, 1, 0, percent=True),
)


def pair_samples(before: Evaluation, after: Evaluation, count: int) -> list[tuple[Sample, Sample]]:
    """The first ``count`` prompts that both evaluations have samples of, in the order of ``before``.

    They are not picked by their scores: what is shown is what a run is like.
    """
    later: dict[str, list[Sample]] = {}
    for sample in after["samples"]:
        later.setdefault(sample["prompt"], []).append(sample)
    pairs: list[tuple[Sample, Sample]] = []
    seen: set[str] = set()
    for sample in before["samples"]:
        if len(pairs) >= count:
            break
        if sample["prompt"] in later and sample["prompt"] not in seen:
            seen.add(sample["prompt"])
            pairs.append((sample, later[sample["prompt"]][0]))
    return pairs


def evaluation_line(evaluation: Evaluation) -> str:
    """An evaluation in one line, for a note."""
    parts = [f"score {_value(_ROWS[0], evaluation)}", f"KL {_value(_ROWS[1], evaluation)}"]
    if finite(evaluation.get("nll")) is not None:
        parts.append(f"NLL {_value(_ROWS[2], evaluation)}")
    parts.append(f"length {_value(_ROWS[4], evaluation)}")
    return f"evaluation on {evaluation.get('prompts', '?')} held-out prompts: " + ", ".join(parts)


def render_comparison(
    before: Evaluation,
    after: Evaluation,
    sample_pairs: Iterable[tuple[Sample, Sample]],
    run_dir: Path | str,
    console: Console,
) -> None:
    """Prints the table before and after, the sample pairs (see `pair_samples`), and where everything lies.

    A value that is missing, None or not finite is shown as such.
    """
    console.print()
    console.print(_table(before, after, console))
    pairs = list(sample_pairs)
    for number, (first, second) in enumerate(pairs, start=1):
        console.print(_pair(first, second, f"sample {number} of {len(pairs)}", console))
    _where(Path(run_dir), console)


def _scaled(row: _Row, evaluation: Evaluation, key: str) -> float | None:
    value = finite(evaluation.get(key))
    return value * 100 if value is not None and row.percent else value


def _value(row: _Row, evaluation: Evaluation) -> str:
    value = _scaled(row, evaluation, row.value)
    if value is None:
        raw = evaluation.get(row.value)
        return "-" if raw is None else fixed(raw, row.decimals)
    text = fixed(value, row.decimals) + ("%" if row.percent else "")
    error = _scaled(row, evaluation, row.error) if row.error else None
    return text if error is None else f"{text} ± {fixed(error, row.decimals)}"


def _change(row: _Row, before: Evaluation, after: Evaluation) -> Text:
    old, new = _scaled(row, before, row.value), _scaled(row, after, row.value)
    if old is None or new is None:
        return Text("-", style="dim")
    change = new - old
    text = fixed(change, row.decimals, sign=True) + (" pp" if row.percent else "")
    clear = True
    if row.error is not None:
        errors = [_scaled(row, evaluation, row.error) for evaluation in (before, after)]
        if all(error is not None for error in errors):
            error = math.hypot(*(error for error in errors if error is not None))
            text += f" ± {fixed(error, row.decimals)}"
            clear = abs(change) > 2 * error
    if not clear:
        return Text(text, style="dim")
    gain = row.better * change
    return Text(text, style="green" if gain > 0 else "red" if gain < 0 else "")


def _table(before: Evaluation, after: Evaluation, console: Console) -> Table:
    counts = [str(evaluation.get("prompts", "?")) for evaluation in (before, after)]
    prompts = counts[0] if counts[0] == counts[1] else f"{counts[0]} (before) and {counts[1]} (after)"
    table = Table(
        title=Text(f"Before and after training, on {prompts} held-out prompts", style="bold"),
        title_justify="left",
        box=box.ROUNDED,
        caption=Text(_encodable(_CAPTION, console), style="dim"),
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in _ROWS:
        label = row.label
        if row.value == "nll" and before.get("nll") is None and after.get("nll") is None:
            label += ": needs data.completion_column"
        change = _change(row, before, after)
        cells = [Text(label), Text(_value(row, before)), Text(_value(row, after)), change]
        table.add_row(*(Text(_encodable(cell.plain, console), style=cell.style) for cell in cells))
    return table


def _encodable(text: str, console: Console) -> str:
    try:
        "±".encode(console.encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+/-")
    return text


def _clipped(text: object, console: Console) -> str:
    shown = printable(str(text), console).strip("\n")
    more = len(shown) - _LONGEST_TEXT
    return shown if more <= 0 else f"{shown[:_LONGEST_TEXT]} [... {more:,} more characters]"


def _pair(before: Sample, after: Sample, title: str, console: Console) -> RenderableType:
    prompt = Text.assemble(("prompt  ", "bold"), _clipped(before["prompt"], console))
    sides = []
    for name, sample in (("before", before), ("after", after)):
        heading = Text(f"{name}, score {fixed(sample.get('score'), 3)}", style="bold")
        response = _clipped(sample["response"], console)
        # fold: with the ellipsis of a table's cell, rich loses letters of lines that hold wide characters
        body = Text(response, overflow="fold") if response.strip() else Text("(empty)", style="dim")
        style = "green" if name == "after" else ""
        sides.append(Panel(body, title=heading, title_align="left", box=box.ROUNDED, border_style=style))
    if console.width >= _SIDE_BY_SIDE:
        both = Table.grid(expand=True, padding=(0, 1))
        both.add_column(ratio=1)
        both.add_column(ratio=1)
        both.add_row(*sides)
        content: RenderableType = both
    else:
        content = Group(*sides)
    return Panel(Group(prompt, content), title=title, title_align="left", box=box.ROUNDED, border_style="blue")


def _where(run_dir: Path, console: Console) -> None:
    folder = shlex.quote(str(run_dir))
    commands = [("talk to the model", f'rayrlhf generate {shlex.quote(str(run_dir / "model"))} --prompt "..."')]
    if (run_dir / "tensorboard").is_dir():
        commands.append(("see the curves", f"tensorboard --logdir {shlex.quote(str(run_dir / 'tensorboard'))}"))
    names = [name for name in _CONTENTS if (run_dir / name).exists()]
    console.print(Text.assemble(("run folder          ", "bold"), folder), soft_wrap=True)
    if names:
        console.print(Text(" " * 20 + ", ".join(names), style="dim"), soft_wrap=True)
    for what, command in commands:
        # One line each, however long: it is there to be copied.
        console.print(Text.assemble(f"{what:<20}", (command, "cyan")), soft_wrap=True)
