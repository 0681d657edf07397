"""From timed steps to the figures: paired ratios, the split by phase, and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Steps = dict[str, list[dict[str, Any]]]
"""For each contender the answers of its timed steps, round by round."""

MODEL_PHASES = ("logprobs", "reference", "values", "score", "update", "critic_update")
ENGINE_PHASES = ("rollout",)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values), "repetitions": len(values)}


def seconds(steps: Steps, name: str) -> list[float]:
    return [step["seconds"] for step in steps[name]]


def phase(steps: Steps, name: str, phases: Sequence[str]) -> list[float]:
    """Seconds that a contender spent in some phases, for each round."""
    return [sum(step["phases"].get(key, 0.0) for key in phases) for step in steps[name]]


class Figures:
    """All ratios of a run. Each is formed within a round, so that both of its sides had the same machine."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.rows: list[dict[str, Any]] = []

    def add(
        self, what: str, over: Sequence[float], under: Sequence[float], goal: str, met: Callable[[float], bool]
    ) -> None:
        """Add the ratio ``over / under``; without a ``goal`` it is shown and not judged."""
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        figure = spread(ratios)
        self.rows.append({"what": what, **figure, "goal": goal, "met": met(figure["median"]) if goal else None})

    def of_type(self, dtype: str) -> None:
        """The ratios that concern one number type; those whose contenders didn't run are left out."""
        steps = self.steps
        inline, spread_out = f"rayrlhf inline {dtype}", f"rayrlhf ray {dtype}"
        model, raw = f"model work {dtype}", f"vllm {dtype}"
        goal = {"float32": 1.3, "bfloat16": 2.2}[dtype]
        for ours in (inline, spread_out):
            if ours not in steps:
                continue
            own = seconds(steps, ours)
            if "trl float32" in steps:
                name = f"TRL float32 / {ours}"
                self.add(name, seconds(steps, "trl float32"), own, f">= {goal}", lambda r: r >= goal)
            if dtype != "float32" and f"trl {dtype}" in steps:
                self.add(f"TRL {dtype} / {ours}", seconds(steps, f"trl {dtype}"), own, "", lambda r: True)
            if model in steps:
                work = seconds(steps, model)
                self.add(f"{ours} / model work", own, work, "<= 1.15", lambda r: r <= 1.15)
                if raw in steps:
                    both = [a + b for a, b in zip(work, seconds(steps, raw), strict=True)]
                    self.add(f"{ours} / (model work + raw vLLM)", own, both, "", lambda r: True)
            if ours == inline:
                self._inside(inline, model, raw)
            elif inline in steps:
                # With Ray the phases overlap. Its overhead is what a step takes beyond the same work in one process.
                work = phase(steps, inline, MODEL_PHASES + ENGINE_PHASES)
                rest = [1.0 - a / b for a, b in zip(work, own, strict=True)]
                self.add(f"overhead of {ours}", rest, [1.0] * len(rest), "<= 0.05", lambda r: r <= 0.05)

    def _inside(self, ours: str, model: str, raw: str) -> None:
        steps, own = self.steps, seconds(self.steps, ours)
        if raw in steps:
            rollout = phase(steps, ours, ENGINE_PHASES)
            self.add(f"raw vLLM / rollout of {ours}", seconds(steps, raw), rollout, ">= 0.9", lambda r: r >= 0.9)
        if model in steps:
            name = f"model phases of {ours} / model work"
            self.add(name, phase(steps, ours, MODEL_PHASES), seconds(steps, model), "", lambda r: True)
        known = phase(steps, ours, MODEL_PHASES + ENGINE_PHASES)
        rest = [1.0 - a / b for a, b in zip(known, own, strict=True)]
        self.add(f"overhead of {ours}", rest, [1.0] * len(rest), "<= 0.05", lambda r: r <= 0.05)


def summary(steps: Steps) -> list[dict[str, Any]]:
    """For each contender: seconds a step, its phases, and how busy others kept the cores."""
    rows = []
    for name, done in steps.items():
        phases = {key: median(step["phases"].get(key, 0.0) for step in done) for key in done[0]["phases"]}
        others = max(step["others"] for step in done)
        row = {"contender": name, **spread(seconds(steps, name)), "phases": phases, "others_at_most": others}
        rows.append(row | {"cpu_seconds": median(step["cpu_seconds"] for step in done)})
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result, as `run.py` makes it."""
    facts, work = result["machine"], result["workload"]
    console.print(
        f"{facts['processor']}, {facts['cores']} cores ({', '.join(facts['instruction_sets'])}), "
        f"{facts['memory_gib']} GiB, {facts['system']}; "
        f"{work['threads']} threads, seed {work['seed']}, {result['parameters']:,} parameters, "
        f"{work['rollouts']} rollouts of {work['prompt_tokens']}+{work['response_tokens']} tokens, "
        f"{work['epochs']} epochs of {work['minibatches']} minibatches"
    )
    table = Table(title="Seconds a step")
    left = ("contender", "phases (medians)")
    right = ("median", "min - max", "steps", "CPU s", "others' share", "memory MiB")
    for column in (left[0], *right, left[1]):
        table.add_column(column, justify="left" if column in left else "right")
    for row in result["contenders"]:
        phases = ", ".join(f"{key} {value:.2f}" for key, value in row["phases"].items())
        memory = result["memory"][row["contender"]]
        table.add_row(
            row["contender"],
            f"{row['median']:.2f}",
            f"{row['min']:.2f} - {row['max']:.2f}",
            str(row["repetitions"]),
            f"{row['cpu_seconds']:.2f}",
            f"{100 * row['others_at_most']:.0f} %",
            f"{memory['together_mib']:,} (peaks {memory['peak_sum_mib']:,})",
            phases,
        )
    console.print(table)
    ratios = Table(title="Paired ratios, median over the rounds")
    for column in ("what", "median", "min - max", "goal", ""):
        ratios.add_column(column, justify="left" if column == "what" else "right")
    for row in result["figures"]:
        judged = None if result["smoke"] else row["met"]
        verdict = {True: "[green]met", False: "[red]missed", None: ""}[judged]
        extent = f"{row['min']:.3f} - {row['max']:.3f}"
        ratios.add_row(row["what"], f"{row['median']:.3f}", extent, row["goal"], verdict)
    console.print(ratios)
    many = Table(title="Peak memory of each process (RSS, MiB)")
    many.add_column("contender")
    many.add_column("processes")
    for name, memory in result["memory"].items():
        many.add_row(name, ", ".join(f"{row['name']} {row['peak_mib']:,}" for row in memory["processes"]))
    console.print(many)
    for name, versions in result["versions"].items():
        console.print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in versions.items()))
    busiest = max(row["others_at_most"] for row in result["contenders"])
    if busiest > 0.05:
        share = f"{100 * busiest:.0f} %"
        console.print(f"[yellow]Other processes took up to {share} of the cores: repeat this on an idle machine.")
