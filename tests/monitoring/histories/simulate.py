"""Healthy runs with the noise that real ones have, and ways to spoil them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Row = dict[str, float]
Change = Callable[[int], float]


def ppo(seed: int, steps: int = 60, samples: int = 64) -> list[Row]:
    """A PPO run whose score rises from 0 to 0.8 and whose KL settles at 0.06 nats a token.

    Noise is that of means over ``samples`` responses of deviation 0.4 (score), 45 (tokens), 3 (KL a response).
    """
    random, rows = np.random.default_rng(seed), []
    for t in range(steps):
        learnt, root = 1 - np.exp(-t / (steps / 3)), np.sqrt(samples)
        score = 0.8 * learnt + random.normal() * 0.4 / root
        length = 120 + 12 * learnt + random.normal() * 45 / root
        kl = 0.06 * learnt * length + random.normal() * 3 / root * learnt
        rows.append(
            {
                "step": t + 1, "score/mean": score, "score/std": 0.4 * random.uniform(0.8, 1.2), "score/min": -0.9,
                "score/max": 1.9 + random.normal() * 0.1, "reward/mean": score - 0.02 * kl, "samples": samples,
                "kl": kl, "kl_per_token": kl / length, "kl_coef": 0.02, "entropy": 2.6 - 0.7 * learnt + random.normal() * 0.06,
                "explained_variance": 0.65 * (1 - np.exp(-t / 12)) + random.normal() * 0.06,
                "value_loss": 0.03 * random.lognormal(0, 0.25), "policy_loss": random.normal() * 0.004,
                "clipfrac": abs(0.08 + random.normal() * 0.03), "ppo_kl": 0.002 * random.lognormal(0, 0.4),
                "grad_norm": 1.2 * random.lognormal(0, 0.2), "response_length/mean": length,
                "truncated_fraction": random.binomial(samples, 0.08) / samples,
                "rollout_mismatch/mean_abs": 0.03 * random.lognormal(0, 0.08),
                "distinct_2": 0.9 - 0.1 * learnt + random.normal() * 0.02,
                "repeated_fraction": random.binomial(samples, 0.03 + 0.05 * learnt) / samples,
                "optimizer_steps": 4.0, "skipped_steps": 0.0, "critic/optimizer_steps": 4.0, "critic/skipped_steps": 0.0,
            }
        )  # fmt: skip
    return rows


def dpo(seed: int, steps: int = 80, pairs: int = 32) -> list[Row]:
    """A DPO run whose accuracy goes from chance to 0.75; the KL is measured at every tenth step only."""
    random, rows = np.random.default_rng(seed), []
    for t in range(steps):
        learnt, root = 1 - np.exp(-t / (steps / 3)), np.sqrt(pairs)
        margin = 0.9 * learnt + random.normal() * (0.05 + 1.1 * learnt) / root
        chosen = -120 - 5 * learnt + random.normal() * 50 / root
        row = {
            "step": t + 1, "loss": 0.693 - 0.22 * learnt + random.normal() * 0.25 * learnt / root,
            "rewards/margins": margin, "rewards/chosen": -0.1 * learnt + random.normal() * 0.4 * learnt / root,
            "rewards/accuracies": random.binomial(pairs, 0.5 + 0.25 * learnt) / pairs,
            "logps/chosen": chosen, "logps/rejected": chosen - 10 * learnt + random.normal() * 20 / root,
            "grad_norm": 4 * random.lognormal(0, 0.3), "optimizer_steps": 1.0, "skipped_steps": 0.0,
        }  # fmt: skip
        row["rewards/rejected"] = row["rewards/chosen"] - margin
        if t % 10 == 9:
            row["kl_per_token"] = 0.05 * learnt * random.lognormal(0, 0.1)
        rows.append(row)
    return rows


def reward_model(seed: int, steps: int = 60, pairs: int = 32) -> list[Row]:
    """A reward model that learns to order 70 % of its pairs."""
    random, rows = np.random.default_rng(seed), []
    for t in range(steps):
        learnt, root = 1 - np.exp(-t / (steps / 3)), np.sqrt(pairs)
        rows.append(
            {
                "step": t + 1, "loss": 0.693 - 0.12 * learnt + random.normal() * 0.3 * learnt / root,
                "accuracy": random.binomial(pairs, 0.5 + 0.2 * learnt) / pairs,
                "margin": 0.6 * learnt + random.normal() * (0.05 + learnt) / root,
                "grad_norm": 2 * random.lognormal(0, 0.3), "optimizer_steps": 1.0, "skipped_steps": 0.0,
            }
        )  # fmt: skip
    return rows


def sft(seed: int, steps: int = 60) -> list[Row]:
    """Fine-tuning from 2.8 to 1.9 nats a token, in batches of different difficulty."""
    random, rows = np.random.default_rng(seed), []
    for t in range(steps):
        loss = 1.9 + 0.9 * np.exp(-t / (steps / 4)) + random.normal() * 0.15
        rows.append({"step": t + 1, "loss": loss, "grad_norm": random.lognormal(0, 0.2), "skipped_steps": 0.0})
    return rows


def spoilt(rows: list[Row], start: int, **changes: Change) -> list[Row]:
    """From row ``start`` on, a metric's value is multiplied by ``changes[name](rows since start)``.

    Names are written with ``__`` for ``/``.
    """
    factors = {name.replace("__", "/"): factor for name, factor in changes.items()}
    return [
        {name: value * factors[name](t - start) if name in factors else value for name, value in row.items()}
        if t >= start
        else dict(row)
        for t, row in enumerate(rows)
    ]


def replaced(rows: list[Row], start: int, **changes: Change) -> list[Row]:
    """As `spoilt`, with the metric's value replaced (or added), not multiplied."""
    values = {name.replace("__", "/"): value for name, value in changes.items()}
    return [
        row | {name: value(t - start) for name, value in values.items()} if t >= start else dict(row)
        for t, row in enumerate(rows)
    ]
