"""A pipeline on the terminal: a heading before each stage, a line after it, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrlhf.monitoring.text import duration, printable

__all__ = ["StageRow", "render_pipeline", "stage_ended", "stage_heading"]

_COLOURS = {"done": "green", "gate": "yellow", "failed": "red", "interrupted": "red", "skipped": "dim"}
_WORDS = {"gate": "gate not passed"}


@dataclass(frozen=True)
class StageRow:
    """One line of the table."""

    name: str
    algorithm: str
    status: str
    seconds: float | None
    result: str


def stage_heading(console: Console, number: int, count: int, name: str, what: str) -> None:
    """A line across the terminal: ``stage 2 of 6: pairs (sampling)``.

    Args:
        what: the algorithm, and whether it goes on.
    """
    console.print()
    console.rule(Text(printable(f"stage {number} of {count}: {name} ({what})", console), style="bold"), align="left")


def stage_ended(console: Console, row: StageRow) -> None:
    """One line: what became of a stage, its time, and what came out."""
    line = Text.assemble(
        (printable(row.name, console), "bold"), ": ", _status(row.status), f" in {duration(row.seconds)}"
    )
    if row.result:
        line.append(f"; {printable(row.result, console)}")
    console.print(line, soft_wrap=True)


def render_pipeline(console: Console, rows: Sequence[StageRow], notes: Sequence[str], took: float) -> None:
    """The table of all stages with the sum of their times, and below it what else is to be said.

    Args:
        took: seconds of this call.
    """
    table = Table(title=Text("Pipeline", style="bold"), title_justify="left", box=box.ROUNDED)
    table.add_column("stage", style="bold cyan", overflow="fold")
    table.add_column("algorithm", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for row in rows:
        name, result = (Text(printable(text, console)) for text in (row.name, row.result))
        table.add_row(name, row.algorithm, _status(row.status), duration(row.seconds), result)
    table.add_section()
    total = sum(row.seconds or 0.0 for row in rows)
    table.add_row("in all", "", "", duration(total), f"this call: {duration(took)}")
    console.print()
    console.print(table)
    for note in notes:
        console.print(Text(printable(note, console)), soft_wrap=True)


def _status(status: str) -> Text:
    return Text(_WORDS.get(status, status), style=_COLOURS.get(status, ""))
