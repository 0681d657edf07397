"""What a report says in tables and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.evaluation.run_folder import RunFolder
from rayrlhf.monitoring.comparison import pair_samples
from rayrlhf.monitoring.text import duration, finite, fixed

__all__ = [
    "Cell",
    "Columns",
    "Outcome",
    "SAMPLES",
    "SampleRow",
    "Sided",
    "comparison_table",
    "config_differences",
    "data_of",
    "extremes",
    "facts",
    "headlines",
    "outcome_table",
    "samples_side_by_side",
    "time_of",
    "visible",
]

SAMPLES = 8
"""Prompts whose responses a report shows, besides those that are picked."""
_AT_EACH_END = 3
_RATES = 4  # win rates among the headlines of a comparison of models
_LONGEST_TEXT = 4000  # characters of a prompt or response


@dataclass(frozen=True)
class _Measure:
    label: str
    value: str
    error: str | None = None
    decimals: int = 3
    better: int = 0
    """1: more is better, -1: less is, 0: neither by itself."""
    percent: bool = False


_MEASURES = (
    _Measure("Score", "score/mean", "score/stderr", 3, 1),
    _Measure("KL to the reference (nats a sequence)", "kl/mean", "kl/stderr", 2),
    _Measure("KL to the reference (nats a token)", "kl_per_token", None, 4),
    _Measure("Loss", "loss", None, 4, -1),
    _Measure("NLL (nats a token)", "nll", None, 3, -1),
    _Measure("Perplexity", "perplexity", None, 2, -1),
    _Measure("Pairs in the right order", "accuracy", "accuracy/stderr", 1, 1, True),
    _Measure("Pairs in the right order", "rewards/accuracies", None, 1, 1, True),
    _Measure("Margin", "margin", None, 3, 1),
    _Measure("Margin of implicit rewards", "rewards/margins", None, 4, 1),
    _Measure("Calibration error (ECE)", "ece", None, 3, -1),
    _Measure("Distinct bigrams", "distinct_2", None, 3),
    _Measure("Response length (tokens)", "response_length/mean", None, 1),
    _Measure("Cut by the length limit", "truncated_fraction", None, 1, 0, True),
)
_NO_MEASURES = frozenset({"step", "prompts", "examples", "pairs"})


@dataclass(frozen=True)
class Cell:
    """A number in words."""

    text: str
    tone: str = ""
    """``better``, ``worse``, ``unclear`` (within two standard errors of no change), or nothing."""


@dataclass(frozen=True)
class Outcome:
    """The first evaluation of a run, and that of the model which it wrote."""

    before: str
    """Step."""
    after: str
    prompts: str
    rows: list[tuple[str, Cell, Cell, Cell]]
    """Label, before, after, change."""


@dataclass(frozen=True)
class Columns:
    """A table with a column a run (or a measure)."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class SampleRow:
    """A prompt with its responses."""

    prompt: str
    responses: list[tuple[str, str, str]]
    """Who, score, text."""
    note: str = ""


def visible(text: object) -> str:
    """Foreign text made harmless: controls and marks that turn the direction of writing are shown as escapes. A list becomes its
    entries, one after the other."""
    if isinstance(text, list | tuple):
        return "; ".join(map(visible, text))
    return "".join(_character(c) for c in str(text).replace("\r\n", "\n"))


def _character(c: str) -> str:
    # Zero-width joiners hold emoji and some scripts together.
    if c in "\n\t\u200c\u200d" or c.isprintable() or (c.isspace() and ord(c) >= 0xA0):
        return c
    return c.encode("unicode_escape", "surrogatepass").decode("ascii")


def clipped(text: object) -> str:
    shown = visible(text)
    more = len(shown) - _LONGEST_TEXT
    return shown if more <= 0 else f"{shown[:_LONGEST_TEXT]} [... {more:,} more characters]"


# -- what a run is ------------------------------------------------------------------------------------------------------


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """What the run is, in name and value."""
    algorithm = str(run.setting("algorithm") or "ppo")
    variant = run.setting("dpo", "loss") if algorithm == "dpo" else run.setting("ppo", "advantage_estimator")
    found: list[tuple[str, Any]] = [
        ("Algorithm", f"{algorithm} ({variant})" if variant else algorithm),
        ("Model", run.setting("policy", "path")),
        ("Adapters", "LoRA" if run.setting("policy", "lora") else None),
        ("Reward", _reward(run)),
        ("Data", data_of(run)),
        ("Steps", _steps(run)),
        ("Time", time_of(run)),
        ("Tokens", f"{math.fsum(run.curve('tokens')[1]):,.0f}" if run.curve("tokens")[0] else None),
        ("Precision", run.setting("policy", "dtype")),
        ("Seed", run.setting("seed")),
        ("Model at the end", _written(run)),
        ("Folder", run.folder),
    ]
    return [(name, visible(value)) for name, value in found if value is not None]


def _written(run: RunFolder) -> str:
    if not (run.folder / "model" / "config.json").exists():
        return "not written"
    return "written" if run.kept_step is None else f"written, of step {run.kept_step}"


def _reward(run: RunFolder) -> str | None:
    sources = run.setting("reward", "sources")
    if not isinstance(sources, list):
        return None
    names = [s.get("name") or s.get("function") or s.get("model") for s in sources if isinstance(s, dict)]
    return ", ".join(str(name) for name in names if name) or None


def data_of(run: RunFolder) -> str | None:
    source = run.setting("data", "prompts") or run.setting("data", "train")
    if isinstance(source, list):
        return ", ".join(str(s.get("path")) for s in source if isinstance(s, dict))
    return None if source is None else str(source)


def _steps(run: RunFolder) -> str | None:
    if not run.metrics:
        return None
    total = run.setting("ppo", "steps") or run.setting("training", "max_steps")
    done = run.metrics[-1]["step"]
    return f"{done} of {total}" if total else str(done)


def time_of(run: RunFolder) -> str | None:
    spent = math.fsum(run.curve("timing/total_s")[1])
    in_steps = f"{duration(spent)} in steps" if spent else ""
    if run.started is None or run.ended is None:
        return in_steps or None
    whole = duration((run.ended - run.started).total_seconds())
    return f"{whole} from {run.started:%Y-%m-%d %H:%M %z}" + (f"; {in_steps}" if in_steps else "")


# -- numbers ------------------------------------------------------------------------------------------------------------


def _scaled(measure: _Measure, evaluation: dict[str, Any], key: str | None) -> float | None:
    value = finite(evaluation.get(key)) if key else None
    return value * 100 if value is not None and measure.percent else value


def _cell(measure: _Measure, evaluation: dict[str, Any]) -> Cell:
    value, error = (_scaled(measure, evaluation, key) for key in (measure.value, measure.error))
    if value is None:
        raw = evaluation.get(measure.value)
        return Cell("–" if raw is None else fixed(raw, measure.decimals))
    text = fixed(value, measure.decimals) + ("%" if measure.percent else "")
    return Cell(text if error is None else f"{text} ± {fixed(error, measure.decimals)}")


def _change(measure: _Measure, before: dict[str, Any], after: dict[str, Any]) -> Cell:
    old, new = (_scaled(measure, evaluation, measure.value) for evaluation in (before, after))
    if old is None or new is None:
        return Cell("–")
    change = new - old
    text = fixed(change, measure.decimals, sign=True) + (" pp" if measure.percent else "")
    errors = [_scaled(measure, evaluation, measure.error) for evaluation in (before, after)]
    known = [error for error in errors if error is not None]
    if len(known) == 2:
        error = math.hypot(*known)
        text += f" ± {fixed(error, measure.decimals)}"
        if abs(change) <= 2 * error:
            return Cell(text, "unclear")
    gain = measure.better * change
    return Cell(text, "better" if gain > 0 else "worse" if gain < 0 else "")


def _measures(evaluations: Sequence[dict[str, Any]]) -> list[_Measure]:
    """The known measures that are there, then every further number of the evaluations."""
    names = list(dict.fromkeys(name for row in evaluations for name, value in row.items() if finite(value) is not None))
    known = [measure for measure in _MEASURES if measure.value in names]
    shown = {m.value for m in known} | {m.error for m in known} | _NO_MEASURES
    further = [name for name in names if name not in shown and not name.endswith("/stderr")]
    return known + [
        _Measure(visible(name), name, error if (error := name.removesuffix("/mean") + "/stderr") in names else None)
        for name in further
    ]


def outcome_table(run: RunFolder) -> Outcome | None:
    """Before and after, with standard errors where there are any; None with fewer than two evaluations."""
    if len(run.evaluations) < 2:
        return None
    before, after = run.evaluations[0], run.outcome
    assert after is not None
    rows = [(m.label, _cell(m, before), _cell(m, after), _change(m, before, after)) for m in _measures([before, after])]
    counts = {str(e["prompts"]) for e in (before, after) if "prompts" in e}
    return Outcome(f"step {before['step']}", run.step_name(after), " and ".join(sorted(counts)), rows)


def comparison_table(runs: Sequence[RunFolder]) -> Columns | None:
    """A row a run, a column a measure of the model that it wrote; the first row is the first run's first evaluation."""
    evaluated = [(run, after) for run in runs if (after := run.outcome) is not None]
    if not evaluated:
        return None
    first = evaluated[0][0]
    start = first.evaluations[0]
    measures = _measures([start, *(after for _, after in evaluated)])
    rows = [(f"before ({first.name})", [_cell(m, start) for m in measures])]
    for run, after in evaluated:
        cells = [Cell(_cell(m, after).text, _change(m, start, after).tone) for m in measures]
        rows.append((f"{run.name} ({run.setting('algorithm') or 'ppo'}, {run.step_name(after)})", cells))
    return Columns([m.label for m in measures], rows)


def _headline_rates(run: RunFolder) -> list[dict[str, Any]]:
    """The first win rate; of a comparison, all judges' on two models, or the first judge's on several."""
    if run.compared is None:
        return run.win_rates[:1]
    judges = [row.get("judge") for row in run.win_rates]
    several = len(run.compared["models"]) > 2
    rows = [row for row, judge in zip(run.win_rates, judges, strict=True) if not several or judge == judges[0]]
    return rows[:_RATES]


def headlines(run: RunFolder) -> list[tuple[str, str, str]]:
    """The few numbers that count, as (what, value, beside it)."""
    found = []
    after = run.outcome
    if len(run.evaluations) > 1 and after is not None:
        before = run.evaluations[0]
        for measure in _measures([before, after])[:3]:
            new = _scaled(measure, after, measure.value)
            if new is not None:
                sign = "%" if measure.percent else ""
                beside = f"before {_cell(measure, before).text}"
                if after is not run.evaluations[-1]:
                    beside += f"; {run.step_name(after)}"
                found.append((measure.label, fixed(new, measure.decimals) + sign, beside))
    for row in _headline_rates(run):
        if finite(row.get("rate")) is not None:
            beside = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            what = f"Wins against {visible(row.get('b', '?'))}"
            if run.compared is not None:
                what = f"{visible(row.get('a', '?'))}: {what[0].lower()}{what[1:]}"
                beside += f", by {visible(row.get('judge', '?'))}"
            found.append((what, f"{100 * row['rate']:.1f}%", beside))
    if run.gates is not None:
        found.append(("Quality gate", "passed" if run.gates.get("passed") is True else "failed", ""))
    if run.health:
        troubles = {(str(row.get("rule")), str(row.get("since"))) for row in run.health}
        found.append(("Health warnings", str(len(troubles)), "see below"))
    return found


# -- samples ------------------------------------------------------------------------------------------------------------


@dataclass
class Sided:
    """Samples of one prompt, by who made them."""

    prompt: str
    by: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Each with ``response`` and ``score``."""

    def row(self, note: str = "") -> SampleRow:
        """For a report."""
        told = [(visible(who), fixed(s.get("score"), 3), clipped(s.get("response", ""))) for who, s in self.by]
        return SampleRow(clipped(self.prompt), told, note)


def samples_side_by_side(runs: Sequence[RunFolder]) -> list[SampleRow]:
    """The first held-out prompts, with the response before and that of each run after; not picked by their scores. Then, for a
    single run, those whose score rose and fell the most."""
    evaluated = [run for run in runs if len(run.evaluations) > 1]
    if not evaluated:
        return []
    columns = [("before", _samples(evaluated[0].evaluations[0]))]
    columns += [("after" if len(runs) == 1 else run.name, _samples(run.outcome or {})) for run in evaluated]
    pairs = pair_samples({"samples": columns[0][1]}, {"samples": columns[1][1]}, len(columns[0][1]))
    sided = {before["prompt"]: Sided(before["prompt"], [("before", before)]) for before, _ in pairs}
    for who, samples in columns[1:]:
        first = {s["prompt"]: s for s in reversed(samples)}
        for prompt, row in sided.items():
            if prompt in first:
                row.by.append((who, first[prompt]))
    rows = list(sided.values())
    shown = [row.row() for row in rows[:SAMPLES]]
    return shown + (extremes(rows[SAMPLES:]) if len(runs) == 1 else [])


def extremes(rows: Sequence[Sided]) -> list[SampleRow]:
    """Those whose score rises and falls the most, from the first response to the last."""

    def gain(row: Sided) -> float:
        scores = [finite(sample.get("score")) for _, sample in row.by]
        return scores[-1] - scores[0] if scores[0] is not None and scores[-1] is not None else 0.0

    ranked = sorted(rows, key=gain)
    fell = [row.row("picked: among the largest losses of score") for row in ranked[:_AT_EACH_END] if gain(row) < 0]
    rose = [row.row("picked: among the largest gains of score") for row in ranked[::-1][:_AT_EACH_END] if gain(row) > 0]
    return rose + fell


def _samples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    samples = evaluation.get("samples")
    if not isinstance(samples, list):
        return []
    return [s for s in samples if isinstance(s, dict) and isinstance(s.get("prompt"), str)]


# -- configuration ------------------------------------------------------------------------------------------------------


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: "null" if value is None else visible(value)}


def config_differences(runs: Sequence[RunFolder]) -> Columns:
    """The keys whose values aren't the same in all runs."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [
        (key, [Cell(values.get(key, "–")) for values in flat])
        for key in keys
        if key != "run_dir" and len({values.get(key) for values in flat}) > 1
    ]
    return Columns([run.name for run in runs], rows)
