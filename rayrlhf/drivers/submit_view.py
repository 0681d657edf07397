"""What is seen here of a job over there: its lines, its live table, and what Ctrl-C does."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from rayrlhf.monitoring import Progress
from rayrlhf.monitoring.relay import JobClock, event_of

__all__ = ["Choice", "Interrupts", "JobView", "ask"]

Choice = Literal["leave", "stop", "watch"]

_RAYS_OWN = ("Running entrypoint for job ", "Tailing logs until the job exits")
"""Beginnings of lines that Ray puts into a job's log."""


class JobView:
    """The job's log as it comes, in pieces of any length.

    Lines of progress are drawn as a table of our own (`rayrlhf.monitoring.relay`), as wide as our terminal; without a
    terminal they are lines, as in the job. All others are shown as they are.
    """

    def __init__(self, console: Console):
        self._console = console
        self._rest = ""
        self._clock = JobClock()
        self._progress: Progress | None = None
        self._named = False

    def feed(self, text: str) -> None:
        """The next piece."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line.removesuffix("\r"))

    def end(self) -> None:
        """The log has ended: a run that hasn't said how it ended has failed."""
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        self._close("failed")

    def leave(self) -> None:
        """No more is read, of a log that may go on: how the run ends isn't known here, and not said."""
        self._rest = ""
        if self._progress is not None:
            self._progress.leave()
            self._progress = None

    def paused(self) -> Any:
        """A context without the table, for a question."""
        return nullcontext() if self._progress is None else self._progress.paused()

    def _line(self, line: str) -> None:
        event = event_of(line)
        if event is not None:
            self._clock.set(float(event["at"]))
            self._event(event)
        elif not line.startswith(_RAYS_OWN) and " job_manager.py:" not in line:
            self._console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)

    def _event(self, event: dict[str, Any]) -> None:
        if "open" in event:
            self._close("failed")
            self._open(event["open"])
        elif self._progress is None:
            return
        elif "phase" in event:
            self._progress.phase(event["phase"])
        elif "step" in event:
            self._progress.step(event["step"], _numbers(event["metrics"]))
        elif "note" in event:
            self._progress.note(event["note"], warning=event["warning"])
        elif "close" in event:
            self._close(event["close"])

    def _open(self, opening: dict[str, Any]) -> None:
        history = [_numbers(row) for row in opening["history"]]
        self._progress = Progress(
            opening["mode"],
            opening["total_steps"],
            run_dir=opening["run_dir"],
            console=self._console,
            history=history,
            clock=self._clock,
        )
        self._progress.__enter__()

    def _close(self, outcome: str) -> None:
        if self._progress is None:
            return
        kind = {"done": None, "interrupted": KeyboardInterrupt}.get(outcome, RuntimeError)
        self._progress.__exit__(kind, None, None)
        self._progress = None


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """With the numbers that JSON has no words for: they come as texts."""
    return {name: float(value) if isinstance(value, str) else value for name, value in metrics.items()}


class Interrupts:
    """Counts Ctrl-C while it is open, instead of raising in the middle of something."""

    def __init__(self) -> None:
        self.count = 0

    def take(self) -> bool:
        """Whether there was one since the last time."""
        was, self.count = self.count > 0, 0
        return was

    @contextmanager
    def counted(self) -> Iterator[Interrupts]:
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Ctrl-C as KeyboardInterrupt for a while: a question can be broken off."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def ask(console: Console) -> Choice:
    """What is to become of the job. Another Ctrl-C, or the end of the input, leaves it running."""
    words: dict[str, Choice] = {"l": "leave", "s": "stop", "w": "watch"}
    while True:
        try:
            answer = console.input(
                "\nThe job runs on the cluster: [b]l[/b]eave it running, [b]s[/b]top it, [b]w[/b]atch on? "
            )
        except (KeyboardInterrupt, EOFError):
            console.print()
            return "leave"
        if answer.strip()[:1].lower() in words:
            return words[answer.strip()[:1].lower()]


def has_terminal() -> bool:
    """Whether a question can be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()
