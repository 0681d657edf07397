"""Each health rule at its threshold, from both sides; and spoilt runs, which trip their own rule and no other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from rayrlhf.config.health import RULE_NAMES, HealthConfig
from rayrlhf.monitoring.health import check_health, review_health
from tests.monitoring.histories import simulate

Value = float | Callable[[int], float]
DEFAULT = HealthConfig()


def rows(steps: int = 60, **columns: Value) -> list[dict[str, float]]:
    """A run without noise; ``__`` in a name stands for ``/``."""
    return [
        {"step": t + 1} | {k.replace("__", "/"): v(t) if callable(v) else v for k, v in columns.items()}
        for t in range(steps)
    ]


def rules(history: list, config: HealthConfig = DEFAULT) -> set[str]:
    return {warning.rule for warning in check_health(history, config)}


def later(first: float, then: float, start: int = 30) -> Callable[[int], float]:
    return lambda t: first if t < start else then


def last(first: Value, then: float, steps: int = 60) -> Callable[[int], float]:
    return lambda t: then if t == steps - 1 else first(t) if callable(first) else first


def two_waves(share: float) -> Callable[[int], float]:
    """1 and two sines with periods of 5 and 3 steps; the first has this share of the variance."""
    a, b = math.sqrt(share), math.sqrt(1 - share)
    return lambda t: 1 + a * math.sin(2 * math.pi * t / 5) + b * math.sin(2 * math.pi * t / 3)


def wave(amplitude: float) -> Callable[[int], float]:
    # The sine's five values are 0, ±0.588 and ±0.951: 1.902 amplitudes from the 10th to the 90th percentile, of which the
    # parabola takes off less than 4 %. A quarter of the level 1 is reached between amplitudes of 0.1314 and 0.137.
    return lambda t: 1 + amplitude * math.sin(2 * math.pi * t / 5)


def up(t: int) -> float:
    return 0.01 * t


def small(t: int) -> float:
    return 0.01 * (-1) ** t


# name, columns that all is well with, columns that the rule speaks of, rules that speak besides
AT_THE_THRESHOLD = [
    ("kl_too_high", {"kl_per_token": 0.5}, {"kl_per_token": 0.501}, set()),
    ("kl_too_high", {"kl": 50, "response_length__mean": 100}, {"kl": 50.1, "response_length__mean": 100}, set()),
    ("kl_too_high", {"kl": 30}, {"kl": 30.1}, set()),
    # the median of the last five steps of c * t is 57 c, that of the middle's 27 c
    ("reward_hacking", {"score__mean": up, "kl_per_token": lambda t: 0.5 / 57 * t},
     {"score__mean": up, "kl_per_token": lambda t: 0.501 / 57 * t}, {"kl_too_high"}),
    ("kl_too_low", {"kl_per_token": 0.001, "score__mean": 0.3}, {"kl_per_token": 0.00099, "score__mean": 0.3}, set()),
    ("kl_too_low", {"kl_per_token": 0.0005, "score__mean": up}, {"kl_per_token": 0.0005}, set()),
    ("kl_flat", {"kl_per_token": 2.1e-5, "grad_norm": 1, "score__mean": up}, {"kl_per_token": 2e-5, "grad_norm": 1}, set()),
    ("kl_flat", {"kl_per_token": 0, "grad_norm": 0.99e-3, "score__mean": up}, {"kl_per_token": 0, "grad_norm": 1e-3}, set()),
    ("score_ceiling", {"score__mean": 0.94, "score__max": 1, "score__min": -0.1},
     {"score__mean": 0.95, "score__max": 1, "score__min": -0.1}, set()),
    ("collapse", {"entropy": later(4, 1.01)}, {"entropy": later(4, 0.99)}, set()),
    ("collapse", {"distinct_2": later(0.8, 0.4)}, {"distinct_2": later(0.8, 0.399)}, set()),
    ("collapse", {"repeated_fraction": later(0, 0.5)}, {"repeated_fraction": later(0, 0.51)}, set()),
    ("length_drift", {"response_length__mean": later(100, 149)}, {"response_length__mean": later(100, 150)}, set()),
    ("length_drift", {"response_length__mean": later(150, 101)}, {"response_length__mean": later(150, 100)}, set()),
    ("loss_spike", {"loss": last(1, 2.99)}, {"loss": last(1, 3)}, set()),
    ("loss_spike", {"value_loss": last(0.1, 0.29)}, {"value_loss": last(0.1, 0.31)}, set()),
    ("loss_spike", {"policy_loss": last(small, 0.0299)}, {"policy_loss": last(small, 0.0301)}, set()),
    # the loss of pairs that are learnt: three times nearly nothing, below a fifth of the beginning
    ("loss_spike", {"loss": last(later(1, 0.01), 0.19)}, {"loss": last(later(1, 0.01), 0.21)}, set()),
    ("value_not_learning", {"explained_variance": 0.05}, {"explained_variance": 0.049}, set()),
    ("value_not_learning", {"explained_variance": lambda t: -20 + t / 9}, {"explained_variance": -14}, set()),
    ("oscillation", {"score__mean": two_waves(0.67)}, {"score__mean": two_waves(0.73)}, set()),
    ("oscillation", {"loss": wave(0.131)}, {"loss": wave(0.138)}, set()),
    ("clipfrac_high", {"clipfrac": 0.3}, {"clipfrac": 0.301}, set()),
    ("truncation", {"truncated_fraction": later(0.1, 0.5)}, {"truncated_fraction": later(0.1, 0.51)}, set()),
    ("truncation", {"truncated_fraction": later(0.4, 0.64)}, {"truncated_fraction": later(0.4, 0.66)}, set()),
    ("rollout_mismatch", {"rollout_mismatch__mean_abs": 0.1}, {"rollout_mismatch__mean_abs": 0.101}, set()),
    ("skipped_steps", {"skipped_steps": 0, "optimizer_steps": 4}, {"skipped_steps": last(0, 1), "optimizer_steps": 4}, set()),
    ("skipped_steps", {"critic__skipped_steps": 0}, {"critic__skipped_steps": last(0, 1)}, set()),
    ("margins_falling", {"rewards__margins": later(1, 0.76)}, {"rewards__margins": later(1, 0.75)}, set()),
    ("margins_falling", {"margin": 0.0}, {"margin": -0.01}, set()),
    ("accuracy_at_chance", {"rewards__accuracies": 0.53}, {"rewards__accuracies": 0.529}, set()),
    ("accuracy_at_chance", {"accuracy": lambda t: 0.4 + t / 500}, {"accuracy": 0.5}, set()),
    ("chosen_sinking", {"logps__chosen": later(-100, -119.9), "logps__rejected": later(-100, -130)},
     {"logps__chosen": later(-100, -120.1), "logps__rejected": later(-100, -130)}, set()),
    ("chosen_sinking", {"logps__chosen": later(-100, -150), "logps__rejected": -100},
     {"logps__chosen": later(-100, -150), "logps__rejected": later(-100, -101)}, set()),
    ("chosen_sinking", {"logps__chosen": later(-100, -150), "logps__rejected": later(-100, -150), "rewards__chosen": 0.1},
     {"logps__chosen": later(-100, -150), "logps__rejected": later(-100, -150), "rewards__chosen": -0.1}, set()),
]  # fmt: skip


@pytest.mark.parametrize("name, good, bad, besides", AT_THE_THRESHOLD, ids=[case[0] for case in AT_THE_THRESHOLD])
def test_a_rule_speaks_beyond_its_threshold_and_not_before(name, good, bad, besides):
    assert rules(rows(**good)) == set()
    assert rules(rows(**bad)) == {name} | besides
    assert rules(rows(**bad), HealthConfig(ignore=[name])) == besides


def test_every_rule_was_tried():
    assert {case[0] for case in AT_THE_THRESHOLD} == set(RULE_NAMES)


@pytest.mark.parametrize(
    "settings, columns, name",
    [
        ({"max_kl_per_token": 0.1}, {"kl_per_token": 0.11}, "kl_too_high"),
        ({"max_kl_per_sequence": 5}, {"kl": 5.1}, "kl_too_high"),
        ({"min_kl_per_token": 0.1}, {"kl_per_token": 0.09}, "kl_too_low"),
        ({"low_kl_after_steps": 61}, {"kl_per_token": 1e-4}, None),
        ({"flat_kl_per_token": 1e-4}, {"kl_per_token": 1e-4, "grad_norm": 1}, "kl_flat"),
        ({"flat_kl_after_steps": 61}, {"kl_per_token": 0, "grad_norm": 1}, "kl_too_low"),
        ({"flat_grad_norm": 2}, {"kl_per_token": 1e-6, "grad_norm": 1}, "kl_too_low"),
        ({"noise": 100}, {"loss": last(lambda t: 1 + 0.02 * (t % 2), 3.2)}, None),
        ({"max_score": 1.0}, {"score__mean": later(0, 0.99)}, "score_ceiling"),
        ({"ceiling_distance": 0.5}, {"score__mean": 0.5, "score__max": 1, "score__min": 0}, "score_ceiling"),
        ({"entropy_fall": 0.5}, {"entropy": later(4, 1.9)}, "collapse"),
        ({"distinct_fall": 0.9}, {"distinct_2": later(0.8, 0.7)}, "collapse"),
        ({"max_repeated_fraction": 0.1}, {"repeated_fraction": later(0, 0.2)}, "collapse"),
        ({"length_factor": 1.2}, {"response_length__mean": later(100, 120)}, "length_drift"),
        ({"loss_factor": 2.0}, {"loss": last(1, 2)}, "loss_spike"),
        ({"min_explained_variance": 0.5}, {"explained_variance": 0.4}, "value_not_learning"),
        ({"value_after_steps": 61}, {"explained_variance": 0}, None),
        ({"oscillation_share": 0.6}, {"score__mean": two_waves(0.67)}, "oscillation"),
        ({"oscillation_swing": 0.1}, {"loss": wave(0.07)}, "oscillation"),
        ({"max_clipfrac": 0.1}, {"clipfrac": 0.11}, "clipfrac_high"),
        ({"max_truncated_fraction": 0.2}, {"truncated_fraction": later(0, 0.3)}, "truncation"),
        ({"truncated_rise": 0.0}, {"truncated_fraction": 0.9}, "truncation"),
        ({"max_rollout_mismatch": 0.01}, {"rollout_mismatch__mean_abs": 0.02}, "rollout_mismatch"),
        ({"max_skipped_fraction": 0.25}, {"skipped_steps": 1, "optimizer_steps": 3}, None),
        ({"margin_fall": 0.1}, {"rewards__margins": later(1, 0.9)}, "margins_falling"),
        ({"min_accuracy": 0.7}, {"accuracy": 0.69}, "accuracy_at_chance"),
        ({"chance_after_steps": 61}, {"accuracy": 0.5}, None),
        ({"chosen_fall": 0.05}, {"logps__chosen": later(-100, -106), "logps__rejected": later(-9, -10)}, "chosen_sinking"),
        ({"warmup_steps": 61}, {"clipfrac": 0.9}, None),
        ({"window_steps": 1}, {"clipfrac": last(0, 0.9)}, "clipfrac_high"),
        ({"window_steps": 9}, {"clipfrac": later(0, 0.9, 57)}, None),
    ],
)  # fmt: skip
def test_every_threshold_counts(settings, columns, name):
    assert rules(rows(**columns), HealthConfig(**settings)) == ({name} if name else set())
    assert rules(rows(**columns)) != rules(rows(**columns), HealthConfig(**settings))


def test_how_severe():
    def severity(**columns: Value) -> dict[str, str]:
        return {w.rule: w.severity for w in check_health(rows(**columns), DEFAULT)}

    assert severity(kl_per_token=0.9) == {"kl_too_high": "warning"}
    assert severity(kl_per_token=1.0) == {"kl_too_high": "critical"}
    assert severity(kl_per_token=1e-4) == {"kl_too_low": "note"}
    # one of five optimizer steps of the window; then four of eight
    assert severity(skipped_steps=last(0, 1), optimizer_steps=1) == {"skipped_steps": "warning"}
    assert severity(skipped_steps=lambda t: 4 * (t == 59), optimizer_steps=lambda t: t > 55) == {
        "skipped_steps": "critical"
    }
    assert HealthConfig(critical_skipped_fraction=0.1).critical_skipped_fraction == 0.1
    light = check_health(rows(skipped_steps=last(0, 1), optimizer_steps=1), HealthConfig(critical_skipped_fraction=0.1))
    assert [w.severity for w in light] == ["critical"]


def test_hacking_needs_a_kl_that_goes_on_growing_or_is_far_too_high():
    flat = {"score__mean": up, "kl_per_token": 0.9}
    assert rules(rows(**flat)) == {"kl_too_high"}
    assert rules(rows(**flat | {"kl_per_token": 1.0})) == {"kl_too_high", "reward_hacking"}
    # 0.9 at the end; in the middle 0.61 (1.475 times) or 0.59 (1.525 times)
    assert rules(rows(**flat | {"kl_per_token": later(0.61, 0.9, 50)})) == {"kl_too_high"}
    assert rules(rows(**flat | {"kl_per_token": later(0.59, 0.9, 50)})) == {"kl_too_high", "reward_hacking"}
    assert rules(rows(**flat | {"kl_per_token": later(0.61, 0.9, 50)}), HealthConfig(kl_growth=1.4)) == {
        "kl_too_high",
        "reward_hacking",
    }
    assert rules(rows(**flat | {"kl_per_token": later(0.1, 0.9, 20)})) == {"kl_too_high"}  # grew, and stays
    assert rules(rows(kl_per_token=1.5, score__mean=0.5)) == {"kl_too_high"}


def test_a_change_within_the_noise_is_none():
    def jagged(size: float) -> Callable[[int], float]:
        return lambda t: 100 + size * math.sin(7.3 * t * t)

    def longer(size: float) -> Callable[[int], float]:
        return lambda t: jagged(size)(t) + (60 if t >= 30 else 0)

    assert rules(rows(response_length__mean=longer(5))) == {"length_drift"}
    assert rules(rows(response_length__mean=longer(60))) == set()
    assert rules(rows(response_length__mean=longer(60)), HealthConfig(noise=0.1)) == {"length_drift"}


@pytest.mark.parametrize(
    "period, expected", [(2, {"oscillation"}), (2.7, {"oscillation"}), (9, {"oscillation"}), (20, set())]
)
def test_what_swings_more_slowly_than_three_times_in_six_windows_is_a_trend(period, expected):
    assert rules(rows(loss=lambda t: 2 + math.sin(2 * math.pi * t / period + 1))) == expected


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_critical_at_once(strange):
    (live,) = check_health([{"step": 1, "loss": strange}], DEFAULT)
    (read,) = check_health([{"step": 1, "loss": None, "non_finite": {"loss": str(strange)}}], DEFAULT)
    assert live == read and live.rule == "loss_spike" and live.severity == "critical"
    assert str(strange) in live.seen


PPO, DPO, REWARD, SFT = simulate.ppo, simulate.dpo, simulate.reward_model, simulate.sft
spoilt, replaced = simulate.spoilt, simulate.replaced
SPOILT = [
    (PPO, {"reward_hacking", "kl_too_high"}, lambda h: spoilt(h, 30, kl=lambda i: 1.15**i, kl_per_token=lambda i: 1.15**i)),
    (PPO, {"score_ceiling"}, lambda h: replaced(h, 35, score__mean=lambda i: 2.35 - 0.02 * (i % 2), score__max=lambda i: 2.4)),
    (PPO, {"kl_too_high"}, lambda h: spoilt(replaced(h, 0, score__mean=lambda i: 0.1 * math.sin(i * i)), 0,
                                           kl=lambda i: 12, kl_per_token=lambda i: 12)),
    (PPO, {"kl_flat"}, lambda h: spoilt(h, 0, kl=lambda i: 0, kl_per_token=lambda i: 0)),
    (PPO, {"kl_too_low"}, lambda h: spoilt(replaced(h, 0, score__mean=lambda i: 0.1 * math.sin(i * i)), 0,
                                          kl=lambda i: 0.01, kl_per_token=lambda i: 0.01)),
    (PPO, {"collapse"}, lambda h: spoilt(h, 25, entropy=lambda i: 0.9**i)),
    (PPO, {"collapse"}, lambda h: spoilt(h, 25, distinct_2=lambda i: 0.95**i)),
    (PPO, {"collapse"}, lambda h: replaced(h, 25, repeated_fraction=lambda i: min(0.9, 0.05 * i))),
    (PPO, {"length_drift"}, lambda h: spoilt(h, 20, response_length__mean=lambda i: 1 + 0.02 * i)),
    (PPO, {"loss_spike"}, lambda h: spoilt(h, 57, value_loss=lambda i: 8)),
    (PPO, {"value_not_learning"}, lambda h: spoilt(h, 0, explained_variance=lambda i: 0.02)),
    (PPO, {"oscillation"}, lambda h: spoilt(h, 15, score__mean=lambda i: 1 + 0.7 * math.sin(i))),
    (PPO, {"oscillation"}, lambda h: spoilt(h, 15, value_loss=lambda i: 1 + 0.5 * (-1) ** i)),
    (PPO, {"clipfrac_high"}, lambda h: spoilt(h, 30, clipfrac=lambda i: 6)),
    (PPO, {"truncation"}, lambda h: replaced(h, 30, truncated_fraction=lambda i: min(0.95, 0.1 + 0.05 * i))),
    (PPO, {"rollout_mismatch"}, lambda h: spoilt(h, 40, rollout_mismatch__mean_abs=lambda i: 1 + i / 2)),
    (PPO, {"skipped_steps"}, lambda h: replaced(h, 57, skipped_steps=lambda i: 1)),
    (DPO, {"reward_hacking", "kl_too_high"}, lambda h: [*h[:-1], h[-1] | {"kl_per_token": 0.7}]),
    (DPO, {"margins_falling"}, lambda h: spoilt(h, 50, rewards__margins=lambda i: -0.2)),
    (DPO, {"accuracy_at_chance"}, lambda h: replaced(h, 0, rewards__accuracies=lambda i: 0.5 + 0.06 * math.sin(i * i))),
    (DPO, {"chosen_sinking"}, lambda h: spoilt(replaced(h, 30, rewards__chosen=lambda i: -0.1 * i), 30,
                                               logps__chosen=lambda i: 1 + 0.02 * i, logps__rejected=lambda i: 1 + 0.02 * i)),
    (REWARD, {"accuracy_at_chance"}, lambda h: replaced(h, 0, accuracy=lambda i: 0.5 + 0.06 * math.sin(i * i))),
    (REWARD, {"loss_spike"}, lambda h: spoilt(h, 58, loss=lambda i: 4)),
    (SFT, {"loss_spike"}, lambda h: spoilt(h, 58, loss=lambda i: 3.5)),
    (SFT, {"loss_spike"}, lambda h: replaced(h, 58, loss=lambda i: math.nan)),
    (SFT, {"oscillation"}, lambda h: spoilt(h, 15, loss=lambda i: 1 + 0.3 * math.sin(2 * i))),
]  # fmt: skip


@pytest.mark.parametrize("make, expected, spoil", SPOILT, ids=["+".join(sorted(case[1])) for case in SPOILT])
def test_a_spoilt_run_trips_its_rule_and_no_other(make, expected, spoil):
    for seed in range(5):
        history = make(seed)
        assert rules(history) == set()
        assert rules(spoil(history)) == expected, seed
        assert {w.rule for w in review_health(spoil(history), DEFAULT)} == expected, seed


@pytest.mark.parametrize("make", [PPO, DPO, REWARD, SFT])
@pytest.mark.parametrize("steps", [25, 60, 150])
def test_healthy_runs_trip_nothing_at_any_step(make, steps):
    for seed in range(100, 106):
        assert review_health(make(seed, steps), DEFAULT) == [], seed


def test_small_noisy_batches_trip_nothing():
    for seed in range(10):
        assert review_health(simulate.ppo(seed, samples=16), DEFAULT) == []
        assert review_health(simulate.dpo(seed, pairs=8), DEFAULT) == []


@pytest.mark.parametrize("seed", [49, 62, 81])
def test_the_best_of_many_windows_is_partly_luck(seed):
    # of the first 200 seeds, those whose best window is so good that what follows looks like a fall
    reviewed = review_health(simulate.reward_model(seed, 200, 16), DEFAULT)
    assert "margins_falling" not in {warning.rule for warning in reviewed}
