"""The live display: a function of the run's state, drawn anew at each refresh to the terminal's size of that moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rayrlhf.monitoring.state import STEPS_KEPT, TREND_METRICS, RunState
from rayrlhf.monitoring.text import can_draw, duration, finite, fixed, number_or_none, printable, sparkline

__all__ = ["render", "shown_metrics", "step_line"]


class Column(NamedTuple):
    metric: str
    heading: str
    """Two lines at most."""
    short: str
    """Name in a line of text."""
    decimals: int
    priority: int
    """Where the width isn't enough, the highest number goes first."""
    percent: bool = False


COLUMNS = (
    Column("score/mean", "score\nmean", "score", 3, 0),
    Column("kl", "\nkl", "kl", 3, 1),
    Column("kl_coef", "kl\ncoef", "kl_coef", 4, 7),
    Column("policy_loss", "policy\nloss", "policy_loss", 4, 4),
    Column("value_loss", "value\nloss", "value_loss", 4, 5),
    Column("clipfrac", "clip\nfrac", "clipfrac", 3, 8),
    Column("explained_variance", "expl.\nvar.", "explained_variance", 2, 6),
    Column("entropy", "\nentropy", "entropy", 3, 9),
    Column("loss", "\nloss", "loss", 4, 0),
    Column("accuracy", "accu-\nracy", "accuracy", 3, 1),
    Column("margin", "\nmargin", "margin", 3, 3),
    Column("rewards/margins", "reward\nmargin", "margin", 4, 1),
    Column("rewards/accuracies", "accu-\nracy", "accuracy", 3, 3),
    Column("rewards/chosen", "reward\nchosen", "chosen", 3, 5),
    Column("rewards/rejected", "reward\nrejected", "rejected", 3, 6),
    Column("logps/chosen", "log p\nchosen", "logp_chosen", 1, 7),
    Column("logps/rejected", "log p\nrejected", "logp_rejected", 1, 8),
    Column("beta", "\nbeta", "beta", 3, 9),
    Column("epoch", "\nepoch", "epoch", 2, 4),
    Column("response_length/mean", "resp.\ntokens", "response_tokens", 1, 3),
    Column("truncated_fraction", "trun-\ncated", "truncated", 1, 10, percent=True),
    Column("timing/total_s", "step\nseconds", "step_s", 1, 2),
)
_TREND_STYLES = {"score/mean": "green", "kl": "magenta", "loss": "cyan", "rewards/margins": "green"}
_SMALL = 0.02
_PARTS = ("cyan", "green", "magenta", "yellow", "blue", "red", "bright_black", "bright_cyan", "bright_green")


def _cell(column: Column, metrics: Mapping[str, Any]) -> str:
    value = number_or_none(metrics.get(column.metric))
    if value is None:
        return "-"
    if column.percent:
        return fixed(100 * value, column.decimals) + "%"
    return fixed(value, column.decimals)


def step_line(state: RunState) -> str:
    """The last step in one line; metrics that it doesn't have are left out."""
    step, metrics = state.rows[-1]
    parts = [f"step {step}/{state.total_steps}"]
    parts += [f"{column.short} {_cell(column, metrics)}" for column in COLUMNS if column.metric in metrics]
    left = state.seconds_left()
    if left is not None:
        parts.append(f"left {duration(left)}")
    return "  ".join(parts)


def shown_metrics(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Those metrics that the display draws, as numbers."""
    names = {*(column.metric for column in COLUMNS), *TREND_METRICS}
    return {k: number_or_none(v) for k, v in metrics.items() if k in names or k.startswith("timing/")}


def render(state: RunState, console: Console) -> RenderableType:
    """Header, phase, last steps, trends, timing and notes, as much of it as the console's height takes."""
    width = console.width
    above = [_header(state, console, width)]
    below = [part for part in (_trends(state, console, width), _timing(state, console, width)) if part is not None]
    below += _notes(state, console)
    if state.rows:
        # + 4: the table's two lines of headings, its rule and its caption
        used = len(console.render_lines(Group(*above, *below), pad=False)) + 4
        above.append(_steps(state, width, max(3, min(STEPS_KEPT, console.height - used - 1))))
    return Group(*above, *below)


def _header(state: RunState, console: Console, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    cells: list[RenderableType] = [Text(f"step {state.done} of {state.total_steps}", style="bold", no_wrap=True)]
    if width >= 70:
        cells.append(ProgressBar(total=max(1, state.total_steps), completed=state.done, width=min(60, width - 60)))
    cells.append(Text(f"elapsed {duration(state.elapsed())}", no_wrap=True))
    left = state.seconds_left() if state.outcome is None else None
    if left is not None:
        cells.append(Text(f"about {duration(left)} left", no_wrap=True))
    line.add_row(*cells)
    return Panel(
        Group(line, _phase(state)),
        title=Text("rayrlhf " + (printable(state.run_dir, console) if state.run_dir else "")),
        title_align="left",
        box=box.ROUNDED,
        border_style={"failed": "red", "interrupted": "yellow", "done": "green"}.get(state.outcome or "", "blue"),
    )


def _phase(state: RunState) -> Text:
    if state.outcome is not None:
        where = f" in {state.phase}" if state.phase and state.outcome != "done" else ""
        return Text(state.outcome + where, style="bold")
    if state.phase is None:
        return Text("between two steps" if state.rows else "starting", style="dim")
    text = Text.assemble((state.phase, "bold cyan"), f" for {_since(state.phase_seconds())}")
    before = finite(state.rows[-1][1].get(f"timing/{state.phase}_s")) if state.rows else None
    if before is not None:
        text.append(f"  (last step: {before:.1f} s)", style="dim")
    return text


def _since(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)


def _steps(state: RunState, width: int, count: int) -> RenderableType:
    rows = list(state.rows)[-count:]
    present = [column for column in COLUMNS if any(column.metric in metrics for _, metrics in rows)]
    cells = {column: [_cell(column, metrics) for _, metrics in rows] for column in present}

    def needed(column: Column) -> int:
        return max(*(len(part) for part in column.heading.split("\n")), *(len(cell) for cell in cells[column])) + 2

    shown = list(present)
    step_width = max(4, *(len(str(step)) for step, _ in rows)) + 2
    while shown and step_width + sum(map(needed, shown)) > width:
        shown.remove(max(shown, key=lambda column: column.priority))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
    table.add_column("\nstep", justify="right", no_wrap=True, style="bold")
    for column in shown:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for index, (step, _) in enumerate(rows):
        table.add_row(str(step), *(_coloured(cells[column][index]) for column in shown))
    hidden = [column.short for column in present if column not in shown]
    if hidden:
        names = ", ".join(hidden)
        table.caption = Text(f"in a wider terminal also: {names}", style="dim", overflow="ellipsis", no_wrap=True)
        table.caption_justify = "left"
    return table


def _coloured(cell: str) -> Text:
    return Text(cell, style="bold red" if cell.startswith(("nan", "inf", "-inf")) else "dim" if cell == "-" else "")


def _trends(state: RunState, console: Console, width: int) -> RenderableType | None:
    grid = Table.grid(padding=(0, 1))
    for name in TREND_METRICS:
        known = [value for value in state.trends[name] if value is not None]
        if not known:
            continue
        drawn = sparkline(state.trends[name], max(10, min(80, width - 46)), ascii_only=not can_draw(console))
        first, last, low, high = (fixed(x, 3) for x in (known[0], known[-1], min(known), max(known)))
        figures = Text(f"{first} -> {last}  (range {low} to {high})", style="dim", no_wrap=True)
        grid.add_row(Text(" " + name.removesuffix("/mean")), Text(drawn, style=_TREND_STYLES[name]), figures)
    return grid if grid.row_count else None


def _timing(state: RunState, console: Console, width: int) -> RenderableType | None:
    """One bar of the last step's time, longest phase first, and what each colour is; phases may overlap."""
    if not state.rows:
        return None
    metrics = state.rows[-1][1]
    names = [name for name in metrics if name.startswith("timing/") and name.endswith("_s")]
    times = {name.removeprefix("timing/").removesuffix("_s"): finite(metrics[name]) for name in names}
    total = times.pop("total", None)
    if not times or not total or total <= 0:
        return None
    # Short phases, and what no phase accounts for, go together.
    known = {name: seconds for name, seconds in times.items() if seconds is not None and seconds >= _SMALL * total}
    other = total - sum(known.values())
    if other >= _SMALL * total:
        known["other"] = other
    length, scale = max(10, min(120, width) - 14), max(total, sum(known.values()))
    bar = Text(" step time  ")
    lines, indent = [Text(" " * 12)], 12
    block, so_far = "█" if can_draw(console) else "#", 0.0
    for index, (name, seconds) in enumerate(sorted(known.items(), key=lambda item: -item[1])):
        style = _PARTS[index % len(_PARTS)]
        edge = round(length * (so_far + seconds) / scale)
        bar.append(block * (edge - len(bar) + indent), style=style)
        so_far += seconds
        item = f"{name} {fixed(seconds, 1 if seconds >= 1 else 2)} s {100 * seconds / total:.0f}%  "
        if len(lines[-1]) > indent and len(lines[-1]) + len(item.rstrip()) > width:
            lines.append(Text(" " * indent))
        lines[-1].append(item, style=style)
    for line in lines:
        line.rstrip()
    return Group(bar, *lines)


def _notes(state: RunState, console: Console) -> list[RenderableType]:
    return [
        Text.assemble(
            (f" {duration(note.at)} ", "dim"),
            (printable(note.message, console).replace("\n", " "), "yellow" if note.warning else ""),
            no_wrap=True,
            overflow="ellipsis",
        )
        for note in state.notes
    ]
