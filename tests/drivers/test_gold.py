"""A gold reward in a PPO run: watched, never trained on; and what the health rules see of a run that collapses."""

from __future__ import annotations

import json

import pytest

from tests.drivers.runs import Finished, TinyWorld

GOLD = "reward.gold.function=tests.drivers.test_gold:different_words"
COLLAPSING = (
    "ppo.steps=18", "ppo.kl_controller=fixed", "ppo.target_kl=null", "ppo.kl_horizon=10000", "ppo.kl_coef=0",
    "policy.optimizer.lr=0.01", "policy.optimizer.schedule=constant", "evaluation.every_steps=9",
    "checkpoint.every_steps=9", "monitoring.samples_per_step=16",
)  # fmt: skip


def different_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Nothing that the reward looks at."""
    return [len(set(response.split())) / 8 for response in responses]


@pytest.fixture(scope="module")
def collapsed(world: TinyWorld) -> Finished:
    """A run without a KL penalty: the policy ends up with the few words that the reward likes."""
    return world.train("collapsed", *COLLAPSING, GOLD)


def samples(run: Finished) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]


def test_the_gold_mean_of_each_step_is_that_of_its_responses(collapsed: Finished):
    rows = samples(collapsed)
    assert [row["step"] for row in collapsed.metrics] == list(range(1, 19))
    for metrics in collapsed.metrics:
        responses = [row["response"] for row in rows if row["step"] == metrics["step"]]
        assert len(responses) == 16
        assert metrics["gold/mean"] == pytest.approx(sum(different_words([], responses)) / 16, abs=1e-6)
        assert "score/gold/mean" not in metrics


def test_evaluations_tell_the_gold_mean_and_its_error(collapsed: Finished):
    assert [row["step"] for row in collapsed.evaluations] == [0, 9, 18]
    for row in collapsed.evaluations:
        golds = different_words([], [sample["response"] for sample in row["samples"]])
        mean = sum(golds) / 8
        error = (sum((g - mean) ** 2 for g in golds) / 7 / 8) ** 0.5
        assert row["gold/mean"] == pytest.approx(mean, abs=1e-6) and row["gold/stderr"] == pytest.approx(
            error, abs=1e-6
        )


def test_the_gold_score_is_never_trained_on(world: TinyWorld):
    short = ("ppo.steps=3", "evaluation.every_steps=1")
    without, watched = world.train("no-gold", *short), world.train("with-gold", *short, GOLD)
    assert watched.same_weights(without)
    for mine, theirs in zip(watched.numbers, without.numbers, strict=True):
        assert mine.keys() - theirs.keys() == {"gold/mean"}
        assert {k: v for k, v in mine.items() if k != "gold/mean"} == theirs
    assert not any(key.startswith("gold") for row in without.evaluations for key in row)
    assert not (without.folder / "reward_hacking.json").exists()
    found = json.loads((watched.folder / "reward_hacking.json").read_text())
    assert found["outcome"] == "too_short" and found["parted_at"] is None and "3 steps" in found["verdict"]


def test_the_analysis_of_hacking_is_written_and_stands_in_the_report(collapsed: Finished):
    found = json.loads((collapsed.folder / "reward_hacking.json").read_text())
    # The reward rises while the responses repeat the same words.
    assert found["outcome"] == "hacking" and found["pearson"] < -0.5 and 1 <= found["parted_at"] < 12
    assert [found["windows"][0]["first_step"], found["windows"][-1]["last_step"]] == [1, 18]
    page = (collapsed.folder / "report.html").read_text()
    assert f"Reward hacking: they part at step {found['parted_at']}" in page


def test_an_analysis_is_made_at_an_evaluation_and_goes_on_after_a_resume(world: TinyWorld):
    """A run that is broken off at an evaluation, and goes on: the analysis is about all its steps."""
    import rayrlhf
    from rayrlhf.config import load_config

    class Enough(Exception):
        pass

    file = world.config_file("broken-off")
    seen = []
    overrides = [*COLLAPSING, GOLD, "ppo.steps=8", "evaluation.every_steps=7", "checkpoint.every_steps=4"]
    with pytest.raises(Enough), rayrlhf.launch(load_config(file, overrides)) as run:
        from rayrlhf.drivers import ppo

        evaluate = run.evaluate

        def evaluated():
            evaluate()
            analysis = world.folder / "broken-off/reward_hacking.json"
            seen.append(json.loads(analysis.read_text()) if analysis.exists() else None)
            if len(seen) == 2:
                raise Enough

        run.evaluate = evaluated
        ppo.train(run)
    assert seen[0] is None and seen[1]["windows"][-1]["last_step"] == 7
    resumed = world.train("broken-off", *overrides, resume=True)
    assert [row["step"] for row in resumed.metrics] == list(range(1, 9))
    whole = json.loads((resumed.folder / "reward_hacking.json").read_text())
    assert (whole["windows"][0]["first_step"], whole["windows"][-1]["last_step"]) == (1, 8)


def test_the_health_rules_see_collapse_and_ceiling_in_a_real_run(collapsed: Finished):
    warnings = [json.loads(line) for line in (collapsed.folder / "health.jsonl").read_text().splitlines()]
    seen = {warning["rule"]: warning["seen"] for warning in warnings}
    assert "distinct_2 fell from" in seen["collapse"] and "with scores from" in seen["score_ceiling"]


def test_variety_and_the_highest_score_are_those_of_the_responses(collapsed: Finished):
    rows, compared = samples(collapsed), 0
    for metrics in collapsed.metrics:
        mine = [row for row in rows if row["step"] == metrics["step"]]
        assert metrics["score/max"] == pytest.approx(max(row["score"] for row in mine), abs=1e-6)
        texts = [row["response"].split() for row in mine]
        if all(row["response_tokens"] == len(words) for row, words in zip(mine, texts, strict=True)):
            # No special tokens: each token is a word of the text.
            pairs = [pair for words in texts for pair in zip(words, words[1:], strict=False)]
            assert metrics["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs), abs=1e-6)
            compared += 1
            assert metrics["repeated_fraction"] == sum(texts.count(words) > 1 for words in texts) / 16
    assert compared > 4
