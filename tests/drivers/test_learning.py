"""With vLLM the reward rises, with every estimator; and the example of an own loop runs. On Ray: tests/multinode."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import ROOT
from tests.drivers.runs import Finished, TinyWorld

LEARN = (
    "ppo.steps=12", "ppo.prompts_per_step=16", "ppo.minibatch_samples=16", "ppo.kl_coef=0.01", "ppo.kl_controller=fixed",
    "ppo.target_kl=null", "policy.optimizer.lr=0.005", "data.completion_column=null", "evaluation.prompts=16",
)  # fmt: skip


def rise(done: Finished) -> float:
    """By how much the mean score of the last three steps is above that of the first."""
    scores = [row["score/mean"] for row in done.metrics]
    return sum(scores[-3:]) / 3 - scores[0]


def test_ppo_with_vllm_raises_the_reward(world: TinyWorld):
    pytest.importorskip("vllm")
    engine = (
        "rollout.engine=vllm",
        "rollout.max_num_seqs=32",
        "rollout.verify_weights=always",
        "rollout.kv_cache_gib=0.05",
    )
    done = world.train("learn-ppo", *LEARN, *engine)
    assert rise(done) > 0.15
    # vLLM and the trainer agree on every probability, before and after each of the updates.
    assert max(row["rollout_mismatch/max_abs"] for row in done.metrics) < 1e-4
    assert done.metrics[0]["kl"] == pytest.approx(0.0, abs=1e-5) and done.metrics[-1]["kl"] > 0.1
    before, after = done.evaluations
    assert after["score/mean"] > before["score/mean"]
    assert "Before and after training" in done.printed


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_group_methods_raise_the_reward(world: TinyWorld, estimator: str):
    done = world.train(
        f"learn-{estimator}", *LEARN, f"ppo.advantage_estimator={estimator}", "critic=null", "rollout.samples_per_prompt=4",
        "ppo.prompts_per_step=8", "reward.normalize=false",
    )  # fmt: skip
    assert rise(done) > 0.1
    assert "value_loss" not in done.metrics[0]


def test_the_example_of_an_own_loop(world: TinyWorld):
    example = runpy.run_path(str(ROOT / "examples" / "custom_loop.py"))
    lines = (ROOT / "examples" / "custom_loop.py").read_text().splitlines()
    assert len(lines) <= 45
    example["main"](str(world.config_file("own-loop")), [*LEARN, "ppo.prompts_per_step=8", "reward.normalize=false"])
    assert rise(Finished(world.folder / "own-loop")) > 0.1
