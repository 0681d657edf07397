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
    "SampleRow",
    "comparison_table",
    "config_differences",
    "facts",
    "headlines",
    "outcome_table",
    "samples_side_by_side",
    "visible",
]

_SAMPLES = 8
_EXTREMES = 3
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
    """The first and the last evaluation of a run."""

    before_step: int
    after_step: int
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


def _clipped(text: object) -> str:
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
        ("Data", _data(run)),
        ("Steps", _steps(run)),
        ("Time", _time(run)),
        ("Tokens", f"{math.fsum(run.curve('tokens')[1]):,.0f}" if run.curve("tokens")[0] else None),
        ("Precision", run.setting("policy", "dtype")),
        ("Seed", run.setting("seed")),
        ("Model at the end", "written" if (run.folder / "model" / "config.json").exists() else "not written"),
        ("Folder", run.folder),
    ]
    return [(name, visible(value)) for name, value in found if value is not None]


def _reward(run: RunFolder) -> str | None:
    sources = run.setting("reward", "sources")
    if not isinstance(sources, list):
        return None
    names = [s.get("name") or s.get("function") or s.get("model") for s in sources if isinstance(s, dict)]
    return ", ".join(str(name) for name in names if name) or None


def _data(run: RunFolder) -> str | None:
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


def _time(run: RunFolder) -> str | None:
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
    before, after = run.evaluations[0], run.evaluations[-1]
    rows = [(m.label, _cell(m, before), _cell(m, after), _change(m, before, after)) for m in _measures([before, after])]
    counts = {str(e["prompts"]) for e in (before, after) if "prompts" in e}
    return Outcome(before["step"], after["step"], " and ".join(sorted(counts)), rows)


def comparison_table(runs: Sequence[RunFolder]) -> Columns | None:
    """A row a run, a column a measure of its last evaluation; the first row is the first run's first evaluation."""
    evaluated = [run for run in runs if run.evaluations]
    if not evaluated:
        return None
    start = evaluated[0].evaluations[0]
    lasts = [run.evaluations[-1] for run in evaluated]
    measures = _measures([start, *lasts])
    rows = [(f"before ({evaluated[0].name})", [_cell(m, start) for m in measures])]
    for run, last in zip(evaluated, lasts, strict=True):
        cells = [Cell(_cell(m, last).text, _change(m, start, last).tone) for m in measures]
        rows.append((f"{run.name} ({run.setting('algorithm') or 'ppo'}, step {last['step']})", cells))
    return Columns([m.label for m in measures], rows)


def headlines(run: RunFolder) -> list[tuple[str, str, str]]:
    """The few numbers that count, as (what, value, beside it)."""
    found = []
    if len(run.evaluations) > 1:
        before, after = run.evaluations[0], run.evaluations[-1]
        for measure in _measures([before, after])[:3]:
            new = _scaled(measure, after, measure.value)
            if new is not None:
                sign = "%" if measure.percent else ""
                beside = f"before {_cell(measure, before).text}"
                found.append((measure.label, fixed(new, measure.decimals) + sign, beside))
    for row in run.win_rates[:1]:
        if finite(row.get("rate")) is not None:
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            found.append((f"Wins against {visible(row.get('b', '?'))}", f"{100 * row['rate']:.1f}%", interval))
    if run.gates is not None:
        found.append(("Quality gate", "passed" if run.gates.get("passed") is True else "failed", ""))
    if run.health:
        troubles = {(str(row.get("rule")), str(row.get("since"))) for row in run.health}
        found.append(("Health warnings", str(len(troubles)), "see below"))
    return found


# -- samples ------------------------------------------------------------------------------------------------------------


@dataclass
class _Sided:
    """Samples of one prompt, by who made them."""

    prompt: str
    by: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def row(self, note: str = "") -> SampleRow:
        told = [(visible(who), fixed(s.get("score"), 3), _clipped(s.get("response", ""))) for who, s in self.by]
        return SampleRow(_clipped(self.prompt), told, note)


def samples_side_by_side(runs: Sequence[RunFolder]) -> list[SampleRow]:
    """The first held-out prompts, with the response before and that of each run after; not picked by their scores. Then, for a
    single run, those whose score rose and fell the most."""
    evaluated = [run for run in runs if len(run.evaluations) > 1]
    if not evaluated:
        return []
    columns = [("before", _samples(evaluated[0].evaluations[0]))]
    columns += [("after" if len(runs) == 1 else run.name, _samples(run.evaluations[-1])) for run in evaluated]
    pairs = pair_samples({"samples": columns[0][1]}, {"samples": columns[1][1]}, len(columns[0][1]))
    sided = {before["prompt"]: _Sided(before["prompt"], [("before", before)]) for before, _ in pairs}
    for who, samples in columns[1:]:
        first = {s["prompt"]: s for s in reversed(samples)}
        for prompt, row in sided.items():
            if prompt in first:
                row.by.append((who, first[prompt]))
    rows = list(sided.values())
    shown = [row.row() for row in rows[:_SAMPLES]]
    return shown + (_extremes(rows[_SAMPLES:]) if len(runs) == 1 else [])


def _extremes(rows: Sequence[_Sided]) -> list[SampleRow]:
    def gain(row: _Sided) -> float:
        scores = [finite(sample.get("score")) for _, sample in row.by]
        return scores[-1] - scores[0] if scores[0] is not None and scores[-1] is not None else 0.0

    ranked = sorted(rows, key=gain)
    fell = [row.row("picked: among the largest losses of score") for row in ranked[:_EXTREMES] if gain(row) < 0]
    rose = [row.row("picked: among the largest gains of score") for row in ranked[::-1][:_EXTREMES] if gain(row) > 0]
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
