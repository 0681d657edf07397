"""What is wrong with data, before anything is trained on it.

The loaders' own checks come first, so an error here is what refuses a run. Then come warnings: what can be trained on,
but is probably not meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrlhf.config.offline import ExamplesConfig, ExampleSource
from rayrlhf.config.schema import PromptsConfig
from rayrlhf.data.candidates import unused_system_prompt
from rayrlhf.data.check_content import balance, characters, duplicates, leaks, repeats, role_order
from rayrlhf.data.check_order import suspicions
from rayrlhf.data.check_tokens import endings, lengths
from rayrlhf.data.examples import Entry, entries, general_problems, read_entry
from rayrlhf.data.findings import CheckedFile, CheckReport, Finding
from rayrlhf.data.lengths import tokenize
from rayrlhf.data.records import Kind, read_records
from rayrlhf.data.source import Source, nearest
from rayrlhf.data.tokens import PromptTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_file"]

Score = Callable[[list[Any], list[str]], Sequence[float]]


def check_file(
    data: str | Path | ExamplesConfig | PromptsConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    score: Score | None = None,
    kind: Kind | None = None,
) -> CheckReport:
    """Look for everything that is wrong with data.

    Args:
        data: a file, the name of a dataset, or a configuration's section ``data``.
        tokenizer: the model's; without it nothing is said of lengths, templates and EOS.
        score: a reward model, from prompts (texts, or lists of messages) and responses to numbers; without it, chosen
            and rejected are compared by their looks.
        kind: what the rows are meant to be: "examples", "pairs", "labelled" or "prompts"; by default what each
            file's columns say.

    Raises:
        InputRefused: ``score`` gives something else than one finite number for each response.
    """
    config = _as_examples(data)
    if isinstance(data, PromptsConfig):
        kind = "prompts"
    findings = [Finding("error", "data", "configuration", text) for text in general_problems(config)]
    files = [_read(entry, config, kind) for entry in entries(config)]
    encoder = PromptTokenizer(tokenizer) if tokenizer is not None else None
    for file in files:
        if file.kind is None:
            continue
        file.records = read_records(file.source, file.entry.source, config, file.kind)
        if encoder is not None:
            file.records = tokenize(file.source, file.records, config, encoder)
        if not file.records and not file.source.problems:
            file.source.problem("it has no rows")
    if not findings and not any(file.source.problems for file in files):
        records = [record for file in files for record in file.records]
        findings += [Finding("error", "data", "configuration", t) for t in unused_system_prompt(config, records)]
    for file in files:
        findings += [file.finding("error", p.number, p.kind, p.text) for p in file.source.problems]
    findings += _warnings(files, score)
    if encoder is not None:
        findings += [finding for file in files for finding in (*endings(file, encoder), *lengths(file, config))]
    if isinstance(data, ExamplesConfig):
        findings += _unsplittable(files, config)
    return CheckReport(_in_order(findings, files), files)


def _as_examples(data: str | Path | ExamplesConfig | PromptsConfig) -> ExamplesConfig:
    """Any kind of data in the words of the section for examples."""
    if isinstance(data, ExamplesConfig):
        return data
    if not isinstance(data, PromptsConfig):
        return ExamplesConfig(train=str(data))
    sources = [
        [ExampleSource(path=name, split=data.split, subset=data.subset, prompt_column=data.prompt_column)]
        for name in (data.prompts, getattr(data, "eval_prompts", None))
        if name is not None
    ]
    return ExamplesConfig(
        train=sources[0],
        validation=sources[1] if len(sources) > 1 else None,
        chat_template=data.chat_template,
        system_prompt=data.system_prompt,
        max_prompt_tokens=data.max_prompt_tokens,
        max_tokens=data.max_prompt_tokens + 1,
        overlong="truncate" if data.overlong_prompts == "truncate_left" else data.overlong_prompts,
        limit=data.limit,
    )


def _read(entry: Entry, config: ExamplesConfig, kind: Kind | None) -> CheckedFile:
    source = read_entry(entry, config)
    return CheckedFile(source, entry, kind or _kind_of(source, entry.source))


def _kind_of(source: Source, entry: ExampleSource) -> Kind | None:
    """What the columns of most rows say; None, and a problem, where they say nothing."""
    signs: list[tuple[Kind, tuple[str, ...]]] = [
        ("pairs", (entry.chosen_column, entry.rejected_column)),
        ("labelled", (entry.label_column, entry.completion_column)),
        ("examples", (entry.messages_column,)),
        ("examples", (entry.prompt_column, entry.completion_column)),
        ("prompts", (entry.prompt_column,)),
    ]
    for kind, columns in signs:
        having = sum(all(column in row.values for column in columns) for row in source.rows)
        if having * 2 > len(source.rows):
            return kind
    if source.rows:
        names = list(dict.fromkeys(str(name) for row in source.rows[:100] for name in row.values))
        wanted = dict.fromkeys(column for _, columns in signs for column in columns)
        close = next((hint for name in names if (hint := nearest(name, wanted))), "")
        text = f"the columns {names} are none of a known kind; known are {', '.join(wanted)}{close}"
        source.problem(text, kind="missing_column")
    return None


def _warnings(files: list[CheckedFile], score: Score | None) -> Iterator[Finding]:
    for file in files:
        yield from characters(file)
        yield from role_order(file)
        yield from repeats(file)
        yield from suspicions(file, score)
    for held_out in (False, True):
        side = [file for file in files if file.entry.held_out is held_out]
        yield from duplicates(side)
        yield from balance(side)
    yield from leaks(files)


def _unsplittable(files: list[CheckedFile], config: ExamplesConfig) -> Iterator[Finding]:
    """What would refuse a run once its examples are split."""
    records = [record for file in files if not file.entry.held_out for record in file.records]
    held_out = {record.identity for file in files if file.entry.held_out for record in file.records}
    prompts = {record.identity for record in records}
    if not prompts:
        return
    if config.validation is None and config.validation_fraction > 0 and len(prompts) == 1:
        text = (
            "data.validation_fraction: all examples have one prompt, so none can be held out; legal: 0, or a file of "
        )
        yield Finding("error", "data", "configuration", text + "their own in data.validation")
    if prompts <= held_out:
        text = "all prompts to train on are prompts of the validation too; none is left to train on"
        yield Finding("error", "data", "leak", text)


def _in_order(findings: list[Finding], files: list[CheckedFile]) -> list[Finding]:
    places = {file.source.name: index for index, file in reversed(list(enumerate(files, start=1)))}
    return sorted(findings, key=lambda f: (places.get(f.file, 0), f.number, f.severity))
