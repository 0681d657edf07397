"""What a run leaves for its readers: ``report.html``, however it ended, and evaluations that any reader of JSON takes."""

from __future__ import annotations

import json
import math

import pytest

from rayrlhf.drivers.evaluation import EvaluationLog
from rayrlhf.errors import RunFailed
from tests.drivers import runs
from tests.drivers.runs import TinyWorld


def test_ppo_leaves_a_report(world: TinyWorld) -> None:
    done = world.train("reported", "ppo.steps=2")
    page = (done.folder / "report.html").read_text()
    assert "reported" in page and "<svg" in page
    assert done.printed.rstrip().endswith(f"The report: {done.folder / 'report.html'}")


def test_a_run_that_failed_has_its_report_with_what_it_failed_of(world: TinyWorld, monkeypatch) -> None:
    monkeypatch.setenv("DIES_AT_CALL", "4")
    monkeypatch.setattr(runs, "calls", 0)
    with pytest.raises(RunFailed, match="no such word"):
        world.train(
            "broken", "reward.sources.0.function=tests.drivers.runs:raises", "ppo.steps=3", "evaluation.prompts=0"
        )
    page = (world.folder / "broken" / "report.html").read_text()
    assert "no such word" in page and "the run ends with RoleFailed: reward rank 0" in page


def test_evaluations_are_json_and_come_back_as_they_were(tmp_path) -> None:
    file, rows = tmp_path / "evaluations.jsonl", [{"low": -math.inf, "high": math.inf}, {"kl": math.nan}, {"kl": None}]
    log = EvaluationLog(file, None)
    for step, row in enumerate(rows):
        log.add(step, {**row, "bins": [{"mean": math.nan, "count": 0}], "name": "nan", "whole": 3})
    written = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in file.open()]
    assert written[0] == {
        "step": 0, "low": None, "high": None, "bins": [{"mean": None, "count": 0}], "name": "nan", "whole": 3,
        "non_finite": {"low": "-inf", "high": "inf"},
    }  # fmt: skip
    assert written[1]["non_finite"] == {"kl": "nan"} and "non_finite" not in written[2]
    again = EvaluationLog(file, 3)
    assert again.results[0]["low"] == -math.inf and again.results[0]["high"] == math.inf
    assert math.isnan(again.results[1]["kl"]) and again.results[2]["kl"] is None
    assert not any("non_finite" in row for row in again.results)
    assert [json.loads(line) for line in file.open()] == written, "resuming writes them as they were"
