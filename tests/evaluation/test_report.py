"""The report: what stands in the file, and that nothing in it runs or comes from elsewhere."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.evaluation.plots import Histogram, LineChart, Outcome, Series, WinRateChart, png, svg, ticks
from rayrlhf.evaluation.report import write_report
from rayrlhf.evaluation.report_tables import visible

EVIL = "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)>&amp;\"'</pre></style>"
CONFIG = """algorithm: ppo
run_dir: RUN
policy: {path: models/small, dtype: float32}
reward: {sources: [{function: "words:count"}]}
ppo: {steps: 4, target_kl: 6.0}
"""


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluation(step: int, score: float, error: float, **more) -> dict:
    samples = [{"prompt": f"p{i}", "response": f"r{i} at {step}", "score": score + (i - 10) / 10} for i in range(20)]
    return {"step": step, "prompts": 20, "score/mean": score, "score/stderr": error, "samples": samples, **more}


def make_run(folder: Path, steps: int = 4, final: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.replace("RUN", folder.name))
    rows = [{"step": s, "score/mean": s / 10, "reward/mean": s / 20, "kl": 0.5 * s, "kl_coef": 0.1, "timing/total_s": 2.0}
            for s in range(1, steps + 1)]  # fmt: skip
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(
        folder / "evaluations.jsonl", [evaluation(0, 0.1, 0.03, nll=2.0), evaluation(steps, final, 0.04, nll=2.5)]
    )
    return folder


class Page(HTMLParser):
    """Tags with attributes, and the text of the page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.append(" ")

    def handle_data(self, data):
        self.texts.append(data)

    def drawings(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(part) for part in re.findall(r"<svg viewBox.*?</svg>", self.source, re.DOTALL)]


def report(tmp_path: Path, *runs: Path, **how) -> Page:
    return Page(write_report(list(runs), tmp_path / "out" / "report.html", **how))


# -- the whole page ----------------------------------------------------------------------------------------------------


def test_foreign_text_stays_text_and_nothing_comes_from_elsewhere(tmp_path):
    run = make_run(tmp_path / f"<b>run{EVIL[:8].replace('/', '')}")
    (run / "config.yaml").write_text(CONFIG + f"# {EVIL}\nevil: {json.dumps(EVIL)}\n")
    rows = [evaluation(0, 0.1, 0.1), evaluation(4, 0.2, 0.1)]
    for row in rows:
        row[EVIL] = 1.0
        row["samples"][0] |= {"prompt": EVIL, "response": EVIL + "\x1b[31m \u202eback"}
    write_rows(run / "evaluations.jsonl", rows)
    write_rows(run / "metrics.jsonl", [{"step": s, "score/mean": s, EVIL: s} for s in (1, 2)])
    write_rows(
        run / "samples.jsonl", [{"step": 1, "prompt": EVIL, "response": EVIL, "finish_reason": EVIL, "score": None}]
    )
    warning = dict.fromkeys(("rule", "severity", "since", "seen", "means", "turn"), EVIL)
    write_rows(run / "health.jsonl", [{"step": 3, **warning}])
    gates = {"passed": False, "gates": [{"name": EVIL, "passed": EVIL, "found": EVIL, "wanted": EVIL}]}
    (run / "gates.json").write_text(json.dumps(gates))
    findings = [dict.fromkeys(("severity", "where", "kind", "text"), EVIL)]
    (run / "data_check.json").write_text(json.dumps({"findings": findings}))
    rates = {"wins": 1, "ties": 1, "losses": 1, "rate": 0.5, "low": 0.1, "high": 0.9, "unjudged": EVIL}
    (run / "win_rates.json").write_text(json.dumps([{"a": EVIL, "b": EVIL, "judge": EVIL, **rates}]))
    (run / "reward_hacking.json").write_text(json.dumps(dict.fromkeys(("outcome", "pearson", "verdict"), EVIL)))
    (run / "log.txt").write_text(f"2026-01-02 03:04:05+0000 WARNING rayrlhf.x: {EVIL}\n")
    page = report(tmp_path, run, pngs=True)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "b", "base"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "src", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert page.text.count("<script>alert('x')</script>") > 15
    assert not re.search(r"@import|url\(|https?://(?!evil)", page.source)
    policy = next(a for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert "\x1b" not in page.source and "\u202e" not in page.source and "\\x1b[31m \\u202eback" in page.text
    assert all(drawing.tag == "svg" for drawing in page.drawings())


def test_before_and_after_with_errors_worked_out_by_hand(tmp_path):
    page = report(tmp_path, make_run(tmp_path / "run"))
    # 1.0 - 0.1 = 0.9; sqrt(0.03^2 + 0.04^2) = 0.05
    assert "Score 0.100 ± 0.030 1.000 ± 0.040 +0.900 ± 0.050" in page.text
    assert "NLL (nats a token) 2.000 2.500 +0.500" in page.text
    tones = [a["class"] for tag, a in page.tags if tag == "td" and a.get("class", "").startswith("number")]
    assert tones[2] == "number better" and tones[5] == "number worse"
    assert "On 20 held-out prompts" in page.text and "words:count" in page.text and "4 of 4" in page.text


def test_the_model_that_was_kept_is_the_one_after(tmp_path):
    """The last of three evaluations isn't that of the model which was written."""
    run, whole = make_run(tmp_path / "run"), make_run(tmp_path / "whole", final=0.6)
    rows = [evaluation(0, 0.1, 0.03), evaluation(2, 0.7, 0.04), evaluation(4, 0.3, 0.04)]
    write_rows(run / "evaluations.jsonl", rows)
    last = report(tmp_path, run)
    assert "after step 4" in last.text and "+0.200 ± 0.050" in last.text and "kept, step" not in last.text
    (run / "model_step.json").write_text('{"kept_step": 2}')
    page = report(tmp_path, run)
    assert "before step 0 after kept, step 2" in page.text and "Score 0.100 ± 0.030 0.700 ± 0.040 +0.600" in page.text
    assert "Score 0.700 before 0.100 ± 0.030; kept, step 2" in page.text
    assert "r0 at 2" in page.text and "r0 at 4" not in page.text
    (whole / "model_step.json").write_text('{"kept_step": 4}')
    both = report(tmp_path, run, whole)
    assert "run (ppo, kept, step 2) 0.700 ± 0.040" in both.text and "whole (ppo, step 4) 0.600 ± 0.040" in both.text
    for broken in ("[2]", '{"kept_step": "2"}', '{"kept_step"'):
        (run / "model_step.json").write_text(broken)
        page = report(tmp_path, run)
        assert "after step 4" in page.text and "model_step.json: no" in page.text


def test_a_change_within_two_errors_is_not_called_one(tmp_path):
    page = report(tmp_path, make_run(tmp_path / "run", final=0.19))  # 0.09 is less than 2 x 0.05
    tones = [a["class"] for tag, a in page.tags if tag == "td" and a.get("class", "").startswith("number")]
    assert tones[2] == "number unclear"


def test_a_whole_run_is_told(tmp_path):
    run = make_run(tmp_path / "run")
    trouble = {"rule": "length_drift", "severity": "warning", "since": 2, "means": "why", "turn": ["key a", "key b"]}
    write_rows(run / "health.jsonl", [{"step": s, "seen": f"now {s}", **trouble} for s in (2, 3, 4)])
    gate = {"name": "KL within bound", "passed": True, "found": "0.03", "wanted": "at most 0.1"}
    (run / "gates.json").write_text(json.dumps({"passed": True, "gates": [gate]}))
    finding = {"severity": "error", "where": "a.jsonl:7", "kind": "identical", "text": "both alike"}
    (run / "data_check.json").write_text(json.dumps({"files": ["a.jsonl"], "findings": [finding]}))
    rate = {"a": "ours", "b": "theirs", "judge": "rm", "wins": 6, "ties": 2, "losses": 2, "unjudged": 3}
    (run / "win_rates.json").write_text(json.dumps([{**rate, "rate": 0.7, "low": 0.45, "high": 0.9}]))
    (run / "log.txt").write_text(
        "2026-01-02 03:00:00+0000 INFO    x: begins\n2026-01-02 04:30:05+0000 ERROR   x: it broke\n", encoding="utf-8"
    )
    page = report(tmp_path, run)
    assert "since step 2, last seen at step 4" in page.text and "now 4" in page.text and "now 3" not in page.text
    assert "key a; key b" in page.text
    assert "Passed." in page.text and "KL within bound 0.03 at most 0.1 passed" in page.text
    assert "a.jsonl:7 error identical both alike" in page.text
    assert "70.0% [45.0, 90.0], 6 wins, 2 ties, 2 losses" in page.text and "3 prompts have no verdict" in page.text
    assert "1:30:05 from 2026-01-02 03:00 +0000" in page.text and "it broke" in page.text
    assert "r0 at 0" in page.text and "r0 at 4" in page.text


def test_several_runs_stand_beside_each_other(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", final=0.5)]
    (runs[1] / "config.yaml").write_text(CONFIG.replace("6.0", "9.0"))
    page = report(tmp_path, *runs)
    assert "a/run, b/run" in page.text
    assert "before (a/run) 0.100 ± 0.030 2.000" in page.text
    assert "a/run (ppo, step 4) 1.000 ± 0.040" in page.text and "b/run (ppo, step 4) 0.500 ± 0.040" in page.text
    assert "ppo.target_kl 6.0 9.0" in page.text
    scores = next(d for d in page.drawings() if "Score and reward: score" in d.get("aria-label", ""))
    lines = [e for e in scores.iter("polyline") if "--s0" in e.get("style") or "--s1" in e.get("style")]
    assert len(lines) == 2
    headings = "r0 at 0", "r0 at 4"
    assert all(text in page.text for text in headings)


def test_what_can_not_be_read_is_named_and_the_rest_is_used(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": "5"}\n{"step": 6, "score')
    (run / "gates.json").write_text("{")
    (run / "data_check.json").write_text("[]")
    (run / "win_rates.json").write_text('[{"a": "x", "wins": 3, "ties": 0, "losses": null}, 7]')
    (run / "config.yaml").write_bytes(b"a: [\xff")
    page = report(tmp_path, run)
    assert "metrics.jsonl: lines 5, 6, 7: no JSON object with a step" in page.text
    for name in (
        "gates.json: no JSON",
        "data_check.json: no JSON object",
        "win_rates.json: entry 0",
        "entry 1",
        "no UTF-8",
    ):
        assert name in page.text
    assert "config.yaml: no YAML" in page.text and "Score 0.100" in page.text


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1}],
        [{"step": 1, "score/mean": 0.5}],
        [{"step": 1, "score/mean": None, "kl": math.nan}, {"step": 2, "score/mean": "x", "kl": math.inf}],
        [{"step": s, "score/mean": 0.0, "kl": 1e300 * s, "odd": [1]} for s in range(1, 9)],
    ],
)
@pytest.mark.parametrize(
    "evaluations", [[], [{"step": 0}], [{"step": 0, "samples": [1, {"prompt": 2}]}, {"step": 9, "score/mean": None}]]
)
def test_little_or_strange_content_makes_a_page_all_the_same(tmp_path, rows, evaluations):
    run = tmp_path / "run"
    run.mkdir()
    write_rows(run / "metrics.jsonl", rows)
    write_rows(run / "evaluations.jsonl", evaluations)
    page = report(tmp_path, run, pngs=True)
    for drawing in page.drawings():
        for element in drawing.iter():
            assert not re.search("nan|inf", " ".join(v for k, v in element.attrib.items() if k != "aria-label"))


def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused) as refused:
        write_report([make_run(tmp_path / "run"), tmp_path / "empty", tmp_path / "none"], tmp_path / "out.html")
    assert len(refused.value.problems) == 2 and "holds no run" in str(refused.value) and "no such" in str(refused.value)
    assert not (tmp_path / "out.html").exists()
    with pytest.raises(InputRefused, match="is a folder"):
        write_report([tmp_path / "run"], tmp_path)
    with pytest.raises(InputRefused, match="no run's folder"):
        write_report([], tmp_path / "out.html")


def test_a_report_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run, out = make_run(tmp_path / "run"), tmp_path / "out.html"
    out.write_text("old")

    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(RunFailed, match="No space"):
            write_report([run], out)
    assert out.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["out.html", "run"]
    assert write_report([run], out) == out and out.read_text() != "old"


def test_pngs_are_pictures_of_the_charts(tmp_path):
    report(tmp_path, make_run(tmp_path / "run"), pngs=True)
    files = {path.stem: path for path in (tmp_path / "out" / "report-plots").iterdir()}
    assert {"score_mean", "kl", "scores"} <= set(files) and all(p.suffix == ".png" for p in files.values())
    with Image.open(files["score_mean"]) as picture:
        assert picture.format == "PNG" and picture.size == (760, 460)
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 20)}
    blue, vermillion = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
    near = [sum(n for c, n in colours.items() if math.dist(c, wanted) < 30) for wanted in (blue, vermillion)]
    assert near[0] > 300 and near[1] > 150


# -- charts ------------------------------------------------------------------------------------------------------------


def polylines(source: str, colour: str) -> list[list[tuple[float, float]]]:
    lines = [e for e in ElementTree.fromstring(source).iter("polyline") if f"--{colour}" in e.get("style")]
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_a_curve_lies_where_its_axis_says():
    values = [1.0, 4.0, 2.5, 3.0]
    source = svg(LineChart("t", [Series("s", [0.0, 1.0, 2.0, 3.0], values)], "t"))
    (line,) = polylines(source, "s0")
    labels = [(float(e.get("y")) - 3.5, float(e.text)) for e in ElementTree.fromstring(source).iter("text")
              if e.get("text-anchor") == "end"]  # fmt: skip
    (y0, v0), (y1, v1) = labels[0], labels[-1]
    read = [v0 + (y - y0) * (v1 - v0) / (y1 - y0) for _, y in line]
    assert read == pytest.approx(values, abs=0.01)
    steps = [x for x, _ in line]
    assert [b - a for a, b in zip(steps, steps[1:], strict=False)] == pytest.approx([steps[1] - steps[0]] * 3, abs=0.11)


def test_a_long_run_is_thinned_and_its_spike_still_seen():
    values = [0.0] * 10_000
    values[5_000], values[7_000] = 50.0, -50.0
    chart = LineChart("t", [Series("s", [float(i) for i in range(10_000)], values)], "t")
    source = svg(chart)
    assert len(polylines(source, "s0")[0]) == 160 and len(source) < 40_000
    band = next(ElementTree.fromstring(source).iter("polygon"))
    heights = [float(p.split(",")[1]) for p in band.get("points").split()]
    middle = polylines(source, "s0")[0][0][1]  # where 0 lies
    assert middle - min(heights) > 60 and max(heights) - middle > 60  # of the 156 that the axis has
    assert png(chart)[:4] == b"\x89PNG"


def test_error_bands_are_one_standard_error_wide():
    source = svg(LineChart("t", [Series("s", [0.0, 1.0], [2.0, 4.0], [0.5, 0.25])], "t"))
    (line,) = polylines(source, "s0")
    scale = (line[0][1] - line[1][1]) / 2.0
    band = next(ElementTree.fromstring(source).iter("polygon")).get("points").split()
    edges = [float(p.split(",")[1]) for p in band]
    assert (edges[3] - edges[0]) / scale == pytest.approx(1.0, abs=0.02)
    assert (edges[2] - edges[1]) / scale == pytest.approx(0.5, abs=0.02)


def test_histograms_count_every_value():
    values = [0.0, 0.1, 0.1, 0.9, 1.0]
    source = svg(Histogram("t", [("a", values), ("b", [0.5] * 7)], "t"))
    shares = re.findall(r"a: ([\d.]+)%\nb: ([\d.]+)%", source)
    assert sum(float(a) for a, _ in shares) == pytest.approx(100)
    assert [float(b) for _, b in shares if float(b)] == [100.0]
    assert svg(Histogram("t", [("a", [3.0, 3.0])], "t"))  # no width at all


def test_win_rate_bars_are_as_long_as_their_counts():
    source = svg(WinRateChart("t", [Outcome("x", 5, 2, 3, 0.6, 0.4, 0.8), Outcome("none", 0, 0, 0, 0, 0, 0)], "t"))
    root = ElementTree.fromstring(source)
    widths = {}
    for bar in root.iter("polygon"):
        xs = [float(p.split(",")[0]) for p in bar.get("points").split()]
        widths[bar.get("style")[11:13]] = (max(xs) - min(xs), min(xs))
    assert widths["ru"][1] == pytest.approx(sum(widths["s0"]), abs=0.2)
    assert widths["s1"][1] == pytest.approx(sum(widths["ru"]), abs=0.2)
    whole = sum(width for width, _ in widths.values())
    assert [widths[c][0] / whole for c in ("s0", "ru", "s1")] == pytest.approx([0.5, 0.2, 0.3], abs=1e-3)
    (dot,) = root.iter("circle")
    assert (float(dot.get("cx")) - widths["s0"][1]) / whole == pytest.approx(0.6, abs=1e-3)
    assert "nothing judged" in source


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 47) == pytest.approx([10, 20, 30, 40])
    assert ticks(-0.013, 0.021, 4) == pytest.approx([-0.01, 0, 0.01, 0.02])
    assert ticks(2, 2) == [2]


def test_foreign_text_shows_its_controls():
    assert visible("a\u202eb\x00\r\n\t\u200dé漢\ud800") == "a\\u202eb\\x00\n\t\u200dé漢\\ud800"
    assert visible(["a", 1]) == "a; 1"
