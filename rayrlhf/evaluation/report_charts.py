"""Which charts a report has."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.evaluation.plots import BarChart, Chart, Histogram, LineChart, Outcome, Series, WinRateChart
from rayrlhf.evaluation.run_folder import RunFolder
from rayrlhf.monitoring.text import finite, fixed

__all__ = ["curves", "distributions", "further_curves", "scores_of", "stage_times", "win_rate_chart"]


@dataclass(frozen=True)
class _Curve:
    """A chart of metrics which belong together."""

    title: str
    metrics: tuple[tuple[str, str], ...]
    """Name of the metric, and its label where there are several."""
    unit: str = ""


_CURVES = (
    _Curve("Score and reward", (("score/mean", "score"), ("reward/mean", "reward, with KL penalty"))),
    _Curve("KL to the reference", (("kl", "KL"),), "nats a sequence"),
    _Curve("Coefficient of the KL", (("kl_coef", "kl_coef"),)),
    _Curve("Loss", (("loss", "loss"),)),
    _Curve("Policy loss", (("policy_loss", "policy"),)),
    _Curve("Value loss", (("value_loss", "value"),)),
    _Curve("NLL of the chosen responses", (("nll_loss", "NLL"),), "nats a token"),
    _Curve("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    _Curve("Reward margin, chosen over rejected", (("rewards/margins", "margin"), ("margin", "margin of scores"))),
    _Curve("Pairs in the right order", (("rewards/accuracies", "share"), ("accuracy", "share")), "share of pairs"),
    _Curve("Log-probabilities of responses", (("logps/chosen", "chosen"), ("logps/rejected", "rejected")), "nats"),
    _Curve("Strength beta", (("beta", "beta"),)),
    _Curve("Response length", (("response_length/mean", "mean"), ("response_length/max", "longest")), "tokens"),
    _Curve("Responses cut by the length limit", (("truncated_fraction", "cut"),), "share"),
    _Curve("Entropy of the policy", (("entropy", "entropy"),), "nats a token"),
    _Curve("Distinct bigrams", (("distinct_2", "distinct-2"),), "share"),
    _Curve("Clipped ratios", (("clipfrac", "policy"), ("value_clipfrac", "value")), "share of tokens"),
    _Curve("KL to the policy before the step", (("ppo_kl", "KL"),), "nats a token"),
    _Curve("Explained variance of the critic", (("explained_variance", "explained"),)),
    _Curve("Gradient norm, before clipping", (("grad_norm", "policy"), ("critic/grad_norm", "critic"))),
    _Curve("Learning rate", (("lr", "policy"), ("critic/lr", "critic"))),
    _Curve(
        "Rollout against trainer log-probabilities", (("rollout_mismatch/mean_abs", "mean difference"),), "nats a token"
    ),
    _Curve("Time of a step", (("timing/total_s", "step"),), "s"),
    _Curve("Throughput", (("tokens_per_s", "tokens"),), "tokens/s"),
)
_NOT_SHOWN = frozenset({"step"})


def curves(runs: Sequence[RunFolder]) -> list[Chart]:
    """Curves over the steps. One run: metrics that belong together share a chart; several: each metric has one, with all runs."""
    made = _evaluated(runs)
    for curve in _CURVES:
        if len(runs) > 1:
            made += [chart for name, label in curve.metrics if (chart := _of_runs(runs, curve, name, label))]
        elif chart := _of_one(runs[0], curve):
            made.append(chart)
    return made


def _of_one(run: RunFolder, curve: _Curve) -> LineChart | None:
    found = [(label, *run.curve(metric)) for metric, label in curve.metrics]
    series = [Series(label, x, y) for label, x, y in found if x]
    if not series:
        return None
    return LineChart(curve.title, series, _slug(curve.metrics[0][0]), curve.unit, _targets(run, curve.metrics[0][0]))


def _of_runs(runs: Sequence[RunFolder], curve: _Curve, metric: str, label: str) -> LineChart | None:
    found = [(run.name, *run.curve(metric)) for run in runs]
    if not any(x for _, x, _ in found):
        return None
    title = curve.title if len(curve.metrics) == 1 else f"{curve.title}: {label}"
    return LineChart(title, [Series(name, x, y) for name, x, y in found], _slug(metric), curve.unit)


def _targets(run: RunFolder, metric: str) -> list[tuple[float, str]]:
    target = finite(run.setting("ppo", "target_kl")) if metric == "kl" else None
    return [] if target is None else [(target, f"target_kl {target:g}")]


def _evaluated(runs: Sequence[RunFolder]) -> list[Chart]:
    """Held-out score and KL, where they were measured along the way and not at both ends alone."""
    made: list[Chart] = []
    for title, measure, unit in (
        ("Held-out score", "score", ""),
        ("Held-out KL to the reference", "kl", "nats a sequence"),
    ):
        series = []
        for run in runs:
            x, y = run.evaluated(f"{measure}/mean")
            errors = {row["step"]: finite(row.get(f"{measure}/stderr")) for row in run.evaluations}
            series.append(Series(run.name if len(runs) > 1 else measure, x, y, [errors[step] or 0.0 for step in x]))
        if any(len(line.x) > 2 for line in series):
            made.append(LineChart(title, series, f"held_out_{measure}", unit))
    return made


def further_curves(runs: Sequence[RunFolder]) -> list[Chart]:
    """A chart of each number that the metrics hold and `curves` doesn't show, if it changes at all."""
    shown = {metric for curve in _CURVES for metric, _ in curve.metrics} | _NOT_SHOWN
    names = dict.fromkeys(name for run in runs for row in run.metrics for name in row if name not in shown)
    made: list[Chart] = []
    for name in sorted(names):
        series = [Series(run.name if len(runs) > 1 else name, *run.curve(name)) for run in runs]
        if len({value for line in series for value in line.y}) > 1:
            made.append(LineChart(name, series, _slug(name)))
    return made


def stage_times(run: RunFolder) -> BarChart | None:
    """Median seconds of a step's stages, longest first."""
    names = dict.fromkeys(name for row in run.metrics for name in row if name.startswith("timing/"))
    rows = []
    for name in names:
        values = run.curve(name)[1]
        if values and name != "timing/total_s":
            rows.append((name.removeprefix("timing/").removesuffix("_s").replace("_", " "), statistics.median(values)))
    rows.sort(key=lambda row: -row[1])
    return BarChart("Stages of a step, median", rows, "stages", "s") if rows else None


def scores_of(evaluation: dict[str, Any]) -> list[float]:
    """The finite scores of an evaluation's samples."""
    samples = evaluation.get("samples")
    found = (
        [finite(sample.get("score")) for sample in samples if isinstance(sample, dict)]
        if isinstance(samples, list)
        else []
    )
    return [score for score in found if score is not None]


def distributions(runs: Sequence[RunFolder]) -> list[Chart]:
    """Scores of held-out samples before and after, a chart a run, all with the same axis."""
    found = []
    for run in runs:
        groups = []
        for label, evaluation in (("before", run.evaluations[:1]), ("after", run.evaluations[1:][-1:])):
            values = scores_of(evaluation[0]) if evaluation else []
            if values:
                step = evaluation[0]["step"]
                groups.append((f"{label}, step {step}: mean {fixed(statistics.fmean(values), 3)}", values))
        if groups:
            found.append((run.name, groups))
    every = [value for _, groups in found for _, values in groups for value in values]
    return [
        Histogram(
            "Held-out scores" if len(runs) == 1 else name,
            groups,
            "scores" if len(runs) == 1 else f"scores_{index}",
            "% of responses",
            (min(every), max(every)),
        )
        for index, (name, groups) in enumerate(found, start=1)
    ]


def win_rate_chart(runs: Sequence[RunFolder]) -> WinRateChart | None:
    """All comparisons that the runs' folders hold, each once."""
    rows: dict[str, Outcome] = {}
    for run in runs:
        for row in run.win_rates:
            wins, ties, losses = (int(row[key]) for key in ("wins", "ties", "losses"))
            rate, low, high = (
                float(row[key] or 0.0) if wins + ties + losses else 0.0 for key in ("rate", "low", "high")
            )
            label = f"{row.get('a', '?')} against {row.get('b', '?')}"
            label += f", judged by {row['judge']}" if row.get("judge") else ""
            rows[label] = Outcome(label, wins, ties, losses, rate, low, high)
    return WinRateChart("Win rates on the same prompts", list(rows.values()), "win_rates") if rows else None


def _slug(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name).strip("_") or "chart"
