"""Health warnings as a function of the history: recorded runs, what a warning says, how long it lasts, any input."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayrlhf.config.health import RULE_NAMES, HealthConfig
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.config.schema import Config
from rayrlhf.config.trainers import Section
from rayrlhf.monitoring.health import RULES, HealthWarning, check_health, review_health, stopping
from rayrlhf.monitoring.health_words import WORDS
from tests.monitoring.histories import simulate

DEFAULT = HealthConfig()
HISTORIES = Path(__file__).parent / "histories"


def recorded(name: str) -> list[dict]:
    return [json.loads(line) for line in (HISTORIES / f"{name}.jsonl").read_text().splitlines()]


# -- real runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo_quickstart", "ppo_tiny"])
def test_recorded_healthy_runs_trip_nothing_at_any_step(name):
    history = recorded(name)
    assert len(history) >= 30
    assert review_health(history, DEFAULT) == []
    assert all(check_health(history[:n], DEFAULT) == [] for n in range(len(history) + 1))


def test_a_recorded_run_without_kl_penalty_is_hacking():
    # A tiny model whose reward is the share of some words, kl_coef 0: it ends with nothing but these words.
    warnings = {w.rule: w for w in check_health(recorded("ppo_without_kl"), DEFAULT)}
    assert set(warnings) == {"reward_hacking", "kl_too_high", "score_ceiling", "value_not_learning"}
    hacking = warnings["reward_hacking"]
    assert hacking.severity == "critical" and hacking.since == 11 and hacking.step == 40
    assert "from 0.4336 to 1" in hacking.seen and "ppo.kl_coef up" in hacking.turn


def test_a_recorded_run_in_bfloat16_at_a_tiny_learning_rate_is_flat():
    (warning,) = check_health(recorded("ppo_lost_updates"), DEFAULT)
    assert warning.rule == "kl_flat" and "policy.dtype=float32" in warning.turn


def test_a_recorded_run_whose_critic_stands_still_is_told():
    (warning,) = check_health(recorded("ppo_dead_critic"), DEFAULT)
    assert warning.rule == "value_not_learning" and "critic.optimizer.lr up" in warning.turn


# -- what a warning says --------------------------------------------------------------------------------------------


def test_a_line_says_all_of_it():
    history = [{"step": 10 * (t + 1), "clipfrac": 0.1 if t < 20 else 0.61} for t in range(30)]
    (warning,) = check_health(history, DEFAULT)
    # three high ones of five make a high median: the 23rd row
    assert (warning.rule, warning.severity, warning.step, warning.since) == ("clipfrac_high", "warning", 300, 230)
    line = warning.line()
    assert line.startswith("warning: clipfrac_high since step 230: clipfrac 0.61 (limit 0.3). It usually means: ")
    assert line.endswith(f"Try: {warning.turn}") and warning.means in line and "\n" not in line
    with pytest.raises(AttributeError):
        warning.step = 3


def test_the_most_severe_comes_first():
    row = {"clipfrac": 0.9, "kl_per_token": 2.0, "skipped_steps": 0, "score/mean": 1, "score/max": 1, "score/min": 0}
    found = check_health([{"step": t, **row} for t in range(20)], DEFAULT)
    assert [w.rule for w in found] == ["kl_too_high", "score_ceiling", "clipfrac_high"]


def keys_of(section: type[Section], path: list[str]) -> bool:
    """Whether a dotted path leads to a key below a section."""
    field = section.model_fields.get(path[0])
    if field is None:
        return False
    if len(path) == 1:
        return True
    below = [part for part in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(part, type)]
    return any(keys_of(part, path[1:]) for part in below if issubclass(part, Section))


ROOTS = {"ppo": Config, "preferences": PreferenceConfig, "reward_model": RewardModelConfig, "sft": SFTConfig}


@pytest.mark.parametrize("name", RULE_NAMES)
def test_the_keys_to_turn_exist(name):
    words, found = WORDS[name], 0
    assert words.means and set(RULES) == set(WORDS) == set(RULE_NAMES)
    for family, root in ROOTS.items():
        for key in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", getattr(words, family)):
            assert keys_of(root, key.split(".")), (family, key)
            found += 1
    assert found >= 2
    assert all(words.turn(family) for family in ROOTS)


def test_the_keys_to_turn_are_those_of_the_kind_of_run():
    def turn(**columns: float) -> str:
        (warning,) = [
            w for w in check_health([{"step": t, "loss": 1 + 9 * (t == 29)} | columns for t in range(30)], DEFAULT)
        ]
        return warning.turn

    assert "training.batch_examples" in turn()
    assert "training.batch_examples" in turn(**{"rewards/margins": 0.5})
    kl = [{"step": t, "kl_per_token": 0.9} for t in range(30)]
    assert "ppo.kl_coef" in check_health(kl, DEFAULT)[0].turn
    assert "dpo.beta" in check_health([row | {"rewards/margins": 0.5} for row in kl], DEFAULT)[0].turn


# -- what ends a run ------------------------------------------------------------------------------------------------


def test_what_ends_a_run():
    def of(rule: str, severity: str) -> HealthWarning:
        return HealthWarning(rule, severity, 1, 1, "", "", "")

    note, warning, critical = of("kl_too_low", "note"), of("clipfrac_high", "warning"), of("collapse", "critical")
    everything = [critical, warning, note]
    assert stopping(everything, HealthConfig()) == []
    assert stopping(everything, HealthConfig(stop_at="critical")) == [critical]
    assert stopping(everything, HealthConfig(stop_at="warning")) == [critical, warning]
    assert stopping(everything, HealthConfig(stop_on=["kl_too_low"])) == [note]
    assert stopping(everything, HealthConfig(stop_at="critical", stop_on=["kl_too_low"])) == [critical, note]


@pytest.mark.parametrize("key", ["ignore", "stop_on"])
def test_a_misspelt_rule_is_refused(key):
    with pytest.raises(ValidationError, match="kl_too_high"):
        HealthConfig(**{key: ["kl_to_high"]})


def test_every_threshold_has_a_doc():
    assert all(field.description for field in HealthConfig.model_fields.values())


# -- how long it lasts ----------------------------------------------------------------------------------------------

ROUGH = {
    "hacking": simulate.spoilt(simulate.ppo(3), 20, kl_per_token=lambda i: 1.2**i if i % 7 else 1.0),
    "flicker": simulate.replaced(simulate.ppo(4), 20, clipfrac=lambda i: 0.3 + 0.02 * math.sin(i * i)),
    "sparse": [
        r | {"kl_per_token": 0.9} if "kl_per_token" in r and 30 < r["step"] < 70 else r for r in simulate.dpo(5)
    ],
    "skips": simulate.replaced(simulate.ppo(6), 5, skipped_steps=lambda i: float(i % 4 == 0 or i % 11 == 3)),
    "margins": simulate.spoilt(simulate.dpo(7), 40, **{"rewards__margins": lambda i: 0.9**i}),
}


@pytest.mark.parametrize("name", ROUGH)
def test_since_stays_while_the_trouble_lasts(name):
    history, before, seen = ROUGH[name], {}, 0
    for n in range(1, len(history) + 1):
        now = {w.rule: w.since for w in check_health(history[:n], DEFAULT)}
        for rule, since in now.items():
            assert since == before.get(rule, since) and since <= history[n - 1]["step"]
            assert rule in before or since == history[n - 1]["step"], "new trouble begins now"
        before, seen = now, seen + len(now)
    assert seen


@pytest.mark.parametrize("name", ROUGH)
def test_the_review_has_what_each_step_saw_and_nothing_else(name):
    history = ROUGH[name]
    told = {(w.rule, w.since) for n in range(1, len(history) + 1) for w in check_health(history[:n], DEFAULT)}
    reviewed = review_health(history, DEFAULT)
    assert {(w.rule, w.since) for w in reviewed} == told and len(reviewed) == len(told)
    assert [w.since for w in reviewed] == sorted(w.since for w in reviewed)
    assert all(w.since <= w.step for w in reviewed)


@given(flags=st.lists(st.booleans(), max_size=40), window=st.integers(1, 6))
def test_a_trouble_is_over_after_a_window_without_it(flags, window):
    history = [{"step": t, "skipped_steps": float(flag)} for t, flag in enumerate(flags)]
    config = HealthConfig(window_steps=window)
    # by definition: it lasts at t where a flag is set within the window that ends at t
    since = None
    for t in range(len(flags)):
        lasts = any(flags[max(0, t - window + 1) : t + 1])
        since = (t if since is None else since) if lasts else None
        found = check_health(history[: t + 1], config)
        assert [w.since for w in found] == ([since] if lasts else [])


def test_what_is_measured_now_and_then_lasts_until_the_next_measurement():
    history = [{"step": t, "loss": 1.0} for t in range(100)]
    for t, value in ((0, 0.0), (20, 0.6), (40, 0.7), (60, 0.2), (80, 0.6)):
        history[t]["kl_per_token"] = value
    sinces = [[w.since for w in check_health(history[:n], DEFAULT)] for n in (20, 21, 39, 60, 61, 80, 81, 100)]
    assert sinces == [[], [20], [20], [20], [], [], [80], [80]]
    assert [(w.since, w.step) for w in review_health(history, DEFAULT)] == [(20, 40), (80, 80)]


# -- any input ------------------------------------------------------------------------------------------------------

NAMES = sorted(
    {name for rule in RULES.values() for name in rule.columns}
    | {"score/max", "score/min", "grad_norm", "optimizer_steps", "critic/optimizer_steps", "logps/rejected"}
    | {"rewards/chosen", "response_length/mean", "step"}
)
ANYTHING = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.floats(-2, 2), st.sampled_from([0.0, 1.0, 1e308, -1e308, 5e-324]),
    st.none(), st.booleans(), st.text(max_size=3), st.integers(), st.just(10**400),
)  # fmt: skip
ROWS = st.lists(
    st.fixed_dictionaries(
        {}, optional={name: ANYTHING for name in NAMES} | {"non_finite": st.sampled_from([None, {}, {"loss": "nan"}])}
    ),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(pattern=ROWS, repeats=st.integers(1, 10), window=st.integers(1, 5), warmup=st.integers(1, 10))
def test_no_history_is_too_strange(pattern, repeats, window, warmup):
    config = HealthConfig(
        window_steps=window, warmup_steps=warmup, low_kl_after_steps=5, value_after_steps=5, chance_after_steps=5
    )
    history = [dict(row) for row in pattern * repeats]
    before = copy.deepcopy(history)
    found = check_health(history, config)
    assert repr(history) == repr(before)
    assert repr(found) == repr(check_health(history, config))
    assert {w.rule for w in found} <= {w.rule for w in review_health(history, config)}
    assert all(w.line() for w in found)


@pytest.mark.parametrize("name", sorted(ROUGH))
@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_gap_here_and_there_changes_nothing(name, gap):
    # A gap in a loss is a finding of its own, so losses stay whole.
    holed = [
        {k: gap if (t + len(k)) % 17 == 0 and k != "step" and "loss" not in k else v for k, v in row.items()}
        for t, row in enumerate(ROUGH[name])
    ]
    whole = {w.rule for w in review_health(ROUGH[name], DEFAULT)}
    assert {w.rule for w in review_health(holed, DEFAULT)} == whole


def test_an_empty_history_is_healthy():
    assert check_health([], DEFAULT) == review_health([], DEFAULT) == check_health([{}], DEFAULT) == []
