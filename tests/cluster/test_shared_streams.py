"""Samples that ranks take from a common pile: each once, those that belong together together, more to whoever is faster."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_setup import HERE, SETTINGS, samples

from rayrlhf.batch import Batch
from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.sharing import Pile
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.cluster.start import start_groups

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
UNITS = [[0, 1], [2, 3, 4], [5], [6, 7], [8, 9], [10, 11]]


def taker(name: str, ranks: int = 1) -> RoleSpec:
    path = os.pathsep.join([HERE, os.path.dirname(os.path.dirname(HERE))])
    return RoleSpec(name, "share_roles:Taker", {}, ranks, {"PYTHONPATH": path})


def until_gone(holder: Any) -> None:
    """Until a holder that was told to end answers no more, which takes Ray a while."""
    import ray

    end = time.monotonic() + 60
    with pytest.raises(ray.exceptions.RayActorError):
        while time.monotonic() < end:
            ray.get(holder.take.remote(0, 1), timeout=30)


@pytest.fixture(scope="module")
def groups(local_ray):
    specs = [taker("even", 3), taker("uneven", 2)]
    with start_groups(specs, executor="ray", settings=SETTINGS) as groups:
        yield groups


@given(st.lists(st.integers(1, 4), max_size=12), st.lists(st.integers(1, 6), min_size=1, max_size=30))
def test_a_pile_gives_everything_once_and_in_order(sizes: list[int], counts: list[int]):
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    units = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    pile, taken = Pile(units), []
    for count in counts:
        some = pile.take(count)
        taken += some
        # Enough, but for the end of the pile, and with whole units: without the last of them it is too few.
        assert len(some) >= count or len(taken) == sum(sizes)
        assert not some or some[-1] + 1 in ends
        last = next((unit for unit in units if unit[-1] == some[-1]), []) if some else []
        assert not some or len(some) - len(last) < count
    assert taken == list(range(len(taken)))


def test_inline_the_one_rank_takes_all():
    with start_groups([taker("inline")], executor="inline", settings=SETTINGS) as groups:
        chunks = list(groups["inline"].stream_shared("work", samples(LENGTHS), UNITS, places=2))
    assert [chunk["index"].tolist() for chunk in chunks] == [[0, 1], [2, 3, 4], [5, 6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("places", [1, 2, 5, 100])
def test_each_sample_is_taken_once(groups, places: int):
    batch = samples(LENGTHS)
    done = Batch.concat(list(groups["even"].stream_shared("work", batch, UNITS, places=places)))
    assert sorted(done["index"].tolist()) == list(range(12))
    for (start, end), index in zip(done.spans(), done["index"].tolist(), strict=True):
        mine = batch.select([index])["tokens"]
        assert torch.equal(done["tokens"][start:end], mine * 2)
    rank_of = dict(zip(done["index"].tolist(), done["rank"].tolist(), strict=True))
    assert all(len({rank_of[i] for i in unit}) == 1 for unit in UNITS)


def test_the_faster_rank_does_more(groups, tmp_path):
    """Rank 1 stays with its first samples until rank 0 has done more than the 6 that it would have been dealt out."""
    mark, by = tmp_path / "most is done", [0, 0]
    how = {"places": 1, "held": [1], "mark": str(mark)}
    for chunk in groups["uneven"].stream_shared("work", samples(LENGTHS), UNITS, **how):
        by[int(chunk["rank"][0])] += len(chunk)
        if by[0] > 6:
            mark.touch()
    assert sum(by) == 12 and by[0] > 6


def test_an_empty_pile_ends_at_once(groups):
    assert list(groups["even"].stream_shared("work", samples([]), [], places=1)) == []


def test_what_is_left_of_an_earlier_call_takes_nothing_from_a_later_one(groups):
    group = groups["even"]
    list(group.stream_shared("hoard", samples(LENGTHS), UNITS))
    stream = group.stream_shared("work", samples(LENGTHS), UNITS, places=1, wait=1.0)
    assert group.broadcast("late") == [[], [], []]
    assert sorted(Batch.concat(list(stream))["index"].tolist()) == list(range(12))


def test_a_rank_that_fails_is_named(groups, tmp_path):
    mark = tmp_path / "rank 0 has failed"
    how = {"places": 1, "fail_rank": 0, "held": [1], "mark": str(mark)}  # rank 1 leaves something for it
    with pytest.raises(RoleFailed, match="uneven rank 0 failed in work: FloatingPointError"):
        list(groups["uneven"].stream_shared("work", samples(LENGTHS), UNITS, **how))
    mark.touch()


def test_the_holder_ends_with_its_group(local_ray):
    with start_groups([taker("short", 2)], executor="ray", settings=SETTINGS) as groups:
        group = groups["short"]
        list(group.stream_shared("work", samples(LENGTHS), UNITS, places=1))
        holder = group._holder
    until_gone(holder)


def test_a_holder_that_is_gone_is_told(local_ray, tmp_path):
    """Nobody empties the pile before: no rank takes anything twice as long as the holder is there."""
    import ray

    mark = tmp_path / "the holder is gone"
    with start_groups([taker("alone", 2)], executor="ray", settings=SETTINGS) as groups:
        how = {"places": 1, "held": [0, 1], "mark": str(mark)}
        stream = groups["alone"].stream_shared("work", samples(LENGTHS), UNITS, **how)
        next(stream)
        ray.kill(groups["alone"]._holder)
        until_gone(groups["alone"]._holder)
        mark.touch()
        with pytest.raises(RoleFailed, match="the process that hands out prompts doesn't answer"):
            list(stream)
