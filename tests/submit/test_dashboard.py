"""What is said where no dashboard lets us in: one message, within 10 s."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from rayrlhf.drivers import submit_cluster
from rayrlhf.drivers.submit_cluster import Dashboard, check_dashboard, dashboard_url, find_token
from rayrlhf.errors import InputRefused, RunFailed
from tests.support.ports import deaf_port

VERSION = json.dumps({"version": "4", "ray_version": "2.60.0"})


@pytest.fixture
def serve():
    """Starts servers that answer every request with what a function of its headers gives: status and text."""
    servers = []

    def start(answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, text = answer(self.headers) if self.path == "/api/version" else (404, "")
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                """Nothing on the terminal."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()


def with_token(headers):
    """As Ray answers with token authentication."""
    given = headers.get("Authorization")
    return (401, "Missing") if given is None else (200, VERSION) if given == "Bearer right" else (403, "Invalid")


def refusal(url: str, environment=None) -> str:
    started = time.monotonic()
    with pytest.raises(InputRefused) as refused:
        check_dashboard(url, environment or {"HOME": "/nowhere"})
    assert time.monotonic() - started < 60
    (problem,) = refused.value.problems
    return problem


def test_token(serve, tmp_path):
    url = serve(with_token)
    assert check_dashboard(url, {"RAY_AUTH_TOKEN": "right"}) == {"Authorization": "Bearer right"}
    (tmp_path / "token").write_text("right\n")
    assert check_dashboard(url, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("right")
    assert check_dashboard(url, {"HOME": str(tmp_path)})
    assert "there is none here" in refusal(url)
    assert "there is none here" in refusal(url, {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"})
    assert "doesn't take the token" in refusal(url, {"RAY_AUTH_TOKEN": "wrong"})
    with pytest.raises(InputRefused, match="RAY_AUTH_TOKEN_PATH: .* can't be read"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nothing")})


def test_the_token_stays_here_unless_it_is_asked_for(serve):
    seen = []
    url = serve(lambda headers: (seen.append(headers.get("Authorization")), (200, VERSION))[1])
    assert check_dashboard(url, {"RAY_AUTH_TOKEN": "secret"}) == {}
    assert seen == [None]


def test_something_else_answers(serve):
    assert "is no Ray dashboard (GET /api/version: 200 OK)" in refusal(serve(lambda _: (200, "<html>")))
    assert "is no Ray dashboard (GET /api/version: 404 Not Found)" in refusal(serve(lambda _: (404, "")))
    assert "is no Ray dashboard" in refusal(serve(lambda _: (200, "[1]")))
    assert "Ray 2.9.3 runs" in refusal(serve(lambda _: (200, json.dumps({"ray_version": "2.9.3"}))))


def test_nobody_answers(monkeypatch):
    assert submit_cluster.CHECK_SECONDS < 10
    monkeypatch.setattr(submit_cluster, "CHECK_SECONDS", 3.0)
    with deaf_port() as port:
        assert "no dashboard answers" in refusal(f"http://127.0.0.1:{port}")
    assert "no dashboard answers" in refusal("http://no-such-host.invalid:8265")
    monkeypatch.setattr(submit_cluster, "ANSWER_SECONDS", 0.5)
    with socket.socket() as silent:  # takes the connection, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "no dashboard answers" in refusal(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_two_slow_answers_have_one_deadline(serve, monkeypatch):
    """The first one asks for a token, the second one doesn't come."""
    monkeypatch.setattr(submit_cluster, "CHECK_SECONDS", 2.0)
    url = serve(lambda headers: (time.sleep(1.5), with_token(headers))[1])
    assert "no answer within 2 s" in refusal(url, {"RAY_AUTH_TOKEN": "right"})


PIECE_SECONDS = 2.5


class Slow(BaseHTTPRequestHandler):
    """Takes an archive of any size, 0.5 MiB in 0.15 s, and jobs; of those called ``lost`` it knows nothing."""

    received = 0
    jobs: ClassVar[list[str]] = []
    answers = True
    proxy = False

    def do_GET(self):
        known = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "true"}
        found = {"/api/version": VERSION, **{f"/api/jobs/{job}": json.dumps(known) for job in self.jobs}}
        self.reply(200 if self.path in found else 404, found.get(self.path, ""))

    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        while left:
            time.sleep(0.15)
            left -= len(self.rfile.read(min(left, 1 << 19)))
        type(self).received = int(self.headers["Content-Length"])
        self.reply(200, "")

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"]
        if job != "lost":
            self.jobs.append(job)
        if job == "wrong":
            self.reply(500, "no such entrypoint")
        elif self.answers:
            self.reply(200, json.dumps({"job_id": job, "submission_id": job}))
        elif self.proxy:
            self.reply(504, "upstream request timeout")

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        """Nothing on the terminal."""


@pytest.fixture
def slow(monkeypatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(submit_cluster, "UPLOAD_SECONDS", (PIECE_SECONDS, 60.0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # what lies there counts as sent
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Dashboard(f"http://127.0.0.1:{server.server_address[1]}", {})
    server.shutdown()


def submit(dashboard: Dashboard, job: str, archive: Path, nbytes: int) -> None:
    archive.write_bytes(bytes(nbytes))
    dashboard.submit(job, archive, env_vars={}, setup_hook="a.b", entrypoint="true")


def test_an_upload_may_take_longer_than_any_of_its_pieces(slow, tmp_path):
    begun = time.monotonic()
    submit(slow, "a-1", tmp_path / "job.zip", 18 << 20)
    assert time.monotonic() - begun > 2 * PIECE_SECONDS and Slow.received == 18 << 20 and Slow.jobs[-1] == "a-1"


@pytest.mark.parametrize("proxy", [False, True])
def test_a_job_whose_acceptance_gets_lost_is_asked_for(slow, tmp_path, monkeypatch, proxy):
    """The connection ends without an answer, or a proxy gives one of its own: to a job that runs, and to one that was never
    heard of."""
    monkeypatch.setattr(Slow, "answers", False)
    monkeypatch.setattr(Slow, "proxy", proxy)
    submit(slow, "runs", tmp_path / "job.zip", 100)
    with pytest.raises(RunFailed, match="was sent job lost, and didn't say whether it accepts it.*--follow lost"):
        submit(slow, "lost", tmp_path / "job.zip", 100)
    with pytest.raises(RunFailed, match="no such entrypoint") as refused:
        submit(slow, "wrong", tmp_path / "job.zip", 100)
    assert "--follow" not in str(refused.value)


def test_a_name_that_takes_for_ever_to_look_up(monkeypatch):
    monkeypatch.setattr(submit_cluster, "_ask", lambda *_: time.sleep(600))
    monkeypatch.setattr(submit_cluster, "CHECK_SECONDS", 0.5)
    assert "no answer within 0.5 s" in refusal("http://head:8265")


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("head:8265", "http://head:8265"),
        ("http://head", "http://head:8265"),
        ("https://ray.example.org/cluster", "https://ray.example.org/cluster"),
    ],
)
def test_addresses(address, url):
    assert dashboard_url(address) == url


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "auto", "http://", "ftp://head", "http://a b:1", "http://head:x"]
)
def test_addresses_that_cannot_be(address):
    with pytest.raises(InputRefused, match="--address: "):
        dashboard_url(address)
