"""What a report says of models that were compared on the same prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.evaluation.plots import Chart, Histogram
from rayrlhf.evaluation.report_tables import (
    SAMPLES,
    Cell,
    SampleRow,
    Sided,
    data_of,
    extremes,
    time_of,
    visible,
)
from rayrlhf.evaluation.run_folder import RunFolder
from rayrlhf.monitoring.evaluation_table import measure_rows, notes_on
from rayrlhf.monitoring.text import finite, fixed

__all__ = ["ModelTable", "comparison_facts", "model_table", "response_samples", "score_charts"]


@dataclass(frozen=True)
class ModelTable:
    """Models beside each other."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str]


def comparison_facts(run: RunFolder) -> list[tuple[str, str]]:
    """What was compared, in name and value."""
    compared = run.compared or {}
    paths = [f"{model['name']}: {model.get('path', '?')}" for model in compared["models"]]
    found: list[tuple[str, Any]] = [
        ("Algorithm", "evaluation"),
        ("Models", paths),
        ("Reference", compared.get("reference")),
        ("Scores", ", ".join(compared["scores"].values()) or None),
        ("Judge", compared.get("judge")),
        ("Data", data_of(run)),
        ("Prompts", compared.get("prompts")),
        ("Longest response", run.setting("rollout", "max_response_tokens")),
        ("Time", time_of(run)),
        ("Seed", run.setting("seed")),
        ("Folder", run.folder),
    ]
    return [(name, visible(value)) for name, value in found if value is not None]


def model_table(run: RunFolder) -> ModelTable | None:
    """A column a model, a row a measure, as a terminal shows it; None where nothing was compared."""
    if run.compared is None:
        return None
    heads = [str(model["name"]) for model in run.compared["models"]]
    rows = [
        (visible(label), [Cell(visible(cell.text), cell.tone) for cell in cells])
        for label, cells in measure_rows(run.compared)
    ]
    notes = [visible(note) for note in notes_on(run.compared)]
    if len(heads) > 1:
        better = "▲ and ▼ mark what is better and worse by more than two standard errors"
        notes.append(f"{better} than {visible(heads[0])}, with the two taken as independent.")
    return ModelTable(heads, rows, notes)


def score_charts(run: RunFolder, several: bool) -> list[Chart]:
    """Distributions of each kind of score, all models over each other."""
    made: list[Chart] = []
    names = _names(run)
    for source, label in (run.compared or {}).get("scores", {}).items():
        groups = []
        for name in names:
            found = [finite(_score(row, name, source)) for row in run.responses]
            values = [value for value in found if value is not None]
            if values:
                groups.append((f"{name}: mean {fixed(statistics.fmean(values), 3)}", values))
        if groups:
            title = f"{run.name}: {label}" if several else label
            slug = f"scores_{source}_{run.name}" if several else f"scores_{source}"
            file = "".join(c if c.isascii() and c.isalnum() else "_" for c in slug)
            made.append(Histogram(title, groups, file, "% of responses"))
    return made


def _names(run: RunFolder) -> list[str]:
    return [str(model["name"]) for model in run.compared["models"]] if run.compared is not None else []


def _told(row: dict[str, Any], name: str) -> dict[str, Any]:
    told = row["models"].get(name)
    return told if isinstance(told, dict) else {}


def _score(row: dict[str, Any], name: str, source: str) -> Any:
    scores = _told(row, name).get("scores")
    return scores.get(source) if isinstance(scores, dict) else None


def response_samples(runs: Sequence[RunFolder]) -> list[SampleRow]:
    """The first prompts with the responses of all models, not picked by their scores. Then, where the report is about nothing
    else, those where the last model's score is the furthest above and below the first one's."""
    found = []
    for run in runs:
        sided = [Sided(_prompt(row)) for row in run.responses]
        for row, side in zip(run.responses, sided, strict=True):
            for name in _names(run):
                told = _told(row, name)
                said = {"response": told.get("response", ""), "score": _score(row, name, "reward")}
                side.by.append((name if len(runs) == 1 else f"{run.name}: {name}", said))
        whole = [side for side in sided if side.by]
        found += [side.row() for side in whole[:SAMPLES]]
        if len(runs) == 1 and len(_names(run)) > 1:
            found += extremes(whole[SAMPLES:])
    return found


def _prompt(row: dict[str, Any]) -> str:
    """A prompt, or the turns of a conversation."""
    prompt = row.get("prompt", "")
    if not isinstance(prompt, list):
        return str(prompt)
    turns = [turn for turn in prompt if isinstance(turn, dict)]
    return "\n\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in turns)
