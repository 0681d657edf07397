"""The policy on held-out prompts: score, KL to the reference, NLL of known continuations, variety, samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayrlhf.batch import Batch
from rayrlhf.drivers.advantages import response_lengths, sequence_kl, truncated
from rayrlhf.drivers.experience import collect, prompt_batch
from rayrlhf.errors import RunFailed
from rayrlhf.evaluation import distinct_n, mean_and_stderr
from rayrlhf.evaluation.hacking import analyze_reward_hacking
from rayrlhf.monitoring.jsonl import JsonlFile, read_rows, restored, storable

if TYPE_CHECKING:
    from rayrlhf.drivers.run import Run

__all__ = ["EvaluationLog", "evaluate", "write_hacking_analysis"]

EVALUATION = 2**20
"""Stands in the seed where training has the step: an evaluation samples alike at whatever step it is made."""


def evaluate(run: Run) -> dict[str, Any]:
    """One response to each held-out prompt, sampled as in training, with the same seeds at every evaluation.

    Returns:
        prompts, score/mean, score/stderr, gold/mean and gold/stderr (only where there is a gold reward), kl/mean and kl/stderr
        (nats a sequence; None without a reference), nll (nats a token of the known continuations at temperature 1; None
        without any), distinct_2, response_length/mean, truncated_fraction, samples.
    """
    prompts = run.prompts.held_out
    batch = collect(run, prompt_batch(prompts, 1, (run.config.seed, EVALUATION)))
    score, score_error = mean_and_stderr(batch["score"].tolist())
    gold = {}
    if "gold" in batch:
        gold = dict(zip(("gold/mean", "gold/stderr"), mean_and_stderr(batch["gold"].tolist()), strict=True))
    kl, kl_error = None, None
    if "reference_logprobs" in batch:
        kl, kl_error = mean_and_stderr(sequence_kl(batch).tolist())
    decode = run.prepared.tokenizer.decode
    responses = [
        decode(batch["tokens"][start + prompt : end].tolist(), skip_special_tokens=True)
        for (start, end), prompt in zip(batch.spans(), batch["prompt_length"].tolist(), strict=True)
    ]
    return {
        "prompts": len(prompts),
        "score/mean": score,
        "score/stderr": score_error,
        **gold,
        "kl/mean": kl,
        "kl/stderr": kl_error,
        "nll": _completion_nll(run),
        "distinct_2": distinct_n(responses, 2),
        "response_length/mean": float(response_lengths(batch).float().mean()),
        "truncated_fraction": float(truncated(batch).float().mean()),
        "samples": [
            {"prompt": prompt.text, "response": response, "score": value}
            for prompt, response, value in zip(prompts, responses, batch["score"].tolist(), strict=True)
        ],
    }


def _completion_nll(run: Run) -> float | None:
    pairs = [(p.tokens, p.completion_tokens) for p in run.prompts.held_out if p.completion_tokens is not None]
    tokens = [torch.cat([prompt, known]) for prompt, known in pairs if len(known)]
    masks = [torch.arange(len(prompt) + len(known)) >= len(prompt) for prompt, known in pairs if len(known)]
    if not tokens:
        return None
    batch = Batch.from_samples({"tokens": tokens, "response_mask": masks})
    run.turns.take({"policy": "weights"})
    logprobs = run.policy.call("token_logprobs", batch, temperature=1.0)["old_logprobs"]
    return float(-logprobs[batch["response_mask"]].mean())


def write_hacking_analysis(rows: Sequence[Mapping[str, Any]], file: Path, *, ended: bool) -> None:
    """Compare the courses of score and gold score, and write what comes of it as JSON: the fields of `HackingAnalysis`.

    Args:
        rows: of metrics.jsonl; those count in which both means are numbers.
        file: where; one that is there is replaced, at once and whole.
        ended: whether these are all steps; if not, nothing is written about too few of them to tell.

    Raises:
        RunFailed: the file can't be written.
    """
    told = [row for row in rows if row.get("score/mean") is not None and row.get("gold/mean") is not None]
    scores, golds = ([row[name] for row in told] for name in ("score/mean", "gold/mean"))
    found = asdict(analyze_reward_hacking(scores, golds, steps=[row["step"] for row in told]))
    if found["outcome"] == "too_short" and not ended:
        return
    draft = file.with_name(f"{file.name}.partial")
    try:
        draft.write_text(json.dumps(storable(found), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise RunFailed(f"the analysis of reward hacking can't be written to {file}: {error}") from error


class EvaluationLog:
    """``evaluations.jsonl``: one line an evaluation. What isn't finite is null there, and ``non_finite`` says what it was.

    Args:
        file: where.
        resume_step: on resume, the first step that is made: later lines, of steps that are made again, are removed.
    """

    def __init__(self, file: Path, resume_step: int | None):
        self._lines = JsonlFile(file, resume_step=resume_step)
        self.results: list[dict[str, Any]] = [restored(row) for row in read_rows(file)]

    def add(self, step: int, result: dict[str, Any]) -> None:
        """Write an evaluation. Raises `RunFailed` where the file can't be written."""
        self._lines.write(storable({"step": step, **result}))
        self.results.append({"step": step, **result})

    def close(self) -> None:
        """May be called more than once."""
        self._lines.close()
