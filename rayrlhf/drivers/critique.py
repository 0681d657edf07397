"""``rayrlhf critique``: a model criticises its own responses by principles and revises them; the revisions become pairs.

The critiques and revisions are those of Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", section 3.1,
with two differences: a critique ends in a verdict, so that a response which is fine stays as it is; and all principles are
applied, in the order of the file, where the paper draws them at random. The paper fine-tunes on the last revisions and
makes its preference pairs from comparisons by the model (section 4.1); that pairs are made of the last revision over the
original response is this software's choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from rayrlhf.config.jobs import CritiqueConfig
from rayrlhf.data import Prompt
from rayrlhf.data.conversation import text_problem
from rayrlhf.data.principles import (
    CRITIQUE_PLACES,
    CRITIQUE_PROMPT,
    REVISE_PLACES,
    REVISE_PROMPT,
    VERDICTS,
    Principle,
    filled,
    parse_critique,
    read_principles,
    read_prompt,
)
from rayrlhf.data.source import LISTED
from rayrlhf.data.tokens import PromptTokenizer
from rayrlhf.drivers.base import started
from rayrlhf.drivers.checks import Problems
from rayrlhf.drivers.jobs import PreparedJob, Sampler, WholeFile, decoded, prepare_job, seeded, warner, whole_files
from rayrlhf.drivers.roles import job_specs
from rayrlhf.errors import InputRefused
from rayrlhf.monitoring import render_plan
from rayrlhf.monitoring.text import printable
from rayrlhf.planning.rows import plan_rows

__all__ = ["critique_responses"]

OUTPUTS = ("critiques.jsonl", "summary.json", "data.jsonl")
OUTCOMES = ("kept", "revised", "unparsable", "too_long", "unchanged", "empty")
"""What comes of a principle: the critique says so; the revision is the new response; the critique ends in no verdict; the
question has too many tokens; the revision says what was there before; the revision has no text."""
AT_ONCE = 256
"""Prompts that go through all principles together."""


class _Words(NamedTuple):
    """What the model is asked, and by which principles."""

    principles: list[Principle]
    critique: str
    revise: str


class _Answer(NamedTuple):
    text: str
    cut: bool
    """Whether it ended at the length limit."""


@dataclass
class _Case:
    """A prompt on its way through the principles."""

    prompt: Prompt
    shown: str
    """The prompt as the critic reads it."""
    original: str
    current: str

    def texts(self, principle: Principle) -> dict[str, str]:
        return {"prompt": self.shown, "response": self.current.rstrip(), "principle": principle.text}


@dataclass(frozen=True)
class _Review:
    """One principle applied to one response."""

    case: _Case
    principle: Principle
    response: str
    outcome: str
    critique: _Answer | None = None
    revision: _Answer | None = None

    def row(self) -> dict[str, Any]:
        return {
            "prompt": _given(self.case.prompt),
            "where": self.case.prompt.where,
            "principle": self.principle.name,
            "response": self.response,
            "outcome": self.outcome,
            "critique": None if self.critique is None else self.critique.text,
            "critique_cut": None if self.critique is None else self.critique.cut,
            "revision": None if self.revision is None else self.revision.text,
            "revision_cut": None if self.revision is None else self.revision.cut,
        }


def critique_responses(config: CritiqueConfig, console: Console | None = None) -> dict[str, Any]:
    """Write ``critiques.jsonl``, ``data.jsonl``, ``summary.json`` and ``config.yaml`` into the run's folder.

    - ``data.jsonl``: {prompt, chosen, rejected}, the last revision over the original response, for each prompt whose
      response was revised. The prompt is as the model had it, a text or messages.
    - ``critiques.jsonl``: {prompt, where, principle, response, outcome, critique, critique_cut, revision, revision_cut},
      one line a prompt and principle; the response is the one that was criticised, ``cut`` whether the length limit
      ended a text.

    A revision keeps the white space at the original response's beginning, which joins it to a plain prompt. White space at
    the end of either is left out, so that a pair differs in what it says.

    Returns:
        The summary: ``prompts``, ``empty_responses`` (prompts left out, as the model's own response has no text),
        ``written`` pairs, ``revisions_cut``, and ``principles``: of each, the number of each outcome (`OUTCOMES`).

    Raises:
        InputRefused: before anything was started.
        RunFailed: where a role failed, or the files can't be written. No file is left then.
    """
    console = console or Console()
    prepared, words = _prepared(config)
    render_plan(plan_rows(config), console)
    for note in prepared.notes:
        console.print(note, highlight=False, markup=False)
    with (
        whole_files(config, OUTPUTS) as files,
        started(config, job_specs(prepared), warner(console)) as groups,
    ):
        summary = _all(_Model(prepared, Sampler(config, groups)), words, files, console)
    _tell(summary, config, console)
    return summary


# -- inputs -----------------------------------------------------------------------------------------------------


def _prepared(config: CritiqueConfig) -> tuple[PreparedJob, _Words]:
    """The inputs, all checked.

    Raises:
        InputRefused: with every problem.
    """
    problems, critique = Problems(), config.critique
    principles = problems.check(read_principles, critique.principles)
    asked = problems.check(
        read_prompt, "critique.critique_prompt", critique.critique_prompt, CRITIQUE_PROMPT, CRITIQUE_PLACES, VERDICTS
    )
    revise = problems.check(read_prompt, "critique.revise_prompt", critique.revise_prompt, REVISE_PROMPT, REVISE_PLACES)
    prepared = prepare_job(config, problems, OUTPUTS, lambda prompts: _check_responses(config, prompts))
    assert principles is not None and asked is not None and revise is not None  # otherwise all was refused
    return prepared, _Words(principles, asked, revise)


def _check_responses(config: CritiqueConfig, prompts: Sequence[Prompt]) -> None:
    column = config.data.response_column
    if column is None:
        return
    if all(column not in prompt.row for prompt in prompts):
        names = sorted(prompts[0].row)
        raise InputRefused(
            f"data.response_column: {config.data.prompts} has no column {column!r}; besides the prompt it has {names}"
        )
    found = [(prompt.where, text_problem(prompt.row.get(column), f"column {column!r}")) for prompt in prompts]
    problems = [f"{where}: {problem}" for where, problem in found if problem]
    if len(problems) > LISTED:
        problems[LISTED:] = [f"... and {len(problems) - LISTED} more problems"]
    if problems:
        raise InputRefused(problems)


# -- the model --------------------------------------------------------------------------------------------------


class _Model:
    """The model that answers, criticises and revises."""

    def __init__(self, prepared: PreparedJob, sampler: Sampler):
        assert isinstance(prepared.config, CritiqueConfig)
        self.config, self.prompts, self.tokenizer = prepared.config, prepared.prompts, prepared.tokenizer
        self.sampler = sampler
        self.encoder = PromptTokenizer(prepared.tokenizer)
        self.chats = self.encoder.has_template and prepared.config.data.chat_template != "never"

    def respond(self, prompts: Sequence[Prompt]) -> list[_Answer]:
        """Responses to prompts."""
        return self._sampled(prompts, 0, self.config.rollout.max_response_tokens)

    def ask(
        self, prompts: Sequence[Prompt], questions: Sequence[str], turn: int, max_tokens: int
    ) -> list[_Answer | None]:
        """Answers to questions about prompts; None for a question of more than ``critique.max_input_tokens``.

        Args:
            prompts: their ids make the seeds.
            questions: one a prompt, as plain texts.
            turn: which question about these prompts it is, from 1.
            max_tokens: longest answer.
        """
        if self.chats:
            written = [self.encoder.render([{"role": "user", "content": question}]) for question in questions]
            tokens = self.encoder.encode_rendered(written)
        else:
            tokens = self.encoder.encode_plain(list(questions))
        fitting = [i for i, ids in enumerate(tokens) if len(ids) <= self.config.critique.max_input_tokens]
        asked = [replace(prompts[i], tokens=torch.tensor(tokens[i]), text=questions[i]) for i in fitting]
        answers: list[_Answer | None] = [None] * len(questions)
        for i, answer in zip(fitting, self._sampled(asked, turn, max_tokens), strict=True):
            answers[i] = answer
        return answers

    def _sampled(self, prompts: Sequence[Prompt], turn: int, max_tokens: int) -> list[_Answer]:
        if not prompts:
            return []
        batch = self.sampler(seeded(prompts, 1, (self.config.seed, turn)), max_response_tokens=max_tokens)
        reasons = batch["finish_reason"]
        return [
            _Answer(text, reason == "length")
            for text, reason in zip(decoded(batch, self.tokenizer), reasons, strict=True)
        ]


# -- the way through the principles -----------------------------------------------------------------------------


def _all(model: _Model, words: _Words, files: Sequence[WholeFile], console: Console) -> dict[str, Any]:
    """Take all prompts through all principles; write what comes of it."""
    critiques, summary_file, data = files
    counts = {principle.name: Counter[str]() for principle in words.principles}
    blocks = [model.prompts[start : start + AT_ONCE] for start in range(0, len(model.prompts), AT_ONCE)]
    empty = written = cut = 0
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("responses", total=len(blocks) * (1 + len(words.principles)))
        for block in blocks:
            cases = _cases(model, block)
            empty += len(block) - len(cases)
            progress.advance(bar)
            for number, principle in enumerate(words.principles):
                progress.update(bar, description=principle.name)
                for review in _reviewed(model, cases, principle, words, 1 + 2 * number):
                    counts[principle.name][review.outcome] += 1
                    cut += review.outcome == "revised" and review.revision is not None and review.revision.cut
                    critiques.write(review.row())
                progress.advance(bar)
            for case in cases:
                if case.current.strip() != case.original.strip():
                    texts = {"chosen": case.current.rstrip(), "rejected": case.original.rstrip()}
                    data.write({"prompt": _given(case.prompt), **texts})
                    written += 1
    summary = {
        "prompts": len(model.prompts),
        "empty_responses": empty,
        "written": written,
        "revisions_cut": cut,
        "principles": {name: {outcome: count[outcome] for outcome in OUTCOMES} for name, count in counts.items()},
    }
    summary_file.write(summary, indent=2)
    return summary


def _cases(model: _Model, prompts: Sequence[Prompt]) -> list[_Case]:
    """The prompts with their responses; those without text have nothing to criticise."""
    column = model.config.data.response_column
    if column is not None:
        responses = [prompt.row[column] for prompt in prompts]
    else:
        responses = [answer.text for answer in model.respond(prompts)]
    return [
        _Case(prompt, _shown(prompt), response, response)
        for prompt, response in zip(prompts, responses, strict=True)
        if response.strip()
    ]


def _reviewed(
    model: _Model, cases: Sequence[_Case], principle: Principle, words: _Words, turn: int
) -> Iterator[_Review]:
    """Criticise the current responses by one principle, and revise those that the critiques want revised."""
    questions = [filled(words.critique, case.texts(principle)) for case in cases]
    limit = model.config.critique.max_critique_tokens
    critiques = model.ask([case.prompt for case in cases], questions, turn, limit)
    verdicts = [None if critique is None else parse_critique(critique.text) for critique in critiques]
    wanted = [i for i, verdict in enumerate(verdicts) if verdict == "revise"]
    questions = [
        filled(words.revise, {**cases[i].texts(principle), "critique": critiques[i].text.strip()})  # type: ignore[union-attr]
        for i in wanted
    ]
    limit = model.config.rollout.max_response_tokens
    answers = model.ask([cases[i].prompt for i in wanted], questions, turn + 1, limit)
    revisions = dict(zip(wanted, answers, strict=True))
    for i, case in enumerate(cases):
        before, critique, revision = case.current, critiques[i], revisions.get(i)
        if critique is None or (i in revisions and revision is None):
            outcome = "too_long"
        elif revision is None:
            outcome = "unparsable" if verdicts[i] is None else "kept"
        else:
            outcome = _taken(case, revision.text)
        yield _Review(case, principle, before, outcome, critique, revision)


def _taken(case: _Case, revision: str) -> str:
    """The outcome of a revision; one that says something new becomes the current response."""
    text = revision.strip()
    if not text:
        return "empty"
    if text in (case.current.strip(), case.original.strip()):
        return "unchanged"
    case.current = _lead(case, revision) + text
    return "revised"


def _lead(case: _Case, revision: str) -> str:
    """The white space before a revision: the original's; where that has none, one blank between it and a plain prompt if the
    revision itself begins with white space."""
    own = case.original[: len(case.original) - len(case.original.lstrip())]
    joined = case.prompt.messages is not None or case.prompt.text[-1:].isspace() or not revision[:1].isspace()
    return own or ("" if joined else " ")


def _given(prompt: Prompt) -> Any:
    """The prompt as the model had it: a text, or messages."""
    return prompt.text if prompt.messages is None else prompt.messages


def _shown(prompt: Prompt) -> str:
    """The prompt as a text: one message as it stands, a conversation with the role before each message."""
    if prompt.messages is None:
        return prompt.text
    if len(prompt.messages) == 1:
        return prompt.messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


# -- what is told -----------------------------------------------------------------------------------------------


def _tell(summary: Mapping[str, Any], config: CritiqueConfig, console: Console) -> None:
    table = Table(title=Text("Critiques", style="bold"), title_justify="left", box=box.ROUNDED)
    table.add_column("principle", overflow="fold")
    for outcome in OUTCOMES:
        table.add_column(outcome.replace("_", " "), justify="right")
    for name, counts in summary["principles"].items():
        table.add_row(Text(printable(name, console)), *(f"{counts[outcome]:,}" for outcome in OUTCOMES))
    console.print(table)
    lines = [f"{summary['written']} pairs from {summary['prompts']} prompts in {config.run_dir}/data.jsonl"]
    if summary["empty_responses"]:
        lines.append(f"Left out: {summary['empty_responses']} prompts, as the response has no text")
    if summary["revisions_cut"]:
        lines.append(f"Cut by rollout.max_response_tokens: {summary['revisions_cut']} revisions; they are taken")
    unparsable = sum(counts["unparsable"] for counts in summary["principles"].values())
    if unparsable:
        lines.append(
            f"Unparsable: {unparsable} critiques end in no verdict, or in two; they change nothing. What they say is in"
            f" {config.run_dir}/critiques.jsonl"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False)
