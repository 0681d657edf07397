"""A reward by URL: the client of `rayrlhf.serving`, or of any service that speaks the same."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.reward import response_tokens
from rayrlhf.batch import Batch
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.http_json import Endpoint, ServiceError, open_client, post_json, run_coroutine, token_from

__all__ = ["RemoteReward", "RemoteRewardSource"]

_CONNECTIONS = 4


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

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One number a response, in order; no sample is left out.

        Raises:
            RunFailed: a request failed in all its attempts; it names the address, the samples and the last cause.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        if not responses:
            return []
        return run_coroutine(lambda: self._all(list(prompts), list(responses)))

    async def _all(self, prompts: list[str], responses: list[str]) -> list[float]:
        gate = asyncio.Semaphore(_CONNECTIONS)
        async with open_client(_CONNECTIONS) as client:

            async def part(start: int) -> list[float]:
                end = min(start + self.batch, len(responses))
                payload = {"prompts": prompts[start:end], "responses": responses[start:end]}
                async with gate:
                    try:
                        return await post_json(client, self.endpoint, payload, lambda a: _scores(a, end - start))
                    except ServiceError as error:
                        tries = "attempt" if error.attempts == 1 else "attempts"
                        raise RunFailed(
                            f"reward service {self.endpoint.url}: samples {start + 1}-{end} of {len(responses)} got no "
                            f"scores in {error.attempts} {tries}: {error}"
                        ) from None

            # A group ends the other requests at the first that fails for good.
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(part(start)) for start in range(0, len(responses), self.batch)]
            except* RunFailed as failures:
                raise failures.exceptions[0] from None
        return [score for task in tasks for score in task.result()]


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError(f"""an answer without a list "scores": {str(answer)[:200]!r}""")
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} responses")
    for number, score in enumerate(scores, start=1):
        # An integer beyond a float's range has no finite value either.
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(_as_float(score)):
            raise ValueError(f"score {number} is {str(score)[:50]}, not a finite number")
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
        responses = self.tokenizer.batch_decode([t.tolist() for t in response_tokens(batch)], skip_special_tokens=True)
        return torch.tensor(self.remote.score(list(batch["prompt_text"]), responses), dtype=torch.float32)
