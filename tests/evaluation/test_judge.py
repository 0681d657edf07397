"""A judge behind a real HTTP server, well and badly behaved."""

from __future__ import annotations

import re

import pytest

from rayrlhf.errors import InputRefused
from rayrlhf.evaluation.judge import DEFAULT_TEMPLATE, OpenAIJudge, parse_verdict
from rayrlhf.evaluation.win_rate import judged_win_rate
from tests.serving.misbehaving import Misbehaving, Reply


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("rayrlhf.http_json.FIRST_PAUSE_S", 0.01)


def says(text: str) -> Reply:
    return Reply({"choices": [{"message": {"role": "assistant", "content": text}}]})


def shown(payload: dict) -> tuple[str, str, str]:
    """Prompt and the two responses, in the order in which the judge sees them."""
    content = payload["messages"][0]["content"]
    names = (("Prompt", "prompt"), ("Response A", "response A"), ("Response B", "response B"))
    first, second, third = (content.split(f"[{b}]\n")[1].split(f"\n[End of {e}]")[0] for b, e in names)
    return first, second, third


def longer_wins(payload: dict, headers: dict) -> Reply:
    _, first, second = shown(payload)
    verdict = "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return says(f"Not [[{'B' if verdict == 'A' else 'A'}]] at all. [[{verdict}]]")


def test_verdicts_name_the_response_in_both_orders():
    with Misbehaving(longer_wins) as server:
        judge = OpenAIJudge(server.url + "/v1", "the-judge")
        found = judge.compare(["p", "q", "r"], ["long one", "x", "same"], ["short", "longer", "same"])
        assert found.first == found.second == ["a", "b", "tie"]
        assert found.failures == [] and found.lines() == [] and found.complete == [0, 1, 2]
        assert set(server.paths) == {"/v1/chat/completions"} and len(server.requests) == 6
        assert {(r["model"], r["temperature"]) for r in server.requests} == {("the-judge", 0)}
        orders = {shown(r) for r in server.requests}
        assert ("p", "long one", "short") in orders and ("p", "short", "long one") in orders


def test_a_judge_who_likes_the_first_place_gives_ties():
    with Misbehaving(lambda payload, headers: says("[[A]]")) as server:
        found = OpenAIJudge(server.url, "j").compare(["p", "q"], ["x", "y"], ["u", "v"])
    assert found.first == ["a", "a"] and found.second == ["b", "b"]
    rate = judged_win_rate(found.first, found.second)
    assert (rate.ties, rate.disagreements, rate.rate) == (2, 2, 0.5)


def test_places_inside_texts_stay_as_they_are():
    with Misbehaving(longer_wins) as server:
        OpenAIJudge(server.url, "j").compare(["what is {first}?"], ["{second} {prompt}"], ["{first}\\1"])
        assert {shown(r) for r in server.requests} == {
            ("what is {first}?", "{second} {prompt}", "{first}\\1"),
            ("what is {first}?", "{first}\\1", "{second} {prompt}"),
        }


@pytest.mark.parametrize(
    "reply, cause",
    [
        (Reply({"error": {"message": "bad key sk-very-secret"}}, 401), r"HTTP 401.*the token.*bad key \*\*\*"),
        (Reply({}, 429, Retry_After="0"), "HTTP 429"),
        (Reply({}, 500), "HTTP 500"),
        (Reply(how="hang"), "no answer within 0.8 s"),
        (Reply(how="drop"), "disconnected"),
        (Reply(raw=b"<html>502</html>"), "no JSON"),
        (Reply({"choices": []}), r"without choices\[0\].message.content"),
        (Reply(["A"]), r"without choices\[0\].message.content"),
        (Reply({"choices": [{"message": {"content": None}}]}), "without choices"),
        (says("I would rather not say."), r"no verdict \[\[A\]\].*rather not say"),
    ],
)
def test_after_the_last_attempt_samples_are_kept_and_marked(reply, cause, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "sk-very-secret")
    tokens = set()

    def answer(payload, headers):
        tokens.add(headers.get("authorization") or headers.get("Authorization"))
        return reply if shown(payload)[0] == "bad" else longer_wins(payload, headers)

    hangs = reply.how == "hang"
    with Misbehaving(answer) as server:
        judge = OpenAIJudge(server.url, "j", token_env="JUDGE_TOKEN", timeout_s=0.8 if hangs else 60, retries=2)
        found = judge.compare(["good", "bad", "fine"], ["aa", "a", "a"], ["b", "b", "bb"])
        server.until(lambda requests: sum(shown(r)[0] == "bad" for r in requests) >= 6)
        asked = [shown(r)[0] for r in server.requests]
    assert found.first == ["a", None, "b"] and found.second == ["a", None, "b"]
    assert found.failed == 1 and found.complete == [0, 2]
    assert [(f.index, f.order) for f in found.failures] == [(1, "first"), (1, "second")]
    assert asked.count("bad") == 6
    # Where time is short a good answer may come too late once.
    assert asked.count("good") >= 2 if hangs else asked.count("good") == 2
    text = "\n".join([*found.lines(), *(f.cause for f in found.failures)])
    assert re.search(cause, text) and "1 of 3 prompts" in text and server.url in text and "sk-very-secret" not in text
    assert tokens == {"Bearer sk-very-secret"}
    rate = judged_win_rate(found.first, found.second)
    assert (rate.wins, rate.losses, rate.unjudged) == (1, 1, 1)


def test_a_fault_that_passes_is_overcome():
    seen: dict[tuple, int] = {}

    def answer(payload, headers):
        key = shown(payload)
        seen[key] = seen.get(key, 0) + 1
        faults = [Reply({}, 401), says("hm"), Reply(how="drop")]
        return faults[seen[key] - 1] if seen[key] <= 3 else longer_wins(payload, headers)

    with Misbehaving(answer) as server:
        found = OpenAIJudge(server.url, "j", retries=3).compare(["p", "q"], ["xx", "x"], ["u", "uu"])
        assert found.first == found.second == ["a", "b"] and not found.failures
        assert len(server.requests) == 16


def test_a_judge_who_is_gone_is_not_asked_for_ever():
    with Misbehaving(lambda payload, headers: Reply({}, 401)) as server:
        n = 60
        found = OpenAIJudge(server.url, "j", retries=1).compare(["p"] * n, ["x"] * n, ["y"] * n)
        assert found.first == found.second == [None] * n and len(found.failures) == 2 * n and found.failed == n
        # 16 in a row, and those that were under way then, each twice
        assert len(server.requests) <= 2 * (16 + 8)
    causes = [f.cause for f in found.failures]
    assert sum("none is configured" in c and not c.startswith("not asked") for c in causes) <= 24
    assert sum(c.startswith("not asked") for c in causes) >= 2 * n - 24


def test_many_failures_with_verdicts_in_between_end_nothing():
    def answer(payload, headers):
        return Reply({}, 500) if shown(payload)[0] == "bad" else longer_wins(payload, headers)

    with Misbehaving(answer) as server:
        found = OpenAIJudge(server.url, "j", retries=0).compare(["bad", "good"] * 40, ["x"] * 80, ["y"] * 80)
        assert len(server.requests) == 160 and found.failed == 40 and found.complete == list(range(1, 80, 2))


def test_the_last_verdict_of_an_answer_counts():
    assert parse_verdict("[[A]] has a flaw, so [[B]]") == "second"
    assert parse_verdict("[[ a ]]") == "first"
    assert parse_verdict("[[TIE]]") == parse_verdict("[[C]]") == "tie"
    for nonsense in ("", "A", "[A]", "[[D]]"):
        with pytest.raises(ValueError, match="no verdict"):
            parse_verdict(nonsense)


def test_nothing_to_judge_asks_nobody():
    found = OpenAIJudge("http://127.0.0.1:9", "j").compare([], [], [])
    assert found.first == found.second == found.failures == []
    with pytest.raises(ValueError, match="1 prompts for 1 and 2"):
        OpenAIJudge("http://127.0.0.1:9", "j").compare(["p"], ["a"], ["b", "c"])


def test_all_bad_settings_are_listed_together(monkeypatch):
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(InputRefused) as refused:
        OpenAIJudge("localhost", "", prompt_template="{prompt} {first}", timeout_s=0, retries=-1, max_tokens=0)
    text = str(refused.value)
    assert len(refused.value.problems) == 6 and all(
        w in text for w in ("{second}", "model", "url", "timeout_s", "retries")
    )
    with pytest.raises(InputRefused, match="NO_TOKEN"):
        OpenAIJudge("http://h", "j", token_env="NO_TOKEN")
    assert all(place in DEFAULT_TEMPLATE for place in ("{prompt}", "{first}", "{second}"))
