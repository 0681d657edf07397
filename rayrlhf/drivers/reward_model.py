"""A reward model from preference pairs (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rayrlhf.batch import Batch
from rayrlhf.data import pair_batch
from rayrlhf.drivers.offline import OfflineRun, spread_units
from rayrlhf.errors import RunFailed
from rayrlhf.evaluation.calibration import expected_calibration_error, pair_probabilities, reliability_table
from rayrlhf.models.tokenizer import Padding, eos_token_ids, padding_of

__all__ = ["train"]


def train(run: OfflineRun) -> None:
    """The whole run: validate, then steps with a validation now and then, then normalise and write the model."""
    if run.validation_due():
        validate(run)

    for _ in run.steps():
        batch = pair_batch(run.next_examples())
        metrics = run.update(batch, spread_units(batch.lengths, 2, run.policy.shards))
        run.finish_step(metrics, batch)
        if run.validation_due():
            validate(run)

    finish(run)


def scores(run: OfflineRun) -> Tensor:
    """Scores of the held-out pairs: float64 [P, 2], the chosen response's first."""
    batch = pair_batch(run.data.validation)
    return run.policy.call("scores", Batch(batch.offsets, {"tokens": batch["tokens"]}))["score"].double().view(-1, 2)


def validate(run: OfflineRun) -> None:
    """Accuracy, margin and calibration on the held-out pairs; of equal accuracies the smaller loss is the better one."""
    run.progress.phase("validation")
    held_out = scores(run)
    difference = held_out[:, 0] - held_out[:, 1]
    # Ties count half: a model that gives every response one score is at chance.
    accuracy = float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())
    loss = float(torch.nn.functional.softplus(-difference).mean())
    stderr = (accuracy * (1 - accuracy) / len(difference)) ** 0.5
    probabilities, outcomes = pair_probabilities(held_out[:, 0].numpy(), held_out[:, 1].numpy())
    result = {
        "pairs": len(difference),
        "accuracy": accuracy,
        "accuracy/stderr": stderr,
        "margin": float(difference.mean()),
        "loss": loss,
        "ece": expected_calibration_error(probabilities, outcomes),
        "reliability": [asdict(row) for row in reliability_table(probabilities, outcomes)],
    }
    line = f"validation on {len(difference)} pairs: accuracy {accuracy:.3f} ± {stderr:.3f}, "
    line += f"margin {result['margin']:.3f}, loss {loss:.4f}, ECE {result['ece']:.3f}"
    run.record(result, accuracy - 1e-6 * loss, line)


def finish(run: OfflineRun) -> None:
    """Write the best model, its scores normalised over the held-out responses, and the pairs that it gets most wrong."""
    settings = run.config.reward_model  # type: ignore[union-attr]
    run.restore_best()
    shift: dict[str, Any] = {}
    if run.data.validation:
        held_out = scores(run)
        if settings.normalize:
            deviation = float(held_out.std())
            if deviation == 0.0:
                raise RunFailed("the reward model gives every held-out response the same score: it has learnt nothing")
            shift = {"mean": float(held_out.mean()), "deviation": deviation}
            run.progress.note(
                f"scores shifted by {-shift['mean']:.4f} and divided by {deviation:.4f}: mean 0, deviation 1 on "
                f"{held_out.numel()} held-out responses"
            )
        write_failures(run, held_out)
    run.save_model(**shift, padding=padding(run))


def padding(run: OfflineRun) -> Padding:
    """The folder's padding token, in its configuration and, from now on, in its tokenizer."""
    tokenizer = run.prepared.tokenizer
    chosen = padding_of(tokenizer, eos_token_ids(tokenizer, run.prepared.model_path))
    if chosen.said is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen.id)
        run.progress.note(f"the reward model's padding token is {tokenizer.pad_token}: {chosen.said}")
    return chosen


def write_failures(run: OfflineRun, held_out: Tensor) -> None:
    """``failures.jsonl``: the held-out pairs with the most wrongly ordered scores, the worst first."""
    difference = held_out[:, 0] - held_out[:, 1]
    wrong = [i for i in torch.argsort(difference).tolist() if difference[i] < 0]
    count = run.config.reward_model.failures_shown  # type: ignore[union-attr]
    with open(run.folder / "failures.jsonl", "w", encoding="utf-8") as file:
        for i in wrong[:count]:
            pair = run.data.validation[i]
            row = {
                "where": pair.where,
                "prompt": pair.prompt_text,
                "chosen": pair.chosen_text,
                "rejected": pair.rejected_text,
                "chosen_score": float(held_out[i, 0]),
                "rejected_score": float(held_out[i, 1]),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    run.progress.note(f"{len(wrong)} of {len(held_out)} held-out pairs are ordered wrongly; see failures.jsonl")
