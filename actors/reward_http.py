"""A reward by URL: the client of `rayrlhf.serving`, or of any service that speaks the same."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import httpx
import torch
from torch import Tensor

from rayrlhf.actors.reward import response_tokens
from rayrlhf.batch import Batch
from rayrlhf.config.schema import ScoreSource
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.http_json import Endpoint, ServiceError, open_client, post_json, run_coroutine, token_from

__all__ = ["RemoteReward", "RemoteRewardSource", "check_service"]

_CONNECTIONS = 4
_LARGEST = torch.finfo(torch.float32).max
_GIVE_UP_AFTER = 3  # requests in a row that failed for good
_PROBE_S = 10.0  # longest wait for an answer before a run, or from a service that was given up
_PROBE_CONNECT_S = 5.0
_PROBE_BYTES = 65536  # of an answer that are read


class RemoteReward:
    """Scores from a service.

    Args:
        url: its address, without ``/score``: ``POST url/score {"prompts": [...], "responses": [...]}`` answers
            ``{"scores": [...]}``, one finite number a response, in order.
        token_env: environment variable with the token for the header ``Authorization: Bearer``; None: no token.
        timeout_s: deadline of one attempt, in seconds, from connecting to the last byte.
        retries: further attempts of a request that failed, with pauses of 0.5, 1, 2, ... s in between.
        batch: samples of one request; up to four requests are under way at the same time.

    Raises:
        InputRefused: address, token or a number can't be used.
    """

    def __init__(
        self, url: str, token_env: str | None = None, timeout_s: float = 60.0, retries: int = 4, batch: int = 64
    ):
        if batch < 1:
            raise InputRefused(f"batch: {batch}; legal: 1 or more")
        self.batch = batch
        self.endpoint = Endpoint(url.rstrip("/") + "/score", token_from(token_env), timeout_s, retries)
        self._failing = _InARow()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One number a response, in order; no sample is left out.

        Raises:
            RunFailed: a request failed in all its attempts; it names the address, the samples and the last cause.
        """
        requests = self._requests(prompts, responses, probe=False)
        return run_coroutine(lambda: self._all(requests)) if requests else []

    def score_each(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[float], list[str | None]]:
        """As `score`, but a request that fails in all its attempts fails for its own samples only.

        After three such requests in a row the rest isn't asked, and is marked so: a service that hangs would cost all the
        patience for every request. The next call then sends its first sample alone, with one attempt of at most 10 s; if that
        gets an answer, the call goes on as usual. A request that the service turns down for what it holds (HTTP 400, 422,
        ...) fails, but has been answered.

        Returns:
            One number a response, NaN where there is none; and what `score` would raise for it, None where there is one.
        """
        requests = self._requests(prompts, responses, probe=self._failing.given_up)
        parts = run_coroutine(lambda: self._each(requests)) if requests else []
        return [score for scores, _ in parts for score in scores], [cause for _, causes in parts for cause in causes]

    def _requests(self, prompts: Sequence[str], responses: Sequence[str], *, probe: bool) -> list[_Request]:
        """All samples in requests of ``batch``; with a probe the first sample makes one of its own."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        count, first = len(responses), int(probe)
        starts = [*range(first, count, self.batch), count]
        if probe and count:
            starts.insert(0, 0)
        return [
            _Request(
                {"prompts": list(prompts[start:end]), "responses": list(responses[start:end])},
                f"samples {start + 1}-{end} of {count}",
            )
            for start, end in pairwise(starts)
        ]

    async def _all(self, requests: list[_Request]) -> list[float]:
        gate = asyncio.Semaphore(_CONNECTIONS)
        async with open_client(_CONNECTIONS) as client:
            # A group ends the other requests at the first that fails for good.
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._one(client, gate, request)) for request in requests]
            except* RunFailed as failures:
                raise failures.exceptions[0] from None
        return [score for task in tasks for score in task.result()]

    async def _each(self, requests: list[_Request]) -> list[tuple[list[float], list[str | None]]]:
        gate = asyncio.Semaphore(_CONNECTIONS)
        async with open_client(_CONNECTIONS) as client:
            probed = []
            if self._failing.given_up:
                probe = replace(self.endpoint, timeout_s=min(_PROBE_S, self.endpoint.timeout_s), retries=0)
                probed, requests = [await self._marked(client, gate, requests[0], probe)], requests[1:]
            return probed + await asyncio.gather(*(self._marked(client, gate, request) for request in requests))

    async def _marked(
        self, client: httpx.AsyncClient, gate: asyncio.Semaphore, request: _Request, probe: Endpoint | None = None
    ) -> tuple[list[float], list[str | None]]:
        """A request's scores, or why there are none; what comes of it is counted."""
        count, failing = len(request.payload["responses"]), self._failing
        async with gate:
            if probe is None and failing.given_up:
                return [math.nan] * count, [failing.not_asked] * count
            try:
                scores = await post_json(
                    client, probe or self.endpoint, request.payload, lambda answer: _scores(answer, count)
                )
            except ServiceError as error:
                # Turned down for what it holds, it says nothing of the next one.
                failing.count, failing.cause = (0, "") if error.final else (failing.count + 1, str(error))
                return [math.nan] * count, [str(self._failure(request, error))] * count
            failing.count = 0
            return scores, [None] * count

    async def _one(self, client: httpx.AsyncClient, gate: asyncio.Semaphore, request: _Request) -> list[float]:
        count = len(request.payload["responses"])
        async with gate:
            try:
                return await post_json(client, self.endpoint, request.payload, lambda answer: _scores(answer, count))
            except ServiceError as error:
                raise self._failure(request, error) from None

    def _failure(self, request: _Request, error: ServiceError) -> RunFailed:
        tries = "attempt" if error.attempts == 1 else "attempts"
        return RunFailed(
            f"reward service {self.endpoint.url}: {request.samples} got no scores in {error.attempts} {tries}: {error}"
        )


@dataclass(frozen=True)
class _Request:
    payload: dict[str, list[str]]
    samples: str
    """Which ones they are, in words."""


@dataclass
class _InARow:
    """Requests that failed for good, since the last one that was answered."""

    count: int = 0
    cause: str = ""
    """Of the last one."""

    @property
    def given_up(self) -> bool:
        return self.count >= _GIVE_UP_AFTER

    @property
    def not_asked(self) -> str:
        return f"not asked: {self.count} requests in a row had failed, the last with: {self.cause}"


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError(f"""an answer without a list "scores": {str(answer)[:200]!r}""")
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} responses")
    for number, score in enumerate(scores, start=1):
        # An integer beyond a float's range has no finite value either.
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(_as_float(score)) <= _LARGEST:
            raise ValueError(f"score {number} is {str(score)[:50]}, not a finite float32 number")
    return [float(score) for score in scores]


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


class RemoteRewardSource:
    """`RemoteReward` as one of a run's sources of reward.

    Args:
        remote: the client.
        name: its name in metrics and messages.
        tokenizer: decodes the responses, without special tokens.
    """

    def __init__(self, remote: RemoteReward, name: str, tokenizer: Any):
        self.remote, self.name, self.tokenizer = remote, name, tokenizer

    def score(self, batch: Batch) -> Tensor:
        """float32 [S]. Raises `RunFailed` as `RemoteReward.score` does."""
        return torch.tensor(self.remote.score(*self._texts(batch)), dtype=torch.float32)

    def score_each(self, batch: Batch) -> tuple[Tensor, list[str | None]]:
        """float32 [S], and the causes [S], as `RemoteReward.score_each` gives them."""
        scores, causes = self.remote.score_each(*self._texts(batch))
        return torch.tensor(scores, dtype=torch.float32), causes

    def _texts(self, batch: Batch) -> tuple[list[str], list[str]]:
        responses = self.tokenizer.batch_decode([t.tolist() for t in response_tokens(batch)], skip_special_tokens=True)
        return list(batch["prompt_text"]), responses


def check_service(source: ScoreSource) -> None:
    """Ask a service for the scores of no responses at all, once.

    What only real responses can tell (a busy or slow service, one that chokes on an empty list) is left to the run, with its
    retries.

    Args:
        source: with a ``url``.

    Raises:
        InputRefused: the token's variable isn't set, nobody listens at the address, the token isn't accepted, or what
            answers there is no reward service.
    """
    assert source.url is not None
    to = RemoteReward(source.url, source.token_env, source.timeout_s, source.retries).endpoint
    try:
        problem = run_coroutine(lambda: _probed(to))
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        problem = (
            f"can't be reached: {str(error) or 'no connection'} ({type(error).__name__}); start it, or correct url"
        )
    except (httpx.HTTPError, TimeoutError):
        return  # somebody listens there, but is busy now, or chokes on an empty list
    if problem is not None:
        raise InputRefused(f"reward service {to.url}: {problem}")


async def _probed(to: Endpoint) -> str | None:
    """What is wrong with a service that answers; None where an empty request meets no trouble."""
    headers = {} if to.token is None else {"authorization": f"Bearer {to.token}"}
    body = bytearray()
    # Making a client takes a while (it reads certificates): no time of the service's.
    async with open_client(1) as client, asyncio.timeout(min(_PROBE_S, to.timeout_s)):
        wait = httpx.Timeout(None, connect=min(_PROBE_CONNECT_S, to.timeout_s / 2))
        empty: dict[str, list[str]] = {"prompts": [], "responses": []}
        async with client.stream("POST", to.url, json=empty, headers=headers, timeout=wait) as response:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _PROBE_BYTES:
                    break
    code = response.status_code
    said = f"answers HTTP {code} {response.reason_phrase}".rstrip()
    if code in (401, 403):
        return f"{said}: " + (
            "it wants a token; put it into an environment variable, and name that in token_env"
            if to.token is None
            else "it doesn't accept the token of token_env"
        )
    if 300 <= code < 400:
        return f"redirects to {response.headers.get('location', 'nowhere')!r}, which is not followed; correct url"
    if code in (404, 405):
        return f"{said}, so it is no reward service; correct url (without /score)"
    if len(body) > _PROBE_BYTES:
        return f"is no reward service: it answers more than {_PROBE_BYTES} bytes to an empty request"
    try:
        if code == 200:
            _scores(json.loads(body), 0)
    except (ValueError, RecursionError) as error:
        return f"is no reward service: {error}"
    return None
