"""What a check of data found, on a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrlhf.monitoring.text import printable

if TYPE_CHECKING:
    from rayrlhf.data.findings import CheckReport, Finding

__all__ = ["render_check"]

_STYLES = {"error": "bold red", "warning": "yellow"}


def render_check(report: CheckReport, console: Console, *, most: int = 50) -> None:
    """Prints the files, how many findings there are of each kind, and the findings: ``most`` at most, errors first."""
    for file in report.files:
        kind = file.kind or "of no known kind"
        line = f"{file.source.name}: {len(file.source.rows):,} rows, {kind}, {len(file.records):,} of them usable"
        console.print(Text(printable(line, console)))
    if not report.findings:
        console.print(Text("nothing found", style="green"))
        return
    console.print(_counts(report))
    shown = [*report.errors, *report.warnings][:most]
    for finding in shown:
        console.print(_line(finding, console))
    rest = len(report.findings) - len(shown)
    if rest:
        console.print(Text(f"... and {rest} more", style="dim"))


def _counts(report: CheckReport) -> Table:
    table = Table(box=box.ROUNDED, title=Text("Findings", style="bold"), title_justify="left")
    table.add_column("kind", no_wrap=True)
    table.add_column("severity", no_wrap=True)
    table.add_column("times", justify="right")
    times = Counter((finding.severity, finding.kind) for finding in report.findings)
    for (severity, kind), count in sorted(times.items()):
        table.add_row(kind, Text(severity, style=_STYLES[severity]), f"{count:,}")
    return table


def _line(finding: Finding, console: Console) -> Text:
    return Text.assemble(
        (printable(f"{finding.where}: ", console), "bold"),
        (finding.severity, _STYLES[finding.severity]),
        printable(f" {finding.kind}: {finding.text}", console),
    )
