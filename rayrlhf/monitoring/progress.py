"""What a person sees while a run is under way: a live table on a terminal, one line a step elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rayrlhf.monitoring.display import render, shown_metrics, step_line
from rayrlhf.monitoring.relay import event_text, is_relayed
from rayrlhf.monitoring.state import STEPS_KEPT, Note, RunState
from rayrlhf.monitoring.text import duration, printable

__all__ = ["Progress"]

Mode = Literal["auto", "table", "lines", "none"]
logger = logging.getLogger(__name__)

# Enough for a running clock. Nothing else draws: a step with eight phases would draw itself ten times, 10-20 ms each.
_REFRESHES_PER_SECOND = 1


class Progress:
    """Context manager around a run. Steps count from 1: ``step(k, ...)`` says that k of ``total_steps`` are done.

    Modes: ``table`` (live), ``lines`` (one a step; a phase where it comes up for the first time; notes), ``none``;
    ``auto`` is the table on a terminal, else lines. Where a breakpoint may stop the driver's process (``debugging``, or
    a debugger at work), ``auto`` takes lines too: a live display and a prompt can't share a terminal. In every mode
    steps and notes go to the ``rayrlhf`` logger as well. Metrics that are missing, None or NaN are shown as such, and
    never raise.

    In a job that somebody watches from afar (`rayrlhf.monitoring.relay`) the lines carry what the table over there needs.
    """

    def __init__(
        self,
        mode: Mode,
        total_steps: int,
        *,
        run_dir: Path | str | None = None,
        console: Console | None = None,
        history: Iterable[Mapping[str, Any]] = (),
        debugging: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``history``: rows of metrics.jsonl (with ``step``) from before a resume; they fill table and trends."""
        self.console = console if console is not None else Console()
        self._relayed = is_relayed() and mode != "none"
        self.mode = "lines" if self._relayed else _choose(mode, self.console, debugging)
        self._opening = {"mode": mode, "total_steps": total_steps, "run_dir": None if run_dir is None else str(run_dir)}
        self._state = RunState(run_dir=None if run_dir is None else str(run_dir), total_steps=total_steps, clock=clock)
        self._past = [(row["step"], row) for row in history]
        for step, row in self._past:
            self._state.add(step, row, timed=False)
        self._phases_seen: set[str] = set()
        self._lock = threading.Lock()  # the display is drawn by a thread of its own
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._state.start()
        if self._relayed:
            kept = self._past[-STEPS_KEPT:]
            history = [{"step": step, **shown_metrics(row)} for step, row in kept]
            self._line("starting", event={"open": {**self._opening, "history": history}})
        self._show_table()
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._state.finish(exception_type)
        self._hide_table()
        self._line(self._state.summary(), event={"close": self._state.outcome})

    def leave(self) -> None:
        """End the display of a run that goes on elsewhere: the table stays as it is, and no outcome is said."""
        self._hide_table()

    def phase(self, name: str) -> None:
        """From now on the run is in this phase: ``rollout``, ``update``, ...; ``timing/NAME_s`` is its usual time."""
        with self._lock:
            self._state.begin_phase(name)
        if self._relayed or name not in self._phases_seen:
            self._phases_seen.add(name)
            self._line(f"phase: {name}", event={"phase": name})

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Step number ``step``, counted from 1, is done."""
        with self._lock:
            self._state.add(step, metrics, timed=True)
            line = step_line(self._state)
        logger.info("%s", line)
        self._line(line, event={"step": step, "metrics": shown_metrics(metrics)})

    def note(self, message: str, *, warning: bool = False) -> None:
        """Something worth knowing: a checkpoint, an evaluation, a health warning."""
        with self._lock:
            self._state.notes.append(Note(self._state.elapsed(), message, warning))
        logger.log(logging.WARNING if warning else logging.INFO, "%s", message)
        line = ("warning: " if warning else "note: ") + message
        event = {"note": message, "warning": warning}
        self._line(line, style="yellow" if warning else "", above_table=warning, event=event)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without the table for a while: for a question on the same terminal."""
        self._hide_table()
        try:
            yield
        finally:
            if self._state.outcome is None:
                self._show_table()

    def _show_table(self) -> None:
        if self.mode == "table":
            self._live = Live(
                get_renderable=self._draw,
                console=self.console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                vertical_overflow="crop",
            )
            self._live.start(refresh=True)

    def _hide_table(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> Any:
        with self._lock:
            return render(self._state, self.console)

    def _line(
        self,
        message: str,
        *,
        style: str = "",
        above_table: bool = False,
        event: Mapping[str, Any] | None = None,
    ) -> None:
        # The table shows the last few notes only; a warning stays in the terminal's history as well.
        if self.mode == "none" or self.mode == "table" and not above_table:
            return
        # Never under the lock: the drawing thread holds the display's own lock while it waits for ours.
        elapsed = self._state.elapsed()
        text = Text(f"[{duration(elapsed)}] {printable(message, self.console)}", style=style)
        if self._relayed and event is not None:
            text.append(event_text(elapsed, event))
        self.console.print(text, soft_wrap=True)  # one line stays one line, however narrow a log may be


def _choose(mode: Mode, console: Console, debugging: bool) -> Literal["table", "lines", "none"]:
    if mode != "auto":
        return mode
    live = console.is_terminal and not console.is_dumb_terminal
    return "table" if live and not debugging and sys.gettrace() is None else "lines"
