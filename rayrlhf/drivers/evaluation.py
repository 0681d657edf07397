"""The policy on held-out prompts: score, KL to the reference, NLL of known continuations, variety, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayrlhf.batch import Batch
from rayrlhf.drivers.advantages import response_lengths, sequence_kl, truncated
from rayrlhf.drivers.experience import collect, prompt_batch
from rayrlhf.evaluation import distinct_n, mean_and_stderr

if TYPE_CHECKING:
    from rayrlhf.drivers.run import Run

__all__ = ["EvaluationLog", "evaluate"]

EVALUATION = 2**20
"""Stands in the seed where training has the step: an evaluation samples alike at whatever step it is made."""


def evaluate(run: Run) -> dict[str, Any]:
    """One response to each held-out prompt, sampled as in training, with the same seeds at every evaluation.

    Returns:
        prompts, score/mean, score/stderr, kl/mean and kl/stderr (nats a sequence; None without a reference), nll (nats a
        token of the known continuations at temperature 1; None without any), distinct_2, response_length/mean,
        truncated_fraction, samples.
    """
    prompts = run.prompts.held_out
    batch = collect(run, prompt_batch(prompts, 1, (run.config.seed, EVALUATION)))
    score, score_error = mean_and_stderr(batch["score"].tolist())
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
    logprobs = run.policy.call("token_logprobs", batch, temperature=1.0)["old_logprobs"]
    return float(-logprobs[batch["response_mask"]].mean())


class EvaluationLog:
    """``evaluations.jsonl``: one line an evaluation.

    Args:
        file: where.
        resume_step: on resume, the first step that is made: later lines, of steps that are made again, are removed.
    """

    def __init__(self, file: Path, resume_step: int | None):
        self.file = file
        self.results: list[dict[str, Any]] = []
        if resume_step is not None and file.exists():
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            self.results = [row for row in rows if row["step"] < resume_step]
            self._write("w", self.results)

    def add(self, step: int, result: dict[str, Any]) -> None:
        self.results.append({"step": step, **result})
        self._write("a", self.results[-1:])

    def _write(self, mode: str, rows: list[dict[str, Any]]) -> None:
        with open(self.file, mode, encoding="utf-8") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in rows)
