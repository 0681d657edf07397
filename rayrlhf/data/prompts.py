"""Prompts from files and Hugging Face datasets: read, checked, turned into tokens, split.

    rows -> checked prompts -> chat template -> tokens -> length rule -> held-out split

Everything that is wrong is found before anything is used, and told in one message.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rayrlhf.config.schema import DataConfig, PromptsConfig
from rayrlhf.data.candidates import Candidate, prepare, unused_system_prompt
from rayrlhf.data.reading import check_kinds, read_source
from rayrlhf.data.report import PromptReport
from rayrlhf.data.source import Place, Source, raise_problems
from rayrlhf.data.split import choose_groups, group_equal
from rayrlhf.data.tokens import PromptTokenizer
from rayrlhf.errors import InputRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "PromptData", "load_all_prompts", "load_prompts"]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: its position in the list it is in (`PromptData.train` or `PromptData.held_out`).
        tokens: int64 [P], with the chat template, cut to ``data.max_prompt_tokens``.
        text: what a reward function gets as the prompt: the plain string, or the user's last message; never cut.
        row: the other columns of the data.
        completion_tokens: int64 [C], a held-out prompt's known continuation, where ``data.completion_column`` is given.
        where: file and line (or row) it comes from.
        messages: the conversation that the chat template wrote; None for a plain prompt.
    """

    id: int
    tokens: Tensor
    text: str
    row: dict[str, Any]
    completion_tokens: Tensor | None = None
    where: str = ""
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True)
class PromptData:
    """Prompts to train on, prompts held out for evaluation, and what was found on the way."""

    train: list[Prompt]
    held_out: list[Prompt]
    report: PromptReport

    @property
    def fingerprint(self) -> str:
        """Stands for the training prompts and their order: a place in the data is a place in these."""
        digest = hashlib.sha256()
        for prompt in self.train:
            digest.update(np.int64(len(prompt.tokens)).tobytes() + prompt.tokens.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, held_out: int) -> PromptData:
    """Load the prompts that ``data`` names.

    Args:
        data: the configuration's section ``data``.
        tokenizer: the policy's, with its chat template.
        seed: the run's seed; it chooses the held-out prompts.
        held_out: how many different prompts are held out (``evaluation.prompts``): from ``data.eval_prompts`` where
            that is given, else out of ``data.prompts``. No prompt equal to one of them is trained on. With 0, neither
            ``eval_prompts`` nor ``completion_column`` is looked at.

    Raises:
        InputRefused: with all problems, each with its file, its line (or row) and what was found there.
    """
    if data.completion_column == data.prompt_column:
        raise InputRefused(f"data.prompt_column and data.completion_column are both {data.prompt_column!r}")
    separate = held_out > 0 and data.eval_prompts is not None
    named = [("data.prompts", data.prompts)]
    if separate and data.eval_prompts is not None:
        named.append(("data.eval_prompts", data.eval_prompts))
    # completions are needed where the held-out prompts come from, and nowhere else
    completions = [data.completion_column if held_out and key == named[-1][0] else None for key, _ in named]
    sources = [
        read_source(
            Place(key, name, data.split, data.subset, data.limit if key == "data.prompts" else None),
            [data.prompt_column, *([column] if column else [])],
        )
        for (key, name), column in zip(named, completions, strict=True)
    ]
    encoder = PromptTokenizer(tokenizer)
    prepared = [prepare(source, data, column, encoder) for source, column in zip(sources, completions, strict=True)]
    general = check_kinds("data", data.split, data.subset, [name for _, name in named])
    if not general and not any(source.problems for source in sources):
        general += unused_system_prompt(data, [c for candidates, _ in prepared for c in candidates])
    raise_problems(sources, general)

    pool, test_pool = prepared[0][0], prepared[-1][0] if separate else []
    train, chosen, duplicates = _split(sources, pool, test_pool, seed, held_out)
    tests = [_prompt(i, c, sources[-1], encoder, data.completion_column) for i, c in enumerate(chosen)]
    raise_problems(sources)
    return PromptData(
        [_prompt(i, c, sources[0], encoder, None) for i, c in enumerate(train)],
        tests,
        PromptReport(tuple(report for _, report in prepared if report), len(train), len(tests), duplicates),
    )


def load_all_prompts(
    data: PromptsConfig, tokenizer: PreTrainedTokenizerBase, *, completion_column: str | None = None
) -> tuple[list[Prompt], list[str]]:
    """Load every usable prompt of ``data.prompts``, in its order, with no split.

    Args:
        completion_column: column with a known continuation, whose tokens each prompt gets.

    Returns:
        The prompts, and lines about them for the user.

    Raises:
        InputRefused: with all problems, each with its file, its line (or row) and what was found there.
    """
    if completion_column == data.prompt_column:
        raise InputRefused(f"data.prompt_column and data.completion_column are both {data.prompt_column!r}")
    place = Place("data.prompts", data.prompts, data.split, data.subset, data.limit)
    source = read_source(place, [data.prompt_column, *([completion_column] if completion_column else [])])
    encoder = PromptTokenizer(tokenizer)
    candidates, report = prepare(source, data, completion_column, encoder)
    general = check_kinds("data", data.split, data.subset, [data.prompts])
    if not general and not source.problems:
        general += unused_system_prompt(data, candidates)
    raise_problems([source], general)
    prompts = [_prompt(i, c, source, encoder, completion_column) for i, c in enumerate(candidates)]
    raise_problems([source])
    return prompts, [report.line()] if report is not None else []


def _split(
    sources: list[Source], pool: list[Candidate], test_pool: list[Candidate], seed: int, held_out: int
) -> tuple[list[Candidate], list[Candidate], int]:
    """Training prompts, held-out prompts, and how many duplicates of these were left out of the training."""
    everything = pool + test_pool
    # the same to the reader, or the same to the model
    groups = group_equal([(candidate.identity, tuple(candidate.tokens)) for candidate in everything])
    first = len(pool) if test_pool else 0
    distinct = len(set(groups[first:]))
    where = sources[-1].name
    if test_pool and distinct < held_out:
        raise InputRefused(
            f"{where}: {len(test_pool)} usable prompts, {distinct} of them different, are fewer than "
            f"evaluation.prompts = {held_out}. Legal: at most {distinct}"
        )
    if not test_pool and distinct <= held_out:
        raise InputRefused(
            f"{where}: {len(pool)} usable prompts, {distinct} of them different, are too few for "
            f"evaluation.prompts = {held_out} and at least one to train on. Legal: evaluation.prompts at most "
            f"{distinct - 1}, or held-out prompts of their own in data.eval_prompts"
        )
    # positions of first members are taken within the pool that is drawn from, whatever else belongs to the group
    own = group_equal([(group,) for group in groups[first:]])
    chosen = [first + item for item in choose_groups(own, held_out, seed)]
    taken = {groups[item] for item in chosen}
    train = [candidate for candidate, group in zip(pool, groups, strict=False) if group not in taken]
    if not train:
        raise InputRefused(
            f"{sources[0].name}: all {len(pool)} usable prompts are held-out prompts of {where} too; "
            "none is left to train on"
        )
    duplicates = len(pool) - len(train) - (0 if test_pool else len(chosen))
    return train, [everything[item] for item in chosen], duplicates


def _prompt(index: int, candidate: Candidate, source: Source, encoder: PromptTokenizer, column: str | None) -> Prompt:
    completion = None
    if column is not None:
        try:
            tokens = encoder.completion(candidate.written, candidate.messages, candidate.row[column])
        # a template can raise anything
        except Exception as error:
            source.problem(f"column {column!r} can't be written by the chat template: {error}", candidate.number)
            tokens = []
        completion = torch.tensor(tokens, dtype=torch.int64)
    tokens_of_prompt = torch.tensor(candidate.tokens, dtype=torch.int64)
    where = source.at(candidate.number)
    return Prompt(index, tokens_of_prompt, candidate.text, candidate.row, completion, where, candidate.messages)
