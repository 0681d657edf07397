"""From timed steps on examples to the figures: paired ratios by kind of step, memory, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from report import seconds, spread
from rich.console import Console
from rich.table import Table

GOALS = {"dpo": 1.7, "reward_model": 1.3, "sft": 1.25}
"""How many times faster than TRL in float32, all of full length."""
RAGGED = 1.5
"""The same where lengths differ, for each job."""


class Ratios:
    """The figures of one job. Each ratio is formed within a round, so that both of its sides had the same machine."""

    def __init__(self, job: str, steps: dict[str, dict[str, list[dict[str, Any]]]], memory: dict[str, Any]):
        self.job, self.steps, self.memory = job, steps, memory
        self.rows: list[dict[str, Any]] = []

    def all(self, dtypes: Sequence[str]) -> None:
        """Every figure of the job."""
        labels = [name.removeprefix("rayrlhf ") for name in self.memory if name.startswith("rayrlhf ")]
        for label in labels:
            for kind in self.steps:
                goal = None
                if label.endswith("float32"):
                    goal = GOALS[self.job] if kind == "equal" else RAGGED
                self._speed(kind, label, goal)
        for label in labels:
            own, other = (self.memory[f"{side} {label}"]["peak_sum_mib"] for side in ("rayrlhf", "trl"))
            judged = label.endswith("float32")
            self._add(f"memory, {label}: peak of ours / TRL's", [own / other], "<= 1" if judged else "", own <= other)
        for dtype in dtypes:
            label = f"cached {dtype}" if self.job == "dpo" else dtype
            for kind, done in self.steps.items():
                work = seconds(done, f"model work {dtype}")
                for side in ("rayrlhf", "trl"):
                    ratios = [a / b for a, b in zip(seconds(done, f"{side} {label}"), work, strict=True)]
                    self._add(f"{kind}, {label}: {side} / model work", ratios, "", True)

    def _speed(self, kind: str, label: str, goal: float | None) -> None:
        theirs, ours = (self.steps[kind][f"{side} {label}"] for side in ("trl", "rayrlhf"))
        told = f">= {goal:g}" if goal else ""
        for what, key in (("TRL / ours", "seconds"), ("TRL / ours, CPU time", "cpu_seconds")):
            ratios = [a[key] / max(b[key], 1e-3) for a, b in zip(theirs, ours, strict=True)]
            judged = goal is not None and key == "seconds"
            met = not judged or median(ratios) >= (goal or 0.0)
            self._add(f"{kind}, {label}: {what}", ratios, told if judged else "", met)

    def _add(self, what: str, ratios: list[float], goal: str, met: bool) -> None:
        self.rows.append({"what": what, **spread(ratios), "goal": goal, "met": met if goal else None})


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result, as `run_examples.py` makes it."""
    facts, work = result["machine"], result["workload"]
    console.print(
        f"{facts['processor']}, {facts['cores']} cores ({', '.join(facts['instruction_sets'])}), "
        f"{facts['memory_gib']} GiB, {facts['system']}; {work['threads']} threads, seed {work['seed']}, "
        f"{result['parameters']:,} parameters, steps of {work['batch']} examples of {work['prompt_tokens']}+"
        f"{work['response_tokens']} tokens (ragged: {work['shortest']} to that)"
    )
    table = Table(title="Seconds a step")
    left = ("job", "contender")
    for column in (*left, "equal", "min - max", "ragged", "min - max", "CPU s", "others' share", "peak MiB"):
        table.add_column(column, justify="left" if column in left else "right")
    busiest = 0.0
    for job, found in result["jobs"].items():
        for name, memory in found["memory"].items():
            done = {kind: steps[name] for kind, steps in found["steps"].items()}
            cells = []
            for steps in done.values():
                extent = spread([step["seconds"] for step in steps])
                cells += [f"{extent['median']:.3f}", f"{extent['min']:.3f} - {extent['max']:.3f}"]
            others = max(step["others"] for steps in done.values() for step in steps)
            busiest = max(busiest, others)
            cpu = ", ".join(f"{median(step['cpu_seconds'] for step in steps):.2f}" for steps in done.values())
            table.add_row(job, name, *cells, cpu, f"{100 * others:.0f} %", f"{memory['peak_sum_mib']:,}")
    console.print(table)
    ratios = Table(title="Paired ratios, median over the rounds")
    for column in ("job", "what", "median", "min - max", "goal", ""):
        ratios.add_column(column, justify="left" if column in ("job", "what") else "right")
    for job, found in result["jobs"].items():
        for row in found["figures"]:
            judged = None if result["smoke"] else row["met"]
            verdict = {True: "[green]met", False: "[red]missed", None: ""}[judged]
            extent = f"{row['min']:.3f} - {row['max']:.3f}"
            ratios.add_row(job, row["what"], f"{row['median']:.3f}", extent, row["goal"], verdict)
    console.print(ratios)
    for job, found in result["jobs"].items():
        console.print(f"{job}: ours and TRL's metrics differ by at most {found['difference']:.1e} in float32")
    if busiest > 0.05:
        share = f"{100 * busiest:.0f} %"
        console.print(f"[yellow]Other processes took up to {share} of the cores: repeat this on an idle machine.")
