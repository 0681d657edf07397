"""Supervised fine-tuning: the likelihood of completions, with early stopping on held-out ones."""

from __future__ import annotations

import math

import torch

from rayrlhf.data import example_batch
from rayrlhf.drivers.offline import OfflineRun, spread_units

__all__ = ["train"]


def train(run: OfflineRun) -> None:
    """The whole run: validate, then steps with a validation now and then, then write the model."""
    if run.validation_due():
        validate(run)

    for _ in run.steps():
        batch = example_batch(run.next_examples())
        metrics = run.update(batch, spread_units(batch.lengths, 1, run.policy.shards))
        run.finish_step(metrics, batch)
        if run.validation_due():
            validate(run)

    run.restore_best()
    run.save_model()


def validate(run: OfflineRun) -> None:
    """Negative log-likelihood of the held-out examples' learnt tokens, and its exponential, the perplexity."""
    run.progress.phase("validation")
    batch = example_batch(run.data.validation)
    logprobs = run.policy.call("token_logprobs", batch, temperature=1.0)["old_logprobs"]
    mask = batch["response_mask"]
    nll = float(-logprobs[mask].double().mean())
    # Each example's own mean, so that the spread is over examples.
    owner = torch.repeat_interleave(torch.arange(len(batch)), batch.lengths)[mask]
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, owner, -logprobs[mask].double())
    counts = torch.bincount(owner, minlength=len(batch))
    spread = float((sums / counts).std()) / math.sqrt(len(batch)) if len(batch) > 1 else math.nan
    result = {"examples": len(batch), "nll": nll, "nll/stderr": spread, "perplexity": math.exp(min(nll, 700.0))}
    line = f"validation on {len(batch)} examples: NLL {nll:.4f} ± {spread:.4f} nats a token, "
    line += f"perplexity {result['perplexity']:.3f}"
    run.record(result, -nll, line)
