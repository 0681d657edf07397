"""What models said to the same prompts, and what is measured of each of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rayrlhf.evaluation.judge import JudgeVerdicts, OpenAIJudge
from rayrlhf.evaluation.measures import (
    distinct_n_and_stderr,
    mean_and_stderr,
    quantiles,
    ratio_and_stderr,
    repeated,
)
from rayrlhf.evaluation.win_rate import WinRate, judged_win_rate, win_rate

__all__ = [
    "Answers",
    "Judged",
    "Scores",
    "compare_by_scores",
    "judge_pairs",
    "measures_of",
    "most_frequent",
    "pairs_of",
    "win_rate_row",
]


@dataclass(frozen=True)
class Scores:
    """One source's scores of one model's responses."""

    values: list[float]
    """[P]; NaN where there is none."""
    causes: list[str | None]
    """[P], why there is none."""

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if not math.isnan(value)]

    def number(self, index: int) -> float | None:
        """The score of a prompt's response; None where there is none."""
        return _number(self.values[index])

    @property
    def unscored(self) -> int:
        return len(self.values) - len(self.known)


@dataclass(frozen=True)
class Answers:
    """One response of a model to each of P prompts."""

    name: str
    path: str
    responses: list[str]
    tokens: list[int]
    """[P], of the responses, EOS included."""
    truncated: list[bool]
    """[P]: cut by the length limit."""
    scores: Mapping[str, Scores]
    """By source: ``reward``, ``safety`` and ``helpfulness``, those that are configured."""
    kl: list[float] | None
    """[P], log-ratio to the reference summed over the response, in nats; None: it can't be measured."""
    no_kl: str | None
    """Why not."""
    known_nll: list[float]
    """[P], negative log-probability of the known continuation, in nats; of none where there is no continuation."""
    known_tokens: list[int]
    """[P], its tokens; 0: the prompt has none."""


def measures_of(answers: Answers) -> dict[str, Any]:
    """What one model is worth on these prompts. Standard errors (``/stderr``) are over prompts.

    Returns:
        prompts; for each of score, safety, helpfulness: mean, stderr, quantiles, unscored (responses without a score);
        kl (k1, nats a sequence: mean, stderr), kl_per_token (mean, stderr), or both None and ``kl/reason``; nll (nats a token
        of the known continuations) and perplexity (its exponential, the error by the delta method), None without any;
        response_length/mean in tokens; truncated_fraction; distinct_1 and distinct_2 (errors by the jackknife);
        repeated_fraction (responses that are equal to another one). Numbers that aren't finite are None.
    """
    found: dict[str, Any] = {"prompts": len(answers.responses)}
    for source, scores in answers.scores.items():
        name = "score" if source == "reward" else source
        _put(found, name, *mean_and_stderr(scores.known))
        found[f"{name}/quantiles"] = quantiles(scores.known)
        found[f"{name}/unscored"] = scores.unscored
    _put(found, "kl", *((None, None) if answers.kl is None else mean_and_stderr(answers.kl)))
    per_token = (None, None) if answers.kl is None else ratio_and_stderr(answers.kl, answers.tokens)
    _put(found, "kl_per_token", *per_token, mean=False)
    if answers.no_kl is not None:
        found["kl/reason"] = answers.no_kl
    nll, error = ratio_and_stderr(answers.known_nll, answers.known_tokens)
    _put(found, "nll", nll, error, mean=False)
    perplexity = _exp(nll)
    _put(found, "perplexity", perplexity, perplexity * error, mean=False)
    _put(found, "response_length", *mean_and_stderr(answers.tokens))
    _put(found, "truncated_fraction", *mean_and_stderr(answers.truncated), mean=False)
    for n in (1, 2):
        _put(found, f"distinct_{n}", *distinct_n_and_stderr(answers.responses, n), mean=False)
    _put(found, "repeated_fraction", *mean_and_stderr(repeated(answers.responses)), mean=False)
    return found


def _put(found: dict[str, Any], name: str, value: float | None, error: float | None, *, mean: bool = True) -> None:
    found[f"{name}/mean" if mean else name] = _number(value)
    found[f"{name}/stderr"] = _number(error)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


# -- each against each --------------------------------------------------------------------------------------------------


def pairs_of(models: Sequence[Answers]) -> list[tuple[Answers, Answers]]:
    """Each two models once: the later one of the list, A, against the earlier one, B."""
    return [(later, earlier) for earlier, later in combinations(models, 2)]


def compare_by_scores(
    models: Sequence[Answers], labels: Mapping[str, str], *, tie: float, seed: int, confidence: float
) -> list[dict[str, Any]]:
    """Win rates of `pairs_of` by each source of scores, as rows of ``win_rates.json``.

    Args:
        labels: how each source is called in them, in the order of the rows.
        tie, seed, confidence: see `win_rate`; the tie is that of the reward, for the others equal scores are one.
    """
    rows = []
    for source, label in labels.items():
        for a, b in pairs_of(models):
            limit = tie if source == "reward" else 0.0
            rate = win_rate(a.scores[source].values, b.scores[source].values, limit, seed, confidence=confidence)
            rows.append(win_rate_row(a.name, b.name, label, rate))
    return rows


@dataclass(frozen=True)
class Judged:
    """What a judge said of two models."""

    a: str
    b: str
    verdicts: JudgeVerdicts

    def row(self, label: str, *, seed: int, confidence: float) -> dict[str, Any]:
        """The win rate, as a row of ``win_rates.json``."""
        rate = judged_win_rate(self.verdicts.first, self.verdicts.second, seed, confidence=confidence)
        return win_rate_row(self.a, self.b, label, rate)

    def of_prompt(self, index: int) -> dict[str, Any]:
        """Both verdicts on a prompt, and why there is none."""
        told: dict[str, Any] = {
            "a": self.a,
            "b": self.b,
            "first": self.verdicts.first[index],
            "second": self.verdicts.second[index],
        }
        causes = {failure.order: failure.cause for failure in self.verdicts.failures if failure.index == index}
        return told | ({"failures": causes} if causes else {})


def judge_pairs(judge: OpenAIJudge, prompts: Sequence[str], models: Sequence[Answers]) -> list[Judged]:
    """The judge's verdicts on `pairs_of`, in both orders. Where all of a pair fail, the rest isn't asked, and is marked so."""
    found: list[Judged] = []
    gone: str | None = None
    for a, b in pairs_of(models):
        if gone is None:
            verdicts = judge.compare(prompts, a.responses, b.responses)
            if len(verdicts.failures) == 2 * len(prompts):
                gone = most_frequent([failure.cause for failure in verdicts.failures])
        else:
            verdicts = JudgeVerdicts.none(len(prompts), f"not asked: every comparison before had failed, with: {gone}")
        found.append(Judged(a.name, b.name, verdicts))
    return found


def most_frequent(causes: Sequence[str]) -> str:
    """Of several causes."""
    return Counter(causes).most_common(1)[0][0]


def win_rate_row(a: str, b: str, judge: str, rate: WinRate) -> dict[str, Any]:
    """A comparison as ``win_rates.json`` has it; what isn't finite (nothing was judged) is None."""
    return {
        "a": a,
        "b": b,
        "judge": judge,
        "wins": rate.wins,
        "ties": rate.ties,
        "losses": rate.losses,
        "unjudged": rate.unjudged,
        "disagreements": rate.disagreements,
        "rate": _number(rate.rate),
        "low": _number(rate.low),
        "high": _number(rate.high),
        "confidence": rate.confidence,
    }
