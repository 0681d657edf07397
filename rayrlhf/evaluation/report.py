"""The report of one run or several: one HTML file that opens without a network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.evaluation import report_charts
from rayrlhf.evaluation.plots import Chart, WinRateChart, legend, png, svg
from rayrlhf.evaluation.report_models import comparison_facts, model_table, response_samples, score_charts
from rayrlhf.evaluation.report_tables import (
    Columns,
    comparison_table,
    config_differences,
    facts,
    headlines,
    outcome_table,
    samples_side_by_side,
    visible,
)
from rayrlhf.evaluation.run_folder import RunFolder, read_runs
from rayrlhf.monitoring.text import fixed

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_TRAINING_SAMPLES = 12


def write_report(run_dirs: Sequence[Path], out: Path, *, pngs: bool = False) -> Path:
    """Write the report of these runs: what they are, what training changed, curves, distributions, win rates, samples, health,
    gates, findings in the data, configurations. Several runs stand beside each other, with the same axes. A run may be an
    evaluation, whose models are compared.

    Of each run's folder it reads ``config.yaml``, ``metrics.jsonl``, ``evaluations.jsonl``, ``samples.jsonl``, ``log.txt``
    as a run writes them, and where they are there:

    - ``model_step.json``: ``{"kept_step"}``: step whose model was written; without it, the last evaluation is that of the
      model.
    - ``health.jsonl``, an object a line: step, since, rule, severity (``note``, ``warning``, ``critical``), seen, means, turn.
    - ``gates.json``: ``{"passed": bool, "gates": [{"name", "passed": bool, "found", "wanted"}]}``.
    - ``data_check.json``: ``{"files": [...], "findings": [{"severity", "where", "kind", "text"}]}``.
    - ``win_rates.json``: ``[{"a", "b", "judge", "wins", "ties", "losses", "unjudged", "rate", "low", "high",
      "confidence"}]``: names of the models and the judge, counts of prompts, numbers in [0, 1], null where nothing was judged.
    - ``evaluation.json``, of models that were compared: ``{"prompts", "seed", "temperature", "reference", "judge", "scores",
      "models"}``: ``scores`` names what scored by source (``reward``, ``safety``, ``helpfulness``), ``models`` has an object a
      model, with its name, its path and the measures of `rayrlhf.evaluation.answers.measures_of`.
    - ``responses.jsonl``, a line a prompt: ``{"where", "prompt", "models", "verdicts"}``; ``models`` has by name ``{"response",
      "tokens", "finish_reason", "scores", "failures", "kl", "known_nll", "known_tokens"}``: scores by source, null with a cause
      in ``failures`` where there is none; ``verdicts`` the judge's, ``{"a", "b", "first", "second", "failures"}``: of the two
      models, with A's response shown first, with B's, and why there is none.
    - ``reward_hacking.json``: an object with outcome, pearson, spearman, parted_at, verdict.

    What can't be read (a torn line, a file that is no JSON) is left out, and the report says so.

    Args:
        run_dirs: folders of runs; the first one's *before* stands for all in the comparison.
        out: the HTML file; one that is there is replaced, at once and whole.
        pngs: write each chart as a PNG file too, into the folder ``STEM-plots`` beside ``out``.

    Returns:
        ``out``.

    Raises:
        InputRefused: a folder isn't there or holds no run, or ``out`` is a folder.
        RunFailed: the files can't be written.
    """
    out = Path(out)
    if out.is_dir():
        raise InputRefused(f"{out}: is a folder; name the HTML file to write")
    runs = read_runs([Path(folder) for folder in run_dirs])
    page = _Page(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _replace(out, page.html().encode("utf-8", "backslashreplace"))
        if pngs:
            folder = out.with_name(f"{out.stem}-plots")
            folder.mkdir(exist_ok=True)
            for chart in page.charts():
                _replace(folder / f"{chart.name}.png", png(chart))
    except OSError as error:
        raise RunFailed(f"the report can't be written to {out}: {error.strerror or error}") from error
    return out


def _replace(target: Path, content: bytes) -> None:
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Figure:
    """A chart in the page."""

    title: str
    unit: str
    legend: list[tuple[str, Markup]]
    """Label, and a drawing of its line."""
    drawing: Markup


def _figure(chart: Chart) -> _Figure:
    # A single curve needs no legend, unless it is one run's among several.
    told = legend(chart) if len(chart.labels) > 1 else []
    wide = isinstance(chart, WinRateChart)
    keys = [(label, Markup(_key(colour, dash, 8.0 if wide else 2.2))) for label, colour, dash in told]
    return _Figure(visible(chart.title), chart.unit, keys, Markup(svg(chart)))  # its text is escaped by `svg`


def _key(colour: str, dash: Sequence[float], width: float) -> str:
    pattern = f";stroke-dasharray:{' '.join(map(str, dash))}" if dash else ""
    line = f'<line x1="0" y1="5" x2="22" y2="5" style="stroke:var(--{colour});stroke-width:{width}{pattern}"/>'
    return f'<svg class="key" viewBox="0 0 22 10" aria-hidden="true">{line}</svg>'


class _Page:
    """What the template shows."""

    def __init__(self, runs: Sequence[RunFolder]):
        self.runs = runs
        self.curves = report_charts.curves(runs)
        self.further = report_charts.further_curves(runs)
        self.stages = [(run.name, chart) for run in runs if (chart := report_charts.stage_times(run)) is not None]
        self.distributions = report_charts.distributions(runs)
        self.distributions += [chart for run in runs for chart in score_charts(run, len(runs) > 1)]
        self.win_rates = report_charts.win_rate_chart(runs)

    def charts(self) -> Iterable[Chart]:
        """All of them, each under a name of its own."""
        yield from self.curves
        yield from self.further
        yield from self.distributions
        yield from (self.stages[0][1],) if len(self.stages) == 1 else ()
        if self.win_rates is not None:
            yield self.win_rates

    def html(self) -> str:
        runs = self.runs
        environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["visible"] = visible
        environment.filters["short"] = lambda value: fixed(value, 3)
        several = len(runs) > 1
        return environment.get_template("report.html").render(
            style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
            title=", ".join(run.name for run in runs),
            several=several,
            runs=[(run, facts(run) if run.compared is None else comparison_facts(run)) for run in runs],
            compared=[(run.name, models) for run in runs if (models := model_table(run)) is not None],
            headlines=[] if several else headlines(runs[0]),
            comparison=comparison_table(runs) if several else None,
            outcomes=[(run.name, table) for run in runs if (table := outcome_table(run)) is not None],
            curves=[_figure(chart) for chart in self.curves],
            stages=[(name, _figure(chart)) for name, chart in self.stages],
            further=[_figure(chart) for chart in self.further],
            distributions=[_figure(chart) for chart in self.distributions],
            win_rates=None if self.win_rates is None else _figure(self.win_rates),
            unjudged=_unjudged(runs),
            samples=samples_side_by_side(runs) + response_samples(runs),
            training_samples=[(run.name, run.samples[-_TRAINING_SAMPLES:][::-1]) for run in runs if run.samples],
            health=[(run.name, _latest_warnings(run)) for run in runs if run.health],
            gates=[(run.name, run.gates, _rows(run.gates, "gates")) for run in runs if run.gates is not None],
            hacking=[(run.name, run.hacking) for run in runs if run.hacking is not None],
            data=[(run.name, _rows(run.data_check, "findings")) for run in runs if run.data_check is not None],
            logs=[(run.name, run.log) for run in runs if run.log],
            unread=[f"{run.name}: {line}" if several else line for run in runs for line in run.unread],
            differences=_differences(runs),
        )


def _differences(runs: Sequence[RunFolder]) -> Columns | None:
    return config_differences(runs) if len(runs) > 1 else None


def _rows(value: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    rows = (value or {}).get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _latest_warnings(run: RunFolder) -> list[dict[str, Any]]:
    """Each trouble once (a rule and the step since which it lasts), as it was last seen; the most severe first."""
    latest = {(str(row.get("rule")), str(row.get("since"))): row for row in run.health}
    order = {"critical": 0, "warning": 1}
    return sorted(latest.values(), key=lambda row: (order.get(str(row.get("severity")), 2), row["step"]))


def _unjudged(runs: Sequence[RunFolder]) -> list[str]:
    """Comparisons in which prompts went without a verdict."""
    rows = {(str(row.get("a")), str(row.get("b")), str(row.get("judge"))): row for run in runs for row in run.win_rates}
    return [
        f"{a} against {b}, judged by {judge}: {row['unjudged']} prompts have no verdict and count nowhere"
        for (a, b, judge), row in rows.items()
        if row.get("unjudged")
    ]
