"""Examples and preference pairs from files and Hugging Face datasets: read, checked, turned into tokens, split.

    rows -> checked records -> chat template -> tokens -> length rule -> held-out prompts -> weights of the mixture

Everything that is wrong is found before anything is used, and told in one message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayrlhf.config.offline import ExamplesConfig, ExampleSource
from rayrlhf.data.candidates import unused_system_prompt
from rayrlhf.data.lengths import fit, tokenize
from rayrlhf.data.reading import check_kinds, read_source
from rayrlhf.data.records import Kind, Record, read_records, text_columns
from rayrlhf.data.report import ExampleReport, LengthReport
from rayrlhf.data.source import Place, Source, raise_problems
from rayrlhf.data.split import choose_groups, group_equal
from rayrlhf.data.tokens import PromptTokenizer
from rayrlhf.errors import InputRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Entry",
    "Example",
    "ExampleData",
    "Pair",
    "entries",
    "general_problems",
    "load_examples",
    "load_labelled",
    "load_pairs",
    "read_entry",
]


@dataclass(frozen=True)
class Example:
    """A prompt with a completion, or a conversation.

    Attributes:
        id: its position in the list it is in (`ExampleData.train` or `ExampleData.validation`).
        tokens: int64 [T], prompt and completion, EOS included unless it was cut.
        mask: bool [T], the tokens that are learnt; never the first.
        prompt_text: the plain prompt, or the user's last message before the first completion; never cut.
        completion_text: the (first) completion; never cut.
        row: the other columns of the data.
        desirable: the label of an unpaired preference, else None.
        where: file and line (or row) it comes from.
    """

    id: int
    tokens: Tensor
    mask: Tensor
    prompt_text: str
    completion_text: str
    row: dict[str, Any]
    desirable: bool | None = None
    where: str = ""


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse response.

    Attributes:
        id: its position in the list it is in (`ExampleData.train` or `ExampleData.validation`).
        prompt: int64 [P], with the chat template and the header of the answer.
        chosen: int64 [C], the better response; an EOS (or the template's end of turn) is its last token unless it was cut.
        rejected: int64 [R], the worse response, likewise.
        prompt_text: the plain prompt, or the user's last message; never cut, like the two texts that follow.
        margin: by how much the chosen one is better, 0 or more; None where the data doesn't say.
        row: the other columns of the data.
        where: file and line (or row) it comes from.
    """

    id: int
    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    prompt_text: str
    chosen_text: str
    rejected_text: str
    row: dict[str, Any]
    margin: float | None = None
    where: str = ""


Item = TypeVar("Item", Example, Pair)


@dataclass(frozen=True)
class ExampleData(Generic[Item]):
    """Examples or pairs to train on, those held out, and what was found on the way."""

    train: list[Item]
    validation: list[Item]
    report: ExampleReport

    @property
    def fingerprint(self) -> str:
        """Stands for all tokens, what is learnt of them, labels, and their order, in both lists."""
        digest = hashlib.sha256()
        for items in (self.train, self.validation):
            digest.update(np.int64(len(items)).tobytes())
            for item in items:
                if isinstance(item, Pair):
                    columns = [item.prompt, item.chosen, item.rejected]
                else:
                    columns = [item.tokens, item.mask, torch.tensor(-1 if item.desirable is None else item.desirable)]
                for column in columns:
                    digest.update(np.int64(column.numel()).tobytes() + column.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """One source that the configuration names: the section with its columns, and the key of this section."""

    source: ExampleSource
    key: str
    held_out: bool


def load_examples(
    data: ExamplesConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    loss_on: Literal["completions", "all"] = "completions",
) -> ExampleData[Example]:
    """Load prompts with completions, and conversations.

    Args:
        data: the configuration's section ``data``.
        tokenizer: the model's, with its chat template.
        seed: the run's seed; it chooses the held-out prompts, and what is drawn from a source whose weight isn't whole.
        loss_on: what is learnt: completions (of a conversation every assistant's message), each with its EOS or end of
            turn; or all tokens but the first.

    Raises:
        InputRefused: with all problems, each with its file, its line (or row) and what was found there.
    """

    def make(index: int, record: Record, where: str) -> Example:
        return _example(index, record, where, learn_all=loss_on == "all")

    return _load(data, tokenizer, seed, "examples", make)


def load_labelled(data: ExamplesConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> ExampleData[Example]:
    """Load unpaired preferences: prompts with completions that are desirable or not. Else as `load_examples`."""
    return _load(data, tokenizer, seed, "labelled", _example)


def load_pairs(data: ExamplesConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> ExampleData[Pair]:
    """Load preference pairs. Arguments and errors as in `load_examples`.

    Without a prompt column (or where it is null), the prompt is what chosen and rejected have in common: all messages
    but the last, or the text up to and with the last common "\\n\\nAssistant:". With one, responses may repeat it:
    conversations one by one, strings where most of the file's do.
    """
    return _load(data, tokenizer, seed, "pairs", _pair)


def _example(index: int, record: Record, where: str, *, learn_all: bool = False) -> Example:
    completion = record.response_tokens[0]
    learnt = [True] * len(completion) if record.learnt is None else record.learnt
    mask = torch.tensor([learn_all] * len(record.tokens) + [learn_all or this for this in learnt])
    mask[0] = False  # nothing predicts it
    return Example(
        id=index,
        tokens=torch.tensor(record.tokens + completion, dtype=torch.int64),
        mask=mask,
        prompt_text=record.text,
        completion_text=record.responses[0],
        row=record.row,
        desirable=record.desirable,
        where=where,
    )


def _pair(index: int, record: Record, where: str) -> Pair:
    prompt, chosen, rejected = (torch.tensor(t, dtype=torch.int64) for t in (record.tokens, *record.response_tokens))
    chosen_text, rejected_text = record.responses
    return Pair(
        id=index,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        prompt_text=record.text,
        chosen_text=chosen_text,
        rejected_text=rejected_text,
        row=record.row,
        margin=record.margin,
        where=where,
    )


def entries(data: ExamplesConfig) -> list[Entry]:
    """The sources of the training examples, then those of the held-out ones."""
    found = []
    for name, named in (("train", data.train), ("validation", data.validation)):
        if isinstance(named, str):
            found.append(Entry(ExampleSource(path=named), f"data.{name}", name == "validation"))
        else:
            found += [
                Entry(source, f"data.{name}.{index}", name == "validation") for index, source in enumerate(named or [])
            ]
    return found


def general_problems(data: ExamplesConfig) -> list[str]:
    """Problems of the section that no file has to be read for."""
    problems = []
    for entry in entries(data):
        problems += check_kinds(entry.key, entry.source.split, entry.source.subset, [entry.source.path])
        fields = ["prompt_column", "completion_column", "messages_column", "chosen_column", "rejected_column"]
        fields += ["margin_column", "label_column"]
        first: dict[str, str] = {}
        for field in fields:
            column = getattr(entry.source, field)
            if column in first:
                problems.append(f"{entry.key}.{field} and {entry.key}.{first[column]} are both {column!r}")
            first.setdefault(column, field)
    if data.max_prompt_tokens >= data.max_tokens:
        problems.append(
            f"data.max_prompt_tokens = {data.max_prompt_tokens} leaves no room for a response within data.max_tokens = "
            f"{data.max_tokens}; legal: less than that"
        )
    return problems


def read_entry(entry: Entry, data: ExamplesConfig) -> Source:
    """The rows of one source."""
    named = entry.source
    return read_source(Place(entry.key, named.path, named.split, named.subset, data.limit), text_columns(named))


def _load(
    data: ExamplesConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    kind: Kind,
    make: Callable[[int, Record, str], Item],
) -> ExampleData[Item]:
    what = "pair" if kind == "pairs" else "example"
    problems = general_problems(data)
    encoder = PromptTokenizer(tokenizer)
    named = entries(data)
    sources = [read_entry(entry, data) for entry in named]
    pools: list[list[Record]] = []
    reports: list[LengthReport] = []
    for entry, source in zip(named, sources, strict=True):
        records = tokenize(source, read_records(source, entry.source, data, kind), data, encoder)
        pools.append(records)
        if records:
            pools[-1], lengths = fit(source, records, data, encoder, what)
            reports.append(lengths)
        elif not source.problems:
            source.problem(f"it has no {what}s")
    if not problems and not any(source.problems for source in sources):
        problems += unused_system_prompt(data, [record for pool in pools for record in pool])
    raise_problems(sources, problems)

    train, held_out, left_out = _split(data, named, pools, seed, what)
    # held-out examples that come out of train are taken once each, whatever the weights
    weights = [entry.source.weight for entry in named]
    own = data.validation is not None
    trained = _mix(train, weights, np.random.SeedSequence(seed, spawn_key=(2,)))
    tested = _mix(held_out, weights if own else [1.0] * len(named), np.random.SeedSequence(seed, spawn_key=(3,)))
    if not trained:
        raise InputRefused(f"data.train: the weights of its sources leave no {what} of it")
    lists = [
        [make(index, record, sources[origin].at(record.number)) for index, (record, origin) in enumerate(mixed)]
        for mixed in (trained, tested)
    ]
    report = ExampleReport(tuple(reports), what, len(trained), len(tested), left_out)
    return ExampleData(lists[0], lists[1], report)


def _split(
    data: ExamplesConfig, named: Sequence[Entry], pools: Sequence[list[Record]], seed: int, what: str
) -> tuple[list[list[Record]], list[list[Record]], int]:
    """Training and held-out records of each source, and how many were left out because their prompt is held out."""
    everything = [(origin, record) for origin, pool in enumerate(pools) for record in pool]
    # the same to the reader, or the same to the model
    groups = group_equal([(record.identity, tuple(record.tokens)) for _, record in everything])
    own = data.validation is not None
    if own:
        taken = {group for group, (origin, _) in zip(groups, everything, strict=True) if named[origin].held_out}
    else:
        distinct = len(set(groups))
        count = min(max(1, round(data.validation_fraction * distinct)), distinct - 1)
        if data.validation_fraction == 0:
            count = 0
        elif count == 0:
            raise InputRefused(
                "data.validation_fraction: all examples have one prompt, so none can be held out; legal: 0, or a file of "
                "their own in data.validation"
            )
        taken = {groups[item] for item in choose_groups(groups, count, seed)}
    train: list[list[Record]] = [[] for _ in pools]
    held_out: list[list[Record]] = [[] for _ in pools]
    left_out = 0
    for group, (origin, record) in zip(groups, everything, strict=True):
        if named[origin].held_out or (group in taken and not own):
            held_out[origin].append(record)
        elif group in taken:
            left_out += 1
        else:
            train[origin].append(record)
    if not any(train):
        raise InputRefused(
            f"data.train: all {left_out} {what}s have prompts of data.validation; none is left to train on"
        )
    return train, held_out, left_out


def _mix(
    pools: Sequence[list[Record]], weights: Sequence[float], seeds: np.random.SeedSequence
) -> list[tuple[Record, int]]:
    """Records with their source's number: of weight w, floor(w) whole copies and a drawn part for the rest."""
    mixed = []
    for origin, (pool, weight, own) in enumerate(zip(pools, weights, seeds.spawn(len(pools)), strict=True)):
        drawn = np.random.default_rng(own).permutation(len(pool))[: round(weight % 1 * len(pool))]
        mixed += [(record, origin) for record in pool * int(weight)]
        mixed += [(pool[index], origin) for index in sorted(drawn.tolist())]
    return mixed
