"""The same run on Ray and inline, with a full model and with LoRA. More ranks and engines: tests/multinode/test_ppo.py."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

import rayrlhf
from rayrlhf.cluster.session import ray_session
from rayrlhf.config import ClusterConfig, load_config
from rayrlhf.errors import RunFailed
from tests.drivers.runs import Finished, TinyWorld

RAY = "cluster.executor=ray"
FEW = ["critic=null", "ppo.advantage_estimator=rloo"]
"""Fewer processes to wait for."""


@pytest.fixture(scope="module")
def ray_once():
    """One Ray for all tests of this file; runs use it and leave it."""
    with ray_session(ClusterConfig()):
        yield


@pytest.fixture(scope="module")
def inline(world: TinyWorld) -> Finished:
    return world.train("inline", "ppo.steps=2")


def test_ray_and_inline_are_the_same_run(world: TinyWorld, inline: Finished, ray_once):
    on_ray = world.train("on-ray", RAY, "ppo.steps=2", "rollout.weight_transport=gloo")
    assert on_ray.numbers == inline.numbers
    assert on_ray.evaluations == inline.evaluations
    assert on_ray.same_weights(inline)


def test_samples_are_conserved(inline: Finished):
    assert [row["samples"] for row in inline.metrics] == [16.0, 16.0]
    assert [row["optimizer_steps"] for row in inline.metrics] == [4.0, 4.0]
    assert [row["staleness"] for row in inline.metrics] == [0.0, 0.0]
    versions = [
        json.loads(line)["weight_version"] for line in (inline.folder / "samples.jsonl").read_text().splitlines()
    ]
    assert versions == [1, 1, 1, 1, 2, 2, 2, 2]


def test_lora_starts_as_its_reference_and_saves_a_merged_model(world: TinyWorld):
    done = world.train(
        "lora", "policy.lora={rank: 4, alpha: 8}", "critic.lora={rank: 4}", "reference={}", "ppo.steps=2"
    )
    first, second = done.metrics
    assert first["kl"] == 0.0 and first["rollout_mismatch/max_abs"] < 1e-5
    assert second["kl"] != 0.0
    # The engine had the merged weights in the second step: its probabilities are the trainer's.
    assert second["rollout_mismatch/max_abs"] < 1e-5
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world.folder / "model").state_dict()
    changed = [
        n
        for n, w in AutoModelForCausalLM.from_pretrained(done.folder / "model").state_dict().items()
        if not torch.equal(w, base[n])
    ]
    assert changed and all("proj" in name for name in changed)


def test_an_adapter_alone_can_be_saved(world: TinyWorld):
    done = world.train("adapter", "policy.lora={rank: 4, save: adapter}", "reference={}", "ppo.steps=1")
    assert (done.folder / "model" / "adapter_config.json").exists()
    from peft import AutoPeftModelForCausalLM

    assert AutoPeftModelForCausalLM.from_pretrained(done.folder / "model") is not None


def test_a_killed_role_ends_the_run_by_name_and_what_was_trained_is_kept(world: TinyWorld, ray_once):
    config = load_config(
        world.config_file("killed-role"), [RAY, *FEW, "checkpoint.every_steps=0", "evaluation.prompts=0"]
    )
    with pytest.raises(RunFailed, match="reference rank 0 died in token_logprobs"), rayrlhf.launch(config) as run:
        for step in run.steps():
            if step == 3:
                os.kill(run.groups["reference"].pids[0], signal.SIGKILL)
                killed = time.monotonic()
            batch = run.collect(run.next_prompts())
            batch = batch.with_columns({"advantages": batch["response_mask"].float()})
            run.finish_step(run.update(batch) | run.publish_weights(), batch)
    assert time.monotonic() - killed < 60
    assert (world.folder / "killed-role/checkpoints/step-2/manifest.json").exists()


def test_a_role_that_cannot_come_up_ends_the_start(world: TinyWorld):
    weights = world.folder / "model" / "model.safetensors"
    broken = world.folder / "broken-model"
    broken.mkdir()
    for file in (world.folder / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes() if file != weights else b"no weights")
    with pytest.raises(RunFailed, match=r"reference rank 0 failed to start"):
        world.train("broken", f"reference.path={broken}")
