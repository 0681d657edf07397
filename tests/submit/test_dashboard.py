"""What is said where no dashboard lets us in: one message, within 10 s."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rayrlhf.drivers import submit_cluster
from rayrlhf.drivers.submit_cluster import Dashboard, check_dashboard, dashboard_url, find_token
from rayrlhf.errors import InputRefused

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
    assert time.monotonic() - started < 11
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


class Slow(BaseHTTPRequestHandler):
    """Takes an archive of any size, 2 MiB in 0.3 s."""

    received = 0

    def do_GET(self):
        self.reply(*((200, VERSION) if self.path == "/api/version" else (404, "")))

    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        while left:
            time.sleep(0.3)
            left -= len(self.rfile.read(min(left, 2 << 20)))
        type(self).received = int(self.headers["Content-Length"])
        self.reply(200, "")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(200, json.dumps({"job_id": "a-1", "submission_id": "a-1"}))

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        """Nothing on the terminal."""


def test_an_upload_may_take_longer_than_any_of_its_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(submit_cluster, "CALL_SECONDS", (1.0, 10.0))
    monkeypatch.setattr(submit_cluster, "UPLOAD_SECONDS", (1.0, 10.0))
    archive = tmp_path / "job.zip"
    archive.write_bytes(bytes(20 << 20))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        dashboard = Dashboard(f"http://127.0.0.1:{server.server_address[1]}", {})
        begun = time.monotonic()
        assert dashboard.submit(archive, env_vars={}, setup_hook="a.b", entrypoint="true") == "a-1"
        assert time.monotonic() - begun > 2 and Slow.received == 20 << 20
    finally:
        server.shutdown()


def test_a_name_that_takes_for_ever_to_look_up(monkeypatch):
    monkeypatch.setattr(submit_cluster, "_ask", lambda *_: time.sleep(60))
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
