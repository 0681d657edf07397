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
_PART_FILES = ("metrics.jsonl", "evaluations.jsonl", "evaluation.json")


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
    kept_step: int | None = None
    """Step whose model was written, as ``model_step.json`` says; None: that of the last step."""
    compared: dict[str, Any] | None = None
    """Of a comparison of models, ``evaluation.json``."""
    responses: list[dict[str, Any]] = field(default_factory=list)
    """And ``responses.jsonl``."""
    unread: list[str] = field(default_factory=list)
    """What could not be read, each with its file and line."""

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric."""
        return _column(self.metrics, metric)

    def evaluated(self, measure: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a measure of the evaluations."""
        return _column(self.evaluations, measure)

    @property
    def outcome(self) -> dict[str, Any] | None:
        """The evaluation of the model that was written: that of its step, or else the last one; None without any."""
        kept = (row for row in self.evaluations if row["step"] == self.kept_step)
        return next(kept, self.evaluations[-1] if self.evaluations else None)

    def step_name(self, evaluation: dict[str, Any]) -> str:
        """The step of an evaluation, in words; with which one was kept, where later ones weren't."""
        step = evaluation["step"]
        return f"kept, step {step}" if step == self.kept_step != self.evaluations[-1]["step"] else f"step {step}"

    def setting(self, *path: str) -> Any:
        """The value at a key of the configuration; None where it isn't there."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs in these folders, in order, with names that differ. A pipeline's folder stands for its stages.

    Raises:
        InputRefused: for each folder that isn't there or holds no run; nothing is read then.
    """
    problems = []
    folders = [run for folder in folders for run in _stages_of(folder)]
    if not folders:
        problems.append("no run's folder was given")
    for folder in folders:
        if not folder.is_dir():
            problems.append(f"{folder}: no such folder")
        elif not _holds_run(folder):
            problems.append(f"{folder}: holds no run: there is none of {', '.join(_PART_FILES)}")
    if problems:
        raise InputRefused(problems)
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _PART_FILES)


def _stages_of(folder: Path) -> list[Path]:
    """The stages of a pipeline that hold a run, in order; of another folder itself."""
    try:
        stages = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        return [folder]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRefused(f"{folder}/pipeline.json: can't be read as a pipeline's state ({error})") from error
    return [folder / name for name in stages if _holds_run(folder / name)] or [folder]


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
        kept_step=_kept_step(folder / "model_step.json", unread),
        compared=_compared(folder / "evaluation.json", unread),
        responses=_rows(folder / "responses.jsonl", unread, "models", dict),
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


def _rows(path: Path, unread: list[str], key: str = "step", kind: type = int) -> list[dict[str, Any]]:
    """The lines that are JSON objects with a value of this kind at this key: a whole number ``step``, say."""
    rows, bad = [], []
    # Not splitlines: a response may hold a U+2028.
    for number, line in enumerate(_text(path, unread).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get(key)) is kind:
            rows.append(row)
        else:
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        lines = "line" if len(bad) == 1 else "lines"
        unread.append(
            f"{path.name}: {lines} {shown}: no JSON object with {'a step' if key == 'step' else key}; left out"
        )
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


def _kept_step(path: Path, unread: list[str]) -> int | None:
    value = _object(path, unread)
    if value is None:
        return None
    step = value.get("kept_step")
    if type(step) is not int:
        unread.append(f"{path.name}: no whole number kept_step")
        return None
    return step


def _compared(path: Path, unread: list[str]) -> dict[str, Any] | None:
    """A comparison of models, where it has any."""
    value = _object(path, unread)
    if value is None:
        return None
    models = value.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(m, dict) and "name" in m for m in models):
        unread.append(f"{path.name}: no list of models with names")
        return None
    labels = value.get("scores")
    scores = {str(k): str(v) for k, v in labels.items()} if isinstance(labels, dict) else {}
    return {**value, "scores": scores, "temperature": finite(value.get("temperature"))}


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
