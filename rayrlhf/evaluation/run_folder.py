"""What a run's folder holds, read for a report. Whatever can't be read is named, and the rest is used."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.errors import InputRefused
from rayrlhf.monitoring.text import finite

__all__ = ["RunFolder", "read_runs"]

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}) (\w+) +(.*)$")
_LOG_LINES = 60  # warnings and errors of the log that a report shows
_PART_FILES = ("metrics.jsonl", "evaluations.jsonl")


@dataclass
class RunFolder:
    """One run. Rows are as the files' writers made them; the formats are told in `rayrlhf.evaluation.report`."""

    folder: Path
    name: str
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    health: list[dict[str, Any]]
    gates: dict[str, Any] | None
    data_check: dict[str, Any] | None
    win_rates: list[dict[str, Any]]
    hacking: dict[str, Any] | None
    started: datetime | None
    ended: datetime | None
    """Times of the first and last line of the log."""
    log: list[tuple[str, str, str]]
    """Time, level and text of the log's warnings and errors: the last 60."""
    unread: list[str] = field(default_factory=list)
    """What could not be read, each with its file and line."""

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric."""
        return _column(self.metrics, metric)

    def evaluated(self, measure: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a measure of the evaluations."""
        return _column(self.evaluations, measure)

    def setting(self, *path: str) -> Any:
        """The value at a key of the configuration; None where it isn't there."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs in these folders, in order, with names that differ.

    Raises:
        InputRefused: for each folder that isn't there or holds no run; nothing is read then.
    """
    problems = []
    if not folders:
        problems.append("no run's folder was given")
    for folder in folders:
        if not folder.is_dir():
            problems.append(f"{folder}: no such folder")
        elif not any((folder / name).is_file() for name in _PART_FILES):
            problems.append(f"{folder}: holds no run: there is neither {' nor '.join(_PART_FILES)}")
    if problems:
        raise InputRefused(problems)
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; more of it where these are alike; a number where the paths themselves are."""
    parts = [folder.resolve().parts for folder in folders]
    names = ["/".join(p[-1:]) for p in parts]
    for length in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            return names
        names = ["/".join(p[-length:]) if names.count(name) > 1 else name for p, name in zip(parts, names, strict=True)]
    return [f"{name} ({index})" if names.count(name) > 1 else name for index, name in enumerate(names, start=1)]


def _read(folder: Path, name: str) -> RunFolder:
    unread: list[str] = []
    config_text = _text(folder / "config.yaml", unread)
    config: Any = {}
    try:
        config = yaml.safe_load(config_text) or {}
    except yaml.YAMLError as error:
        unread.append(f"config.yaml: no YAML: {' '.join(str(error).split())}")
    if not isinstance(config, dict):
        unread.append("config.yaml: no mapping of keys")
        config = {}
    stamps, log = _read_log(folder / "log.txt", unread)
    gates, check = (_object(folder / file, unread) for file in ("gates.json", "data_check.json"))
    return RunFolder(
        folder=folder,
        name=name,
        config=config,
        config_text=config_text,
        metrics=_by_step(_rows(folder / "metrics.jsonl", unread)),
        evaluations=_by_step(_rows(folder / "evaluations.jsonl", unread)),
        samples=_rows(folder / "samples.jsonl", unread),
        health=_rows(folder / "health.jsonl", unread),
        gates=gates,
        data_check=check,
        win_rates=_comparisons(folder / "win_rates.json", unread),
        hacking=_object(folder / "reward_hacking.json", unread),
        started=stamps[0] if stamps else None,
        ended=stamps[-1] if stamps else None,
        log=log,
        unread=unread,
    )


def _text(path: Path, unread: list[str]) -> str:
    if not path.exists():
        return ""
    try:
        raw = path.read_bytes()
    except OSError as error:
        unread.append(f"{path.name}: {error.strerror or error}")
        return ""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        unread.append(
            f"{path.name}: no UTF-8 from byte {error.start} on; such bytes are shown as a replacement character"
        )
        return raw.decode("utf-8", "replace")


def _rows(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects with a whole number ``step``."""
    rows, bad = [], []
    # Not splitlines: a response may hold a U+2028.
    for number, line in enumerate(_text(path, unread).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        else:
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        lines = "line" if len(bad) == 1 else "lines"
        unread.append(f"{path.name}: {lines} {shown}: no JSON object with a step; left out")
    return rows


def _json(path: Path, unread: list[str]) -> Any:
    text = _text(path, unread)
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        unread.append(f"{path.name}: no JSON: {error}")
        return None


def _object(path: Path, unread: list[str]) -> dict[str, Any] | None:
    value = _json(path, unread)
    if value is None or isinstance(value, dict):
        return value
    unread.append(f"{path.name}: no JSON object")
    return None


def _comparisons(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    value = _json(path, unread)
    if value is None:
        return []
    if not isinstance(value, list):
        unread.append(f"{path.name}: no JSON list")
        return []
    whole = []
    for index, row in enumerate(value):
        counts = [finite(row.get(key)) for key in ("wins", "ties", "losses")] if isinstance(row, dict) else [None]
        known = all(count is not None and count >= 0 for count in counts)
        # Where nothing was judged there is no rate.
        if known and (not any(counts) or None not in [finite(row.get(key)) for key in ("rate", "low", "high")]):
            whole.append(row)
        else:
            unread.append(
                f"{path.name}: entry {index}: no comparison with wins, ties, losses, rate, low, high; left out"
            )
    return whole


def _read_log(path: Path, unread: list[str]) -> tuple[list[datetime], list[tuple[str, str, str]]]:
    stamps, told = [], []
    for line in _text(path, unread).split("\n"):
        match = _STAMP.match(line)
        if match is None:
            continue
        stamps.append(datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S%z"))
        if match[2] not in ("DEBUG", "INFO"):
            told.append((match[1], match[2].lower(), match[3]))
    return stamps, told[-_LOG_LINES:]


def _by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ascending; of several rows with one step the last counts."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def _column(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    pairs = [(float(row["step"]), finite(row.get(name))) for row in rows]
    known = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in known], [value for _, value in known]
