"""Evaluations with a judge, and with services that fail."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from statistics import fmean

import pytest
import yaml
from rich.console import Console

from rayrlhf.actors.reward_http import RemoteReward
from rayrlhf.config import load_config
from rayrlhf.drivers.evaluate import evaluate_models
from rayrlhf.errors import RunFailed
from tests.drivers.evaluations import PROMPTS, Models, Result
from tests.drivers.runs import TinyWorld, small_numbers
from tests.serving.misbehaving import Misbehaving, Reply


@pytest.fixture(scope="module")
def models(world: TinyWorld) -> Models:
    return Models(world)


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr("rayrlhf.http_json.FIRST_PAUSE_S", 0.01)


# -- a judge -----------------------------------------------------------------------------------------------------------


def judge_of(answer: Callable[[str, str, str], str]) -> Callable[[dict, dict], Reply]:
    """A judge that says what ``answer`` makes of prompt, first and second response."""

    def reply(payload: dict, headers: dict) -> Reply:
        content = payload["messages"][0]["content"]
        names = (("Prompt", "prompt"), ("Response A", "response A"), ("Response B", "response B"))
        prompt, first, second = (content.split(f"[{b}]\n")[1].split(f"\n[End of {e}]")[0] for b, e in names)
        text = answer(prompt, first, second)
        if not text:
            return Reply({"error": "wrong key"}, 401)
        return Reply({"choices": [{"message": {"role": "assistant", "content": text}}]})

    return reply


def longest_wins(prompt: str, first: str, second: str) -> str:
    return "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"


def test_a_judge_who_prefers_the_longer_response(models: Models) -> None:
    with Misbehaving(judge_of(longest_wins)) as server:
        found = models.evaluate("judged", judge={"url": server.url, "model": "long"})
        assert len(server.requests) == 3 * PROMPTS * 2
    rate = found.rate("other", "base", "long (judge)")
    lengths = [[len(told["response"]) for told in found.told(name)] for name in ("other", "base")]
    wins, losses = (sum(f(a, b) for a, b in zip(*lengths, strict=True)) for f in (int.__gt__, int.__lt__))
    assert (rate["wins"], rate["losses"], rate["unjudged"], rate["disagreements"]) == (wins, losses, 0, 0) and wins
    for row, a, b in zip(found.rows, *lengths, strict=True):
        (verdict,) = [v for v in row["verdicts"] if (v["a"], v["b"]) == ("other", "base")]
        assert verdict["first"] == verdict["second"] == ("tie" if a == b else "a" if a > b else "b")


def test_comparisons_without_a_verdict_are_kept_marked_and_counted(models: Models, short_pauses) -> None:
    bad = json.loads(models.prompts.read_text().splitlines()[2])["prompt"]

    def answer(prompt: str, first: str, second: str) -> str:
        return "I can't decide." if prompt == bad else "[[A]]"

    judge = {"retries": 1, "model": "first", "timeout_s": 60}
    with Misbehaving(judge_of(answer)) as server:
        found = models.evaluate("undecided", ("base", "other"), judge={"url": server.url, **judge})
    rate = found.rate("other", "base", "first (judge)")
    assert (rate["unjudged"], rate["ties"], rate["disagreements"]) == (1, PROMPTS - 1, PROMPTS - 1)
    (verdict,) = found.rows[2]["verdicts"]
    assert found.rows[2]["prompt"] == bad and verdict["first"] is None and verdict["second"] is None
    assert "no verdict" in verdict["failures"]["first"] and "failures" not in found.rows[3]["verdicts"][0]
    assert "1 of 24 prompts have no verdict" in found.printed and found.rows[2]["models"]["base"]["response"]


def test_a_judge_alone_compares_without_scores(models: Models) -> None:
    file = models.config_file("judge-alone", ("base", "other"))
    values = yaml.safe_load(file.read_text())
    del values["scores"]
    with Misbehaving(judge_of(longest_wins)) as server:
        values["judge"] = {"url": server.url, "model": "long"}
        file.write_text(yaml.safe_dump(values))
        console = Console(file=io.StringIO(), width=150)
        evaluate_models(load_config(file, []), console=console)
    found = Result(models.folder / "judge-alone", console.file.getvalue())  # type: ignore[attr-defined]
    (rate,) = found.rates
    assert (rate["a"], rate["b"], rate["judge"]) == ("other", "base", "long (judge)") and rate["unjudged"] == 0
    assert found.evaluation["scores"] == {} and not any(key.startswith("score") for key in found.models["base"])
    assert found.told("base")[0]["scores"] == {} and found.models["other"]["kl/mean"] > 0.5
    page = (found.folder / "report.html").read_text()
    for shown in (found.printed, page):
        assert "long (judge)" in shown and "score:" not in shown and "responses without a score" not in shown
    assert ", score" not in found.printed and found.printed.count("sample ") == 3
    # With a score beside it the verdicts are the same.
    measured = {"scores": {"reward": None, "safety": {"function": "tests.drivers.evaluations:longer"}}}
    with Misbehaving(judge_of(longest_wins)) as server:
        both = models.evaluate(
            "judge-and-safety", ("base", "other"), judge={"url": server.url, "model": "long"}, **measured
        )
    assert both.rate("other", "base", "long (judge)") == rate and both.models["base"]["safety/mean"] > 0
    assert {r["judge"] for r in both.rates} == {"safety", "helpfulness", "long (judge)"}


@pytest.mark.parametrize(("how", "cause"), [("refuses", "HTTP 401"), ("hangs", "no answer within 0.2 s")])
def test_a_judge_who_never_answers_fails_the_run_and_the_rest_is_kept(models: Models, how, cause, short_pauses) -> None:
    with Misbehaving(judge_of(lambda *_: "") if how == "refuses" else lambda *_: Reply(how="hang")) as server:
        judge = {"url": server.url, "model": "mute", "retries": 0, "timeout_s": 0.2 if how == "hangs" else 60}
        with pytest.raises(RunFailed, match=f"no verdict on any of .*{cause}.*is in"):
            models.evaluate(f"mute-{how}", judge=judge)
        assert len(server.requests) < 2 * PROMPTS, (
            "after so many failures neither the rest nor the other pairs are asked"
        )
    found = Result(models.folder / f"mute-{how}")
    assert found.rate("other", "base", "mute (judge)")["unjudged"] == PROMPTS
    assert found.rate("other", "base", "mute (judge)")["rate"] is None
    assert found.rate("other", "base", "small_numbers (reward)")["unjudged"] == 0


def test_conversations_are_written_by_each_models_own_template_and_judged_whole(models: Models) -> None:
    turns = [[("user", "w1 w2"), ("assistant", "w3"), ("user", f"w{i}")] for i in range(4, 8)]
    rows = [{"prompt": [{"role": role, "content": text} for role, text in some]} for some in turns]
    (models.folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates = [models.folder / "plain.jinja", models.folder / "other.jinja"]
    for template, end in zip(templates, ("", "w60"), strict=True):
        template.write_text("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}" + end)
    both = [
        {"path": str(models.folder / name / "model"), "chat_template": str(template)}
        for name, template in zip(("base", "twin"), templates, strict=True)
    ]
    data = {"prompts": str(models.folder / "chats.jsonl"), "completion_column": None}
    with Misbehaving(judge_of(longest_wins)) as server:
        found = models.evaluate("chats", data=data, judge={"url": server.url, "model": "j"}, models=both)
        asked = [request["messages"][0]["content"] for request in server.requests]
    # Comparisons are asked at the same time, in no order: each prompt twice.
    assert sum("user: w1 w2\n\nassistant: w3\n\nuser: w4\n" in one for one in asked) == 2
    assert [row["prompt"] for row in found.rows] == [row["prompt"] for row in rows]
    said = [[one["response"] for one in found.told(name)] for name in ("base", "twin")]
    assert said[0] != said[1], "the same weights, but other words before the answer"
    assert all(abs(one["kl"]) < 1e-5 for one in found.told("twin"))
    assert found.models["base"]["perplexity"] is None and "No perplexity" in found.printed


# -- services that fail ------------------------------------------------------------------------------------------------


def scored(fails: Callable[[list[str]], bool]) -> Callable[[dict, dict], Reply]:
    def reply(payload: dict, headers: dict) -> Reply:
        if fails(payload["prompts"]):
            return Reply({"error": "broken"}, 500)
        return Reply({"scores": small_numbers(payload["prompts"], payload["responses"])})

    return reply


def test_responses_without_a_score_are_kept_marked_and_counted(models: Models, short_pauses) -> None:
    bad = json.loads(models.prompts.read_text().splitlines()[0])["prompt"]
    with Misbehaving(scored(lambda prompts: bad in prompts)) as server:
        reward = {"url": server.url, "retries": 0, "timeout_s": 60}
        found = models.evaluate("unscored", ("base", "other"), scores={"reward": reward})
    told = found.told("base")
    missing = [i for i, one in enumerate(told) if one["scores"]["reward"] is None]
    assert 0 in missing and len(missing) < PROMPTS, "a chunk of five goes without"
    assert all("HTTP 500" in told[i]["failures"]["reward"] and told[i]["response"] for i in missing)
    assert "failures" not in told[next(i for i in range(PROMPTS) if i not in missing)]
    measured = found.models["base"]
    assert measured["score/unscored"] == len(missing)
    known = [one["scores"]["reward"] for one in told if one["scores"]["reward"] is not None]
    assert measured["score/mean"] == pytest.approx(fmean(known))
    (rate,) = [r for r in found.rates if r["judge"].endswith("(reward)")]
    either = {i for i in range(PROMPTS) if any(found.told(n)[i]["scores"]["reward"] is None for n in ("base", "other"))}
    assert rate["unjudged"] == len(either) and rate["wins"] + rate["ties"] + rate["losses"] == PROMPTS - len(either)
    assert f"{len(missing)} of 24 responses have no reward score" in found.printed


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_service_that_goes_fails_the_run_and_the_rest_is_kept(
    models: Models, short_pauses, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It scores the first model's responses and no others."""
    answered: list[int] = []
    score_each = RemoteReward.score_each

    def reply(payload: dict, headers: dict) -> Reply:
        if sum(answered) == PROMPTS:
            return Reply({"error": "broken"}, 500, how="hang" if how == "hangs" else "")
        answered.append(len(payload["prompts"]))
        return Reply({"scores": small_numbers(payload["prompts"], payload["responses"])})

    def waiting(remote: RemoteReward, *texts: list[str]) -> tuple[list[float], list[str | None]]:
        # Little time only where no answer is expected; the workers are in this process.
        if how == "hangs" and sum(answered) == PROMPTS:
            remote.endpoint = dataclasses.replace(remote.endpoint, timeout_s=0.3)
        return score_each(remote, *texts)

    monkeypatch.setattr(RemoteReward, "score_each", waiting)
    name, cause = f"gone-{how}", {"fails": "HTTP 500", "hangs": "no answer within 0.3 s"}[how]
    with Misbehaving(reply) as server:
        reward = {"url": server.url, "retries": 1, "timeout_s": 60}
        with pytest.raises(
            RunFailed, match=rf"no response of other got a score from scores.reward.*{cause}.*is in .*{name}"
        ):
            models.evaluate(name, ("base", "other"), scores={"reward": reward})
        chunks = math.ceil(PROMPTS / 5)
        # The check's; then those that are answered; three that are tried twice; and one sample of each of the last ones.
        tried = len(server.requests) - 1 - chunks
        assert tried == 3 * 2 + (chunks - 3) if how == "fails" else tried <= 3 * 2 + (chunks - 3)
    found = Result(models.folder / name)
    base, other = found.models["base"], found.models["other"]
    assert base["score/unscored"] == 0 and other["score/unscored"] == PROMPTS and other["score/mean"] is None
    assert other["kl/mean"] > 0.5 and other["perplexity"] > 1 and any(told["response"] for told in found.told("other"))
    causes = [told["failures"]["reward"] for told in found.told("other")]
    kinds = [sum(words in cause for cause in causes) for words in ("in 2 attempts:", "in 1 attempt:", "not asked:")]
    assert kinds == [3 * 5, chunks - 3, PROMPTS - 3 * 5 - (chunks - 3)]
    assert not any("failures" in told for told in found.told("base"))
    rate = found.rate("other", "base", next(r["judge"] for r in found.rates if r["judge"].endswith("(reward)")))
    assert rate["unjudged"] == PROMPTS and rate["rate"] is None
    assert found.rate("other", "base", "helpfulness")["rate"] is not None
    assert "24 of 24 responses have no reward score; they are kept and marked. Mostly: " in models.printed
    assert cause in (found.folder / "log.txt").read_text() and "<svg" in (found.folder / "report.html").read_text()
