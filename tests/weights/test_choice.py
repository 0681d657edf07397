"""Which transport ``auto`` is."""

from __future__ import annotations

from typing import Any

import pytest

from rayrlhf.config import Config
from rayrlhf.drivers.roles import weight_transport

ONE, TWO = [{"count": 1, "gpus": 8}], [{"count": 2, "gpus": 8}]


def chosen(transport: str = "auto", ranks: int = 8, engines: int = 4, tensor_parallel: int = 2, **cluster: Any) -> str:
    values: dict[str, Any] = {
        "run_dir": "nowhere",
        "policy": {"path": "nowhere", "ranks": ranks},
        "reward": {"sources": [{"function": "nowhere:nothing"}]},
        "data": {"prompts": "nowhere.jsonl"},
        "rollout": {"engines": engines, "tensor_parallel": tensor_parallel, "weight_transport": transport},
        "ppo": {"steps": 1, "prompts_per_step": 8, "minibatch_samples": 8},
        "cluster": cluster,
    }
    config = Config.model_validate(values)
    return weight_transport(config.rollout, config)


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
    assert chosen(**cluster) == expected
    assert chosen(transport="gloo", **cluster) == "gloo", "what is asked for is taken"
