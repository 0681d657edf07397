"""A real HTTP server that does what a test tells it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], dict[str, str]], "Reply"]


class Reply:
    """What the server sends: a status with a body, or something that is no proper answer."""

    def __init__(self, body: Any = None, status: int = 200, *, raw: bytes | None = None, how: str = "", **headers: str):
        self.status, self.headers, self.how = status, {k.replace("_", "-"): v for k, v in headers.items()}, how
        self.raw = raw if raw is not None else json.dumps(body).encode()


class Misbehaving:
    """Answers each POST by ``answer(payload, headers)``; ``requests`` holds what came in, in order.

    ``how`` of a reply: ``hang`` sends nothing, ``trickle`` a byte at a time for ever, ``drop`` closes the connection,
    ``cut`` closes it in the middle of the body.
    """

    def __init__(self, answer: Answer):
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.ending = threading.Event()
        self.reading = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.reading:
                    outer.requests.append(payload)
                    outer.paths.append(self.path)
                    outer.reading.notify_all()
                    reply = answer(payload, dict(self.headers))
                outer.send(self, reply)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def until(self, came: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Wait for requests: those that a client gave up may have yet to be read here."""
        with self.reading:
            assert self.reading.wait_for(lambda: came(self.requests), timeout=30), self.requests

    def send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.how == "hang":
            self.ending.wait(30)
        if reply.how in ("hang", "drop"):
            handler.close_connection = True
            return
        handler.send_response(reply.status)
        for key, value in reply.headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(reply.raw) + (100 if reply.how == "cut" else 0)))
        handler.end_headers()
        if reply.how == "trickle":
            try:
                for byte in reply.raw:
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
                    if self.ending.wait(0.05):
                        return
            except OSError:
                return  # the client has had enough
        handler.wfile.write(reply.raw)

    def __enter__(self) -> Misbehaving:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.server.shutdown()
        self.server.server_close()
