"""JSON requests to a service that may be slow, wrong or gone: deadlines, retries, and errors that name the cause."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx

from rayrlhf.errors import InputRefused

__all__ = ["Endpoint", "ServiceError", "open_client", "post_json", "run_coroutine", "token_from"]

T = TypeVar("T")

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LONGEST_ANSWER = 64 * 2**20  # bytes
_SNIPPET = 200  # characters of an answer that an error shows
_FINAL = frozenset({400, 404, 405, 411, 413, 422})
"""Status codes that say that this very request is wrong: the same again would meet the same answer."""


class ServiceError(Exception):
    """A request got no usable answer; the text is the cause.

    Attributes:
        final: asking again would not help.
        pause_s: what the service asked to wait before the next attempt.
        attempts: requests that were sent.
    """

    def __init__(self, cause: str, *, final: bool = False, pause_s: float = 0.0):
        super().__init__(cause)
        self.final, self.pause_s, self.attempts = final, pause_s, 1


def _port_is_legal(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how patient we are.

    Raises:
        InputRefused: with every problem of the address and the numbers.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    """Sent as ``Authorization: Bearer``; it is in no message."""
    timeout_s: float = 60.0
    """Deadline of one attempt, from connecting to the last byte of the answer."""
    retries: int = 4
    """Further attempts after a failed one, with pauses of 0.5, 1, 2, ... s (30 s at most) in between."""

    def __post_init__(self) -> None:
        problems = []
        parts = urlsplit(self.url if self.url.isascii() and self.url.isprintable() else "")
        if parts.scheme not in ("http", "https") or not parts.hostname or not _port_is_legal(parts):
            problems.append(f"url: {self.url!r} is no address; legal: http://HOST[:PORT][/PATH], or https")
        if parts.username is not None or parts.password is not None:
            problems.append(
                "url: holds a user name or password; put a token into an environment variable, name it in token_env"
            )
        if not self.timeout_s > 0:
            problems.append(f"timeout_s: {self.timeout_s}; legal: seconds above 0")
        if self.retries < 0:
            problems.append(f"retries: {self.retries}; legal: 0 or more")
        if problems:
            raise InputRefused(problems)

    def pause_s(self, attempt: int) -> float:
        """Seconds between attempt ``attempt`` (from 1) and the next."""
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1))

    @property
    def patience_s(self) -> float:
        """Longest time that a request can take, all attempts and pauses included (the service asking for none longer)."""
        return (self.retries + 1) * self.timeout_s + sum(self.pause_s(i + 1) for i in range(self.retries))


def token_from(token_env: str | None) -> str | None:
    """The token in the environment variable ``token_env``; None where no name is given.

    Raises:
        InputRefused: where the variable isn't set, is empty, or holds what no header can carry.
    """
    if token_env is None:
        return None
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise InputRefused(f"token_env: the environment variable {token_env} is not set; export {token_env}=TOKEN")
    if not (token.isascii() and token.isprintable()):
        raise InputRefused(f"token_env: {token_env} holds characters that no header can carry; legal: printable ASCII")
    return token


def open_client(connections: int) -> httpx.AsyncClient:
    """A client with so many connections. It follows no redirect: a token must not travel to another address."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    # The deadline of an attempt is `post_json`'s: httpx's own times are those of single reads.
    return httpx.AsyncClient(timeout=None, limits=limits, follow_redirects=False)


async def post_json(client: httpx.AsyncClient, to: Endpoint, payload: Any, read: Callable[[Any], T]) -> T:
    """Send ``payload``, and what ``read`` makes of the answer.

    Args:
        client: from `open_client`.
        to: address, token, deadline, retries.
        payload: for JSON.
        read: takes the parsed answer; raises ValueError where it isn't what was asked for, which is then asked again.

    Raises:
        ServiceError: after the last attempt, with the cause of that one.
    """
    for attempt in range(1, to.retries + 2):
        try:
            async with asyncio.timeout(to.timeout_s):
                answer = await _attempt(client, to, payload)
            return read(answer)
        except TimeoutError:
            failure = ServiceError(f"no answer within {to.timeout_s:g} s")
        except ServiceError as error:
            failure = error
        except httpx.HTTPError as error:
            failure = ServiceError(f"{_hidden(str(error), to) or 'connection lost'} ({type(error).__name__})")
        except ValueError as error:
            failure = ServiceError(f"nonsense: {_hidden(str(error), to)}")
        failure.attempts = attempt
        if failure.final or attempt > to.retries:
            raise failure
        await asyncio.sleep(max(to.pause_s(attempt), failure.pause_s))
    raise AssertionError("the last attempt returns or raises")


async def _attempt(client: httpx.AsyncClient, to: Endpoint, payload: Any) -> Any:
    headers = {"content-type": "application/json", "accept": "application/json"}
    if to.token is not None:
        headers["authorization"] = f"Bearer {to.token}"
    # A lone surrogate, which a tokenizer can produce, has no UTF-8; as \udXXX it is plain ASCII.
    content = json.dumps(payload, ensure_ascii=True).encode("ascii")
    body = bytearray()
    async with client.stream("POST", to.url, content=content, headers=headers) as response:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > LONGEST_ANSWER:
                raise ServiceError(f"nonsense: an answer of more than {LONGEST_ANSWER // 2**20} MiB")
    if response.status_code != 200:
        raise _refused(response, bytes(body), to)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError(f"an answer that is no JSON: {_shown(bytes(body))}") from None


def _refused(response: httpx.Response, body: bytes, to: Endpoint) -> ServiceError:
    code = response.status_code
    cause = f"HTTP {code} {response.reason_phrase}".rstrip()
    if code in (401, 403):
        cause += ": it wants a token, and none is configured" if to.token is None else ": it doesn't accept the token"
    if 300 <= code < 400:
        cause += f": redirected to {response.headers.get('location', 'nowhere')!r}, which is not followed"
    if body.strip():
        cause += f"; it says {_hidden(_shown(body), to)}"
    wait = response.headers.get("retry-after", "")
    pause = min(LONGEST_PAUSE_S, float(wait)) if wait.isascii() and wait.isdigit() else 0.0
    return ServiceError(cause, final=code in _FINAL or 300 <= code < 400, pause_s=pause)


def _shown(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    return repr(text if len(text) <= _SNIPPET else text[:_SNIPPET] + " ...")


def _hidden(text: str, to: Endpoint) -> str:
    """``text`` without the token, should the service have repeated it."""
    return text.replace(to.token, "***") if to.token else text


def run_coroutine(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of a coroutine, also where this thread has an event loop of its own (a notebook, an async actor)."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(make())).result()
