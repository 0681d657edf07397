"""One step's experience: prompts in, samples with scores, reference, values and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from rayrlhf.batch import Batch
from rayrlhf.data import Prompt

if TYPE_CHECKING:
    from rayrlhf.drivers.run import Run

__all__ = ["collect", "deal", "prompt_batch"]


def prompt_batch(prompts: Sequence[Prompt], samples_per_prompt: int, seed: Sequence[int]) -> Batch:
    """Prompts, each as often as it is to be sampled, with a seed for each sample.

    Args:
        prompts: in the order of the step.
        samples_per_prompt: n.
        seed: whole numbers that tell this batch from all others, such as (run seed, step).

    Returns:
        S = len(prompts) * n samples with the columns tokens, prompt_id, sample_index, position, seed, prompt_length,
        prompt_text and row. A sample's seed is a hash of ``seed``, its prompt's place and its index.
    """
    n = samples_per_prompt
    seeds = [
        int(np.random.SeedSequence([*seed, place, k]).generate_state(1)[0])
        for place in range(len(prompts))
        for k in range(n)
    ]
    repeated = [prompt for prompt in prompts for _ in range(n)]
    return Batch.from_samples(
        {"tokens": [p.tokens for p in repeated]},
        {
            "prompt_id": torch.tensor([p.id for p in repeated], dtype=torch.int64),
            "sample_index": torch.arange(n).repeat(len(prompts)),
            "position": torch.arange(len(repeated)),
            "seed": torch.tensor(seeds, dtype=torch.int64),
            "prompt_text": [p.text for p in repeated],
            "row": [p.row for p in repeated],
        },
    )


def deal(prompts: Batch, engines: int) -> list[Batch]:
    """Each engine's part: the samples of a prompt stay together (they share its KV cache), tokens are balanced.

    The largest prompts go first, each to the engine with the fewest tokens so far; within an engine the order stays.
    """
    lengths, load = prompts.lengths.tolist(), [0] * engines
    ids = prompts["prompt_id"].tolist()
    groups: list[list[int]] = []
    for i, prompt_id in enumerate(ids):
        if i and ids[i - 1] == prompt_id:
            groups[-1].append(i)
        else:
            groups.append([i])
    parts: list[list[int]] = [[] for _ in range(engines)]
    for group in sorted(groups, key=lambda g: (-sum(lengths[i] for i in g), g[0])):
        engine = min(range(engines), key=lambda e: (load[e], e))
        parts[engine] += group
        load[engine] += sum(lengths[i] for i in group)
    return [prompts.select(sorted(part)) for part in parts]


def collect(run: Run, prompts: Batch) -> Batch:
    """Generate, and score each chunk of samples as soon as it is finished.

    Returns:
        The samples in the order of ``prompts``, with the columns of a rollout (tokens, response_mask, rollout_logprobs,
        weight_version, finish_reason), score, reference_logprobs, values and final_values, old_logprobs: those whose
        roles the run has.
    """
    run.progress.phase("rollout")
    running = []
    for chunk in run.rollout.stream("generate", deal(prompts, run.rollout.size)):
        calls = [run.reward.submit("score", chunk)]
        if run.reference is not None:
            calls.append(run.reference.submit("token_logprobs", chunk))
        if run.critic is not None:
            calls.append(run.critic.submit("values", chunk))
        calls.append(run.policy.submit("token_logprobs", chunk))
        running.append((chunk, calls))
    run.progress.phase("score")
    batch = Batch.concat([chunk.merge(*(call.result() for call in calls)) for chunk, calls in running])
    return batch.select(torch.argsort(batch["position"]))
