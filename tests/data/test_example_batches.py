"""Batches of examples, pairs and labelled examples, column by column."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayrlhf.data import example_batch, labelled_batch, pair_batch

ROWS = [
    {"prompt": "hello", "chosen": "one", "rejected": "two two", "margin": 0.5},
    {"prompt": "how are you", "chosen": "three three", "rejected": "four"},
]
LABELLED = [
    {"prompt": "hello", "completion": "one", "label": True},
    {"prompt": "how are you", "completion": "two two two two", "label": False},
    {"prompt": "be kind", "completion": "three", "label": True},
]


def samples(batch: Any, column: str) -> list[list[Any]]:
    return [batch[column][start:end].tolist() for start, end in batch.spans()]


def test_examples(load_fixed: Any, ids: Any) -> None:
    batch = example_batch(load_fixed("examples", LABELLED).train[1:])
    assert samples(batch, "tokens") == [ids("<s> how are you two two two two </s>"), ids("<s> be kind three </s>")]
    assert samples(batch, "response_mask") == [[False] * 4 + [True] * 5, [False] * 3 + [True] * 2]
    assert batch["example_id"].tolist() == [1, 2]
    assert batch["tokens"].dtype == torch.int64 and batch["response_mask"].dtype == torch.bool


def test_pairs_are_neighbours(load_fixed: Any, ids: Any) -> None:
    batch = pair_batch(load_fixed("pairs", ROWS).train)
    assert samples(batch, "tokens") == [
        ids("<s> hello one </s>"),
        ids("<s> hello two two </s>"),
        ids("<s> how are you three three </s>"),
        ids("<s> how are you four </s>"),
    ]
    assert samples(batch, "response_mask") == [
        [False, False, True, True],
        [False, False, True, True, True],
        [False] * 4 + [True] * 3,
        [False] * 4 + [True] * 2,
    ]
    assert batch["prompt_length"].tolist() == [2, 2, 4, 4] and batch["prompt_length"].dtype == torch.int64
    assert batch["margin"].dtype == torch.float32
    assert batch["margin"][:2].tolist() == [0.5, 0.5] and batch["margin"][2:].isnan().all()
    assert batch["example_id"].tolist() == [0, 0, 1, 1] and batch["example_id"].dtype == torch.int64


def test_labelled_examples_have_their_mismatched_ones_behind_them(load_fixed: Any, ids: Any) -> None:
    examples = load_fixed("labelled", LABELLED).train
    batch = labelled_batch(examples)
    assert samples(batch, "tokens") == [
        *(example.tokens.tolist() for example in examples),
        ids("<s> hello two two two two </s>"),
        ids("<s> how are you three </s>"),
        ids("<s> be kind one </s>"),
    ]
    prompts = [2, 4, 3]
    assert batch["prompt_length"].tolist() == prompts * 2
    assert [row.index(True) for row in samples(batch, "response_mask")] == prompts * 2
    assert all(all(row[start:]) for row, start in zip(samples(batch, "response_mask"), prompts * 2, strict=True))
    assert batch["mismatched"].tolist() == [False] * 3 + [True] * 3 and batch["mismatched"].dtype == torch.bool
    assert batch["desirable"].tolist() == [True, False, True] * 2
    assert batch["example_id"].tolist() == [0, 1, 2] * 2


def test_a_mismatched_sample_is_no_longer_than_the_longest_example(load_fixed: Any, ids: Any) -> None:
    rows = [
        {"prompt": "how are you there", "completion": "one", "label": True},
        {"prompt": "be", "completion": "two two two", "label": False},
    ]
    batch = labelled_batch(load_fixed("labelled", rows).train)
    # 5 tokens of the prompt and 4 of the completion are more than the 7 of the first example
    assert samples(batch, "tokens")[2] == ids("<s> how are you there two two")
    assert max(batch.lengths.tolist()) == 7


def test_examples_without_labels_are_none_of_an_unpaired_preference(load_fixed: Any) -> None:
    with pytest.raises(ValueError, match="without a label"):
        labelled_batch(load_fixed("examples", LABELLED).train)
