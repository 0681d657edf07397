"""Which transport ``auto`` is."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config import Config
from rayrlhf.planning.placement import Claim, Machine, place
from rayrlhf.planning.transfer import transport_of

ONE, TWO = [{"count": 1, "gpus": 8}], [{"count": 2, "gpus": 8}]


def config_of(
    transport: str = "auto", ranks: int = 8, engines: int = 4, tensor_parallel: int = 2, **cluster: Any
) -> Config:
    values: dict[str, Any] = {
        "run_dir": "nowhere",
        "policy": {"path": "nowhere", "ranks": ranks},
        "reward": {"sources": [{"function": "nowhere:nothing"}]},
        "data": {"prompts": "nowhere.jsonl"},
        "rollout": {"engines": engines, "tensor_parallel": tensor_parallel, "weight_transport": transport},
        "ppo": {"steps": 1, "prompts_per_step": 8, "minibatch_samples": 8},
        "cluster": cluster,
    }
    return Config.model_validate(values)


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ({"executor": "inline"}, "shared_memory"),
        ({}, "shared_memory"),
        ({"nodes": [{"gpus": 0}]}, "shared_memory"),
        ({"nodes": [{"gpus": 0, "count": 2}]}, "gloo"),
        ({"address": "auto"}, "gloo"),
        ({"device": "cuda", "nodes": ONE, "placement": "colocated"}, "ipc"),
        ({"device": "cuda", "nodes": TWO, "placement": [["policy", "rollout"]]}, "ipc"),
        ({"device": "cuda", "nodes": [{"count": 5, "gpus": 8}], "placement": "disaggregated"}, "nccl"),
        ({"device": "cuda", "placement": "disaggregated"}, "nccl"),
        ({"device": "cuda", "placement": "colocated"}, "ipc"),
    ],
)
def test_auto_takes_the_fastest_that_the_placement_allows(cluster: dict[str, Any], expected: str) -> None:
    assert transport_of(config_of(**cluster)) == expected
    assert transport_of(config_of(transport="gloo", **cluster)) == "gloo", "what is asked for is taken"


def test_the_machines_that_there_are_decide_and_not_the_usual_ones() -> None:
    """On two machines with three GPUs, four ranks leave GPU 1 of the second to an engine alone: CUDA IPC doesn't reach it."""
    config = config_of(ranks=4, engines=2, tensor_parallel=2, device="cuda", placement=[["policy", "rollout"]])
    claims = [Claim("policy", 4, 1), Claim("rollout", 2, 2)]
    odd = place(claims, "colocated", [Machine("a", 3), Machine("b", 3)])
    assert odd.of("rollout")[1].gpus == (0, 1) and odd.of("policy")[3].gpus == (0,)
    assert transport_of(config, odd) == "gloo"
    assert transport_of(config, place(claims, "colocated", [Machine("a", 4)])) == "ipc" == transport_of(config)
