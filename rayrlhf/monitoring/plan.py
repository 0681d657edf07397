"""The plan of a run as tables, shown before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrlhf.monitoring.text import printable
from rayrlhf.planning.document import resources_of
from rayrlhf.planning.memory import PARTS
from rayrlhf.planning.plan import Plan
from rayrlhf.planning.transfer import Crossing
from rayrlhf.planning.usage import GpuUsage

__all__ = ["render_full_plan", "render_notes", "render_plan"]

GIB = 2**30


def render_plan(rows: Sequence[tuple[str, str, object, str]], console: Console) -> None:
    """Prints rows of (section, name, value, how the value comes about), with a line between sections."""
    cells: list[list[str]] = []
    for section, name, value, how in rows:
        cells.append([printable(text, console) for text in (section, name, _shown(value), how)])
    widths = _widths(cells, console)
    table = Table(title=Text("Plan", style="bold"), title_justify="left", box=box.ROUNDED, show_header=False)
    table.add_column(style="bold cyan", no_wrap=True, width=widths[0])
    table.add_column(overflow="fold", width=widths[1])
    table.add_column(justify="right", overflow="fold", width=widths[2])
    table.add_column(style="dim", overflow="fold", width=widths[3])
    previous = None
    for section, *rest in cells:
        if previous not in (None, section):
            table.add_section()
        table.add_row(*(Text(text) for text in (section if section != previous else "", *rest)))
        previous = section
    console.print(table)


def _widths(rows: Sequence[Sequence[str]], console: Console) -> list[int] | list[None]:
    """Widths of a table's columns with which no word is broken: keys and paths can be copied. What is left goes to the columns
    that need least of it. Where the terminal is too narrow, None for each: words are broken then."""
    columns = list(zip(*rows, strict=True))
    if not columns:
        return [None] * 4
    least = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    whole = [max(cell_len(line) for cell in column for line in [*cell.splitlines(), ""]) for column in columns]
    left = console.width - sum(least) - 3 * len(columns) - 1
    if left < 0:
        return [None] * len(columns)
    widths = list(least)
    for k in sorted(range(len(columns)), key=lambda k: whole[k] - least[k]):
        more = min(max(0, whole[k] - least[k]), left)
        widths[k], left = widths[k] + more, left - more
    return widths


def _shown(value: object) -> str:
    """Numbers with separators between thousands; yes and no; "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return str(value)


# -- everything about a run ---------------------------------------------------------------------------------------------


def render_full_plan(plan: Plan, console: Console) -> None:
    """Prints batch arithmetic, the map of GPUs, memory by phase and part, transfers, resources, and all that can't work."""
    render_plan(plan.rows, console)
    _models(plan, console)
    if plan.placement is not None and plan.placement.seats:
        _map(plan, console)
    if plan.usage is not None:
        _gpus(plan, console)
        _hosts(plan, console)
    if plan.transfer is not None:
        _transfer(plan, console)
    render_notes(plan.notes, console)
    render_notes(
        [str(model) for model in plan.known.unseen],
        console,
        title="Models that couldn't be looked at, so that nothing here says whether they work",
    )
    render_notes(plan.problems, console, title="What can't work", style="red")


def render_notes(notes: Sequence[str], console: Console, *, title: str = "Notes", style: str = "yellow") -> None:
    """Prints notes as a list under a title; nothing where there are none."""
    if notes:
        console.print(Text(title, style=f"bold {style}"))
    for note in notes:
        console.print(Text(f"  - {printable(note, console)}"))


def _table(title: str, *columns: str, right: int = 0) -> Table:
    """A table whose last ``right`` columns hold numbers."""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.ROUNDED)
    for k, name in enumerate(columns):
        table.add_column(name, justify="right" if k >= len(columns) - right else "left", overflow="fold")
    return table


def _gib(count: int | None) -> str:
    if count is None:
        return "?"
    return "-" if count == 0 else f"{count / GIB:.1f}" if count >= GIB / 10 else f"{count / GIB:.3f}"


def _models(plan: Plan, console: Console) -> None:
    if not plan.known.models:
        return
    table = _table("Models", "role", "model", "parameters", right=1)
    rows = []
    for role, models in plan.known.models.items():
        for model in models:
            count = model.shape.parameters(head=model.head, layers=model.layers)
            rows.append(
                [printable(text, console) for text in (role, f"{model.path}\n  {model.shape.source}", f"{count:,}")]
            )
    for column, width in zip(table.columns, _widths(rows, console), strict=True):
        column.width = width if width is None else max(width, cell_len(str(column.header)))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _spans(numbers: Sequence[int]) -> str:
    """``0-3, 6`` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _map(plan: Plan, console: Console) -> None:
    """Which ranks of which role sit on which GPUs; machines on which the same sits share their rows."""
    placement = plan.placement
    assert placement is not None
    roles = list(dict.fromkeys(seat.role for seat in placement.seats))
    alike: dict[Any, list[int]] = {}
    for m in range(len(placement.machines)):
        on = tuple((role, tuple(s.gpus for s in placement.of(role) if s.machine == m)) for role in roles)
        if any(gpus for _, gpus in on):
            alike.setdefault(on, []).append(m)
    table = _table("GPUs", "machine", "role", "GPUs of each", "ranks", "")
    for on, machines in alike.items():
        names = [placement.machines[m].name for m in machines]
        shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
        if len(names) > 1 and machines != list(range(machines[0], machines[-1] + 1)):
            shown = ", ".join(names)
        for role, gpus in ((role, gpus) for role, gpus in on if gpus):
            noun = "engine" if role == "rollout" else "rank"
            how = f"{len(gpus)} {noun}{'s' if len(gpus) > 1 else ''}{' each' if len(names) > 1 else ''}"
            how += f", of {len(gpus[0])} GPUs" if len(gpus[0]) > 1 else ""
            ranks = _spans([seat.rank for seat in placement.of(role) if seat.machine in machines])
            table.add_row(shown, role, _spans([gpu for process in gpus for gpu in process]), ranks, how)
            shown = ""
        table.add_section()
    console.print(table)
    resources = resources_of(plan)
    assert resources is not None
    counts, nodes = list(resources["gpus_by_node"].values()), resources["nodes"]
    each = f"{counts[0]} each" if len(set(counts)) == 1 else ", ".join(map(str, counts))
    where = f"on {nodes} nodes ({each})" if nodes > 1 else "on one node"
    console.print(Text(f"Ask Ray for: GPU: {resources['GPU']} {where}; CPU: 0, processes ask for none of their own"))


def _gpus(plan: Plan, console: Console) -> None:
    """The bytes by part and phase, a table for each kind of GPU."""
    assert plan.usage is not None and plan.placement is not None
    kinds: dict[Any, list[GpuUsage]] = {}
    for gpu in plan.usage.gpus:
        key = tuple((phase, tuple(sorted(parts.items()))) for phase, parts in gpu.phases.items())
        kinds.setdefault((gpu.roles, gpu.limit, key), []).append(gpu)
    for gpus in kinds.values():
        first = gpus[0]
        shown = [part for part in PARTS if any(parts.get(part) for parts in first.phases.values())]
        on: dict[int, list[int]] = {}
        for gpu in gpus:
            on.setdefault(gpu.machine, []).append(gpu.gpu)
        spots = {name: [m for m, g in on.items() if _spans(g) == name] for name in map(_spans, on.values())}
        names = "; ".join(
            f"{plan.placement.machines[ms[0]].name}{f' and {len(ms) - 1} more' if len(ms) > 1 else ''}: GPU {name}"
            for name, ms in spots.items()
        )
        title = f"GiB on each of {len(gpus)} GPU{'s' if len(gpus) > 1 else ''} with {', '.join(first.roles)} ({names})"
        # Phases are few: as columns they fit into any terminal, with all names whole.
        table = _table(title, "", *first.phases, right=len(first.phases))
        peak_phase, peak = first.peak
        bold = {phase: "bold" if phase == peak_phase else "" for phase in first.phases}
        for part in shown:
            row = (Text(_gib(parts.get(part, 0)), style=bold[phase]) for phase, parts in first.phases.items())
            table.add_row({"kv_cache": "KV cache"}.get(part, part), *row)
        table.add_section()
        totals = (Text(_gib(sum(parts.values())), style=bold[phase]) for phase, parts in first.phases.items())
        table.add_row("total", *totals)
        console.print(table)
        over = first.limit is not None and peak > first.limit
        limit = "of a GPU whose memory isn't known" if first.limit is None else f"of {_gib(first.limit)}"
        console.print(Text(f"Peak: {_gib(peak)} GiB {limit}, in {peak_phase}", style="red" if over else "green"))


def _hosts(plan: Plan, console: Console) -> None:
    assert plan.usage is not None and plan.placement is not None
    kinds: dict[Any, list[int]] = {}
    for host in plan.usage.hosts:
        kinds.setdefault((host.limit, tuple(sorted(host.parts.items()))), []).append(host.machine)
    by_machine = {host.machine: host for host in plan.usage.hosts}
    shown = sorted({part for host in plan.usage.hosts for part, count in host.parts.items() if count})
    table = _table("GiB of host memory", "machine", *shown, "at most", "there are", right=len(shown) + 2)
    for machines in kinds.values():
        host = by_machine[machines[0]]
        name = plan.placement.machines[machines[0]].name
        more = f" and {len(machines) - 1} more" if len(machines) > 1 else ""
        cells = [_gib(host.parts.get(part, 0)) for part in shown]
        table.add_row(f"{name}{more}", *cells, _gib(host.total), _gib(host.limit))
    console.print(table)


def _transfer(plan: Plan, console: Console) -> None:
    transfer = plan.transfer
    assert transfer is not None
    table = _table("Weights, one transfer", "", "over", "GB", "GB/s", "s", right=3)
    for one, when in ((transfer, ""), (transfer.base, ", once before the first")):
        if one is None:
            continue
        parts: list[tuple[str, Crossing | None]] = [
            (f"{one.what}, {one.transport}{when}", one.send),
            ("gathered from all ranks", one.gather),
        ]
        for name, crossing in parts:
            if crossing is not None:
                speed = "?" if crossing.bytes_per_s is None else f"{crossing.bytes_per_s / 1e9:,.0f}"
                seconds = "?" if crossing.seconds is None else f"{crossing.seconds:,.2f}"
                table.add_row(name, crossing.wire, f"{crossing.nbytes / 1e9:,.2f}", speed, seconds)
        whole = "?" if one.seconds is None else f"{one.seconds:,.2f}"
        table.add_row("together", f"buckets of {one.bucket_bytes / 2**20:,.0f} MiB", "", "", whole, style="bold")
        table.add_section()
    console.print(table)
