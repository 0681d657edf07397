"""``rayrlhf sample``: responses of a model, scored and ranked, as preference pairs or as examples to learn from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from rayrlhf.batch import Batch
from rayrlhf.config.jobs import SamplingConfig, SamplingSettings
from rayrlhf.data import Prompt
from rayrlhf.drivers.base import started
from rayrlhf.drivers.checks import Problems
from rayrlhf.drivers.jobs import PreparedJob, Sampler, decoded, prepare_job, seeded, warner, whole_files
from rayrlhf.drivers.roles import job_specs
from rayrlhf.errors import RunFailed
from rayrlhf.monitoring import render_plan
from rayrlhf.planning.rows import plan_rows

__all__ = ["sample_responses"]

OUTPUTS = ("summary.json", "data.jsonl")
UNSCORED = "unscored.jsonl"


class _Response(NamedTuple):
    text: str
    score: float
    """NaN where a service gave none."""
    failure: str | None

    @property
    def usable(self) -> bool:
        """Whether it can stand in a pair or an example: what is trained on has a text."""
        return not math.isnan(self.score) and bool(self.text.strip())


@dataclass
class _Tally:
    """What is counted on the way."""

    prompts: int = 0
    responses: int = 0
    written: int = 0
    ties: int = 0
    """Prompts whose best and worst response differ by too little."""
    too_few: int = 0
    """Prompts without enough usable responses."""
    empty: int = 0
    """Responses without any text."""
    unscored: int = 0
    """Responses to which a service gave no score."""
    scores: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    """Score of each prompt's best response."""
    margins: list[float] = field(default_factory=list)
    """Of the pairs that are written."""
    cause: str | None = None
    """Why the first of the unscored responses has no score."""

    def summary(self) -> dict[str, Any]:
        counts = ("prompts", "responses", "written", "ties", "too_few", "empty", "unscored")
        return {
            **{name: getattr(self, name) for name in counts},
            "score/mean": _mean(self.scores),
            "score/best": _mean(self.best),
            "margin/mean": _mean(self.margins),
            "failure": self.cause,
        }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def sample_responses(config: SamplingConfig, console: Console | None = None) -> dict[str, Any]:
    """Sample, score, rank, and write ``data.jsonl``, ``summary.json`` and ``config.yaml`` into the run's folder.

    One line of ``data.jsonl`` is, by ``sampling.form``:

    - pairs: {prompt, chosen, rejected, margin}, a prompt's best response over its worst (the first of equal ones), and up
      to ``sampling.pairs_per_prompt`` of them: then the second best over the second worst, and so on;
    - best: {prompt, completion, score};
    - all: {prompt, response, score}, the best first; score null and the key ``failure`` where a service gave none.

    The prompt is as the data has it, a text or messages. Responses without text or score stand in no pair and in no
    example, and are counted. Those without a score, where there are any, are in ``unscored.jsonl``: {prompt, response,
    failure}, with the cause.

    Returns:
        The summary: ``prompts``, ``responses``, ``written`` lines; ``ties`` (prompts whose best and worst response
        differ by less than ``least_gap``, or not at all), ``too_few`` (prompts without enough usable responses),
        ``empty`` and ``unscored`` responses; ``score/mean`` over all that have one, ``score/best`` over the prompts'
        best, ``margin/mean`` over the pairs (None where there are none); ``failure``, why the first of the unscored
        responses has no score.

    Raises:
        InputRefused: before anything was started.
        RunFailed: where a role failed, a service gave no score at all, or the files can't be written. No file is left then, but
            ``unscored.jsonl`` where nothing got a score; it doesn't stand in the way of another attempt.
    """
    console = console or Console()
    prepared = prepare_job(config, Problems(), OUTPUTS)
    render_plan(plan_rows(config), console)
    for note in prepared.notes:
        console.print(note, highlight=False, markup=False)
    tally, at_once = _Tally(), config.sampling.prompts_at_once
    with (
        whole_files(config, OUTPUTS, [UNSCORED]) as (summary, data, unscored),
        started(config, job_specs(prepared), warner(console)) as groups,
    ):
        sampler = Sampler(config, groups)
        starts = range(0, len(prepared.prompts), at_once)
        for start in track(starts, "sampling", console=console, disable=not console.is_terminal):
            some = prepared.prompts[start : start + at_once]
            batch = sampler(seeded(some, config.rollout.samples_per_prompt, (config.seed,)))
            responses = _responses(batch, prepared)
            for row in _unscored(some, responses):
                unscored.write(row)
            for row in _rows(some, responses, config.sampling, tally):
                data.write(row)
            if not tally.scores:
                unscored.finish()
                raise RunFailed(
                    f"none of the first {tally.responses} responses got a score: {tally.cause}. They are in {unscored.path}"
                )
        summary.write(tally.summary(), indent=2)
    _tell(tally, config, console)
    return tally.summary()


def _responses(batch: Batch, prepared: PreparedJob) -> list[_Response]:
    failures = [batch[name] for name in batch.keys() if name.endswith("/failure")]
    causes: list[str | None] = [None] * len(batch)
    for column in failures:
        causes = [cause or found for cause, found in zip(causes, column, strict=True)]
    texts = decoded(batch, prepared.tokenizer)
    return [_Response(*one) for one in zip(texts, batch["score"].tolist(), causes, strict=True)]


def _by_prompt(prompts: Sequence[Prompt], responses: list[_Response]) -> Iterator[tuple[Any, list[_Response]]]:
    """Each prompt, as the data has it, with its responses."""
    each = len(responses) // len(prompts)
    for k, prompt in enumerate(prompts):
        yield prompt.text if prompt.messages is None else prompt.messages, responses[k * each :][:each]


def _unscored(prompts: Sequence[Prompt], responses: list[_Response]) -> Iterator[dict[str, Any]]:
    for given, own in _by_prompt(prompts, responses):
        for one in own:
            if math.isnan(one.score):
                yield {"prompt": given, "response": one.text, "failure": one.failure}


def _rows(
    prompts: Sequence[Prompt], responses: list[_Response], settings: SamplingSettings, tally: _Tally
) -> Iterator[dict[str, Any]]:
    """The lines of some prompts, with all their responses; they are counted."""
    for given, own in _by_prompt(prompts, responses):
        _count(own, tally)
        # Sorting keeps the order of equal ones; those without a score come last.
        ranked = sorted(own, key=lambda one: math.inf if math.isnan(one.score) else -one.score)
        lines = _lines(given, ranked, settings, tally)
        tally.written += len(lines)
        yield from lines


def _count(responses: Sequence[_Response], tally: _Tally) -> None:
    unscored = [one for one in responses if math.isnan(one.score)]
    tally.prompts += 1
    tally.responses += len(responses)
    tally.empty += sum(not one.text.strip() for one in responses)
    tally.unscored += len(unscored)
    tally.cause = tally.cause or next((one.failure for one in unscored), None)
    tally.scores += [one.score for one in responses if not math.isnan(one.score)]


def _lines(given: Any, ranked: list[_Response], settings: SamplingSettings, tally: _Tally) -> list[dict[str, Any]]:
    usable = [one for one in ranked if one.usable]
    if usable:
        tally.best.append(usable[0].score)
    if settings.form == "all":
        return [_line(given, one) for one in ranked]
    if len(usable) < (2 if settings.form == "pairs" else 1):
        tally.too_few += 1
        return []
    if settings.form == "best":
        return [{"prompt": given, "completion": usable[0].text, "score": usable[0].score}]
    pairs = _pairs(given, usable, settings)
    tally.ties += not pairs
    tally.margins += [pair["margin"] for pair in pairs]
    return pairs


def _pairs(given: Any, ranked: list[_Response], settings: SamplingSettings) -> list[dict[str, Any]]:
    """Best over worst, then what is left, as long as the scores differ enough."""
    left = list(ranked)
    pairs: list[dict[str, Any]] = []
    while len(left) >= 2 and len(pairs) < settings.pairs_per_prompt:
        best, worst = left[0], next(one for one in left if one.score == left[-1].score)
        margin = best.score - worst.score
        # Where all scores are equal, both are the first response.
        if margin < settings.least_gap or best.text.strip() == worst.text.strip():
            break
        pairs.append({"prompt": given, "chosen": best.text, "rejected": worst.text, "margin": margin})
        left.remove(best)
        left.remove(worst)
    return pairs


def _line(given: Any, one: _Response) -> dict[str, Any]:
    if math.isnan(one.score):
        return {"prompt": given, "response": one.text, "score": None, "failure": one.failure}
    return {"prompt": given, "response": one.text, "score": one.score}


def _tell(tally: _Tally, config: SamplingConfig, console: Console) -> None:
    """What came of it, in a few lines."""
    what = {"pairs": "pairs", "best": "examples", "all": "responses"}[config.sampling.form]
    left_out = {
        "as the scores of best and worst don't differ enough": tally.ties,
        "as too few responses have text and score": tally.too_few,
    }
    lines = [f"{tally.written} {what} from {tally.prompts} prompts in {config.run_dir}/data.jsonl"]
    if any(left_out.values()):
        lines.append("Prompts left out: " + "; ".join(f"{count} {why}" for why, count in left_out.items() if count))
    shown = {"all responses": _mean(tally.scores), "each prompt's best": _mean(tally.best)}
    means = ", ".join(f"{mean:.3f} over {name}" for name, mean in shown.items() if mean is not None)
    lines.append(f"Mean score: {means}")
    if tally.margins:
        lines[-1] += f"; the pairs' mean margin: {_mean(tally.margins):.3f}"
    if tally.empty:
        lines.append(f"Without any text: {tally.empty} of {tally.responses} responses")
    if tally.unscored:
        lines.append(f"Without a score: {tally.unscored} of {tally.responses} responses; the first for: {tally.cause}")
        lines.append(f"They are in {config.run_dir}/{UNSCORED}")
    for line in lines:
        console.print(line, highlight=False, markup=False)
