"""What a check of data gives: findings, each with its file and line, and the files it looked at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from rayrlhf.data.examples import Entry
from rayrlhf.data.records import Kind, Record
from rayrlhf.data.source import Source

__all__ = ["TAKEN_OUT", "CheckReport", "CheckedFile", "Finding"]

TAKEN_OUT = ("duplicate", "contradiction", "leak")
"""Kinds of warnings whose rows a cleaned copy lacks, as it lacks those with errors."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks wrong, with the data.

    Attributes:
        severity: an "error" refuses a run; a "warning" is shown.
        where: ``file:line``, ``file:row N`` for files whose records aren't lines, or the file alone.
        kind: one word for the kind of trouble.
        text: what was found, and what is legal.
        file: the file or dataset; empty for the configuration.
        number: the line or row; 0 for the whole file.
    """

    severity: Literal["error", "warning"]
    where: str
    kind: str
    text: str
    file: str = ""
    number: int = 0

    @property
    def taken_out(self) -> bool:
        """Whether a cleaned copy lacks this row."""
        return self.number > 0 and (self.severity == "error" or self.kind in TAKEN_OUT)


@dataclass
class CheckedFile:
    """One file or dataset: its rows and problems, and the rows that can be used. ``kind`` is None where it isn't known."""

    source: Source
    entry: Entry
    kind: Kind | None
    records: list[Record] = field(default_factory=list)

    def finding(self, severity: Literal["error", "warning"], number: int, kind: str, text: str) -> Finding:
        name = self.source.name
        place = f"{number}" if self.source.unit == "line" else f"{self.source.unit} {number}"
        return Finding(severity, f"{name}:{place}" if number else name, kind, text, name, number)

    def warning(self, number: int, kind: str, text: str) -> Finding:
        return self.finding("warning", number, kind, text)

    def at(self, number: int) -> str:
        """A place as a finding's ``where`` has it."""
        return self.warning(number, "", "").where


@dataclass(frozen=True)
class CheckReport:
    """All findings, in the order of files and lines."""

    findings: list[Finding]
    files: list[CheckedFile]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    def lines(self) -> list[str]:
        """A few lines for a plan: each file, and how often there is what."""
        lines = []
        for file in self.files:
            lines.append(f"{file.source.name}: {len(file.source.rows)} rows, {file.kind or 'of no known kind'}")
        for severity, findings in (("error", self.errors), ("warning", self.warnings)):
            for kind, times in Counter(finding.kind for finding in findings).items():
                first = next(finding for finding in findings if finding.kind == kind)
                more = f" (and {times - 1} more of this kind)" if times > 1 else ""
                lines.append(f"{severity}: {first.where}: {first.text}{more}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The report for a JSON file: ``files`` (path, kind, rows) and ``findings`` (severity, where, kind, text)."""
        return {
            "files": [{"path": f.source.name, "kind": f.kind, "rows": len(f.source.rows)} for f in self.files],
            "findings": [
                {"severity": f.severity, "where": f.where, "kind": f.kind, "text": f.text} for f in self.findings
            ],
        }
