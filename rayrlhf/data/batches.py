"""Examples and pairs as batches: the layout that trainers of fixed data share.

A pair is two neighbouring samples, 2i the chosen one and 2i + 1 the rejected one, each prompt + response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.data.examples import Example, Pair

__all__ = ["example_batch", "labelled_batch", "pair_batch"]


def example_batch(examples: Sequence[Example]) -> Batch:
    """One sample an example: token columns ``tokens`` and ``response_mask`` (what is learnt), sample column
    ``example_id``."""
    return Batch.from_samples(
        {"tokens": [e.tokens for e in examples], "response_mask": [e.mask for e in examples]},
        {"example_id": torch.tensor([e.id for e in examples])},
    )


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """Two samples a pair, chosen before rejected.

    Token columns ``tokens`` and ``response_mask`` (True on the response); sample columns, equal for both samples of a
    pair, ``prompt_length``, ``margin`` (float32, NaN where there is none) and ``example_id``.
    """
    tokens, masks = [], []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            tokens.append(torch.cat([pair.prompt, response]))
            masks.append(_response_mask(len(pair.prompt), len(response)))
    margins = torch.tensor([float("nan") if p.margin is None else p.margin for p in pairs], dtype=torch.float32)
    columns = {
        "prompt_length": torch.tensor([len(p.prompt) for p in pairs]),
        "margin": margins,
        "example_id": torch.tensor([p.id for p in pairs]),
    }
    return Batch.from_samples(
        {"tokens": tokens, "response_mask": masks},
        {name: column.repeat_interleave(2) for name, column in columns.items()},
    )


def labelled_batch(examples: Sequence[Example]) -> Batch:
    """The n examples, and behind them n mismatched samples, from which KTO estimates the KL.

    Mismatched sample i is the prompt of example i with the completion of example (i + 1) mod n, cut where it would be
    longer than the longest example of the batch. Token columns ``tokens`` and ``response_mask``; sample columns
    ``desirable`` and ``mismatched`` (bool), ``prompt_length`` and ``example_id``, a mismatched sample's being those of the
    example that its prompt is of.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", section 4.1.

    Raises:
        ValueError: an example without a label.
    """
    if any(example.desirable is None for example in examples):
        raise ValueError("an example without a label is none of an unpaired preference")
    starts = [int(example.mask.int().argmax()) for example in examples]
    longest = max(len(example.tokens) for example in examples)
    tokens = [example.tokens for example in examples]
    for index, example in enumerate(examples):
        other = (index + 1) % len(examples)
        mixed = torch.cat([example.tokens[: starts[index]], examples[other].tokens[starts[other] :]])
        tokens.append(mixed[:longest])
    prompts = torch.tensor(starts * 2)
    masks = [_response_mask(start, len(sample) - start) for start, sample in zip(starts * 2, tokens, strict=True)]
    n = len(examples)
    return Batch.from_samples(
        {"tokens": tokens, "response_mask": masks},
        {
            "desirable": torch.tensor([bool(example.desirable) for example in examples] * 2),
            "mismatched": torch.arange(2 * n) >= n,
            "prompt_length": prompts,
            "example_id": torch.tensor([example.id for example in examples] * 2),
        },
    )


def _response_mask(prompt: int, response: int) -> Tensor:
    return torch.arange(prompt + response) >= prompt
