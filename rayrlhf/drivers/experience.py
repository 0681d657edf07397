"""One step's experience: prompts in, samples with scores, reference, values and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayrlhf.batch import Batch
from rayrlhf.cluster import Pending, RoleFailed
from rayrlhf.data import Prompt
from rayrlhf.errors import RunFailed
from rayrlhf.monitoring.jsonl import JsonlFile

if TYPE_CHECKING:
    from rayrlhf.drivers.run import Run

__all__ = ["UNSCORED", "collect", "deal", "prompt_batch"]

UNSCORED = "unscored.jsonl"
"""In a run's folder: samples of the step that was under way when the reward failed. A line: step, prompt, response, cause."""


def prompt_batch(prompts: Sequence[Prompt], samples_per_prompt: int, seed: Sequence[int]) -> Batch:
    """Prompts, each as often as it is to be sampled, with a seed for each sample.

    Args:
        prompts: in the order of the step.
        samples_per_prompt: n.
        seed: whole numbers that tell this batch from all others, such as (run seed, step).

    Returns:
        S = len(prompts) * n samples with the columns tokens, prompt_id, sample_index, position, seed, prompt_length,
        prompt_text, messages (None for a plain prompt) and row. A sample's seed is a hash of ``seed``, its prompt's place and
        its index.
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
            "messages": [p.messages for p in repeated],
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
        weight_version, finish_reason), score (and gold), reference_logprobs, values and final_values, old_logprobs: those
        whose roles the run has.

    Raises:
        RunFailed: a role failed. Samples that got no score are kept in ``RUN/unscored.jsonl``.
    """
    run.progress.phase("rollout")
    running: list[tuple[Batch, list[Pending]]] = []
    with _unscored_kept(run, running):
        judged = 0
        for chunk in run.rollout.stream("generate", deal(prompts, run.rollout.size)):
            calls = [run.reward.submit("score", chunk)]
            if run.reference is not None:
                calls.append(run.reference.submit("token_logprobs", chunk))
            if run.critic is not None:
                calls.append(run.critic.submit("values", chunk))
            calls.append(run.policy.submit("token_logprobs", chunk))
            running.append((chunk, calls))
            # A reward that has failed ends the run now, not once all is generated.
            while judged < len(running) and running[judged][1][0].done():
                running[judged][1][0].result()
                judged += 1
        run.progress.phase("score")
        batch = Batch.concat([chunk.merge(*(call.result() for call in calls)) for chunk, calls in running])
    return batch.select(torch.argsort(batch["position"]))


@contextmanager
def _unscored_kept(run: Run, running: Sequence[tuple[Batch, Sequence[Pending]]]) -> Iterator[None]:
    """Where the reward fails, write the samples without a score into ``RUN/unscored.jsonl``, each with the cause.

    ``running`` holds the generated samples with their calls, the reward's first.
    """
    try:
        yield
    except RoleFailed as error:
        if error.role == run.reward.name:
            try:
                _keep_unscored(run, running)
            except (OSError, RunFailed) as failure:
                run.progress.note(f"the samples without a score could not be kept: {failure}", warning=True)
        raise


def _keep_unscored(run: Run, running: Sequence[tuple[Batch, Sequence[Pending]]]) -> None:
    rows: list[dict[str, Any]] = []
    step, decode = run.state.step + 1, run.prepared.tokenizer.decode
    for chunk, (scoring, *_) in running:
        cause = "the run ended before it was scored"
        if scoring.done():
            try:
                scoring.result()
                continue
            except RoleFailed as failed:
                cause = failed.cause
        for prompt, length, (start, end) in zip(
            chunk["prompt_text"], chunk["prompt_length"].tolist(), chunk.spans(), strict=True
        ):
            response = decode(chunk["tokens"][start + length : end].tolist(), skip_special_tokens=True)
            rows.append({"step": step, "prompt": prompt, "response": response, "cause": cause})
    file = JsonlFile(run.folder / UNSCORED, resume_step=step)
    for row in rows:
        file.write(row)
    file.close()
    run.progress.note(f"{len(rows)} samples without a score are kept in {file.path}", warning=True)
