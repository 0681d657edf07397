"""PPO whose policy and critic share each sequence between two ranks is the run on one rank in one process."""

from __future__ import annotations

import pytest
import torch

from tests.drivers.runs import TinyWorld

pytestmark = pytest.mark.timeout(600)

SETTINGS = [
    *["ppo.steps=2", "evaluation.prompts=0", "checkpoint.every_steps=0"],
    *["policy.optimizer.lr=0.0003", "critic.optimizer.lr=0.0003"],
]
SHARED = [
    *["cluster.executor=ray", "cluster.start_timeout_s=500"],
    *["policy.ranks=2", "policy.sequence_parallel=2", "policy.zero_stage=3"],
    *["critic.ranks=2", "critic.sequence_parallel=2"],
]


def test_two_ranks_a_sequence_train_as_one_rank(world: TinyWorld):
    inline = world.train("inline", *SETTINGS)
    shared = world.train("shared", *SETTINGS, *SHARED)
    for name, weight in shared.weights.items():
        torch.testing.assert_close(
            weight, inline.weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for mine, theirs in zip(shared.numbers, inline.numbers, strict=True):
        for name in ("score/mean", "kl", "policy_loss", "value_loss", "entropy", "grad_norm", "critic/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert mine["samples"] == theirs["samples"] == 16.0
