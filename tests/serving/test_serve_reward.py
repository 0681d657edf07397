"""The reward service and its client, over real sockets."""

from __future__ import annotations

import http.client
import json
import math
import re
import socket
import threading
from dataclasses import replace

import pytest
import torch

from rayrlhf.actors.reward_http import RemoteReward, RemoteRewardSource, check_service
from rayrlhf.batch import Batch
from rayrlhf.config.schema import ScoreSource
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.serving import RewardServer
from tests.serving.misbehaving import Misbehaving, Reply
from tests.support.ports import deaf_port

TOKEN = "s3cret-token"


def by_length(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(p) + len(r) / 1000 for p, r in zip(prompts, responses, strict=True)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("rayrlhf.http_json.FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server():
    with RewardServer(by_length, name="length", token=TOKEN, max_bytes=2000, max_samples=5) as served:
        yield served


def ask(server: RewardServer, method: str, path: str, body: bytes | None = None, token: str | None = TOKEN, **headers):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read()), response
    connection.close()
    return answer


def test_scores_come_back_in_order(server):
    body = json.dumps({"prompts": ["a", "bb"], "responses": ["xyz", "ü"]}).encode()
    assert ask(server, "POST", "/score", body)[:2] == (200, {"scores": [1.003, 2.001]})
    assert ask(server, "POST", "/score", b'{"prompts": [], "responses": []}')[:2] == (200, {"scores": []})


def test_health_needs_no_token(server):
    assert ask(server, "GET", "/health", token=None)[:2] == (200, {"status": "ok", "name": "length"})


BAD = [
    ("GET", "/nowhere", None, 404, "not_found"),
    ("GET", "/score", None, 405, "bad_method"),
    ("POST", "/health", b"{}", 405, "bad_method"),
    ("DELETE", "/score", None, 405, "bad_method"),
    ("POST", "/score", b"{", 400, "bad_json"),
    ("POST", "/score", b"\xff\xfe", 400, "bad_json"),
    ("POST", "/score", b"[" * 1500, 400, "bad_json"),
    ("POST", "/score", b"[1]", 422, "bad_input"),
    ("POST", "/score", b'{"prompts": ["a"]}', 422, "bad_input"),
    ("POST", "/score", b'{"prompts": ["a"], "responses": "b"}', 422, "bad_input"),
    ("POST", "/score", b'{"prompts": ["a"], "responses": [7]}', 422, "bad_input"),
    ("POST", "/score", b'{"prompts": ["a"], "responses": ["b", "c"]}', 422, "bad_input"),
    ("POST", "/score", b'{"prompts": ["a"], "responses": ["b"], "promts": []}', 422, "bad_input"),
    ("POST", "/score", json.dumps({"prompts": ["a"] * 6, "responses": ["b"] * 6}).encode(), 413, "too_large"),
    ("POST", "/score", b" " * 2001, 413, "too_large"),
    ("POST", "/score", b" " * 400_000, 413, "too_large"),
]


@pytest.mark.parametrize("method, path, body, status, code", BAD)
def test_each_kind_of_bad_input_has_its_answer(server, method, path, body, status, code):
    got, answer, _ = ask(server, method, path, body)
    assert (got, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"]


def test_bad_input_is_named_with_its_place(server):
    body = b'{"prompts": ["a", null], "responses": {"b": 1}, "more": 1}'
    message = ask(server, "POST", "/score", body)[1]["error"]["message"]
    assert "prompts[1] is null" in message and "responses is an object" in message and "'more'" in message


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer é"]
)
def test_without_the_token_nothing_is_scored(header):
    called = []
    with RewardServer(lambda p, r: called.append(1) or [0.0], name="x", token=TOKEN) as server:
        given = {} if header is None else {"Authorization": header}
        body = b'{"prompts": ["a"], "responses": ["b"]}'
        status, answer, response = ask(server, "POST", "/score", body, token=None, **given)
    assert (status, answer["error"]["code"]) == (401, "bad_token")
    assert response.headers["WWW-Authenticate"] == "Bearer" and not called
    assert TOKEN not in json.dumps(answer)


def test_a_body_without_length_and_broken_http_are_refused(server):
    host, port = server.url.removeprefix("http://").split(":")
    for request, status in (
        (f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n", b"411"),
        (
            f"POST /score HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"411",
        ),
        (f"POST /score HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: -5\r\n\r\n", b"411"),
        ("BREW /score HTTP/1.1\r\nHost: x\r\n\r\n", b"501"),
        ("GET /health HTTP/9.9.9\r\n\r\n", b"400"),
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(request.encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b"")) if status != b"411" else connection.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.split()[1] == status, answer
        if body:
            assert json.loads(body)["error"]["code"]


def test_a_connection_goes_on_after_refused_content(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for body, status in ((b"{", 400), (b'{"prompts": ["a"], "responses": ["b"]}', 200)):
        connection.request("POST", "/score", body, {"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


@pytest.mark.parametrize(
    "scorer, cause",
    [
        (lambda p, r: 1 / 0, "ZeroDivisionError"),
        (lambda p, r: [1.0], "1 numbers for 2"),
        (lambda p, r: [1.0, math.nan], "nan for responses[1]"),
        (lambda p, r: ["x", "y"], "ValueError"),
    ],
)
def test_a_scorer_that_fails_is_a_500_and_a_failed_run(scorer, cause):
    with RewardServer(scorer, name="x") as server:
        body = b'{"prompts": ["a", "b"], "responses": ["c", "d"]}'
        status, answer, _ = ask(server, "POST", "/score", body, token=None)
        assert (status, answer["error"]["code"]) == (500, "scorer_failed") and cause in answer["error"]["message"]
        with pytest.raises(RunFailed, match="HTTP 500"):
            RemoteReward(server.url, retries=1).score(["a", "b"], ["c", "d"])


def test_the_scorer_is_called_by_one_thread_at_a_time():
    inside, most, lock = [], [], threading.Lock()

    def scorer(prompts, responses):
        with lock:
            inside.append(1)
            most.append(len(inside))
        threading.Event().wait(0.01)
        with lock:
            inside.pop()
        return [float(p) for p in prompts]

    with RewardServer(scorer, name="x") as server:
        numbers = [str(i) for i in range(40)]
        assert RemoteReward(server.url, batch=3).score(numbers, numbers) == [float(i) for i in range(40)]
    assert max(most) == 1 and len(most) == 14


def test_it_ends_when_another_thread_closes_it():
    server = RewardServer(by_length, name="x")
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    assert RemoteReward(server.url).score(["a"], [""]) == [1.0]
    server.close()
    serving.join(60)
    assert not serving.is_alive()
    server.close()
    RewardServer(by_length, name="never served").close()


def test_what_can_not_be_served_is_refused(server):
    with pytest.raises(InputRefused) as refused:
        RewardServer(by_length, name="x", host="0.0.0.0", max_bytes=0)
    assert len(refused.value.problems) == 2 and "token" in str(refused.value)
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(InputRefused, match="listened"):
        RewardServer(by_length, name="x", port=port)


# -- the client --------------------------------------------------------------------------------------------------------


def test_server_and_client_understand_each_other(server, monkeypatch):
    monkeypatch.setenv("THE_TOKEN", TOKEN)
    prompts, responses = ["a" * i for i in range(13)], ["é\ud800\u2028"] * 13
    remote = RemoteReward(server.url + "/", "THE_TOKEN", batch=4)
    assert remote.score(prompts, responses) == pytest.approx([i + 0.003 for i in range(13)])
    assert remote.score([], []) == []
    assert TOKEN not in repr(remote.endpoint)


def test_it_tries_again_and_then_goes_on():
    answers = iter(
        [
            Reply({"error": "busy"}, 503, Retry_After="0"),
            Reply(raw=b"<html>"),
            Reply(how="drop"),
            Reply({"scores": [1.0]}),
            Reply({"scores": [3, 4.5]}),
        ]
    )
    with Misbehaving(lambda payload, headers: next(answers)) as server:
        assert RemoteReward(server.url, retries=4).score(["a", "b"], ["c", "d"]) == [3.0, 4.5]
        assert len(server.requests) == 5 and server.paths == ["/score"] * 5
        assert all(request == {"prompts": ["a", "b"], "responses": ["c", "d"]} for request in server.requests)


@pytest.mark.parametrize(
    "reply, cause",
    [
        (Reply(how="hang"), "no answer within 0.5 s"),
        (Reply({"scores": [1.0, 2.0]}, how="trickle"), "no answer within 0.5 s"),
        (Reply(how="drop"), "disconnected"),
        (Reply({"scores": [1.0, 2.0]}, how="cut"), "connection lost|closed|complete"),
        (Reply({"error": TOKEN}, 401), r"HTTP 401.*doesn't accept the token.*\*\*\*"),
        (Reply({}, 500), "HTTP 500"),
        (Reply(raw=b"\xff"), "no JSON"),
        (Reply([1.0, 2.0]), 'without a list "scores"'),
        (Reply({"scores": [1.0]}), "1 scores for 2 responses"),
        (Reply({"scores": [1.0, None]}), "score 2 is None"),
        (Reply({"scores": [True, 1.0]}), "score 1 is True"),
        (Reply(raw=b'{"scores": [NaN, 1]}'), "score 1 is nan"),
        (Reply(raw=b'{"scores": [1e999, 1]}'), "score 1 is inf"),
        (Reply({"scores": [10**400, 1]}), "not a finite float32 number"),
    ],
)
def test_what_stays_wrong_fails_the_run_with_address_and_cause(reply, cause, monkeypatch):
    monkeypatch.setenv("THE_TOKEN", TOKEN)
    timeout_s = 0.5 if reply.how in ("hang", "trickle") else 60
    with Misbehaving(lambda payload, headers: reply) as server:
        with pytest.raises(RunFailed, match=cause) as failed:
            RemoteReward(server.url, "THE_TOKEN", timeout_s=timeout_s, retries=2).score(["a", "b"], ["c", "d"])
        server.until(lambda requests: len(requests) >= 3)
        assert len(server.requests) == 3
    assert f"{server.url}/score" in str(failed.value) and "samples 1-2 of 2" in str(failed.value)
    assert "3 attempts" in str(failed.value) and TOKEN not in str(failed.value)


@pytest.mark.parametrize("status", [400, 404, 413, 422, 302])
def test_what_the_same_request_can_not_cure_is_not_repeated(status):
    with Misbehaving(lambda payload, headers: Reply({}, status, Location="http://127.0.0.1:9/")) as server:
        with pytest.raises(RunFailed, match=f"in 1 attempt: HTTP {status}"):
            RemoteReward(server.url).score(["a"], ["b"])
        assert len(server.requests) == 1


def test_nobody_listens():
    with deaf_port() as port, pytest.raises(RunFailed, match="connect"):
        RemoteReward(f"http://127.0.0.1:{port}", retries=1).score(["a"], ["b"])


def test_pauses_double_up_to_their_bound(monkeypatch):
    monkeypatch.setattr("rayrlhf.http_json.FIRST_PAUSE_S", 0.5)
    endpoint = RemoteReward("http://127.0.0.1", timeout_s=10, retries=8).endpoint
    pauses = [endpoint.pause_s(attempt) for attempt in range(1, 9)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert endpoint.patience_s == 9 * 10 + sum(pauses)


def test_bad_settings_are_refused(monkeypatch):
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(InputRefused, match="NO_TOKEN is not set"):
        RemoteReward("http://x", "NO_TOKEN")
    with pytest.raises(InputRefused) as refused:
        RemoteReward("ftp://x", timeout_s=0, retries=-1)
    assert len(refused.value.problems) == 3
    for url in ("localhost:8000", "http://", "http://user:pw@host", "http://host:99999", "http://h\n"):
        with pytest.raises(InputRefused, match="url"):
            RemoteReward(url)
    with pytest.raises(InputRefused, match="batch"):
        RemoteReward("http://x", batch=0)


def test_as_a_source_of_reward(server, monkeypatch):
    class Words:
        def batch_decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return ["".join(map(str, sample)) for sample in ids]

    monkeypatch.setenv("THE_TOKEN", TOKEN)
    batch = Batch.from_samples(
        {"tokens": [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7])]},
        {"prompt_length": torch.tensor([1, 1]), "prompt_text": ["pp", "q"]},
    )
    scores = RemoteRewardSource(RemoteReward(server.url, "THE_TOKEN"), "far", Words()).score(batch)
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx([2.002, 1.003])


# -- some samples fail --------------------------------------------------------------------------------------------


def test_a_request_that_fails_for_good_costs_its_own_samples_only():
    def answer(payload, headers):
        return Reply({"scores": [float(p) for p in payload["prompts"]]}, 422 if "3" in payload["prompts"] else 200)

    numbers = [str(i) for i in range(10)]
    with Misbehaving(answer) as server:
        remote = RemoteReward(server.url, batch=3)
        scores, causes = remote.score_each(numbers, numbers)
        assert remote.score_each([], []) == ([], []) and len(server.requests) == 4
    assert [i for i in range(10) if math.isnan(scores[i])] == [3, 4, 5]
    assert [scores[i] for i in range(10) if i not in (3, 4, 5)] == [0, 1, 2, 6, 7, 8, 9]
    assert [cause is None for cause in causes] == [i not in (3, 4, 5) for i in range(10)]
    assert f"{server.url}/score: samples 4-6 of 10 got no scores in 1 attempt: HTTP 422" in causes[3]


def test_a_service_that_hangs_is_given_up_and_found_again():
    """Requests of two samples, two attempts each; the service comes back after the second call."""
    back = threading.Event()

    def answer(payload, headers):
        return Reply({"scores": [float(p) for p in payload["prompts"]]}) if back.is_set() else Reply(how="hang")

    numbers = [str(i) for i in range(40)]
    with Misbehaving(answer) as server:
        remote = RemoteReward(server.url, timeout_s=0.2, retries=1, batch=2)
        scores, causes = remote.score_each(numbers, numbers)
        gone = [not cause.startswith("not asked") for cause in causes]
        under_way = sum(gone) // 2  # four at a time: those that were asked when the third one failed
        assert 3 <= under_way <= 4 + 2 and all(map(math.isnan, scores)) and all(gone[: 2 * under_way])
        assert all(cause.endswith("in 2 attempts: no answer within 0.2 s") for cause in causes[: 2 * under_way])
        # How many had failed before depends on which were under way.
        told = r"not asked: \d+ requests in a row had failed, the last with: no answer within [\d.]+ s"
        assert all(re.fullmatch(told, cause) for cause in causes[2 * under_way :])

        remote.endpoint = replace(remote.endpoint, timeout_s=1)
        scores, causes = remote.score_each(numbers, numbers)
        assert all(map(math.isnan, scores)) and "samples 1-1 of 40 got no scores in 1 attempt" in causes[0]
        assert len(set(causes[1:])) == 1 and re.fullmatch(told, causes[1])
        server.until(lambda requests: {"prompts": ["0"], "responses": ["0"]} in requests)
        asked = sorted(len(request["prompts"]) for request in server.requests)
        assert asked[:2] == [1, 2] and len(asked) <= 1 + 2 * under_way, "one sample alone, one attempt"

        # Other samples than before: what was given up may be read by the server only now.
        back.set()
        remote.endpoint = replace(remote.endpoint, timeout_s=60)
        fresh = [str(i) for i in range(100, 140)]
        assert remote.score_each(fresh, fresh) == ([float(i) for i in range(100, 140)], [None] * 40)
        found = [len(request["prompts"]) for request in server.requests if request["prompts"][0] in fresh]
        assert sorted(found) == [1, 1, *[2] * 19]
        back.clear()
        remote.endpoint = replace(remote.endpoint, timeout_s=0.2)
        remote.score_each(numbers[:2], numbers[:2])
        back.set()
        remote.endpoint = replace(remote.endpoint, timeout_s=60)
        assert remote.score_each(["207", "208"], ["", ""]) == ([207, 208], [None, None])
        assert [request["prompts"] for request in server.requests if "207" in request["prompts"]] == [["207", "208"]]


def test_answers_in_between_and_requests_that_are_turned_down_give_up_nothing():
    def answer(payload, headers):
        (prompt,) = payload["prompts"]
        return Reply({"scores": [1.0]}, {"bad": 422, "busy": 503}.get(prompt, 200))

    prompts = ["busy", "busy", "good", "busy", "busy", "bad", "bad", "bad", "bad", "busy", "busy", "good"]
    with Misbehaving(answer) as server:
        remote = RemoteReward(server.url, retries=0, batch=1)
        causes = [remote.score_each([prompt], [""])[1][0] for prompt in prompts]
        assert len(server.requests) == len(prompts)
    assert [cause is None for cause in causes] == [prompt == "good" for prompt in prompts]


# -- before a run ---------------------------------------------------------------------------------------------------


def test_a_service_that_scores_is_accepted(server, monkeypatch):
    monkeypatch.setenv("THE_TOKEN", TOKEN)
    check_service(ScoreSource(url=server.url, token_env="THE_TOKEN"))
    with pytest.raises(InputRefused, match="HTTP 401.*it wants a token"):
        check_service(ScoreSource(url=server.url))
    monkeypatch.setenv("THE_TOKEN", "another")
    with pytest.raises(InputRefused, match="HTTP 401.*doesn't accept the token"):
        check_service(ScoreSource(url=server.url, token_env="THE_TOKEN"))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply({}, 401), "HTTP 401.*doesn't accept the token of token_env"),
        (Reply({}, 403), "HTTP 403.*doesn't accept"),
        (Reply({}, 404), "HTTP 404 Not Found, so it is no reward service"),
        (Reply({}, 405), "HTTP 405.*no reward service"),
        (Reply({}, 308, Location="https://elsewhere/score"), "redirects to 'https://elsewhere/score'"),
        (Reply(raw=b"<html>"), "no reward service"),
        (Reply(raw=b"\xff"), "no reward service"),
        (Reply({"score": []}), 'no reward service: an answer without a list "scores"'),
        (Reply({"scores": [1.0]}), "no reward service: 1 scores for 0 responses"),
        (Reply(raw=b"[" * 20_000), "no reward service: .*recursion"),
        (Reply(raw=b" " * 200_000), "more than 65536 bytes"),
    ],
)
def test_what_is_no_reward_service_is_refused_before_a_run(reply, said, monkeypatch):
    monkeypatch.setenv("THE_TOKEN", TOKEN)
    with Misbehaving(lambda payload, headers: reply) as server:
        with pytest.raises(InputRefused, match=said) as refused:
            check_service(ScoreSource(url=server.url, token_env="THE_TOKEN"))
        assert server.requests == [{"prompts": [], "responses": []}] and server.paths == ["/score"]
    assert f"reward service {server.url}/score" in str(refused.value) and TOKEN not in str(refused.value)


@pytest.mark.parametrize(
    "reply",
    [
        Reply({}, 500),
        Reply({}, 503),
        Reply({}, 422),
        Reply(how="hang"),
        Reply(how="drop"),
        Reply(raw=b" " * 99, how="trickle"),
    ],
)
def test_what_only_real_responses_can_tell_is_left_to_the_run(reply):
    with Misbehaving(lambda payload, headers: reply) as server:
        check_service(ScoreSource(url=server.url, timeout_s=2 if reply.how in ("hang", "trickle") else 30))
        server.until(lambda requests: len(requests) >= 1)
        assert len(server.requests) == 1


def test_no_token_no_listener_and_no_host_are_refused(monkeypatch):
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(InputRefused, match="NO_TOKEN is not set"):
        check_service(ScoreSource(url="http://127.0.0.1:1", token_env="NO_TOKEN"))
    with deaf_port() as port:
        for address in (f"http://127.0.0.1:{port}", "http://host.invalid"):
            with pytest.raises(InputRefused, match="can't be reached: .*start it, or correct url"):
                check_service(ScoreSource(url=address))
