"""metrics.jsonl, samples.jsonl, TensorBoard, W&B and log.txt, as another program reads them."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.monitoring import MetricWriter, SampleWriter, check_wandb, close_log, read_rows, setup_log
from rayrlhf.monitoring.jsonl import JsonlFile


def strict_rows(path: Path) -> list[dict]:
    """Read as strict JSON: NaN and Infinity, which Python's reader would take, are errors."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_bytes().decode()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def writer(run_dir: Path, resume_step: int | None = None, tensorboard: bool = False) -> MetricWriter:
    config = {"seed": 1, "ppo": {"steps": 3}}
    return MetricWriter(
        run_dir, tensorboard=tensorboard, wandb_project=None, config_dict=config, resume_step=resume_step
    )


def write_sample(samples: SampleWriter, step: int, response: str = "good", score: float = 0.5) -> None:
    samples.write(
        step,
        prompt="p",
        response=response,
        score=score,
        kl=1.25,
        response_tokens=3,
        finish_reason="stop",
        weight_version=step - 1,
    )


def test_metrics_are_sorted_flushed_and_exact_for_float32(tmp_path):
    metrics = writer(tmp_path)
    tenth = torch.tensor(0.1)
    metrics.log(1, {"zeta": 2, "alpha": tenth, "mid/x": np.float32(1 / 3), "flag": True, "lr": 1e-5, "zero": -0.0})
    # read before close: the line was flushed
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "alpha": 0.100000001, "flag": 1, "lr": 1e-05, "mid/x": 0.333333343, "zero": 0.0, "zeta": 2}\n'
    )
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert torch.tensor(row["alpha"]) == tenth and np.float32(row["mid/x"]) == np.float32(1 / 3)
    metrics.close()
    metrics.close()


def test_non_finite_values_become_null_with_a_note(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.log(1, {"kl": float("nan"), "loss": torch.tensor(-math.inf), "none": None, "fine": 1.0})
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert row == {
        "step": 1,
        "fine": 1.0,
        "kl": None,
        "loss": None,
        "none": None,
        "non_finite": {"kl": "nan", "loss": "-inf"},
    }


@pytest.mark.parametrize("value", [[1.0], "0.5", torch.zeros(2), {"a": 1}])
def test_what_is_no_number_is_named(tmp_path, value):
    with writer(tmp_path) as metrics, pytest.raises(TypeError, match="'wrong'"):
        metrics.log(1, {"wrong": value})
    assert strict_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("name", ["step", "non_finite"])
def test_reserved_names_are_refused(tmp_path, name):
    with writer(tmp_path) as metrics, pytest.raises(ValueError, match=name):
        metrics.log(1, {name: 1})


def test_resume_removes_repeated_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with writer(tmp_path) as metrics:
        for step in (1, 2, 3, 4):
            metrics.log(step, {"x": step})
    path.write_bytes(path.read_bytes() + b'{"step": 5, "x": "\xc3')  # killed inside a line, inside a character
    with writer(tmp_path, resume_step=3) as metrics:
        metrics.log(3, {"x": 30})
    assert strict_rows(path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": 30}]
    assert [row["x"] for row in read_rows(path)] == [1, 2, 30]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resume_keeps_a_whole_last_line_without_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 1}\n{"step": 2, "x": 2}')
    with writer(tmp_path, resume_step=3) as metrics:
        metrics.log(3, {"x": 3})
    assert [row["step"] for row in strict_rows(path)] == [1, 2, 3]


def test_lines_that_are_lost_are_reported(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": "one"}\n[1]\n{"step": 2}\n')
    with caplog.at_level(logging.WARNING, logger="rayrlhf"):
        writer(tmp_path, resume_step=9).close()
    assert [row["step"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "2, 3" in caplog.text


def test_resume_from_the_start_and_without_files(tmp_path):
    with writer(tmp_path / "new", resume_step=0) as metrics:
        metrics.log(0, {"x": 1})
    with writer(tmp_path / "new", resume_step=0) as metrics:
        metrics.log(0, {"x": 2})
    assert strict_rows(tmp_path / "new" / "metrics.jsonl") == [{"step": 0, "x": 2}]


def test_an_earlier_run_is_never_overwritten(tmp_path):
    with writer(tmp_path) as metrics:
        pass
    with writer(tmp_path) as metrics:  # it left an empty file
        metrics.log(1, {"x": 1})
    with pytest.raises(InputRefused, match="--resume"):
        writer(tmp_path)
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_message(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = JsonlFile(tmp_path / "metrics.jsonl")
    with pytest.raises(RunFailed, match="metrics.jsonl: can't be written: No space left"):
        metrics.write({"step": 1})


def test_samples_keep_every_character_and_resume_alike(tmp_path):
    strange = 'line\nbreak\u2028\u2029\x85 "quote" \udcff \x1b[2J 好'
    with SampleWriter(tmp_path) as samples:
        write_sample(samples, 1, strange, float("nan"))
        write_sample(samples, 2, strange)
        write_sample(samples, 2)
        write_sample(samples, 3)
    with SampleWriter(tmp_path, resume_step=3) as samples:
        write_sample(samples, 3, "again")
    rows = strict_rows(tmp_path / "samples.jsonl")
    assert [(row["step"], row["response"]) for row in rows] == [(1, strange), (2, strange), (2, "good"), (3, "again")]
    assert list(rows[0]) == [
        "step",
        "prompt",
        "response",
        "score",
        "kl",
        "response_tokens",
        "finish_reason",
        "weight_version",
    ]
    assert rows[0]["score"] is None and rows[1]["score"] == 0.5
    assert "好" in (tmp_path / "samples.jsonl").read_text()  # to be read by people


def test_tensorboard_after_a_resume_has_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writer(tmp_path, tensorboard=True) as metrics:
        for step in (1, 2, 3, 4):
            metrics.log(step, {"score/mean": step / 10, "kl": float("nan") if step == 2 else 1.0, "none": None})
    with writer(tmp_path, resume_step=3, tensorboard=True) as metrics:
        for step in (3, 4, 5):
            metrics.log(step, {"score/mean": step, "kl": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"score/mean", "kl"}
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("score/mean")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 3.0),
        (4, 4.0),
        (5, 5.0),
    ]
    assert math.isnan(events.Scalars("kl")[1].value)
    assert events.Tensors("config/text_summary")[0].step == 0
    assert b'"steps": 3' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_is_flushed_each_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = writer(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        metrics.log(step, {"x": 1.0})
    assert len(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("x")) == 3
    metrics.close()


def test_without_tensorboard_nothing_of_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises
    with writer(tmp_path) as metrics:
        metrics.log(1, {"x": 1})
    assert not (tmp_path / "tensorboard").exists()


def no_wandb(monkeypatch, spec):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: spec if name == "wandb" else real(name, *a))


def test_missing_wandb_is_refused_before_the_run(tmp_path, monkeypatch):
    leftover = importlib.machinery.ModuleSpec("wandb", None, is_package=True)  # a folder that W&B left behind
    for spec in (None, leftover):
        no_wandb(monkeypatch, spec)
        with pytest.raises(InputRefused, match="pip install wandb") as refused:
            check_wandb("mine")
        assert "'mine'" in str(refused.value)
        check_wandb(None)
        with pytest.raises(InputRefused, match="pip install wandb"):
            MetricWriter(tmp_path, tensorboard=False, wandb_project="mine", config_dict={})
    assert list(tmp_path.iterdir()) == []


class FakeRun:
    def __init__(self, calls: list, kwargs: dict):
        self.calls = calls
        calls.append(("init", kwargs))

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls: list = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: FakeRun(calls, kwargs)
    no_wandb(monkeypatch, importlib.machinery.ModuleSpec("wandb", None, origin="somewhere"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (None, 2):
        with MetricWriter(
            tmp_path, tensorboard=False, wandb_project="mine", config_dict={"seed": 1}, resume_step=resume_step
        ) as metrics:
            metrics.log(2, {"x": 1.0, "none": None})
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first["project"] == "mine" and first["config"] == {"seed": 1} and first["resume"] == "allow"
    assert first["id"] == second["id"]
    assert ("log", ({"step": 2, "x": 1.0},), {}) in calls
    assert ("finish", (), {"exit_code": 0}) in calls


def test_wandb_that_refuses_is_a_message(tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured")

    fake = types.ModuleType("wandb")
    fake.init = refuse
    no_wandb(monkeypatch, importlib.machinery.ModuleSpec("wandb", None, origin="somewhere"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(RunFailed, match="api_key not configured.*wandb login"):
        MetricWriter(tmp_path, tensorboard=False, wandb_project="mine", config_dict={})


def test_the_log_is_appended_and_has_one_handler(tmp_path):
    log = logging.getLogger("rayrlhf.somewhere")
    try:
        setup_log(tmp_path / "a")
        log.info("first %d", 1)
        setup_log(tmp_path / "a")
        log.warning("second \udcff 好")
        setup_log(tmp_path / "b")
        log.info("elsewhere")
    finally:
        close_log()
    log.warning("after the end")
    lines = (tmp_path / "a" / "log.txt").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("INFO    rayrlhf.somewhere: first 1")
    assert lines[1].endswith("second \\udcff 好")
    assert lines[0][:3] == "202" and lines[0][10] == " " and lines[0][13] == ":"  # date and time
    assert len((tmp_path / "b" / "log.txt").read_text().splitlines()) == 1
