"""Ray and inline groups: the same results in the same order, and nothing fetched by the driver."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_setup import SETTINGS, running, samples, toy

from rayrlhf.batch import Batch, Deferred
from rayrlhf.cluster import columns, ray_pending
from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.group import wait_any
from rayrlhf.cluster.start import start_groups

SIZES = {"one": 1, "two": 2, "three": 3}
SHAPES = [[3, 1, 4, 1, 5, 9, 2], [7, 2], [6], [2, 0, 5], []]


@pytest.fixture(scope="module")
def groups(local_ray):
    with start_groups([toy(n, r, bias=7) for n, r in SIZES.items()], executor="ray", settings=SETTINGS) as groups:
        pids = [pid for group in groups.values() for pid in group.pids]
        assert len(set(pids)) == 6
        yield groups
    assert not [pid for pid in pids if running(pid)]


@pytest.fixture(scope="module")
def inline():
    with start_groups([toy("inline", bias=7)], executor="inline", settings=SETTINGS) as groups:
        yield groups["inline"]


@pytest.fixture
def gets(monkeypatch):
    """Names of the columns which this process reads out of the object store."""
    read = []
    original = columns.Block.column
    monkeypatch.setattr(columns.Block, "column", lambda self, name: (read.append(name), original(self, name))[1])
    return read


def assert_same(a: Batch, b: Batch) -> None:
    assert sorted(a.keys()) == sorted(b.keys())
    assert torch.equal(a.offsets, b.offsets)
    for name in sorted(a.keys()):
        assert a.is_token_column(name) == b.is_token_column(name)
        if isinstance(a[name], list):
            assert a[name] == b[name]
        else:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name])


@pytest.fixture(params=["in the message", "through the store"])
def way(request, monkeypatch) -> None:
    """How columns of the driver's own travel; the batches here are all small."""
    if request.param == "through the store":
        monkeypatch.setattr(columns, "SMALL_BYTES", -1)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("lengths", SHAPES, ids=str)
def test_same_as_inline_and_in_order(groups, inline, name, lengths, way):
    batch = samples(lengths)
    expected = inline.call("columns", batch, factor=3)
    assert_same(groups[name].call("columns", batch, factor=3), expected)
    if lengths:  # and by hand
        assert expected["sum"].tolist() == [3 * sum(10 * i + k for k in range(n)) for i, n in enumerate(lengths)]
        assert expected["half"].dtype == torch.bfloat16 and expected["odd"].dtype == torch.bool


@pytest.mark.parametrize("name", SIZES)
def test_chained_calls_move_no_values_through_the_driver(groups, inline, name, gets, way):
    batch = samples([3, 1, 4, 1, 5])
    first = groups[name].call("columns", batch)
    merged = batch.merge(first).select([4, 0, 2, 2])
    both = merged.merge(groups["two"].call("second", merged))
    moved = Batch.concat([both, both]).select([6, 1])
    third = groups["three"].call("second", moved)
    assert gets == []
    assert all(isinstance(c, Deferred) for part in first.columns() for c in part.values())

    local = batch.merge(inline.call("columns", batch)).select([4, 0, 2, 2])
    local = local.merge(inline.call("second", local))
    assert_same(third, inline.call("second", Batch.concat([local, local]).select([6, 1])))
    assert set(gets) == {"more", "half_sum"}


def test_columns_of_one_answer_are_read_from_the_store_once(groups, monkeypatch):
    loads = []
    original = columns.ray.get
    result = groups["one"].call("columns", samples([3, 1, 4]))
    monkeypatch.setattr(columns.ray, "get", lambda *a, **k: (loads.append(1), original(*a, **k))[1])
    result.select([1, 2])["shifted"], result["sum"], result["word"], result["half"]
    assert len(loads) == 1


def test_split_is_by_tokens_and_every_rank_is_called(groups):
    result = groups["three"].call("where", samples([9, 1, 1, 7, 8, 1]))
    # 9 -> 0, 8 -> 1, 7 -> 2, 1 -> 2 (8), 1 -> 1 (fewer samples than 2), 1 -> 2
    assert result["rank"].tolist() == [0, 2, 1, 2, 1, 2]
    assert groups["three"].call("where", samples([5]))["shard"].tolist() == [1]


def test_a_role_that_writes_into_a_column_changes_no_one_elses(groups):
    batch = groups["one"].call("echo", samples([2, 3]))
    assert groups["one"].call("overwrite", batch)["seen"].tolist() == [-1] * 5
    assert batch["tokens"].tolist() == [0, 1, 10, 11, 12]


def test_broadcast_reaches_every_rank_and_batches_travel_as_references(groups, inline, gets):
    assert groups["three"].broadcast("ping", value={"a": [1]}) == [(r, 3, {"a": [1]}) for r in range(3)]
    assert inline.broadcast("ping", value=2) == [(0, 1, 2)]
    deferred = groups["two"].call("echo", samples([2, 3]))
    assert groups["three"].broadcast("total", batch=deferred) == [34, 35, 36]
    echoed = groups["two"].broadcast("echo", batch=deferred.select([1]))
    assert gets == []
    assert [e["tokens"].tolist() for e in echoed] == [[10, 11, 12]] * 2


def test_environment_and_threads(groups):
    found = groups["two"].broadcast("describe")
    assert len({f["pid"] for f in found} | {os.getpid()}) == 3
    assert all(f["threads"] == (1, "1", "PASSIVE") and f["toy"] == "two" and f["device"] == "cpu" for f in found)


@pytest.mark.parametrize(
    "what, says", [("number", "TypeError: wrong must return a Batch"), ("fewer", "BatchError: wrong must")]
)
def test_results_that_do_not_fit_are_refused(groups, inline, what, says):
    for group in (groups["one"], inline):
        with pytest.raises(RoleFailed, match=says):
            group.call("wrong", samples([1, 2]), what=what)


def test_wait_any(groups, inline, tmp_path):
    mark = tmp_path / "all else is done"
    slow = groups["one"].broadcast_async("wait", mark=str(mark))
    quick = groups["two"].submit("where", samples([1, 2]))
    assert wait_any([slow, quick], 30) == [quick]
    assert wait_any([slow], 0.05) == []
    assert wait_any([inline.broadcast_async("ping"), slow])[0].result() == [(0, 1, None)]
    assert wait_any([slow, quick], 0) == [quick] and not slow.done()
    mark.touch()
    assert wait_any([slow]) == [slow] and slow.result() == ["woken"]
    assert wait_any([]) == []


# -- streams ----------------------------------------------------------------------------------------------------------


def shards(size: int) -> list[Batch]:
    return [samples([2, 1, 3, 1, 2][: 5 - rank], start=10 * rank) for rank in range(size)]


@pytest.mark.parametrize("name", SIZES)
def test_stream_brings_everything_in_each_ranks_order(groups, name, gets):
    batches = shards(SIZES[name])
    chunks = list(groups[name].stream("numbers", batches, chunk=2))
    assert gets == []
    for rank, batch in enumerate(batches):
        mine = [c for c in chunks if c["from"][0] == rank]
        assert [len(c) for c in mine] == [2] * (len(batch) // 2) + [1] * (len(batch) % 2)
        whole = Batch.concat(mine)
        assert torch.equal(whole["index"], batch["index"]) and torch.equal(whole["tokens"], batch["tokens"] * 2)


def test_stream_inline_is_the_same(groups, inline):
    ours, theirs = (list(g.stream("numbers", shards(1), chunk=2)) for g in (groups["one"], inline))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_stream_hands_over_before_all_is_done_and_ranks_mix(groups, tmp_path):
    """No rank makes a second chunk before a first one of each is here."""
    mark, ranks = tmp_path / "one of each", []
    for chunk in groups["two"].stream("numbers", shards(2), chunk=1, mark=str(mark)):
        ranks.append(chunk["from"][0])
        if len(set(ranks)) == 2:
            mark.touch()
    assert set(ranks[:2]) == {0, 1} and len(ranks) == 9


def test_stream_that_raises_in_the_middle_gives_what_came_before(groups, inline):
    for group, name in ((groups["one"], "one"), (inline, "inline")):
        stream, got = group.stream("numbers", shards(1), chunk=2, fail_at=2), []
        with pytest.raises(RoleFailed, match=f"{name} rank 0 failed in numbers: ValueError: chunk 2 is bad") as caught:
            for chunk in stream:
                got += chunk["index"].tolist()
        assert got == [0, 1, 2, 3]
        assert caught.value.phase == "numbers"


def test_stream_deadline_is_between_chunks(groups, monkeypatch):
    """By the driver's clock five chunks take longer than the deadline of 60 s, which holds for each of them alone."""
    ahead = 0.0
    monkeypatch.setattr(ray_pending, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead))
    count = 0
    for _ in groups["one"].stream("numbers", shards(1), chunk=1, pause=0.2, timeout_s=60.0):
        count, ahead = count + 1, ahead + 30.0
    assert count == 5


def test_stream_wants_a_batch_for_each_rank(groups):
    with pytest.raises(ValueError, match="two has 2 ranks, found 1 batches"):
        groups["two"].stream("numbers", shards(1), chunk=1)


# -- errors after which the group can still be used -------------------------------------------------------------------


def test_exception_is_named_with_its_last_frames_and_log(groups):
    with pytest.raises(RoleFailed) as caught:
        groups["one"].call("boom", samples([1]), rank=0)
    error = caught.value
    assert (error.role, error.rank, error.phase, error.cause) == ("one", 0, "boom", "FloatingPointError: loss is nan")
    assert str(error).startswith("one rank 0 failed in boom: FloatingPointError: loss is nan")
    assert "toy_roles.py" in str(error) and 'raise FloatingPointError("loss is nan")' in str(error)
    assert error.log in str(error) and "FloatingPointError: loss is nan" in Path(error.log).read_text()
    assert groups["one"].broadcast("ping") == [(0, 1, None)]


def test_exceptions_which_can_not_be_pickled_are_told_too(groups):
    with pytest.raises(RoleFailed, match="failed in unpicklable: Odd: but can be told"):
        groups["one"].broadcast("unpicklable")
    with pytest.raises(RoleFailed, match="failed in end: SystemExit: 4"):
        groups["one"].broadcast("end", how="sys.exit")
    with pytest.raises(RoleFailed, match="failed in nothing: AttributeError: 'Toy' object has no attribute 'nothing'"):
        groups["one"].broadcast("nothing")


def test_inline_keeps_the_original_exception(inline):
    pending = inline.submit("boom", samples([1]), rank=0)
    with pytest.raises(RoleFailed, match="inline rank 0 failed in boom: FloatingPointError: loss is nan") as caught:
        pending.result()
    original = caught.value.__cause__
    assert isinstance(original, FloatingPointError)
    assert original.__traceback__.tb_next is not None and original.__traceback__.tb_frame is not None
