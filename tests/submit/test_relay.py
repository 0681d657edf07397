"""A run's progress across a job's log: what is drawn here is what the run would have drawn itself."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from rayrlhf.drivers.submit_view import Interrupts, JobView
from rayrlhf.monitoring import Progress
from rayrlhf.monitoring.relay import RELAY_VARIABLE, event_of, event_text

METRICS = {
    "score/mean": 0.25,
    "kl": math.nan,
    "clipfrac": None,
    "timing/total_s": 2.0,
    "timing/rollout_s": 1.5,
    "x": 1.0,
}


def screen(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, height=40, force_terminal=terminal, color_system=None)


def written(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def run(progress: Progress) -> None:
    """What a run says."""
    with progress:
        progress.note("80 prompts")
        for step in (4, 5):
            progress.phase("rollout")
            progress.phase("update")
            progress.step(step, METRICS)
        progress.note("KL is high", warning=True)


def progress(console: Console, mode: str = "auto", **kwargs) -> Progress:
    history = [{"step": 3, "score/mean": 0.125}]
    return Progress(mode, 5, run_dir="runs/a", console=console, history=history, clock=lambda: 60.0, **kwargs)


@pytest.fixture
def log(monkeypatch) -> str:
    """A job's log."""
    monkeypatch.setenv(RELAY_VARIABLE, "1")
    console = screen()
    console.print("before the run")
    run(progress(console))
    console.print("after it")
    monkeypatch.delenv(RELAY_VARIABLE)
    return written(console)


@pytest.mark.parametrize("length", [1, 7, 100_000])
def test_without_a_terminal_the_lines_are_the_runs_own(log, length):
    direct = screen()
    direct.print("before the run")
    run(progress(direct))
    direct.print("after it")
    console = screen()
    view = JobView(console)
    for start in range(0, len(log), length):
        view.feed(log[start : start + length])
    view.end()
    assert written(console) == written(direct)


def test_on_a_terminal_it_is_the_table(log):
    console = screen(terminal=True)
    view = JobView(console)
    view.feed(log)
    view.end()
    shown = written(console)
    parts = ("step 5 of 5", "runs/a", "score", "0.250", "nan", "0.125 -> 0.250", "rollout 1.5 s", "80 prompts")
    for part in (*parts, "warning: KL is high"):
        assert part in shown, part
    assert "\x1e" not in shown and '{"at"' not in shown
    assert "before the run" in shown and "after it" in shown


def test_the_raw_log_can_be_read_too(log):
    lines = [line.partition("\x1e")[0].rstrip() for line in log.split("\n")]
    assert any(line.endswith("note: 80 prompts") for line in lines)
    assert any("step 5/5  score 0.250  kl nan" in line for line in lines)
    assert lines[-3].endswith("done: 5 of 5 steps, 0:00:00")
    assert "x" not in event_of(log.split("\n")[-5])["metrics"], "what no display draws stays out"


def test_a_run_that_says_no_more_has_failed(log):
    console = screen()
    view = JobView(console)
    view.feed(log[: log.index("KL is high")])
    view.end()
    assert "failed: 5 of 5 steps" in written(console)


@pytest.mark.parametrize("terminal", [True, False])
def test_whoever_leaves_a_run_is_not_told_how_it_ended(log, terminal):
    console = screen(terminal=terminal)
    view = JobView(console)
    view.feed(log[: log.index("warning: KL is high") + 9])
    view.leave()
    shown = written(console)
    assert "5" in shown and "failed" not in shown and "done" not in shown and "\x1e" not in shown


def test_times_are_the_jobs(monkeypatch):
    """Whoever comes back to a job hours later sees its times, not those since he came."""
    monkeypatch.setenv(RELAY_VARIABLE, "1")
    now, there = [0.0], screen()
    with Progress("auto", 2, console=there, clock=lambda: now[0]) as shown:
        now[0] = 3600.0
        shown.phase("update")
        shown.step(1, METRICS)
        now[0] = 7200.0
    monkeypatch.delenv(RELAY_VARIABLE)
    console = screen()
    view = JobView(console)
    view.feed(written(there))
    view.end()
    text = written(console)
    assert "[1:00:00] step 1/2" in text and "done: 1 of 2 steps, 2:00:00" in text


def test_rays_own_lines_are_left_out():
    console = screen()
    view = JobView(console)
    view.feed("2026-01-01 00:00:00,1\tINFO job_manager.py:581 -- Runtime env is setting up.\n")
    view.feed("Running entrypoint for job a: python\nhello\r\n\x1b[31mred\x1b[0m")
    view.end()
    assert written(console) == "hello\nred\n"


def test_lines_that_were_cut_are_no_events():
    text = event_text(1.5, {"step": 1, "metrics": {"kl": math.inf}})
    assert event_of("[0:00:01] step" + text) == {"at": 1.5, "step": 1, "metrics": {"kl": "inf"}}
    assert event_of(text[:-3]) is None and event_of("plain") is None and event_of("\x1e[1]") is None


def test_interrupts_are_counted_once():
    import os
    import signal

    interrupts = Interrupts()
    with interrupts.counted():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.take() and not interrupts.take()
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
