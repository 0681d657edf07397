"""Held-out prompts are apart from all that is trained on."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.split import choose_groups, group_equal
from rayrlhf.errors import InputRefused

NUMBERS = ["one", "two", "three", "four", "five"]


def rows(*texts: str) -> list[dict]:
    return [{"prompt": text} for text in texts]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(10, 16)), max_size=12))
def test_groups_are_the_connected_components(keys: list[tuple[int, int]]) -> None:
    reached = [[bool(set(one) & set(other)) for other in keys] for one in keys]
    for k, i, j in product(range(len(keys)), repeat=3):  # Warshall's closure
        reached[i][j] |= reached[i][k] and reached[k][j]
    assert group_equal(keys) == [row.index(True) for row in reached]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=15), st.integers(0, 100), st.data())
def test_chosen_items_are_of_different_groups(values: list[int], seed: int, data: Any) -> None:
    groups = group_equal([(value,) for value in values])
    count = data.draw(st.integers(0, len(set(groups))))
    chosen = choose_groups(groups, count, seed)
    assert len(chosen) == len({values[item] for item in chosen}) == count
    assert chosen == sorted(chosen) == choose_groups(groups, count, seed)


def test_each_item_is_chosen_about_as_often() -> None:
    counts = Counter(item for seed in range(600) for item in choose_groups(range(6), 2, seed))
    assert set(counts) == set(range(6)) and all(150 < count < 250 for count in counts.values())


def test_no_held_out_prompt_is_trained_on(load: Any) -> None:
    texts = NUMBERS * 3 + ["five"]
    seen = set()
    for seed in range(8):
        loaded = load(rows(*texts), held_out=2, seed=seed)
        held = [prompt.text for prompt in loaded.held_out]
        train = [prompt.text for prompt in loaded.train]
        assert len(set(held)) == 2 and not set(held) & set(train)
        assert Counter(train) == Counter(text for text in texts if text not in held)
        assert loaded.report.duplicates_left_out == sum(texts.count(text) for text in held) - 2
        assert [prompt.id for prompt in loaded.train] == list(range(len(train)))
        assert [prompt.id for prompt in loaded.held_out] == [0, 1]
        again = load(rows(*texts), held_out=2, seed=seed)
        assert [prompt.where for prompt in again.held_out] == [prompt.where for prompt in loaded.held_out]
        seen.add(tuple(held))
    assert len(seen) > 2


def test_the_same_question_under_another_system_message_is_a_duplicate(load: Any) -> None:
    user = {"role": "user", "content": "hello"}
    same = ["hello", [user], [{"role": "system", "content": "be kind"}, user]]
    other = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, user]
    for seed in range(6):
        loaded = load([{"prompt": prompt} for prompt in [*same, other]], held_out=1, seed=seed)
        lines = [prompt.where[-1] for prompt in loaded.train]
        assert (lines, loaded.report.duplicates_left_out) in ((["4"], 2), (["1", "2", "3"], 0))


def test_prompts_with_the_same_tokens_after_the_cut_are_duplicates(load: Any) -> None:
    texts = rows("one two three", "four two three", "five")
    for seed in range(6):
        loaded = load(texts, held_out=1, seed=seed, max_prompt_tokens=3, overlong_prompts="truncate_left")
        lines = [prompt.where[-1] for prompt in loaded.train]
        assert (lines, loaded.report.duplicates_left_out) in ((["3"], 1), (["1", "2"], 0))


def test_held_out_prompts_of_another_file(load: Any, write: Any) -> None:
    other = write(rows("six", "one", "one", "hello"), "other.jsonl")
    for seed in range(6):
        loaded = load(rows(*NUMBERS, "one"), eval_prompts=other, held_out=3, seed=seed, limit=6)
        assert [prompt.text for prompt in loaded.held_out] == ["six", "one", "hello"]
        assert loaded.held_out[1].where.endswith("other.jsonl, line 2")
        assert [prompt.text for prompt in loaded.train] == NUMBERS[1:]
        assert loaded.report.duplicates_left_out == 2
        assert len(loaded.report.lines()) == 3
    assert (
        loaded.report.lines()[-1]
        == "4 prompts to train on, 3 held out; 2 duplicates of held-out prompts left out of the training"
    )
    # the limit is for the training prompts
    loaded = load(rows(*NUMBERS), eval_prompts=other, held_out=3, limit=2)
    assert [len(loaded.train), len(loaded.held_out)] == [1, 3]
    # without an evaluation the other file isn't read
    assert len(load(rows(*NUMBERS), eval_prompts="nowhere.jsonl").train) == 5


def test_too_few_prompts(load: Any, write: Any) -> None:
    assert len(load(rows(*NUMBERS, "one"), held_out=4).held_out) == 4
    with pytest.raises(InputRefused) as refused:
        load(rows(*NUMBERS, "one"), held_out=5)
    assert str(refused.value).endswith(
        "prompts.jsonl: 6 usable prompts, 5 of them different, are too few for evaluation.prompts = 5 and at least one "
        "to train on. Legal: evaluation.prompts at most 4, or held-out prompts of their own in data.eval_prompts"
    )
    other = write(rows("one", "one", "two"), "other.jsonl")
    with pytest.raises(
        InputRefused, match=r"3 usable .*, 2 of them different, are fewer than .* = 3. Legal: at most 2"
    ):
        load(rows(*NUMBERS), eval_prompts=other, held_out=3)
    with pytest.raises(InputRefused, match="all 2 usable prompts are held-out prompts of .*; none is left to train on"):
        load(rows("one", "two"), eval_prompts=other, held_out=2)


def test_the_fingerprint_stands_for_the_training_prompts_in_their_order(load: Any) -> None:
    first = load(rows("one", "two")).fingerprint
    assert first == load([{"prompt": "one", "more": 1}, {"prompt": "two"}]).fingerprint
    others = [rows("two", "one"), rows("one"), rows("one", "three"), rows("one <s> two")]
    assert len({first, *(load(other).fingerprint for other in others)}) == 5
