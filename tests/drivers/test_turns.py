"""Roles that share GPUs take turns: who goes, who comes, in which order, and what is left after a failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.batch import Batch
from rayrlhf.cluster import Group, Pending
from rayrlhf.config import load_config
from rayrlhf.drivers.turns import Turns
from rayrlhf.errors import RunFailed
from rayrlhf.planning.placement import Claim, Machine, Placement, place
from rayrlhf.planning.usage import phases_of
from tests.conftest import ROOT

ROLES = ["policy", "critic", "reference", "reward", "rollout"]
HEIGHT = {"none": 0, "weights": 1, "all": 2}


class Gpu:
    """What roles have on one GPU, as memory has it: who comes in needs room from the call on, who goes gives it back at the end
    of the call, and an engine without its KV cache takes that before it falls asleep. Everybody has everything there at first."""

    def __init__(self, roles: Sequence[str] = ROLES, refuses: str | None = None):
        self.levels = dict.fromkeys(roles, "all")
        self.leaving: set[str] = set()
        self.calls: list[str] = []
        self.refuses, self.closed = refuses, []
        self.alone: set[str] | None = None
        """Who may have something there while somebody comes in; None: nobody looks."""
        self.together: set[tuple[tuple[str, str], ...]] = set()
        """All that was there at once, each time that somebody came in."""

    def takes(self, role: str, level: str) -> None:
        assert not self.leaving, f"{role} comes in while {self.leaving} are still there"
        self.levels[role] = level
        self.together.add(tuple((r, level) for r, level in self.levels.items() if level != "none"))

    def comes(self, role: str, level: str) -> None:
        self.takes(role, level)
        if self.alone is not None:
            there = {r for r, level in self.levels.items() if level != "none"}
            assert there <= self.alone, f"{role} comes in where {there - self.alone} still are"


class Move(Pending):
    def __init__(self, gpu: Gpu, role: str, level: str, fails: bool):
        self.gpu, self.role, self.level, self.fails = gpu, role, level, fails

    def done(self) -> bool:
        return True

    def result(self) -> None:
        if self.fails:
            raise RunFailed(f"{self.role} is stuck")
        if self.role in self.gpu.leaving:
            self.gpu.leaving.remove(self.role)
            self.gpu.levels[self.role] = self.level


class Mover(Group):
    """A role of which only the place of its states is asked."""

    def __init__(self, name: str, gpu: Gpu):
        self.name, self.size, self.shards, self.gpu = name, 1, 1, gpu

    @property
    def addresses(self) -> list[str]:
        return ["here"]

    def broadcast_async(self, method: str, *, timeout_s: float | None = None, **kwargs: Any) -> Pending:
        gpu = self.gpu
        gpu.calls.append(f"{self.name}.{method}({', '.join(str(v) for v in kwargs.values())})")
        if method == "set_residence":
            target = kwargs["level"]
        elif method == "sleep":
            target = "none"
            if gpu.levels[self.name] == "weights":  # see `RolloutEngine.sleep`
                gpu.takes(self.name, "all")
        else:
            present = gpu.levels[self.name]
            legal = {"none": ("weights", "all"), "weights": ("kv_cache",), "all": ()}[present]
            assert method == "wake" and kwargs["part"] in legal, (method, kwargs, present)
            target = "all" if kwargs["part"] == "kv_cache" else kwargs["part"]
        fails = gpu.refuses == self.name
        if HEIGHT[target] > HEIGHT[gpu.levels[self.name]]:
            gpu.comes(self.name, target)
        else:
            gpu.leaving.add(self.name)
        return Move(gpu, self.name, target, fails)

    def submit(self, method: str, batch: Batch, **kwargs: Any) -> Pending:
        raise AssertionError("turns don't compute")

    def stream(self, method: str, batches: Sequence[Batch], **kwargs: Any) -> Iterator[Batch]:
        raise AssertionError("turns don't generate")

    def stream_shared(self, method: str, batch: Batch, units: Any, **kwargs: Any) -> Iterator[Batch]:
        raise AssertionError("turns don't generate")

    def close(self) -> None:
        self.gpu.closed.append(self.name)


def on_one_gpu(roles: Sequence[str] = ROLES) -> Placement:
    return place([Claim(role, 1, 1) for role in roles], "colocated", [Machine("here", 1)])


def turns_of(gpu: Gpu, placement: Placement | None, offload_idle: bool = True) -> Turns:
    return Turns({role: Mover(role, gpu) for role in gpu.levels}, placement, offload_idle)


PHASES = {
    "transfer": {"policy": "weights", "rollout": "weights"},
    "rollout": {"rollout": "all"},
    "scoring": {"policy": "weights", "critic": "weights", "reference": "weights", "reward": "weights"},
    "update": {"policy": "all", "critic": "all"},
    "checkpoint": {"policy": "all", "critic": "all"},
    "model": {"policy": "weights"},
}


def test_the_calls_of_a_step_in_their_order():
    gpu = Gpu()
    turns = turns_of(gpu, on_one_gpu())
    told = []
    for phase in ("transfer", "rollout", "scoring", "update", "transfer", "rollout"):
        gpu.alone = set(PHASES[phase])
        turns.take(PHASES[phase])
        told.append(list(gpu.calls))
        gpu.calls.clear()
    first, rollout, scoring, update, transfer, again = told
    # Nobody knows what is there at first, so all go; then who is needed comes.
    assert set(first[:5]) == {f"{role}.set_residence(none)" for role in ROLES[:4]} | {"rollout.sleep(1)"}
    assert set(first[5:]) == {"policy.set_residence(weights)", "rollout.wake(weights)"}
    # The policy has gone before the KV cache comes.
    assert rollout == again == ["policy.set_residence(none)", "rollout.wake(kv_cache)"]
    assert scoring[0] == "rollout.sleep(1)"
    assert set(scoring[1:]) == {f"{role}.set_residence(weights)" for role in ROLES[:4]}
    assert set(update[:2]) == {"reference.set_residence(none)", "reward.set_residence(none)"}
    assert set(update[2:]) == {"policy.set_residence(all)", "critic.set_residence(all)"}
    # The optimizer goes first, then the engine's weights come, beside the policy's.
    assert set(transfer[:2]) == {"policy.set_residence(weights)", "critic.set_residence(none)"}
    assert transfer[2:] == ["rollout.wake(weights)"]


def test_what_is_there_already_isnt_called():
    gpu = Gpu()
    turns = turns_of(gpu, on_one_gpu())
    turns.take(PHASES["update"])
    gpu.calls.clear()
    for phase in ("update", "checkpoint", "model"):  # the last needs less than there is, and nobody wants the room
        turns.take(PHASES[phase])
    assert gpu.calls == []
    assert gpu.levels["policy"] == gpu.levels["critic"] == "all"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(PHASES)), max_size=12), st.sets(st.sampled_from(ROLES[1:]), max_size=3))
def test_whoever_comes_in_is_among_those_who_are_named(phases: list[str], left_out: set[str]):
    roles = [role for role in ROLES if role not in left_out]
    gpu = Gpu(roles)
    turns = turns_of(gpu, on_one_gpu(roles))
    for phase in phases:
        gpu.alone = set(PHASES[phase])
        turns.take(PHASES[phase])  # `Gpu.comes` looks on
        for role, level in PHASES[phase].items():
            assert role in left_out or HEIGHT[gpu.levels[role]] >= HEIGHT[level]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*sorted(PHASES), "away"]), max_size=12), st.sets(st.sampled_from(ROLES[1:]), max_size=3)
)
def test_nothing_is_there_at_once_that_no_phase_of_the_plan_has_room_for(phases: list[str], left_out: set[str]):
    planned = phases_of(load_config(ROOT / "configs/ppo_local.yaml", []))
    roles = [role for role in ROLES if role not in left_out]
    gpu = Gpu(roles)
    turns = turns_of(gpu, on_one_gpu(roles))
    for phase in phases:
        turns.send_away(roles) if phase == "away" else turns.take(PHASES[phase])
    for held in gpu.together:
        fits = [
            all(HEIGHT[level] <= HEIGHT[plan.get(role, "none")] for role, level in held) for plan in planned.values()
        ]
        assert any(fits), held


def test_an_engine_with_its_weights_alone_falls_asleep_when_nobody_else_is_there():
    gpu = Gpu()
    turns = turns_of(gpu, on_one_gpu())
    turns.take(PHASES["transfer"])
    gpu.calls.clear()
    turns.take(PHASES["checkpoint"])  # the policy's weights, which are there, go for a moment
    assert gpu.calls[:2] == ["policy.set_residence(none)", "rollout.sleep(1)"]
    assert sorted(gpu.calls[2:]) == ["critic.set_residence(all)", "policy.set_residence(all)"]
    turns.take(PHASES["transfer"])
    gpu.calls.clear()
    turns.send_away(["rollout"])
    assert gpu.calls == ["policy.set_residence(none)", "rollout.sleep(1)"]


def test_without_shared_gpus_nobody_is_called():
    for placement, offload in (
        (None, True),
        (on_one_gpu(), False),
        (place([Claim(role, 1, 1) for role in ROLES], "disaggregated", [Machine("here", 5)]), True),
    ):
        gpu = Gpu()
        turns = turns_of(gpu, placement, offload)
        for wanted in PHASES.values():
            turns.take(wanted)
        turns.send_away(ROLES)
        turns.clear_for(["policy"])
        assert gpu.calls == gpu.closed == [] and not turns.any
        assert all(turns.together(role, "rollout") for role in ROLES[:4])


def test_only_those_who_share_go():
    claims = [Claim(role, 1, 1) for role in ROLES]
    placement = place(claims, [["policy", "critic"], ["reference", "reward"]], [Machine("here", 3)])
    gpu = Gpu()
    turns = turns_of(gpu, placement)
    assert turns.any and all(turns.together(role, "rollout") for role in ROLES[:4])
    assert not turns.together("policy", "critic")
    turns.take(PHASES["scoring"])
    turns.take(PHASES["update"])
    gpu.calls.clear()
    turns.take(PHASES["scoring"])  # both pairs have what they need together
    turns.take(PHASES["transfer"])
    turns.take(PHASES["rollout"])
    assert gpu.calls == []
    turns.take({"reward": "all"})
    assert gpu.calls == ["reference.set_residence(none)", "reward.set_residence(all)"]


def test_reward_functions_have_no_turn():
    claims = [Claim(role, 1, 0 if role == "reward" else 1) for role in ROLES]
    gpu = Gpu()
    turns = turns_of(gpu, place(claims, "colocated", [Machine("here", 1)]))
    assert turns.together("reward", "rollout") and not turns.together("reference", "rollout")
    turns.take(PHASES["scoring"])
    assert not [call for call in gpu.calls if call.startswith("reward")]


def test_after_a_failure_nothing_was_brought_in_and_the_next_turn_begins_anew():
    gpu = Gpu(refuses="critic")
    turns = turns_of(gpu, on_one_gpu())
    with pytest.raises(RunFailed, match="critic is stuck"):
        turns.take(PHASES["rollout"])
    assert not [call for call in gpu.calls if "wake" in call or "weights" in call]
    gpu.refuses = None
    gpu.leaving.clear()
    gpu.calls.clear()
    turns.take(PHASES["rollout"])
    assert "critic.set_residence(none)" in gpu.calls and gpu.calls[-1] == "rollout.wake(all)"


def test_of_a_move_that_failed_nothing_is_known():
    gpu = Gpu()
    turns = turns_of(gpu, on_one_gpu())
    turns.take(PHASES["update"])
    gpu.refuses = "critic"
    with pytest.raises(RunFailed):
        turns.take(PHASES["rollout"])
    gpu.refuses = None
    gpu.leaving.clear()
    gpu.calls.clear()
    turns.take(PHASES["update"])  # the critic had all of it, and may have half of it now
    critics = [call for call in gpu.calls if call.startswith("critic")]
    assert critics == ["critic.set_residence(none)", "critic.set_residence(all)"]


def test_for_the_last_checkpoint_others_are_ended_and_not_asked():
    gpu = Gpu(refuses="rollout")
    turns = turns_of(gpu, on_one_gpu())
    turns.clear_for(["policy", "critic"])
    assert sorted(gpu.closed) == ["reference", "reward", "rollout"]
    turns.take(PHASES["checkpoint"])
    assert {call.split(".")[0] for call in gpu.calls} == {"policy", "critic"}
    assert gpu.levels["policy"] == "all"


def test_seconds_are_counted_once():
    turns = turns_of(Gpu(), on_one_gpu())
    assert turns.take_seconds() == 0
    turns.take(PHASES["update"])
    assert turns.take_seconds() > 0 and turns.take_seconds() == 0
