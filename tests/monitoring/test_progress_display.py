"""What a person sees while a run is under way."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from rayrlhf.monitoring import Progress, close_log, setup_log
from rayrlhf.monitoring.display import render
from rayrlhf.monitoring.text import duration, fixed, printable, sparkline

ALL = {
    "score/mean": 0.1234, "kl": 1.5, "kl_coef": 0.05, "policy_loss": -0.01, "value_loss": 0.25, "clipfrac": 0.1,
    "explained_variance": 0.5, "entropy": 2.0, "response_length/mean": 23.5, "truncated_fraction": 0.75,
    "timing/total_s": 10.0, "timing/rollout_s": 4.0, "timing/update_s": 5.0, "timing/score_s": 0.01,
    "grad_norm": 1.0,
}  # fmt: skip


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal(width: int = 120, height: int = 40, **kwargs) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None, **kwargs)


def plain(width: int = 80, **kwargs) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False, **kwargs)


def shown(progress: Progress) -> str:
    """The live display as it would be drawn now."""
    size = progress.console
    file = io.TextIOWrapper(io.BytesIO(), encoding=size.encoding)
    console = Console(file=file, force_terminal=True, width=size.width, height=size.height, color_system=None)
    console.print(render(progress._state, console))
    file.flush()
    return file.buffer.getvalue().decode(size.encoding)


def output(console: Console) -> str:
    return console.file.getvalue()


def steps(progress: Progress, clock: Clock, count: int, seconds: float = 10.0, **changes) -> None:
    for step in range(1, count + 1):
        clock.now += seconds
        progress.step(step, ALL | {"score/mean": step / 100} | changes)


def test_lines_mode_prints_one_line_a_step_however_narrow():
    console, clock = plain(40), Clock()
    with Progress("auto", 20, console=console, clock=clock) as progress:
        assert progress.mode == "lines"
        clock.now += 30
        progress.phase("rollout")
        clock.now += 10
        progress.step(1, ALL)
        progress.phase("rollout")
        clock.now += 12
        progress.step(2, {"kl": 2.0})
        progress.note("checkpoint saved: [bold]step-2[/bold]")
        progress.note("KL is flat", warning=True)
    lines = output(console).splitlines()
    assert lines == [
        "[0:00:30] phase: rollout",
        # 19 steps of the 10 s that the step says; the 30 s before it won't come again
        "[0:00:40] step 1/20  score 0.123  kl 1.500  kl_coef 0.0500  policy_loss -0.0100  value_loss 0.2500  "
        "clipfrac 0.100  explained_variance 0.50  entropy 2.000  response_tokens 23.5  truncated 75.0%  "
        "step_s 10.0  left 0:03:10",
        "[0:00:52] step 2/20  kl 2.000  left 0:03:18",  # 18 * (10 + 12) / 2
        "[0:00:52] note: checkpoint saved: [bold]step-2[/bold]",
        "[0:00:52] warning: KL is flat",
        "[0:00:52] done: 2 of 20 steps, 0:00:52",
    ]


@pytest.mark.parametrize("mode", ["table", "lines", "none"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_metric_can_stop_a_run(mode, encoding):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, force_terminal=mode == "table", width=80, height=24)
    infinity = float("inf")
    odd = [None, float("nan"), infinity, -infinity, "text", [1], torch.zeros(2), torch.tensor(1.5), 10**400, 1e30]
    with Progress(mode, 0, run_dir="run/好", console=console) as progress:
        shown(progress)
        progress.step(1, {})
        shown(progress)
        for step, value in enumerate(odd, start=2):
            progress.phase("rollout")
            progress.step(step, {name: value for name in ALL})
            progress.note("\x1b[2J [/nonsense] 好 \udcff", warning=True)
            shown(progress)
        progress.step(99, ALL | {"timing/rollout_s": -1.0, "timing/total_s": 0.0})
        shown(progress)
    file.flush()
    assert (raw.getvalue() == b"") == (mode == "none")
    assert b"\x1b[2J" not in raw.getvalue()


def test_table_shows_header_phase_last_steps_trends_timing_and_notes():
    console, clock = terminal(120, 40), Clock()
    progress = Progress("table", 50, run_dir="runs/one", console=console, clock=clock)
    with progress:
        steps(progress, clock, 12)
        progress.phase("update")
        clock.now += 3
        progress.note("checkpoint saved")
        text = shown(progress)
    assert "runs/one" in text and "step 12 of 50" in text
    assert "elapsed 0:02:03" in text and "about 0:06:17 left" in text  # 38 steps of 10 s, less 3 s
    assert "update for 3 s  (last step: 5.0 s)" in text
    rows = [line.split() for line in text.splitlines() if re.match(r"\s+\d+  ", line)]
    assert [row[0] for row in rows] == [str(k) for k in range(3, 13)]  # the last ten
    assert " ".join(rows[-1]) == "12 0.120 1.500 0.0500 -0.0100 0.2500 0.100 0.50 2.000 23.5 75.0% 10.0"
    assert "0.010 -> 0.120" in text and "▁" in text and "█" in text
    assert "update 5.0 s 50%  rollout 4.0 s 40%  other 1.0 s 10%" in text
    assert "0:02:03 checkpoint saved" in text
    assert "done: 12 of 50" not in text and "grad_norm" not in text
    assert "done" in shown(progress)


@pytest.mark.parametrize("width, height", [(80, 24), (100, 30), (120, 40), (200, 60)])
def test_table_fits_the_terminal(width, height):
    console, clock = terminal(width, height), Clock()
    history = [ALL | {"step": step, "score/mean": step / 100} for step in range(1, 120)]
    with Progress("table", 500, run_dir="runs/one", console=console, clock=clock, history=history) as progress:
        clock.now += 10
        progress.step(120, ALL)
        for number in range(6):
            progress.note(f"note {number} " + "long " * 50)
        lines = shown(progress).rstrip("\n").split("\n")
    assert len(lines) <= height
    assert max(cell_len(line) for line in lines) <= width
    assert "note 5" in lines[-1]
    body = "\n".join(line for line in lines if "note" not in line and "wider" not in line)
    assert "…" not in body  # no heading and no number is cut
    assert ("wider terminal" in "\n".join(lines)) == (width == 80)


def test_narrow_tables_leave_out_the_least_important_columns():
    console, clock = terminal(50, 40), Clock()
    with Progress("table", 5, console=console, clock=clock) as progress:
        steps(progress, clock, 1)
        text = shown(progress)
    assert "score" in text and "seconds" in text and "tokens" in text
    heading = text[text.index("score") : text.index("wider")]
    assert "cated" not in heading and "entropy" not in heading and "coef" not in heading
    assert "in a wider terminal also: kl_coef, value" in text


def test_missing_columns_are_left_out_and_single_gaps_shown():
    console, clock = terminal(), Clock()
    with Progress("table", 5, console=console, clock=clock) as progress:
        progress.step(1, {"score/mean": 0.5, "kl": float("nan")})
        progress.step(2, {"score/mean": None, "kl": 1.0})
        text = shown(progress)
    assert "policy" not in text and "step time" not in text
    rows = [line.split() for line in text.splitlines() if re.match(r"\s+\d+  ", line)]
    assert rows == [["1", "0.500", "nan"], ["2", "-", "1.000"]]


def test_live_table_draws_and_keeps_warnings_above_itself():
    console, clock = terminal(), Clock()
    with Progress("auto", 5, console=console, clock=clock) as progress:
        assert progress.mode == "table"
        steps(progress, clock, 2)
        progress.note("KL is flat", warning=True)
        progress.note("checkpoint saved")
    text = output(console)
    assert "step 2 of 5" in text
    assert "[0:00:20] warning: KL is flat" in text and "note: checkpoint saved" not in text


@pytest.mark.parametrize("error, word", [(RuntimeError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_the_display_ends_with_the_outcome_and_the_error_goes_on(error, word):
    for console in (terminal(), plain()):
        with pytest.raises(error), Progress("auto", 5, console=console, clock=Clock()) as progress:
            progress.phase("update")
            raise error("boom")
        assert word in output(console)
        assert "update" in output(console)


def test_history_fills_table_and_trends_after_a_resume():
    console, clock = terminal(), Clock()
    history = [{"step": k} | ALL | {"score/mean": k / 10} for k in (1, 2, 3)]
    with Progress("table", 5, console=console, clock=clock, history=history) as progress:
        text = shown(progress)
        assert "step 3 of 5" in text and "0.100 -> 0.300" in text and "left" not in text
        clock.now += 60
        progress.step(4, ALL)
        assert "about 0:00:10 left" in shown(progress)


def test_auto_takes_lines_where_a_debugger_may_stop(monkeypatch):
    assert Progress("auto", 5, console=terminal(), debugging=True).mode == "lines"
    assert Progress("table", 5, console=terminal(), debugging=True).mode == "table"
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert Progress("auto", 5, console=dumb).mode == "lines"
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    assert Progress("auto", 5, console=terminal()).mode == "lines"


def test_steps_and_notes_go_to_the_log_in_every_mode(tmp_path):
    try:
        setup_log(tmp_path)
        console = plain()
        with Progress("none", 5, console=console, clock=Clock()) as progress:
            progress.step(1, {"kl": 2.0})
            progress.note("look", warning=True)
    finally:
        close_log()
    text = (tmp_path / "log.txt").read_text()
    assert "step 1/5  kl 2.000" in text and re.search("WARNING .*look", text)
    assert output(console) == ""


def test_without_a_log_nothing_is_printed_to_stderr(capsys):
    logging.getLogger("rayrlhf.anything").warning("quiet")
    assert "quiet" not in capsys.readouterr().err


def test_numbers_and_times():
    assert [fixed(x, 2) for x in (1, 0.005, 0.001, -0.0, 123456.0, None, "x", float("nan"), True)] == [
        "1.00", "0.01", "1.0e-03", "0.00", "1.2e+05", "-", "-", "nan", "1.00",
    ]  # fmt: skip
    assert fixed(0.5, 1, sign=True) == "+0.5" and fixed(-0.5, 1, sign=True) == "-0.5"
    assert [duration(x) for x in (0, 59.6, 3599, 90061, None, float("inf"))] == [
        "0:00:00", "0:01:00", "0:59:59", "1 d 1:01:01", "-", "-",
    ]  # fmt: skip


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"  # means of halves
    assert sparkline([0.0, None, float("nan"), 1.0], 4) == "▁  █"
    assert sparkline([5.0, 5.0], 4) == "▄▄"
    assert sparkline([], 4) == sparkline([None], 4) == ""
    assert len(sparkline(list(range(1000)), 37)) == 37
    assert sparkline([0, 7], 4, ascii_only=True).isascii()


def test_foreign_text_is_harmless():
    console = plain()
    assert printable("a\tb\nc\r\n\x1b[2J\x07\x85", console) == "a\tb\nc\n\\x1b[2J\\x07\\x85"
    assert printable("好😀\u200d\xa0\u3000é", console) == "好😀\u200d\xa0\u3000é"
    assert printable("\udcff\u202e", console) == "\\udcff\\u202e"  # lone surrogate; right-to-left override
    ascii_console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert printable("é好", ascii_console) == "\\xe9\\u597d"
