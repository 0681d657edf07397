"""Held-out examples, mixtures and fingerprints."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from rayrlhf.errors import InputRefused

NUMBERS = ["one", "two", "three", "four", "five"]
ROWS = [
    {"prompt": f"{a} {b}", "completion": completion, "label": True, "chosen": completion, "rejected": "you"}
    for a in NUMBERS
    for b in NUMBERS
    for completion in ("fine", "thanks")
]


def prompts(items: Any) -> list[str]:
    return [item.prompt_text for item in items]


@pytest.mark.parametrize("kind", ["examples", "pairs", "labelled"])
def test_whole_prompts_are_held_out_by_seed(load_fixed: Any, kind: str) -> None:
    loaded = load_fixed(kind, ROWS, validation_fraction=0.2, seed=3)
    train, held_out = prompts(loaded.train), prompts(loaded.validation)
    # 25 prompts with two examples each
    assert len(set(held_out)) == 5 and len(held_out) == 10 and len(train) == 40
    assert not set(train) & set(held_out)
    assert [item.id for item in loaded.train] == list(range(40))
    assert [item.id for item in loaded.validation] == list(range(10))
    again = load_fixed(kind, ROWS, validation_fraction=0.2, seed=3)
    assert prompts(again.validation) == held_out and again.fingerprint == loaded.fingerprint
    other = load_fixed(kind, ROWS, validation_fraction=0.2, seed=4)
    assert prompts(other.validation) != held_out and other.fingerprint != loaded.fingerprint
    assert loaded.report.lines()[-1].endswith("s to train on, 10 held out")


def test_no_prompt_is_held_out_where_none_is_asked_for(load_fixed: Any) -> None:
    loaded = load_fixed("examples", ROWS, validation_fraction=0.0)
    assert len(loaded.train) == 50 and loaded.validation == []


def test_one_prompt_cannot_be_split(load_fixed: Any) -> None:
    with pytest.raises(InputRefused, match="all examples have one prompt"):
        load_fixed("examples", ROWS[:2], validation_fraction=0.5)
    assert len(load_fixed("examples", ROWS[:4], validation_fraction=0.01).validation) == 2
    assert len(load_fixed("examples", ROWS[:4], validation_fraction=0.99).train) == 2


def test_prompts_of_the_validation_file_are_left_out_of_the_training(load_fixed: Any, write: Any) -> None:
    held_out = write(ROWS[:4], "held_out.jsonl")
    loaded = load_fixed("pairs", ROWS, validation=held_out)
    assert prompts(loaded.validation) == ["one one", "one one", "one two", "one two"]
    assert len(loaded.train) == 46 and not set(prompts(loaded.train)) & {"one one", "one two"}
    assert loaded.report.lines()[-1] == (
        "46 pairs to train on, 4 held out; 4 with held-out prompts left out of the training"
    )
    with pytest.raises(InputRefused, match="all 4 pairs have prompts of data.validation"):
        load_fixed("pairs", ROWS[:4], validation=held_out)


def test_weights_are_copies_and_a_drawn_part(load_fixed: Any, write: Any) -> None:
    few, many = write(ROWS[:8], "few.jsonl"), write(ROWS[8:28], "many.jsonl")

    def mixed(seed: int, **keys: Any) -> Any:
        sources = [{"path": few, "weight": 2.5}, {"path": many, "weight": 0.25}]
        return load_fixed("examples", train=sources, seed=seed, **keys)

    loaded = mixed(0)
    times = Counter(item.where.rsplit("/", 1)[-1] for item in loaded.train)
    of_few = [times[f"few.jsonl, line {line}"] for line in range(1, 9)]
    of_many = [times[f"many.jsonl, line {line}"] for line in range(1, 21)]
    # 2.5 * 8 = two copies of each and four drawn ones; 0.25 * 20 = five drawn ones, none twice
    assert sorted(of_few) == [2] * 4 + [3] * 4 and sorted(of_many) == [0] * 15 + [1] * 5
    assert [item.id for item in loaded.train] == list(range(25))
    assert [i.where for i in mixed(0).train] == [i.where for i in loaded.train] != [i.where for i in mixed(1).train]
    # what is held out of a mixture is seen once, and isn't trained on
    split = mixed(0, validation_fraction=0.2)
    assert max(Counter(item.where for item in split.validation).values()) == 1
    assert not set(prompts(split.train)) & set(prompts(split.validation))


def test_the_limit_holds_for_each_source(load_fixed: Any, write: Any) -> None:
    sources = [{"path": write(ROWS[:8], "a.jsonl")}, {"path": write(ROWS[8:], "b.jsonl")}]
    assert len(load_fixed("examples", train=sources, limit=3).train) == 6


def test_the_fingerprint_sees_tokens_masks_labels_and_order(load_fixed: Any) -> None:
    prints = [
        load_fixed("examples", ROWS[:4]).fingerprint,
        load_fixed("examples", ROWS[:4], loss_on="all").fingerprint,
        load_fixed("examples", ROWS[3::-1]).fingerprint,
        load_fixed("examples", ROWS[:3]).fingerprint,
        load_fixed("examples", [*ROWS[:3], {**ROWS[3], "completion": "fine fine"}]).fingerprint,
        load_fixed("labelled", ROWS[:4]).fingerprint,
        load_fixed("labelled", [*ROWS[:3], {**ROWS[3], "label": False}]).fingerprint,
        load_fixed("pairs", ROWS[:4]).fingerprint,
        # the same tokens, but for the border between prompt and response
        load_fixed("pairs", [{"prompt": "one", "chosen": "two", "rejected": "you"}]).fingerprint,
        load_fixed("pairs", [{"prompt": "one two", "chosen": "two", "rejected": "you"}]).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load_fixed("examples", ROWS[:4], seed=7).fingerprint == prints[0]
