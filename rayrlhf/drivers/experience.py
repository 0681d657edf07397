"""One step's experience: prompts in, samples with scores, reference, values and log-probabilities out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rayrlhf.batch import Batch
from rayrlhf.cluster import Group, RoleFailed
from rayrlhf.data import Prompt
from rayrlhf.drivers.dispatch import responses
from rayrlhf.drivers.turns import Level
from rayrlhf.errors import RunFailed
from rayrlhf.monitoring.jsonl import JsonlFile

if TYPE_CHECKING:
    from rayrlhf.drivers.run import AdapterOffReference, Run

__all__ = ["UNSCORED", "collect", "prompt_batch"]

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


class Scorer(NamedTuple):
    """What looks at finished samples."""

    role: str
    """Whose states it needs."""
    group: Group | AdapterOffReference
    method: str


class Scoring:
    """Samples, and what is being computed of them."""

    def __init__(self, samples: Batch, by: Sequence[Scorer]):
        self.samples = samples
        self._calls = [scorer.group.submit(scorer.method, samples) for scorer in by]
        self.reward = next((call for call, s in zip(self._calls, by, strict=True) if s.role == "reward"), None)

    def judged(self) -> bool:
        """Whether the reward has answered. Raises what it failed with."""
        if self.reward is None or not self.reward.done():
            return False
        self.reward.result()
        return True

    def result(self) -> Batch:
        """The samples with all that was computed."""
        return self.samples.merge(*(call.result() for call in self._calls))


def scorers(run: Run) -> list[Scorer]:
    """All of a run, the reward first."""
    found = [Scorer("reward", run.reward, "score")]
    if run.reference is not None:
        own = "reference" in run.groups
        found.append(Scorer("reference" if own else "policy", run.reference, "token_logprobs"))
    if run.critic is not None:
        found.append(Scorer("critic", run.critic, "values"))
    return [*found, Scorer("policy", run.policy, "token_logprobs")]


def collect(run: Run, prompts: Batch) -> Batch:
    """Generate, and score each chunk of samples as soon as it is finished.

    Roles that share GPUs with the engines wait until these sleep, and then score all samples at once.

    Returns:
        The samples in the order of ``prompts``, with the columns of a rollout (tokens, response_mask, rollout_logprobs,
        weight_version, finish_reason), score (and gold), reference_logprobs, values and final_values, old_logprobs: those
        whose roles the run has.

    Raises:
        RunFailed: a role failed. Samples that got no score are kept in ``RUN/unscored.jsonl``.
    """
    run.progress.phase("rollout")
    everybody, config = scorers(run), run.config
    at_once = [scorer for scorer in everybody if run.turns.together(scorer.role, "rollout")]
    later = [scorer for scorer in everybody if scorer not in at_once]
    first: dict[str, Level] = {scorer.role: "weights" for scorer in at_once}
    run.turns.take(first | {"rollout": "all"})
    running: list[Scoring] = []
    with _unscored_kept(run, running):
        judged = 0
        for chunk in responses(run.rollout, prompts, config.rollout, config.cluster):
            running.append(Scoring(chunk, at_once))
            # A reward that has failed ends the run now, not once all is generated.
            while judged < len(running) and running[judged].judged():
                judged += 1
        run.progress.phase("score")
        batch = Batch.concat([scoring.result() for scoring in running])
        batch = batch.select(torch.argsort(batch["position"]))
        if later:
            run.turns.take({scorer.role: "weights" for scorer in everybody})
            running[:] = [Scoring(batch, later)]
            batch = running[0].result()
    return batch


@contextmanager
def _unscored_kept(run: Run, running: Sequence[Scoring]) -> Iterator[None]:
    """Where the reward fails, write the samples without a score into ``RUN/unscored.jsonl``, each with the cause.

    ``running`` holds the samples that are generated.
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


def _keep_unscored(run: Run, running: Sequence[Scoring]) -> None:
    rows: list[dict[str, Any]] = []
    step, decode = run.state.step + 1, run.prepared.tokenizer.decode
    for scoring in running:
        cause = "the run ended before it was scored"
        try:
            if scoring.judged():
                continue
        except RoleFailed as failed:
            cause = failed.cause
        chunk = scoring.samples
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
