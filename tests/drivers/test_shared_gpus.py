"""Runs whose roles share a GPU, which is one in name only: they take turns, and come to what they come to without."""

from __future__ import annotations

import os
import signal
import time

import pytest

import rayrlhf
from rayrlhf.actors.reference import ReferenceModel
from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.cluster.session import ray_session
from rayrlhf.config import ClusterConfig, load_config
from rayrlhf.config.base import NodeConfig
from rayrlhf.errors import RunFailed
from tests.drivers.evaluations import Models
from tests.drivers.offline_runs import OfflineWorld
from tests.drivers.runs import CLOCK, Finished, TinyWorld
from tests.support.tiny import save_reward_model

SHARED = "cluster.nodes=[{gpus: 1}]"
WHOLE = "rollout.chunk_samples=16"
"""All samples of a step in one chunk: then they are scored together, whether roles share or not."""


@pytest.fixture(scope="module")
def alone(world: TinyWorld) -> Finished:
    return world.train("alone", "ppo.steps=2", WHOLE)


@pytest.fixture(scope="module")
def shared(world: TinyWorld) -> Finished:
    return world.train("shared", "ppo.steps=2", WHOLE, SHARED)


def test_the_same_run_bit_for_bit(alone: Finished, shared: Finished):
    assert shared.numbers == alone.numbers
    assert shared.evaluations == alone.evaluations
    assert shared.same_weights(alone)
    assert all(row["timing/turns_s"] > 0 for row in shared.metrics)
    assert all("timing/turns_s" not in row for row in alone.metrics)


def test_with_a_reward_model_that_shares_too(world: TinyWorld):
    save_reward_model(world.folder / "reward", world.folder / "model")
    source = f"reward.sources=[{{model: {world.folder / 'reward'}}}]"
    one = world.train("alone-reward", "ppo.steps=1", WHOLE, source)
    two = world.train("shared-reward", "ppo.steps=1", WHOLE, source, SHARED)
    assert one.numbers == two.numbers and one.same_weights(two)


def test_scored_in_chunks_or_all_at_once_makes_a_difference_of_rounding_only(world: TinyWorld, shared: Finished):
    chunks = world.train("shared-chunks", "ppo.steps=2", SHARED, "rollout.chunk_samples=4")
    for mine, theirs in zip(chunks.numbers, shared.numbers, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_policy_with_lora_is_its_own_reference_in_its_turn(world: TinyWorld):
    lora = ("policy.lora={rank: 4}", "reference={}", "ppo.steps=1", WHOLE)
    one, two = world.train("alone-lora", *lora), world.train("shared-lora", *lora, SHARED)
    assert one.numbers == two.numbers and one.same_weights(two)
    assert two.metrics[0]["kl"] == 0.0


def test_a_resumed_run_goes_on_as_if_nothing_had_been(world: TinyWorld, shared: Finished):
    world.train("resumed", "ppo.steps=2", "checkpoint.every_steps=1", WHOLE, SHARED)
    (world.folder / "resumed/checkpoints/step-2/manifest.json").unlink()
    again = world.train("resumed", "ppo.steps=2", "checkpoint.every_steps=1", WHOLE, SHARED, resume=True)
    assert again.numbers[-1] == shared.numbers[-1] and again.same_weights(shared)


def test_a_role_that_is_called_out_of_turn_says_so(world: TinyWorld):
    config = load_config(world.config_file("out-of-turn"), [SHARED, "evaluation.prompts=0"])
    with rayrlhf.launch(config) as run:
        batch = run.collect(run.next_prompts())
        with pytest.raises(RunFailed, match="policy .*set_residence"):
            run.policy.broadcast("update", batch=batch, schedule=[], step=1)
        with pytest.raises(RunFailed, match="asleep"):
            list(run.rollout.stream("generate", [run.next_prompts()]))
        run.turns.take({"rollout": "all"})
        for group in (run.policy, run.groups["reference"]):
            with pytest.raises(RunFailed, match="set_residence"):
                group.call("token_logprobs", batch)
        run.turns.take({"policy": "weights"})
        run.policy.call("token_logprobs", batch)


def test_preferences(world: TinyWorld):
    offline = OfflineWorld(world.folder)
    settings = {"training": {"epochs": 1, "validate_every_steps": 3}}
    one = offline.train("alone-dpo", "dpo", settings)
    two = offline.train("shared-dpo", "dpo", settings, SHARED)
    assert one.numbers == two.numbers and one.same_weights(two)
    found = [[{k: v for k, v in row.items() if k not in CLOCK} for row in run.evaluations] for run in (one, two)]
    assert found[0] == found[1] and found[0][0]["kl_per_token"] is not None
    assert found[0][0]["sync/bytes"] > 0


def test_models_that_are_compared(world: TinyWorld, monkeypatch: pytest.MonkeyPatch):
    models = Models(world)
    whole = {"chunk_samples": 64}
    one = models.evaluate("alone-models", ("base", "other"), rollout=whole)
    built, levels = [], []
    build_model, build_engine = ReferenceModel.__init__, RolloutEngine.__init__

    def model(self, *args, **kwargs):
        built.append(self)
        build_model(self, *args, **kwargs)

    def engine(self, *args, **kwargs):
        levels.append(built[0].frozen.residence.level)  # of the reference, which stays for all models
        build_engine(self, *args, **kwargs)

    monkeypatch.setattr(ReferenceModel, "__init__", model)
    monkeypatch.setattr(RolloutEngine, "__init__", engine)
    two = models.evaluate("shared-models", ("base", "other"), rollout=whole, cluster={"nodes": [{"gpus": 1}]})
    assert levels == ["none", "none"]
    for name in ("evaluation.json", "win_rates.json", "responses.jsonl"):
        assert (one.folder / name).read_text() == (two.folder / name).read_text()


# -- on Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_once():
    """One Ray for both tests, with a GPU in name only."""
    with ray_session(ClusterConfig(nodes=[NodeConfig(gpus=1)])):
        yield


def test_processes_that_share_a_gpu_give_the_same_run_bit_for_bit(world: TinyWorld, alone: Finished, ray_once):
    on_ray = world.train("shared-on-ray", "cluster.executor=ray", "ppo.steps=2", WHOLE, SHARED)
    assert on_ray.numbers == alone.numbers
    assert on_ray.evaluations == alone.evaluations
    assert on_ray.same_weights(alone)
    assert all(row["timing/turns_s"] > 0 for row in on_ray.metrics)


def test_an_engine_that_died_is_not_waited_for_when_the_rest_is_saved(world: TinyWorld, ray_once):
    on_ray = ["cluster.executor=ray", "ppo.steps=3", "checkpoint.every_steps=0", "evaluation.prompts=0", SHARED]
    on_ray += ["critic=null", "ppo.advantage_estimator=rloo"]  # fewer processes to wait for
    config = load_config(world.config_file("died"), on_ray)
    with pytest.raises(RunFailed, match="rollout rank 0 died in wake"), rayrlhf.launch(config) as run:
        assert run.groups.placement.sharing("policy") == {"reference", "rollout"}
        for step in run.steps():
            if step == 3:
                os.kill(run.rollout.pids[0], signal.SIGKILL)
                killed = time.monotonic()
            batch = run.collect(run.next_prompts())
            batch = batch.with_columns({"advantages": batch["response_mask"].float()})
            run.finish_step(run.update(batch) | run.publish_weights(), batch)
    assert time.monotonic() - killed < 60
    assert (world.folder / "died/checkpoints/step-2/manifest.json").exists()
