"""Settings, specs and batches of the tests of this folder."""

from __future__ import annotations

import os

import torch

from rayrlhf.batch import Batch
from rayrlhf.cluster.spec import RoleSpec
from rayrlhf.config.base import ClusterConfig

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = ClusterConfig(threads=1, start_timeout_s=280, call_timeout_s=60)


def toy(name: str, ranks: int = 1, role: str = "Toy", gpus: int = 0, **kwargs) -> RoleSpec:
    env = {"TOY_VARIABLE": name, "PYTHONPATH": os.pathsep.join([HERE, os.path.dirname(os.path.dirname(HERE))])}
    return RoleSpec(name, f"toy_roles:{role}", kwargs, ranks, env, gpus)


def running(pid: int) -> bool:
    """Whether a process of this machine is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def samples(lengths: list[int], start: int = 0) -> Batch:
    """A batch with a token, a tensor and a list column: token k of sample i is 10 i + k."""
    offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    tokens = [10 * (i + start) + k for i, n in enumerate(lengths) for k in range(n)]
    sample = {"word": [f"w{i + start}" for i in range(len(lengths))], "index": torch.arange(len(lengths)) + start}
    return Batch(offsets, {"tokens": torch.tensor(tokens, dtype=torch.int64)}, sample)
