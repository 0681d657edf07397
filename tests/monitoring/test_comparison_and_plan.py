"""The tables before and after a run."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from rayrlhf.monitoring import evaluation_line, pair_samples, render_comparison, render_plan


def evaluation(score: float, kl: float, nll: float | None, samples: list[dict]) -> dict:
    return {
        "prompts": 64, "score/mean": score, "score/stderr": 0.03, "kl/mean": kl, "kl/stderr": 0.4, "nll": nll,
        "distinct_2": 0.9, "response_length/mean": 23.25, "truncated_fraction": 0.5, "samples": samples,
    }  # fmt: skip


SAMPLES = [{"prompt": f"prompt {k}", "response": f"old [red]{k}[/red]", "score": k / 10} for k in range(4)]
NEW = [{"prompt": f"prompt {k}", "response": f"new answer {k} \x1b[2J", "score": -k / 10} for k in (3, 1, 0, 2)]
BEFORE = evaluation(0.12, 0.0, 3.214, SAMPLES)
AFTER = evaluation(0.532, 7.81, 3.61, NEW) | {"score/stderr": 0.04, "truncated_fraction": 0.25}


def rendered(width: int, before: dict, after: dict, pairs: list, run_dir="runs/one", encoding="utf-8") -> str:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=width)
    render_comparison(before, after, pairs, run_dir, console)
    console.file.flush()
    return raw.getvalue().decode(encoding)


def row(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("│ " + label)]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_table_has_each_value_and_its_change():
    text = rendered(120, BEFORE, AFTER, [])
    assert "on 64 held-out prompts" in text
    assert row(text, "score") == ["0.120 ± 0.030", "0.532 ± 0.040", "+0.412 ± 0.050"]  # 3-4-5
    assert row(text, "KL to the reference (nats a sequence)")[1] == "7.81 ± 0.40"
    assert row(text, "held-out NLL") == ["3.214", "3.610", "+0.396"]
    assert row(text, "distinct-2") == ["0.900", "0.900", "+0.000"]
    assert row(text, "response length (tokens)")[0] in ("23.2", "23.3")
    assert row(text, "cut by the length limit") == ["50.0%", "25.0%", "-25.0 pp"]


def test_missing_and_non_finite_values_are_shown():
    after = AFTER | {"nll": None, "score/mean": math.nan, "score/stderr": None}
    text = rendered(120, BEFORE | {"nll": None}, after, [])
    assert row(text, "score") == ["0.120 ± 0.030", "nan", "-"]
    assert row(text, "held-out NLL (nats a token): needs data.completion_column") == ["-", "-", "-"]
    assert "score" in rendered(80, {}, {}, [])


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_samples_are_readable_and_harmless(width, encoding):
    empty = {"prompt": "好 " * 9, "response": "", "score": None}
    long = {"prompt": "", "response": "好 word  " * 300, "score": math.inf}
    text = rendered(width, BEFORE, AFTER, [*pair_samples(BEFORE, AFTER, 3), (empty, long)], encoding=encoding)
    for k in range(3):
        assert f"prompt {k}" in text and f"old [red]{k}[/red]" in text and f"new answer {k} \\x1b[2J" in text
        assert f"before, score {k / 10:.3f}" in text and f"after, score {'-' if k else ''}{k / 10:.3f}" in text
    assert "prompt 3" not in text and "sample 4 of 4" in text
    assert "\x1b" not in text and "(empty)" in text
    assert "more" in text and "characters" in text
    if encoding == "utf-8":
        assert max(cell_len(line) for line in text.splitlines()) <= width
        assert "…" not in text and text.count("好") > 50


def test_pairs_belong_to_the_same_prompt_and_come_in_order():
    pairs = pair_samples(BEFORE, AFTER, 3)
    assert [before["prompt"] for before, _ in pairs] == ["prompt 0", "prompt 1", "prompt 2"]
    assert all(before["prompt"] == after["prompt"] for before, after in pairs)
    assert len(pair_samples(BEFORE, AFTER, 99)) == 4
    assert pair_samples(BEFORE, AFTER | {"samples": []}, 3) == [] == pair_samples(BEFORE, AFTER, 0)
    twice = {"samples": SAMPLES[:1] * 2 + SAMPLES[1:2]}
    assert [before["prompt"] for before, _ in pair_samples(twice, AFTER, 2)] == ["prompt 0", "prompt 1"]


def test_it_says_where_things_lie_in_lines_that_can_be_copied(tmp_path):
    run = tmp_path / ("a folder with a long name " * 4).strip()
    (run / "model").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    text = rendered(80, BEFORE, AFTER, [], run)
    assert f"rayrlhf generate '{run}/model' --prompt \"...\"" in text
    assert "model, metrics.jsonl" in text and "samples.jsonl" not in text and "tensorboard" not in text
    (run / "tensorboard").mkdir()
    assert f"tensorboard --logdir '{run}/tensorboard'" in rendered(80, BEFORE, AFTER, [], run)


def test_evaluation_line():
    assert evaluation_line(BEFORE) == (
        "evaluation on 64 held-out prompts: score 0.120 ± 0.030, KL 0.00 ± 0.40, NLL 3.214, length 23.2"
    )
    assert "NLL" not in evaluation_line(BEFORE | {"nll": None})


def test_rendering_leaves_the_evaluations_alone():
    before = json.dumps([BEFORE, AFTER])
    rendered(80, BEFORE, AFTER, pair_samples(BEFORE, AFTER, 3))
    assert json.dumps([BEFORE, AFTER]) == before


PLAN = [
    ("batch", "samples a step", 16384, "8192 prompts x 2 [bold]samples[/bold]"),
    ("batch", "learning rate", 1e-5, "constant"),
    ("placement", "shared", True, "because " * 30),
    ("placement", "critic", None, ""),
    ("memory", "KV cache", "1.25 GiB", "computed"),
]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_plan_shows_every_row_once_in_sections(width):
    console = Console(file=io.StringIO(), width=width)
    render_plan(PLAN, console)
    text = console.file.getvalue()
    assert max(cell_len(line) for line in text.splitlines()) <= width
    lines = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line] for line in lines]
    named = [line[:3] for line in cells if line[1]]
    assert named == [
        ["batch", "samples a step", "16,384"],
        ["", "learning rate", "1e-05"],
        ["placement", "shared", "yes"],
        ["", "critic", "-"],
        ["memory", "KV cache", "1.25 GiB"],
    ]
    assert "[bold]samples[/bold]" in re.sub(r"\s+", " ", text)
    assert text.count("because") == 30
    assert text.count("├") == 2  # a line between sections
