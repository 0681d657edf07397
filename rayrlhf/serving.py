"""A scorer over HTTP: ``rayrlhf serve-reward``."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import math
import socket
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rayrlhf.errors import InputRefused

__all__ = ["RewardServer", "Score"]

Score = Callable[[list[str], list[str]], Sequence[float]]
"""``score(prompts, responses)``: one finite number a response, in order."""

logger = logging.getLogger(__name__)

_SLOW_CLIENT_S = 30.0  # without a byte from it
_WAITING = 64  # requests that may wait for the scorer


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, {k.replace("_", "-"): v for k, v in headers.items()}


class RewardServer:
    """Serves a scorer.

    ``POST /score`` with ``{"prompts": [text, ...], "responses": [text, ...]}`` answers ``{"scores": [number, ...]}``. ``GET
    /health`` answers ``{"status": "ok", "name": ...}`` and needs no token. Everything else, and all bad input, is answered by
    ``{"error": {"code": ..., "message": ...}}``: 400 ``bad_json`` (``bad_request`` for broken HTTP), 401 ``bad_token``,
    404 ``not_found``, 405 ``bad_method``, 411 ``no_length``, 413 ``too_large``, 422 ``bad_input``, 500
    ``scorer_failed``, 501 ``bad_method``, 503 ``busy``.

    The scorer is called by one thread at a time.

    Args:
        score: see `Score`.
        name: what is served, for ``/health``.
        host: address to listen at.
        port: 0 takes a free one; see `url`.
        token: what ``Authorization: Bearer`` must hold; None: anybody may ask, which only a loopback address allows.
        max_bytes: longest body of a request.
        max_samples: most responses of a request.

    Raises:
        InputRefused: the address can't be listened at, is reachable from outside without a token, or a limit is below 1.
    """

    def __init__(
        self,
        score: Score,
        *,
        name: str,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        max_bytes: int = 16 * 2**20,
        max_samples: int = 1024,
    ):
        problems = [
            f"{key}: {value}; legal: 1 or more"
            for key, value in (("max_bytes", max_bytes), ("max_samples", max_samples))
            if value < 1
        ]
        if token is not None and not token.strip():
            problems.append("token: is empty; legal: a text, or none at all")
        if token is None and not _is_loopback(host):
            problems.append(
                f"host: {host} can be reached from other machines, and there is no token; "
                "set one, or listen at 127.0.0.1"
            )
        if problems:
            raise InputRefused(problems)
        self._score, self._lock, self._waiting = score, threading.Lock(), threading.BoundedSemaphore(_WAITING)
        self.name, self.max_bytes, self.max_samples = name, max_bytes, max_samples
        self._token = None if token is None else _digest(token.strip())
        self._thread: threading.Thread | None = None
        self._serving = threading.Event()
        server_class = _ServerV6 if ":" in host else _Server
        try:
            self._server = server_class((host, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise InputRefused(f"host, port: {host}:{port} can't be listened at: {error}") from error

    @property
    def url(self) -> str:
        """Where clients go, without a path."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def serve_forever(self) -> None:
        """Answer requests until `close` is called from another thread."""
        self._serving.set()
        try:
            self._server.serve_forever(poll_interval=0.1)
        finally:
            self._serving.clear()

    def close(self) -> None:
        """Stop listening. May be called more than once, but while it serves not by the thread that does."""
        if self._serving.is_set():
            self._server.shutdown()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def __enter__(self) -> RewardServer:
        self._thread = threading.Thread(target=self.serve_forever, name=f"serve {self.name}", daemon=True)
        self._thread.start()
        self._serving.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def allows(self, header: str | None) -> bool:
        """Whether a request with this ``Authorization`` header may be answered. The comparison takes the same time whatever the
        header holds."""
        if self._token is None:
            return True
        scheme, _, given = (header or "").partition(" ")
        # Digests have one length: the time says nothing of the token's either.
        return hmac.compare_digest(_digest(given.strip()), self._token) and scheme.lower() == "bearer"

    def scores(self, prompts: list[str], responses: list[str]) -> list[float]:
        """What the scorer says, checked."""
        if not self._waiting.acquire(blocking=False):
            raise _Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "busy", f"{_WAITING} requests are waiting; try again", Retry_After="1"
            )
        try:
            with self._lock:
                numbers = [float(number) for number in self._score(prompts, responses)]
        except Exception as error:
            logger.exception("%s: the scorer failed on %d responses", self.name, len(responses))
            message = f"the scorer raised {type(error).__name__}: {error}"
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "scorer_failed", message) from error
        finally:
            self._waiting.release()
        if len(numbers) != len(responses):
            message = f"the scorer gave {len(numbers)} numbers for {len(responses)} responses"
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "scorer_failed", message)
        for index, number in enumerate(numbers):
            if not math.isfinite(number):
                message = f"the scorer gave {number} for responses[{index}]"
                raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "scorer_failed", message)
        return numbers


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away while it was answered; it is no fault of ours, and no reason to print a traceback.
        logger.debug("%s: the connection broke", client_address, exc_info=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _handler(server: RewardServer) -> type[BaseHTTPRequestHandler]:
    """A handler class for ``server``: http.server makes one object of it a connection."""

    class Handler(_Handler):
        rewards = server

    return Handler


class _Handler(BaseHTTPRequestHandler):
    rewards: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = "rayrlhf"
    sys_version = ""
    timeout = _SLOW_CLIENT_S

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.address_string(), format % args)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses (a malformed request line, an unknown method), in our form."""
        self._read, self.close_connection = True, True
        self.request_version = self.protocol_version  # of a request line that couldn't be read it says HTTP/0.9
        status = HTTPStatus(code)
        name = "bad_method" if status == HTTPStatus.NOT_IMPLEMENTED else "bad_request"
        self._send(status, {"error": {"code": name, "message": message or status.phrase}}, {})

    def _answer(self, method: str) -> None:
        self._read = False
        try:
            answer = self._handle(method, self.path.partition("?")[0])
        except _Refused as refused:
            self._end_unread()
            error = {"code": refused.code, "message": str(refused)}
            self._send(refused.status, {"error": error}, refused.headers)
        except TimeoutError:
            self.close_connection = True  # the client has gone silent; there is nobody to answer
        else:
            self._send(HTTPStatus.OK, answer, {})

    def _handle(self, method: str, path: str) -> dict[str, Any]:
        legal = {"/health": "GET", "/score": "POST"}
        if path not in legal:
            raise _Refused(HTTPStatus.NOT_FOUND, "not_found", f"no {path}; there are GET /health and POST /score")
        if method != legal[path]:
            message = f"{path} takes {legal[path]}, not {method}"
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "bad_method", message, Allow=legal[path])
        if path == "/health":
            return {"status": "ok", "name": self.rewards.name}
        if not self.rewards.allows(self.headers.get("Authorization")):
            message = "the header Authorization: Bearer TOKEN is missing or holds another token"
            raise _Refused(HTTPStatus.UNAUTHORIZED, "bad_token", message, WWW_Authenticate="Bearer")
        prompts, responses = self._samples(self._body())
        return {"scores": self.rewards.scores(prompts, responses)}

    def _body(self) -> Any:
        given = self.headers.get("Content-Length")
        if given is None or not (given.isascii() and given.isdigit()) or "Transfer-Encoding" in self.headers:
            message = "a body with Content-Length is needed (no Transfer-Encoding)"
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "no_length", message)
        if int(given) > self.rewards.max_bytes:
            message = (
                f"a body of {int(given)} bytes; at most {self.rewards.max_bytes} are read. Send fewer samples at once"
            )
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)
        raw = self.rfile.read(int(given))
        self._read = True
        if len(raw) < int(given):
            self.close_connection = True
            message = f"the body ends after {len(raw)} of {int(given)} bytes"
            raise _Refused(HTTPStatus.BAD_REQUEST, "bad_json", message)
        try:
            return json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "bad_json", f"the body is no JSON: {error}") from None

    def _samples(self, body: Any) -> tuple[list[str], list[str]]:
        problems = []
        if not isinstance(body, dict):
            problems.append(f'the body is {_kind(body)}; legal: {{"prompts": [...], "responses": [...]}}')
            body = {"prompts": [], "responses": []}
        problems += [f"unknown key {key!r}" for key in body if key not in ("prompts", "responses")]
        for key in ("prompts", "responses"):
            if key not in body:
                problems.append(f"{key} is missing")
            elif not isinstance(body[key], list):
                problems.append(f"{key} is {_kind(body[key])}; legal: a list of texts")
            else:
                wrong = [(i, text) for i, text in enumerate(body[key]) if not isinstance(text, str)]
                problems += [f"{key}[{i}] is {_kind(text)}; legal: a text" for i, text in wrong[:1]]
        if not problems and len(body["prompts"]) != len(body["responses"]):
            problems.append(f"{len(body['prompts'])} prompts for {len(body['responses'])} responses")
        if problems:
            raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_input", "; ".join(problems))
        if len(body["responses"]) > self.rewards.max_samples:
            message = f"{len(body['responses'])} responses; at most {self.rewards.max_samples} at once"
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)
        return body["prompts"], body["responses"]

    def _end_unread(self) -> None:
        """A body that wasn't read would be taken for the next request, so the connection ends with this answer."""
        given = self.headers.get("Content-Length", "0")
        if not self._read and (given != "0" or "Transfer-Encoding" in self.headers):
            self.close_connection = True

    def _send(self, status: HTTPStatus, answer: dict[str, Any], headers: dict[str, str]) -> None:
        body = json.dumps(answer).encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if self.close_connection and not self._read:
            self._linger()

    def _linger(self) -> None:
        """Read on for a moment what the client still sends: closing at once would reset the connection, and the client might
        never see the answer."""
        self.wfile.flush()
        self.connection.settimeout(1.0)
        left = 4 * self.rewards.max_bytes
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (chunk := self.connection.recv(65536)):
                left -= len(chunk)
        except OSError as error:
            logger.debug("%s: a refused request ended early: %s", self.address_string(), error)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
