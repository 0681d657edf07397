"""The packed batch against lists of samples; deferred columns against ordinary ones."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.batch import Batch, BatchError, Deferred, Rows


class Held:
    """A source that holds its values and counts how often it was asked."""

    def __init__(self, values: Any):
        self.values, self.fetched = values, 0

    def fetch(self) -> Any:
        self.fetched += 1
        return self.values


def make(samples: list[list[int]], deferred: bool = False) -> Batch:
    """A batch whose columns can be told from its tokens: score = sum, name = str, pair = 2 numbers a token."""
    offsets = torch.tensor([sum(map(len, samples[:i])) for i in range(len(samples) + 1)])
    tokens = torch.tensor([t for s in samples for t in s], dtype=torch.int64)
    token: dict[str, Any] = {"tokens": tokens, "pair": torch.stack([tokens, -tokens], 1)}
    sample: dict[str, Any] = {
        "score": torch.tensor([float(sum(s)) for s in samples]),
        "name": [str(s) for s in samples],
    }
    if deferred:
        rows = Rows.whole(len(samples))
        token = {k: Deferred.whole(Held(v), rows, offsets) for k, v in token.items()}
        sample = {k: Deferred.whole(Held(v), rows, None) for k, v in sample.items()}
    return Batch(offsets, token, sample)


def check(batch: Batch, samples: list[list[int]]) -> None:
    """The batch has exactly these samples, in every column."""
    assert len(batch) == len(samples) and batch.num_tokens == sum(map(len, samples))
    assert batch.lengths.tolist() == [len(s) for s in samples] and batch.offsets.dtype == torch.int64
    assert [batch["tokens"][a:b].tolist() for a, b in batch.spans()] == samples
    assert batch["tokens"].dtype == torch.int64
    assert batch["pair"].tolist() == [[t, -t] for s in samples for t in s]
    assert batch["score"].tolist() == [float(sum(s)) for s in samples] and batch["score"].dtype == torch.float32
    assert batch["name"] == [str(s) for s in samples]


sample_lists = st.lists(st.lists(st.integers(-99, 99), max_size=4), max_size=6)


def positions_in(samples: list[list[int]]) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(samples) - 1), max_size=8) if samples else st.just([])


@settings(max_examples=60, deadline=None)
@given(sample_lists, st.booleans(), st.data())
def test_select(samples, deferred, data):
    chosen = data.draw(positions_in(samples))
    check(make(samples, deferred).select(chosen), [samples[i] for i in chosen])
    check(make(samples, deferred).select(torch.tensor(chosen, dtype=torch.int64)), [samples[i] for i in chosen])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(sample_lists, st.booleans()), min_size=1, max_size=4))
def test_concat_of_ordinary_and_deferred(parts):
    check(Batch.concat([make(s, d) for s, d in parts]), [x for s, _ in parts for x in s])


@settings(max_examples=100, deadline=None)
@given(st.lists(sample_lists, min_size=1, max_size=3), st.booleans(), st.data())
def test_any_chain_of_select_and_concat(parts, deferred, data):
    """As a driver does it: shard, put together again, shard once more; nothing is fetched until it is read."""
    model = [list(p) for p in parts]
    batches = [make(p, deferred) for p in parts]
    sources = [c.sources[0] for b in batches for columns in b.columns() for c in columns.values() if deferred]
    for _ in range(data.draw(st.integers(1, 5))):
        k = data.draw(st.integers(0, len(model) - 1))
        if data.draw(st.booleans()):
            chosen = data.draw(positions_in(model[k]))
            batches.append(batches[k].select(chosen))
            model.append([model[k][i] for i in chosen])
        else:
            j = data.draw(st.integers(0, len(model) - 1))
            batches.append(Batch.concat([batches[k], batches[j]]))
            model.append(model[k] + model[j])
    assert all(source.fetched == 0 for source in sources)
    for batch, samples in zip(batches, model, strict=True):
        check(pickle.loads(pickle.dumps(batch)), samples)
        check(batch, samples)


def test_a_deferred_column_is_fetched_once_and_only_where_it_is_needed():
    first, second = make([[1, 2], [3]], deferred=True), make([[4], [5, 6]], deferred=True)
    chosen = Batch.concat([first, second]).select([3, 2])
    token, _ = chosen.columns()
    needed = second.columns()[0]["tokens"].sources[0]
    assert token["tokens"].sources == (needed,)  # the first batch's values are no longer asked for
    assert chosen["tokens"].tolist() == [5, 6, 4] and chosen["tokens"].tolist() == [5, 6, 4]
    assert needed.fetched == 1 and chosen.is_token_column("tokens")


def test_nothing_selected_from_a_deferred_column():
    nothing = make([[1, 2], [3]], deferred=True).select([])
    check(nothing, [])
    assert nothing["pair"].shape == (0, 2)
    check(Batch.concat([nothing, make([[7]], deferred=True)]), [[7]])


def test_with_columns_only_and_missing():
    batch = make([[1, 2], [3]])
    more = batch.with_columns(token={"mask": torch.tensor([True, False, True])}, sample={"score": torch.zeros(2)})
    assert more["score"].tolist() == [0, 0] and batch["score"].tolist() == [3, 3]
    assert "mask" in more and "mask" not in batch and more.is_token_column("mask")
    assert sorted(more.only(["mask", "score", "nothing"]).keys()) == ["mask", "score"]
    with pytest.raises(BatchError, match="no column 'mask'"):
        batch["mask"]


def test_from_samples():
    columns = {"tokens": [torch.tensor([1, 2]), torch.tensor([3])], "pair": [torch.ones(2, 2), torch.zeros(1, 2)]}
    batch = Batch.from_samples(columns, {"name": ["a", "b"]})
    assert batch.offsets.tolist() == [0, 2, 3] and batch["pair"].shape == (3, 2) and batch["name"] == ["a", "b"]
    # the same number of tokens in all, but not in each sample
    with pytest.raises(BatchError, match="'mask' have"):
        Batch.from_samples({"tokens": columns["tokens"], "mask": [torch.ones(1), torch.ones(2)]})
    for empty in ({}, {"tokens": []}):
        with pytest.raises(BatchError, match="at least one"):
            Batch.from_samples(empty)


OFFSETS = torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("token", "sample", "message"),
    [
        ({"a": torch.zeros(2)}, {}, "'a' has 2 entries where the batch has 3 tokens"),
        ({}, {"b": torch.zeros(3)}, "'b' has 3 entries where the batch has 2 samples"),
        ({}, {"b": ["x"]}, "'b' has 1 entries"),
        ({"c": torch.zeros(3)}, {"c": torch.zeros(2)}, r"\['c'\] are given both"),
        (
            {"d": Deferred.whole(Held(torch.zeros(3)), Rows.whole(3), torch.tensor([0, 1, 2, 3]))},
            {},
            "'d' has 3 entries",
        ),
    ],
)
def test_columns_that_do_not_fit(token: dict, sample: dict, message: str):
    with pytest.raises(BatchError, match=message):
        Batch(OFFSETS, token, sample)


def test_fetched_values_that_do_not_fit():
    batch = Batch(OFFSETS, {"a": Deferred.whole(Held(torch.zeros(4)), Rows.whole(2), OFFSETS)})
    for _ in range(2):
        with pytest.raises(BatchError, match="fetched with 4 entries instead of 3"):
            batch["a"]


@pytest.mark.parametrize("indices", [[-1], [2], [0, -2]])
def test_select_of_samples_that_are_not_there(indices):
    for deferred in (False, True):
        with pytest.raises(BatchError, match="aren't in a batch of 2"):
            make([[1, 2], [3]], deferred).select(indices)


@pytest.mark.parametrize("indices", [torch.tensor([True, False]), [False, True], torch.tensor([0.0])])
def test_select_takes_positions(indices):
    with pytest.raises(BatchError, match="positions of samples"):
        make([[1, 2], [3]]).select(indices)


def test_concat_of_batches_that_differ():
    one, other = make([[1]]), make([[2]])
    with pytest.raises(BatchError, match=r"differ in the columns \['mask'\]"):
        Batch.concat([one, other.with_columns(token={"mask": torch.tensor([True])})])
    as_token = Batch(torch.tensor([0, 1]), {"x": torch.zeros(1)})
    as_sample = Batch(torch.tensor([0, 1]), {}, {"x": torch.zeros(1)})
    with pytest.raises(BatchError, match=r"differ in the columns \['x'\]"):
        Batch.concat([as_token, as_sample])
    with pytest.raises(BatchError, match="nothing to concatenate"):
        Batch.concat([])
