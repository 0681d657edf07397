"""The end of an evaluation: models side by side, win rates, samples."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rayrlhf.monitoring.text import finite, fixed, printable

__all__ = ["MeasureCell", "MeasureRow", "encodable", "measure_rows", "model_line", "notes_on", "render_evaluation"]

_LONGEST_TEXT = 800  # characters of a prompt or response that are shown
_LABEL = 24  # characters that a table's first column takes at the least, with its frame
_LONGEST_NAME = 24  # characters of a model's name in one line
_SIDE_BY_SIDE = 36  # characters that a response needs to stand beside another one
_FILES = ("report.html", "evaluation.json", "win_rates.json", "responses.jsonl", "config.yaml", "log.txt")


class MeasureCell(NamedTuple):
    """A number in words."""

    text: str
    tone: str
    """``better`` or ``worse`` than the first model by more than two standard errors, or nothing."""


class MeasureRow(NamedTuple):
    """One measure of all models."""

    label: str
    cells: list[MeasureCell]


class _Measure(NamedTuple):
    label: str
    value: str
    error: str
    decimals: int
    better: int = 0
    """1: more is better, -1: less is, 0: neither by itself."""
    percent: bool = False


_MEASURES = (
    _Measure("score", "score/mean", "score/stderr", 3, 1),
    _Measure("safety", "safety/mean", "safety/stderr", 3, 1),
    _Measure("helpfulness", "helpfulness/mean", "helpfulness/stderr", 3, 1),
    _Measure("KL to the reference (nats a sequence)", "kl/mean", "kl/stderr", 2),
    _Measure("KL to the reference (nats a token)", "kl_per_token", "kl_per_token/stderr", 4),
    _Measure("perplexity of known continuations", "perplexity", "perplexity/stderr", 2, -1),
    _Measure("response length (tokens)", "response_length/mean", "response_length/stderr", 1),
    _Measure("cut by the length limit", "truncated_fraction", "truncated_fraction/stderr", 1, 0, True),
    _Measure("distinct-1", "distinct_1", "distinct_1/stderr", 3),
    _Measure("distinct-2", "distinct_2", "distinct_2/stderr", 3),
    _Measure("equal to another response", "repeated_fraction", "repeated_fraction/stderr", 1, 0, True),
)
_COUNTS = (
    ("responses without a score", "score/unscored"),
    ("responses without a safety score", "safety/unscored"),
    ("responses without a helpfulness score", "helpfulness/unscored"),
)


# -- what stands in the tables ------------------------------------------------------------------------------------------


def measure_rows(evaluation: Mapping[str, Any]) -> list[MeasureRow]:
    """The measures of an ``evaluation.json`` that any of its models has, a cell a model."""
    models = evaluation["models"]
    rows = []
    for measure in _MEASURES:
        if any(finite(model.get(measure.value)) is not None for model in models):
            label = measure.label
            if measure.value == "score/mean" and (evaluation.get("scores") or {}).get("reward"):
                label = f"score: {evaluation['scores']['reward'].removesuffix(' (reward)')}"
            rows.append(MeasureRow(label, [_cell(measure, model, models[0]) for model in models]))
    for label, key in _COUNTS:
        if any(model.get(key) for model in models):
            rows.append(MeasureRow(label, [MeasureCell(str(model.get(key, "-")), "") for model in models]))
    return rows


def notes_on(evaluation: Mapping[str, Any]) -> list[str]:
    """What must be known to read the table."""
    notes = ["± is one standard error over prompts."]
    if any(finite(model.get("kl/mean")) is not None for model in evaluation["models"]):
        at = finite(evaluation.get("temperature"))
        where = "" if at is None else f", at temperature {at:g}"
        notes.append(f"KL is measured to {evaluation.get('reference', '?')}{where}.")
    for model in evaluation["models"]:
        if model.get("kl/reason"):
            notes.append(
                f"No KL of {model['name']}: {model['kl/reason']}; numbers a token don't compare with the others'."
            )
    if all(finite(model.get("perplexity")) is None for model in evaluation["models"]):
        notes.append("No perplexity: it needs data.completion_column.")
    return notes


def _cell(measure: _Measure, model: Mapping[str, Any], first: Mapping[str, Any]) -> MeasureCell:
    factor = 100.0 if measure.percent else 1.0
    value, error = finite(model.get(measure.value)), finite(model.get(measure.error))
    if value is None:
        return MeasureCell("-", "")
    text = fixed(value * factor, measure.decimals) + ("%" if measure.percent else "")
    if error is not None:
        text += f" ± {fixed(error * factor, measure.decimals)}"
    return MeasureCell(text, _tone(measure, value, error, first))


def _tone(measure: _Measure, value: float, error: float | None, first: Mapping[str, Any]) -> str:
    """Against the first model, with the errors taken as independent."""
    base, its_error = finite(first.get(measure.value)), finite(first.get(measure.error))
    if not measure.better or base is None or error is None or its_error is None:
        return ""
    gain = measure.better * (value - base)
    if abs(gain) <= 2 * math.hypot(error, its_error):
        return ""
    return "better" if gain > 0 else "worse"


def model_line(measures: Mapping[str, Any]) -> str:
    """One model's measures in a line, for a note."""
    wanted = {
        "score": "score/mean",
        "KL": "kl/mean",
        "perplexity": "perplexity",
        "length": "response_length/mean",
    }
    by_key = {measure.value: measure for measure in _MEASURES}
    parts = [
        f"{name} {_cell(by_key[key], measures, measures).text}"
        for name, key in wanted.items()
        if finite(measures.get(key)) is not None
    ]
    return ", ".join(parts)


# -- on a terminal ------------------------------------------------------------------------------------------------------


def render_evaluation(
    evaluation: Mapping[str, Any],
    win_rates: Sequence[Mapping[str, Any]],
    samples: Iterable[Mapping[str, Any]],
    folder: Path,
    console: Console,
) -> None:
    """Prints the table of models, the win rates, samples side by side, and where the files are.

    Args:
        evaluation: as in ``evaluation.json``.
        win_rates: as in ``win_rates.json``.
        samples: ``{prompt, responses: [(model, score or None, text)]}``; where no response has a score, none is shown.
    """
    console.print()
    _print_models(evaluation, console)
    if win_rates:
        console.print(_win_rate_table(win_rates, console))
    shown = list(samples)
    scored = any(score is not None for sample in shown for _, score, _ in sample["responses"])
    for number, sample in enumerate(shown, start=1):
        console.print(_sample(sample, f"sample {number} of {len(shown)}", scored, console))
    console.print(Text.assemble(("folder  ", "bold"), shlex.quote(str(folder))), soft_wrap=True)
    there = ", ".join(name for name in _FILES if (folder / name).exists())
    console.print(Text(f"        {there}", style="dim"), soft_wrap=True)


def encodable(text: str, console: Console) -> str:
    """Our own words and numbers in the console's encoding, and foreign ones among them made harmless."""
    try:
        "±".encode(console.encoding)
    except UnicodeEncodeError:
        text = text.replace("±", "+/-")
    return printable(text, console)


_STYLES = {"better": "green", "worse": "red", "": ""}


def _print_models(evaluation: Mapping[str, Any], console: Console) -> None:
    """One table, or several where the terminal is too narrow for all models beside each other."""
    names = [str(model["name"]) for model in evaluation["models"]]
    rows = measure_rows(evaluation)
    for start, end in _blocks(names, rows, console.width):
        table = Table(box=box.ROUNDED)
        if start == 0:
            title = f"{len(names)} models" if len(names) > 1 else "One model"
            table.title = Text(f"{title} on the same {evaluation['prompts']} prompts", style="bold")
            table.title_justify = "left"
        table.add_column("", overflow="fold")
        for name in names[start:end]:
            table.add_column(encodable(name, console), justify="right", overflow="fold", max_width=_LONGEST_NAME)
        for label, cells in rows:
            shown = [Text(encodable(c.text, console), style=_STYLES[c.tone], no_wrap=True) for c in cells[start:end]]
            table.add_row(Text(encodable(label, console)), *shown)
        console.print(table)
    notes = notes_on(evaluation)
    if len(names) > 1:
        notes.append(f"Green and red: better and worse than {names[0]} by more than two standard errors.")
    for note in notes:
        console.print(Text(encodable(note, console), style="dim"))
    console.print()


def _blocks(names: Sequence[str], rows: Sequence[MeasureRow], width: int) -> list[tuple[int, int]]:
    """Which models stand in one table: from, to."""
    blocks, start, used = [], 0, _LABEL
    for index, name in enumerate(names):
        widest = max([min(len(name), _LONGEST_NAME), *(len(cells[index].text) for _, cells in rows)]) + 3
        if index > start and used + widest > width:
            blocks.append((start, index))
            start, used = index, _LABEL
        used += widest
    return [*blocks, (start, len(names))]


def _win_rate_table(win_rates: Sequence[Mapping[str, Any]], console: Console) -> Table:
    confidence = 100 * float(win_rates[0]["confidence"])
    table = Table(
        box=box.ROUNDED,
        title=Text("Win rates", style="bold"),
        title_justify="left",
        caption=Text(
            f"Ties count half. In brackets the bootstrap's {confidence:g}% interval; green and red: all of it beyond 50%.",
            style="dim",
        ),
        caption_justify="left",
    )
    for heading in ("A", "against B", "judged by"):
        table.add_column(heading, overflow="fold")
    table.add_column("A wins", justify="right", no_wrap=True)
    table.add_column("won, tied, lost", justify="right")
    unjudged = any(row.get("unjudged") for row in win_rates)
    if unjudged:
        table.add_column("unjudged", justify="right")
    for row in win_rates:
        names = [Text(encodable(str(row[key]), console)) for key in ("a", "b", "judge")]
        counts = f"{row['wins']}, {row['ties']}, {row['losses']}"
        more = [Text(str(row["unjudged"]))] if unjudged else []
        table.add_row(*names, _rate(row), Text(counts), *more)
    return table


def _rate(row: Mapping[str, Any]) -> Text:
    rate, low, high = (finite(row.get(key)) for key in ("rate", "low", "high"))
    if rate is None or low is None or high is None:
        return Text("nothing judged", style="dim")
    style = "green" if low > 0.5 else "red" if high < 0.5 else ""
    return Text(f"{100 * rate:.1f}% [{100 * low:.1f}, {100 * high:.1f}]", style=style)


def _clipped(text: object, console: Console) -> str:
    shown = printable(str(text), console).strip("\n")
    more = len(shown) - _LONGEST_TEXT
    return shown if more <= 0 else f"{shown[:_LONGEST_TEXT]} [... {more:,} more characters]"


def _sample(sample: Mapping[str, Any], title: str, scored: bool, console: Console) -> RenderableType:
    prompt = Text.assemble(("prompt  ", "bold"), _clipped(sample["prompt"], console))
    sides = []
    for name, score, response in sample["responses"]:
        told = f", score {fixed(score, 3)}" if scored else ""
        heading = Text(f"{encodable(str(name), console)}{told}", style="bold")
        text = _clipped(response, console)
        # fold: with the ellipsis of a table's cell, rich loses letters of lines that hold wide characters
        body = Text(text, overflow="fold") if text.strip() else Text("(empty)", style="dim")
        sides.append(Panel(body, title=heading, title_align="left", box=box.ROUNDED))
    content: RenderableType = Group(*sides)
    if console.width >= _SIDE_BY_SIDE * len(sides) + 4:
        beside = Table.grid(expand=True, padding=(0, 1))
        for _ in sides:
            beside.add_column(ratio=1)
        beside.add_row(*sides)
        content = beside
    return Panel(Group(prompt, content), title=title, title_align="left", box=box.ROUNDED, border_style="blue")
