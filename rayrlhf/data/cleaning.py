"""A copy of data without the rows that a check takes out."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.data.findings import CheckedFile, CheckReport, Finding
from rayrlhf.data.json_files import read_json
from rayrlhf.data.source import UTF8_BOM, Source
from rayrlhf.errors import InputRefused

__all__ = ["Cleaned", "fix"]


@dataclass(frozen=True)
class Cleaned:
    """What a cleaned copy has.

    Attributes:
        written: the files.
        kept: rows in them, all together.
        removed: the findings whose rows they lack, one row having several perhaps.
        left: findings that are true of the copy too.
    """

    written: list[Path]
    kept: int
    removed: list[Finding]
    left: list[Finding]

    def lines(self) -> list[str]:
        """For the user: what was written and what was taken out of it."""
        rows = {(finding.file, finding.number) for finding in self.removed}
        names = ", ".join(str(path) for path in self.written)
        lines = [f"{names}: {self.kept} rows kept, {len(rows)} taken out; findings left: {len(self.left)}"]
        kinds = Counter(finding.kind for finding in self.removed)
        lines += [f"{finding.where}: {finding.kind}: {finding.text}" for finding in self.removed]
        return [*lines, *(f"taken out for {kind}: {times}" for kind, times in sorted(kinds.items()))]


def fix(report: CheckReport, out: str | Path) -> Cleaned:
    """Write a copy of the checked data without the rows that have errors, copies, contradictions or leaks.

    The originals are never touched. What is kept stays as it stands there, byte for byte in JSON Lines, cell by cell in
    other files.

    Args:
        report: of a check.
        out: the copy of one file, with the same suffix; of several files the folder for their copies.

    Raises:
        InputRefused: the copy exists already, has another suffix, would have no rows, or a file can't be read to its end.
    """
    out = Path(out)
    copies = [out] if len(report.files) == 1 else [out / Path(file.source.name).name for file in report.files]
    problems = [problem for file, path in zip(report.files, copies, strict=True) if (problem := _why_not(file, path))]
    problems += [f"{path}: two of the files have this name" for path, times in Counter(copies).items() if times > 1]
    if problems:
        raise InputRefused(problems)
    removed = [finding for finding in report.findings if finding.taken_out]
    taken = {(finding.file, finding.number) for finding in removed}
    keep = [
        [row.number for row in file.source.rows if (file.source.name, row.number) not in taken] for file in report.files
    ]
    empty = [f"{path}: no row would be left" for path, numbers in zip(copies, keep, strict=True) if not numbers]
    if empty:
        raise InputRefused(empty)
    for file, path, numbers in zip(report.files, copies, keep, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        _WRITERS[path.suffix](Path(file.source.name).expanduser(), partial, set(numbers))
        os.replace(partial, path)
    left = [finding for finding in report.findings if (finding.file, finding.number) not in taken]
    return Cleaned(copies, sum(map(len, keep)), removed, left)


def _why_not(file: CheckedFile, out: Path) -> str | None:
    """Why a file can't be copied to ``out``."""
    original = Path(file.source.name).expanduser()
    whole = [problem.text for problem in file.source.problems if not problem.number]
    if not original.is_file() or original.suffix not in _WRITERS:
        return f"{file.source.name}: only files are cleaned ({', '.join(_WRITERS)}); save the dataset as one first"
    if out.suffix != original.suffix:
        return f"{out}: the copy of a {original.suffix} file must be one too"
    if out.exists():
        return f"{out}: this exists already, and isn't overwritten"
    if whole and not file.source.rows:
        return f"{file.source.name}: {whole[0]}"
    if len({row.number for row in file.source.rows}) < len(file.source.rows):
        return f"{file.source.name}: several rows stand in one line; write one a line first"
    if original.suffix == ".json" and (broken := _broken(file)):
        return f"{file.source.name}: what follows line {broken} can't be read; mend it by hand"
    return None


def _broken(file: CheckedFile) -> int:
    """The line behind which a JSON list can't be read; 0 where it can."""
    syntax = [problem.number for problem in file.source.problems if problem.text.startswith("malformed JSON")]
    return syntax[0] if syntax and _is_list(Path(file.source.name).expanduser().read_bytes()) else 0


def _is_list(raw: bytes) -> bool:
    return raw.removeprefix(UTF8_BOM).lstrip()[:1] == b"["


def _write_lines(original: Path, out: Path, keep: set[int]) -> None:
    with original.open("rb") as source, out.open("wb") as target:
        for number, line in enumerate(source, start=1):
            if number in keep:
                target.write(line if line.endswith(b"\n") else line + b"\n")


def _write_json(original: Path, out: Path, keep: set[int]) -> None:
    raw = original.read_bytes()
    if not _is_list(raw):
        _write_lines(original, out, keep)
        return
    source = Source(str(original), "")
    read_json(source, original, None)
    kept = [json.dumps(row.values, ensure_ascii=False) for row in source.rows if row.number in keep]
    out.write_text("[\n" + ",\n".join(kept) + "\n]\n", encoding="utf-8")


def _write_csv(original: Path, out: Path, keep: set[int]) -> None:
    text = original.read_bytes().removeprefix(UTF8_BOM).decode("utf-8")
    records = [record for record in csv.reader(io.StringIO(text, newline="")) if record]
    with out.open("w", encoding="utf-8", newline="") as target:
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(records[0])
        writer.writerows(record for number, record in enumerate(records[1:], start=1) if number in keep)


def _write_parquet(original: Path, out: Path, keep: set[int]) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(original)
    pyarrow.parquet.write_table(table.take([number - 1 for number in sorted(keep)]), out)


_WRITERS: dict[str, Callable[[Path, Path, set[int]], None]] = {
    ".jsonl": _write_lines,
    ".json": _write_json,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
