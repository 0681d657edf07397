"""The plan of a run as a table, shown before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrlhf.monitoring.text import printable

__all__ = ["render_plan"]


def render_plan(rows: Sequence[tuple[str, str, object, str]], console: Console) -> None:
    """Prints rows of (section, name, value, how the value comes about), with a line between sections."""
    table = Table(title=Text("Plan", style="bold"), title_justify="left", box=box.ROUNDED, show_header=False)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    table.add_column(style="dim", overflow="fold")
    previous = None
    for section, name, value, how in rows:
        if previous not in (None, section):
            table.add_section()
        heading = section if section != previous else ""
        table.add_row(*(Text(printable(text, console)) for text in (heading, name, _shown(value), how)))
        previous = section
    console.print(table)


def _shown(value: object) -> str:
    """Numbers with separators between thousands; yes and no; "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return str(value)
