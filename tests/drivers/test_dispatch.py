"""Prompts for engines: every sample once, whoever generates it, and the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.actors.rollout_common import Request
from rayrlhf.actors.rollout_intake import Intake
from rayrlhf.batch import Batch
from rayrlhf.cluster.sharing import Pile
from rayrlhf.config.base import ClusterConfig
from rayrlhf.config.schema import RolloutConfig
from rayrlhf.data import Prompt
from rayrlhf.drivers.dispatch import assignment, responses, same_prompt
from rayrlhf.drivers.experience import prompt_batch
from rayrlhf.errors import RunFailed
from rayrlhf.models.world import World
from tests.drivers.runs import TinyWorld

CPU, CUDA = ClusterConfig(), ClusterConfig(device="cuda")


def some_prompts(count: int, samples: int) -> Batch:
    lengths = [(7 * i) % 5 + 1 for i in range(count)]
    return prompt_batch(
        [Prompt(i, torch.arange(3, 3 + n) + i, "", {}) for i, n in enumerate(lengths)], samples, (11, 0)
    )


def test_who_gives_prompts_out():
    assert assignment(RolloutConfig(), CPU) == "fixed" and assignment(RolloutConfig(), CUDA) == "least_loaded"
    for chosen in ("fixed", "least_loaded"):
        assert {assignment(RolloutConfig(assignment=chosen), where) for where in (CPU, CUDA)} == {chosen}


# -- what an engine takes in ------------------------------------------------------------------------------------------


def requests(count: int) -> list[Request]:
    return [Request(i, [1], i, 1.0, 4) for i in range(count)]


def test_without_a_share_all_come_at_once_and_once():
    intake = Intake(requests(5))
    assert [r.index for r in intake.take(0)] == [0, 1, 2, 3, 4]
    assert intake.take(5) == intake.take(0) == []


def test_with_a_share_free_places_are_filled_and_no_more():
    pile = Pile([[0, 1], [2, 3], [4, 5], [6]])
    intake = Intake(requests(7), pile, places=3)
    assert [r.index for r in intake.take(0)] == [0, 1, 2, 3]  # whole prompts
    assert intake.take(4) == intake.take(3) == []
    assert [r.index for r in intake.take(2)] == [4, 5]
    assert [r.index for r in intake.take(0)] == [6]
    assert intake.take(1) == intake.take(0) == []


def test_two_intakes_share_all_between_them():
    pile = Pile([[i] for i in range(10)])
    one, two = Intake(requests(10), pile, 3), Intake(requests(10), pile, 2)
    taken = [r.index for _ in range(3) for intake in (one, two) for r in intake.take(0)]
    assert taken == list(range(10)) and one.take(0) == two.take(0) == []


# -- engines ----------------------------------------------------------------------------------------------------------


def engine(world: TinyWorld, kind: str = "transformers", **settings: Any) -> RolloutEngine:
    config = RolloutConfig(engine=kind, max_response_tokens=12, chunk_samples=2, **settings)  # type: ignore[arg-type]
    return RolloutEngine(
        World(0, 1, "127.0.0.1", 0, "cpu", 1),
        model_path=str(world.folder / "model"),
        config=config,
        dtype="float32",
        max_model_tokens=20,
    )


def said(chunks: list[Batch]) -> dict[int, tuple[list[int], str]]:
    """Tokens of prompt and response and the reason of their end, by position; each position once."""
    batch = Batch.concat(chunks)
    positions = batch["position"].tolist()
    assert len(set(positions)) == len(positions)
    texts = [batch["tokens"][start:end].tolist() for start, end in batch.spans()]
    return dict(zip(positions, zip(texts, batch["finish_reason"], strict=True), strict=True))


class Together:
    """Two engines side by side, as a group has them, in one process. One is slow: the other one yields three times as often."""

    size = 2

    def __init__(self, engines: Sequence[RolloutEngine]):
        self.engines, self.counts = engines, [0, 0]

    def stream(self, method: str, batches: Sequence[Batch], **how: Any) -> Iterator[Batch]:
        return self._both([getattr(e, method)(b, **how) for e, b in zip(self.engines, batches, strict=True)])

    def stream_shared(self, method: str, batch: Batch, units: Sequence[Sequence[int]], **how: Any) -> Iterator[Batch]:
        pile = Pile(units)
        return self._both([getattr(e, method)(batch, share=pile, **how) for e in self.engines])

    def _both(self, streams: list[Iterator[Batch]]) -> Iterator[Batch]:
        self.counts = [0, 0]
        while any(stream is not None for stream in streams):
            for number in (0, 1, 1, 1):
                chunk = next(streams[number], None) if streams[number] is not None else None
                if chunk is None:
                    streams[number] = None  # type: ignore[call-overload]
                else:
                    self.counts[number] += len(chunk)
                    yield chunk


@pytest.fixture(scope="module")
def pair(world: TinyWorld) -> Together:
    return Together([engine(world, engines=2, max_num_seqs=2) for _ in range(2)])


def test_the_text_does_not_depend_on_who_generates_it(world: TinyWorld, pair: Together):
    prompts = some_prompts(12, 2)
    alone = said(list(engine(world).generate(prompts)))
    fixed = said(list(responses(pair, prompts, RolloutConfig(assignment="fixed"), CPU)))
    even = list(pair.counts)
    shared = said(list(responses(pair, prompts, RolloutConfig(assignment="least_loaded"), CPU)))
    assert alone == fixed == shared and sorted(alone) == list(range(24))
    # The slow engine has its half with ``fixed``, and less than that where it takes what it can.
    assert even == [12, 12] and 0 < pair.counts[0] < 12 < pair.counts[1]


def test_a_sample_that_is_lost_is_noticed(pair: Together):
    class Loses(Together):
        def _both(self, streams: list[Iterator[Batch]]) -> Iterator[Batch]:
            chunks = list(super()._both(streams))
            yield from chunks[:-1]

    prompts = some_prompts(6, 2)
    for how in ("fixed", "least_loaded"):
        with pytest.raises(RunFailed, match="answered 10 of 12 prompts"):
            list(responses(Loses(pair.engines), prompts, RolloutConfig(assignment=how), CPU))  # type: ignore[arg-type]


def test_vllm_fills_its_places_as_they_become_free(world: TinyWorld):
    pytest.importorskip("vllm")
    prompts = some_prompts(8, 2)
    expected = said(list(engine(world).generate(prompts)))
    own = engine(world, "vllm", max_num_seqs=3)
    taken: list[tuple[int, int]] = []

    class Counted(Pile):
        def take(self, count: int) -> list[int]:
            found = super().take(count)
            taken.append((count, len(found)))
            return found

    try:
        pile = Counted(same_prompt(prompts))
        shared = said(list(own.generate(prompts, share=pile)))
        whole = said(list(own.generate(prompts)))
    finally:
        own.close()
    assert sorted(shared) == sorted(expected) and shared == whole
    assert taken[0] == (3, 4) and all(asked <= 3 and found <= asked + 1 for asked, found in taken)
    assert sum(found for _, found in taken) == 16 and taken[-1][1] == 0
