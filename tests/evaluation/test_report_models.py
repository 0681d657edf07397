"""The report of models side by side: what stands in it, and that it makes do with little or strange content."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayrlhf.errors import InputRefused
from rayrlhf.evaluation.report import write_report
from rayrlhf.monitoring.evaluation_table import measure_rows, notes_on, render_evaluation
from tests.evaluation.test_report import EVIL, Page, make_run

RATE = {"wins": 6, "ties": 2, "losses": 2, "unjudged": 3, "rate": 0.7, "low": 0.55, "high": 0.9, "confidence": 0.95}


def model(name: str, score: float, **more) -> dict:
    measures = {"score/mean": score, "score/stderr": 0.03, "kl/mean": 2.5, "kl/stderr": 0.5, "perplexity": 12.0}
    return {"name": name, "path": f"models/{name}", "prompts": 12, **measures, "perplexity/stderr": 0.25, **more}


def evaluation(*models: dict, **more) -> dict:
    told = {"prompts": 12, "seed": 1, "temperature": 0.7, "reference": "sft", "judge": None}
    return {**told, "scores": {"reward": "words (reward)", "safety": "safety"}, "models": list(models), **more}


def folder_of(folder: Path, told: dict, rates: list[dict] | None = None, prompts: int = 12) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("algorithm: evaluation\nseed: 1\ndata: {prompts: p.jsonl}\n")
    (folder / "evaluation.json").write_text(json.dumps(told))
    (folder / "win_rates.json").write_text(json.dumps(rates or []))
    names = [one["name"] for one in told["models"]]
    with open(folder / "responses.jsonl", "w") as file:
        for i in range(prompts):
            said = {
                name: {"response": f"{name} says {i}", "scores": {"reward": k + i * (1 - 2 * k) / 10, "safety": None}}
                for k, name in enumerate(names)
            }
            file.write(json.dumps({"prompt": f"prompt {i}", "models": said}) + "\n")
    return folder


def page_of(tmp_path: Path, *runs: Path, **how) -> Page:
    return Page(write_report(list(runs), tmp_path / "out" / "report.html", **how))


def test_models_are_columns_and_clear_differences_are_marked(tmp_path):
    # 0.5 - 0.4 is more than 2 x sqrt(2) x 0.03 = 0.085; 0.46 - 0.4 isn't; a lower perplexity is better
    models = [
        model("sft", 0.4),
        model("ppo", 0.5, perplexity=10.0),
        model("dpo", 0.46, **{"kl/mean": None, "kl/stderr": None, "kl/reason": "other tokens"}),
    ]
    rates = [{"a": "ppo", "b": "sft", "judge": "words (reward)", **RATE}]
    page = page_of(tmp_path, folder_of(tmp_path / "e", evaluation(*models), rates))
    assert "score: words 0.400 ± 0.030 0.500 ± 0.030 0.460 ± 0.030" in page.text
    assert "KL to the reference (nats a sequence) 2.50 ± 0.50 2.50 ± 0.50 -" in page.text
    tones = [a["class"] for tag, a in page.tags if tag == "td" and a.get("class", "").startswith("number")]
    assert [tone.removeprefix("number").strip() for tone in tones] == ["", "better", "", "", "", "", "", "better", ""]
    assert "KL is measured to sft, at temperature 0.7" in page.text and "No KL of dpo: other tokens" in page.text
    assert "70.0% [55.0, 90.0], 6 wins, 2 ties, 2 losses" in page.text
    assert "ppo against sft, judged by words (reward): 3 prompts have no verdict" in page.text
    assert "ppo: wins against sft 70.0% 55.0 to 90.0, by words (reward)" in page.text
    drawings = [d.get("aria-label") for d in page.drawings()]
    assert any("ppo: mean" in label and "of 12" in label for label in drawings)
    assert not any(label.startswith("safety") for label in drawings), "no score, no chart"


def test_samples_stand_side_by_side_and_the_extremes_are_picked(tmp_path):
    page = page_of(tmp_path, folder_of(tmp_path / "e", evaluation(model("a", 0.1), model("b", 0.2))))
    for i in range(8):
        assert f"prompt {i} a score {i / 10:.3f} a says {i} b score {1 - i / 10:.3f} b says {i}" in page.text
    # behind the first eight b's score is below a's: by 0.6, 0.8, 1.0 and 1.2
    assert page.text.count("picked: among the largest losses of score") == 3 and "prompt 11" in page.text
    assert "largest gains" not in page.text and "prompt 8" not in page.text


def test_beside_a_training_run(tmp_path):
    compared = folder_of(tmp_path / "e", evaluation(model("a", 0.1), model("b", 0.9)))
    page = page_of(tmp_path, make_run(tmp_path / "run"), compared, pngs=True)
    assert "run (ppo, step 4)" in page.text and "Models side by side" in page.text and "e: a score" in page.text
    pngs = {path.name for path in (tmp_path / "out" / "report-plots").iterdir()}
    assert "scores_reward_e.png" in pngs and "score_mean.png" in pngs


def test_a_pipelines_folder_stands_for_its_stages(tmp_path):
    pipeline = tmp_path / "pipeline"
    make_run(pipeline / "dpo")
    folder_of(pipeline / "compare", evaluation(model("sft", 0.4), model("ppo", 0.5)))
    (pipeline / "pairs").mkdir()  # data, and no run
    (pipeline / "pipeline.json").write_text(json.dumps({"stages": {"compare": {}, "pairs": {}, "dpo": {}}}))
    whole = page_of(tmp_path, pipeline)
    assert whole.text == page_of(tmp_path, pipeline / "compare", pipeline / "dpo").text
    (pipeline / "pipeline.json").write_text("torn")
    with pytest.raises(InputRefused, match="can't be read as a pipeline's state"):
        page_of(tmp_path, pipeline)


def test_foreign_text_stays_text(tmp_path):
    told = evaluation(
        model(EVIL, 0.5, **{"kl/reason": EVIL}), reference=EVIL, judge=EVIL, scores={EVIL: EVIL, "reward": EVIL}
    )
    folder = folder_of(tmp_path / "e", told, [{"a": EVIL, "b": EVIL, "judge": EVIL, **RATE}])
    row = {"prompt": [{"role": EVIL, "content": EVIL}], "models": {EVIL: {"response": EVIL, "scores": {EVIL: 1.0}}}}
    (folder / "responses.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of(tmp_path, folder, pngs=True)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "b", "base"}
    assert page.text.count("<script>alert('x')</script>") > 8
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "{",
        '{"models": []}',
        '{"models": [{"name": "a"}]}',
        '{"models": [{"name": 7, "score/mean": "x", "kl/mean": null}], "scores": [1], "temperature": "hot"}',
    ],
)
def test_little_or_strange_content_makes_a_page_all_the_same(tmp_path, content):
    folder = tmp_path / "e"
    folder.mkdir()
    (folder / "evaluation.json").write_text(content)
    (folder / "responses.jsonl").write_text(
        '{"prompt": 3, "models": {"7": 1, "a": {"scores": 2}}}\n{"models": 1}\n[]\n'
    )
    page = page_of(tmp_path, folder)
    assert "responses.jsonl: lines 2, 3" in page.text
    assert ("evaluation.json" in page.text) == ("name" not in content)


def test_a_folder_with_neither_is_refused(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "responses.jsonl").write_text("")
    with pytest.raises(InputRefused, match="holds no run"):
        write_report([tmp_path / "e"], tmp_path / "x.html")


# -- on a terminal -----------------------------------------------------------------------------------------------------


def shown(told: dict, width: int, rates: list[dict] | None = None, encoding: str = "utf-8", **samples) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    render_evaluation(told, rates or [], samples.get("samples", []), Path("runs/e"), Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [50, 80, 140])
def test_every_number_is_whole_at_any_width(width):
    models = [
        model(name, score) for name, score in (("first", 0.1), ("second-model", 0.2), ("third", 0.3), ("x" * 60, 0.4))
    ]
    text = shown(evaluation(*models), width, [{"a": "third", "b": "first", "judge": "words (reward)", **RATE}])
    for told in models:
        assert f"{told['score/mean']:.3f} ± 0.030" in text
    assert all(len(line) <= width for line in text.splitlines())
    assert text.replace("\n", "").count("x") >= 60 and "70.0% [55.0, 90.0]" in text


def test_a_terminal_without_unicode_gets_ascii():
    sample = {"prompt": "p", "responses": [("a", None, "\x1b[31mé"), ("b", 0.5, "")]}
    text = shown(evaluation(model("a", 0.1), model("b", 0.2)), 100, encoding="ascii", samples=[sample])
    assert "0.100 +/- 0.030" in text and "a, score -" in text and "\x1b[31m" not in text and "(empty)" in text


def test_what_was_not_measured_is_no_row():
    rows = measure_rows(
        evaluation({"name": "a", "score/mean": 0.5}, {"name": "b", "score/mean": None, "score/unscored": 4})
    )
    assert [label for label, _ in rows] == ["score: words", "responses without a score"]
    assert [cell.text for cell in rows[0].cells] == ["0.500", "-"]
    assert any("data.completion_column" in note for note in notes_on(evaluation({"name": "a"})))
