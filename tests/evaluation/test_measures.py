"""Measures of responses against definitions written out, other libraries, and simulation."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from rayrlhf.evaluation import (
    distinct_n,
    distinct_n_and_stderr,
    mean_and_stderr,
    quantiles,
    ratio_and_stderr,
    repeated,
    win_rate,
)
from rayrlhf.evaluation.answers import Answers, Judged, Scores, compare_by_scores, measures_of
from rayrlhf.evaluation.judge import JudgeFailure, JudgeVerdicts

TEXTS = ["a b a", "B c", "", "a b", "d e f g", "c c c"]


def test_a_ratio_by_hand():
    # 6 nats over 4 tokens; residuals 1 - 1.5 x 2 = -2 and 5 - 1.5 x 2 = 2: their mean's error is 2, over 2 tokens 1
    assert ratio_and_stderr([1.0, 5.0], [2, 2]) == pytest.approx((1.5, 1.0))
    assert all(math.isnan(value) for value in ratio_and_stderr([0.0, 0.0], [0, 0]))
    assert math.isnan(ratio_and_stderr([3.0], [2])[1]) and ratio_and_stderr([3.0], [2])[0] == 1.5


def test_the_error_of_a_ratio_is_what_repetition_shows():
    chance = np.random.default_rng(0)
    counts = chance.integers(2, 20, size=(2000, 60))
    sums = counts * 1.3 + chance.normal(size=counts.shape) * np.sqrt(counts)
    ratios = sums.sum(1) / counts.sum(1)
    errors = [ratio_and_stderr(s.tolist(), c.tolist())[1] for s, c in zip(sums[:200], counts[:200], strict=True)]
    assert statistics.fmean(errors) == pytest.approx(ratios.std(), rel=0.06)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_jackknife_leaves_out_one_text_after_the_other(n):
    with_grams = [text for text in TEXTS if len(text.split()) >= n]
    left_out = [distinct_n(with_grams[:i] + with_grams[i + 1 :], n) for i in range(len(with_grams))]
    m = len(left_out)
    error = math.sqrt((m - 1) / m * sum((v - statistics.fmean(left_out)) ** 2 for v in left_out))
    assert distinct_n_and_stderr(TEXTS, n) == pytest.approx((distinct_n(TEXTS, n), error))


def test_distinct_words_by_hand():
    assert distinct_n(["a b a", "B c"], 1) == 3 / 5 and distinct_n(["a b a", "B c"], 2) == 1.0
    value, error = distinct_n_and_stderr(["one"], 1)
    assert value == 1.0 and math.isnan(error) and distinct_n_and_stderr([], 2)[0] == 0.0


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_quantiles_are_numpys(size):
    values = [random.Random(size).gauss(0, 1) for _ in range(size)]
    found = quantiles(values)
    assert list(found) == ["0", "0.05", "0.25", "0.5", "0.75", "0.95", "1"]
    assert list(found.values()) == pytest.approx(np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist())
    assert quantiles([]) == {}


def test_repeated_responses_are_all_of_those_alike():
    assert repeated(["x", "y ", " x", "y", "z"]) == [True, True, True, True, False]
    assert repeated([]) == []


def answers(name: str, values: list[float], **more) -> Answers:
    count = len(values)
    told = {
        "path": f"models/{name}",
        "responses": [f"{name} {i}" for i in range(count)],
        "tokens": [2] * count,
        "truncated": [False] * count,
        "scores": {"reward": Scores(values, [None if v == v else "gone" for v in values])},
        "kl": [0.0] * count,
        "no_kl": None,
        "known_nll": [0.0] * count,
        "known_tokens": [0] * count,
    }
    return Answers(name=name, **(told | more))


def test_what_has_no_score_counts_nowhere_but_as_unjudged():
    a, b = answers("a", [1.0, math.nan, 3.0, 0.0]), answers("b", [0.0, 5.0, math.nan, 0.5])
    (row,) = compare_by_scores([b, a], {"reward": "r"}, tie=0.0, seed=0, confidence=0.9)
    assert (row["a"], row["b"], row["wins"], row["ties"], row["losses"], row["unjudged"]) == ("a", "b", 1, 0, 1, 2)
    direct = win_rate(a.scores["reward"].values, b.scores["reward"].values, confidence=0.9)
    assert (row["rate"], row["low"], row["high"]) == (direct.rate, direct.low, direct.high)
    measured = measures_of(a)
    mean, error = mean_and_stderr([1.0, 3.0, 0.0])
    assert (measured["score/mean"], measured["score/stderr"], measured["score/unscored"]) == (mean, error, 1)


def test_the_tie_is_that_of_the_reward_alone():
    scores = {source: Scores([0.3, 0.1], [None, None]) for source in ("reward", "safety")}
    zeros = {source: Scores([0.0, 0.0], [None, None]) for source in ("reward", "safety")}
    models = [answers("b", [0.0, 0.0], scores=zeros), answers("a", [0.0, 0.0], scores=scores)]
    reward, safety = compare_by_scores(models, {"reward": "r", "safety": "safety"}, tie=0.2, seed=0, confidence=0.95)
    assert (reward["wins"], reward["ties"]) == (1, 1) and (safety["wins"], safety["ties"]) == (2, 0)


def test_three_models_are_compared_each_with_each_the_later_one_first():
    models = [answers(name, [float(i)]) for i, name in enumerate("abc")]
    rows = compare_by_scores(models, {"reward": "r"}, tie=0.0, seed=0, confidence=0.95)
    assert [(row["a"], row["b"], row["rate"]) for row in rows] == [("b", "a", 1.0), ("c", "a", 1.0), ("c", "b", 1.0)]


def test_perplexity_and_kl_of_a_token_by_hand():
    one = answers("a", [0.0, 0.0], kl=[1.0, 3.0], tokens=[2, 6], known_nll=[2.0, 4.0, 0.0], known_tokens=[1, 3, 0])
    measured = measures_of(one)
    assert measured["kl/mean"] == 2.0 and measured["kl/stderr"] == pytest.approx(1.0)
    assert measured["kl_per_token"] == pytest.approx(4 / 8)
    assert measured["nll"] == pytest.approx(1.5) and measured["perplexity"] == pytest.approx(math.exp(1.5))
    assert measured["perplexity/stderr"] == pytest.approx(math.exp(1.5) * measured["nll/stderr"])


def test_what_can_not_be_measured_is_none_with_its_reason():
    measured = measures_of(answers("a", [0.5], kl=None, no_kl="other tokens"))
    assert measured["kl/mean"] is None and measured["kl/reason"] == "other tokens" and measured["perplexity"] is None
    assert measured["score/stderr"] is None and measured["score/mean"] == 0.5


def test_a_prompt_tells_both_verdicts_and_why_there_is_none():
    verdicts = JudgeVerdicts(["a", None], ["b", "tie"], [JudgeFailure(1, "first", "HTTP 500")])
    judged = Judged("x", "y", verdicts)
    assert judged.of_prompt(0) == {"a": "x", "b": "y", "first": "a", "second": "b"}
    assert judged.of_prompt(1)["failures"] == {"first": "HTTP 500"}
    row = judged.row("j", seed=0, confidence=0.95)
    assert (row["ties"], row["unjudged"], row["disagreements"]) == (1, 1, 1)
