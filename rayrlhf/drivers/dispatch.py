"""Which engine answers which prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from rayrlhf.batch import Batch
from rayrlhf.cluster import Group
from rayrlhf.config.base import ClusterConfig
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.errors import RunFailed

__all__ = ["assignment", "deal", "responses"]


def assignment(sampler: SamplerConfig, cluster: ClusterConfig) -> Literal["fixed", "least_loaded"]:
    """How prompts are given to engines, where the configuration leaves it open too."""
    if sampler.assignment is not None:
        return sampler.assignment
    return "fixed" if cluster.device == "cpu" else "least_loaded"


def responses(
    rollout: Group, prompts: Batch, sampler: SamplerConfig, cluster: ClusterConfig, **how: Any
) -> Iterator[Batch]:
    """A response to each prompt, in chunks as they finish.

    ``fixed``: each engine gets its prompts beforehand (`deal`), and the same run is the same again. ``least_loaded``: what no
    engine has room for waits in common, and an engine takes the next prompt when a place is free there. So nobody waits in
    the queue of a slow engine, or behind long responses, while another one is idle. A response doesn't depend on who
    generates it, but for rounding: the seed belongs to the sample.

    Args:
        prompts: as `rayrlhf.drivers.experience.prompt_batch` makes them.
        how: further arguments of `RolloutEngine.generate`.

    Raises:
        RunFailed: an engine failed, or a sample is missing in the end.
    """
    if rollout.size > 1 and assignment(sampler, cluster) == "least_loaded":
        chunks = rollout.stream_shared("generate", prompts, same_prompt(prompts), **how)
    else:
        chunks = rollout.stream("generate", deal(prompts, rollout.size), **how)
    answered = 0
    for chunk in chunks:
        answered += len(chunk)
        yield chunk
    if answered != len(prompts):
        raise RunFailed(f"the engines have answered {answered} of {len(prompts)} prompts")


def same_prompt(prompts: Batch) -> list[list[int]]:
    """The places of each prompt's samples, which share its KV cache. The samples of a prompt stand together."""
    ids = prompts["prompt_id"].tolist()
    groups: list[list[int]] = []
    for i, prompt_id in enumerate(ids):
        if i and ids[i - 1] == prompt_id:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def deal(prompts: Batch, engines: int) -> list[Batch]:
    """Each engine's part: the samples of a prompt stay together, tokens are balanced.

    The largest prompts go first, each to the engine with the fewest tokens so far; within an engine the order stays.
    """
    lengths, load = prompts.lengths.tolist(), [0] * engines
    parts: list[list[int]] = [[] for _ in range(engines)]
    for group in sorted(same_prompt(prompts), key=lambda g: (-sum(lengths[i] for i in g), g[0])):
        engine = min(range(engines), key=lambda e: (load[e], e))
        parts[engine] += group
        load[engine] += sum(lengths[i] for i in group)
    return [prompts.select(sorted(part)) for part in parts]
