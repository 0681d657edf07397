"""From scores to advantages, against loops over single samples written out in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayrlhf.algorithms import RunningMoments
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.drivers.advantages import (
    add_advantages,
    next_kl_coef,
    rollout_metrics,
    scores_to_learn_from,
    variety,
)
from rayrlhf.drivers.dispatch import deal
from rayrlhf.drivers.experience import prompt_batch
from rayrlhf.drivers.minibatches import minibatch_schedule
from rayrlhf.errors import RunFailed

PROMPTS, RESPONSES = (2, 3, 1, 2), (3, 1, 4, 2)
REASONS = ["stop", "length", "length", "stop"]


def config(**ppo) -> Config:
    reward = {"sources": [{"function": "m:f"}], **ppo.pop("reward", {})}
    rollout = {"max_response_tokens": 4, "samples_per_prompt": ppo.pop("samples_per_prompt", 1)}
    return Config.model_validate(
        {
            "run_dir": "unused",
            "policy": {"path": "unused"},
            "data": {"prompts": "unused"},
            "reward": reward,
            "rollout": rollout,
            "ppo": {"steps": 1, "prompts_per_step": 4, "minibatch_samples": 4, "whiten_advantages": False, **ppo},
        }
    )


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.arange(p + r) >= p for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    mask = torch.cat(masks)
    columns = {
        name: torch.randn(len(mask), generator=generator) * mask
        for name in ("old_logprobs", "reference_logprobs", "rollout_logprobs", "values")
    }
    return Batch.from_samples({"response_mask": masks}).with_columns(
        {**columns, "tokens": torch.arange(len(mask))},
        {
            "score": torch.tensor([1.0, -2.0, 0.5, 4.0]),
            "final_values": torch.tensor([0.3, 0.7, -0.4, 0.9]),
            "finish_reason": REASONS,
            "prompt_length": torch.tensor(PROMPTS),
            "position": torch.arange(4),
            "weight_version": torch.tensor([3, 3, 2, 3]),
        },
    )


def response(batch: Batch, name: str, sample: int) -> list[float]:
    start, end = batch.spans()[sample]
    return batch[name][start + PROMPTS[sample] : end].double().tolist()


def by_hand(batch: Batch, sample: int, score: float, kl_coef: float, gamma: float, lam: float, after: float):
    """Rewards, advantages and returns of one sample, by the O(T^2) definition of GAE."""
    kl = [
        a - b
        for a, b in zip(
            response(batch, "old_logprobs", sample), response(batch, "reference_logprobs", sample), strict=True
        )
    ]
    rewards = [-kl_coef * k for k in kl]
    rewards[-1] += score
    values = [*response(batch, "values", sample), after]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    advantages = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]
    return rewards, advantages, [a + v for a, v in zip(advantages, values, strict=False)]


@pytest.mark.parametrize("rule", ["terminal", "bootstrap"])
def test_ppo_advantages_are_the_definition(batch: Batch, rule: str):
    settings = config(gamma=0.9, lam=0.8, truncated_responses=rule)
    done = add_advantages(settings, batch, 0.1, None)
    for i, score in enumerate([1.0, -2.0, 0.5, 4.0]):
        after = float(batch["final_values"][i]) if rule == "bootstrap" and REASONS[i] == "length" else 0.0
        for name, expected in zip(
            ("rewards", "advantages", "returns"), by_hand(batch, i, score, 0.1, 0.9, 0.8, after), strict=True
        ):
            assert response(done, name, i) == pytest.approx(expected, abs=1e-6), (name, i)


def test_masked_truncated_responses_are_not_trained_on_and_leave_no_trace(batch: Batch):
    settings = config(truncated_responses="mask")
    done = add_advantages(settings, batch, 0.1, None)
    assert [any(response(done, "response_mask", i)) for i in range(4)] == [True, False, False, True]
    assert response(done, "advantages", 1) == [0.0] and response(done, "advantages", 2) == [0.0] * 4
    assert scores_to_learn_from(settings, batch).tolist() == [1.0, 4.0]


def test_scores_are_normalised_then_clipped_then_penalised(batch: Batch):
    moments = RunningMoments()
    moments.update(batch["score"])
    settings = config(
        reward={
            "normalize": True,
            "clip": 1.0,
            "missing_eos_penalty": 0.25,
            "length_penalty": 0.1,
            "length_penalty_from": 2,
        }
    )
    done = add_advantages(settings, batch, 0.0, moments)
    scores = np.array([1.0, -2.0, 0.5, 4.0])
    shaped = np.clip((scores - scores.mean()) / scores.std(ddof=1), -1, 1)
    expected = shaped - np.array([0, 0.25, 0.25, 0]) - np.array([0.1, 0, 0.2, 0])
    assert [sum(response(done, "rewards", i)) for i in range(4)] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_group_methods_compare_the_samples_of_a_place_in_the_step(batch: Batch, estimator: str):
    settings = config(advantage_estimator=estimator, samples_per_prompt=2)
    done = add_advantages(settings, batch, 0.1, None)
    total = []
    for i, score in enumerate([1.0, -2.0, 0.5, 4.0]):
        total.append(sum(by_hand(batch, i, score, 0.1, 1, 1, 0)[0]))
    for i, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        expected = total[i] - total[other]
        if estimator == "grpo":
            mean = (total[i] + total[other]) / 2
            expected = (total[i] - mean) / math.sqrt((total[i] - mean) ** 2 + (total[other] - mean) ** 2)
        assert response(done, "advantages", i) == pytest.approx([expected] * RESPONSES[i], rel=1e-4)


def of_responses(*responses: list[int]) -> Batch:
    """Samples whose prompt is 9 9 9, then its place: equal prompts' bigrams, and a bigram over the border, don't count."""
    tokens = [torch.tensor([9, 9, 9, i, *response]) for i, response in enumerate(responses)]
    return Batch.from_samples({"tokens": tokens}, {"prompt_length": torch.full((len(responses),), 4)})


@pytest.mark.parametrize(
    ("responses", "distinct", "repeated"),
    [
        (([1, 2, 3], [4, 5, 6]), 1.0, 0.0),
        (([1, 2, 1, 2, 1], [1, 2]), 2 / 5, 0.0),  # 12 21 12 21, 12
        (([1, 2], [1, 2], [3], [1, 2]), 1 / 3, 3 / 4),
        (([5], [5], [6]), 0.0, 2 / 3),
        (([7, 7, 7, 7],), 1 / 3, 0.0),
        (([1, 2], [2, 1], [0, 12], [1, 20]), 1.0, 0.0),
        (([], [], [3, 0]), 1.0, 2 / 3),
    ],
)
def test_variety_of_responses(responses: tuple, distinct: float, repeated: float):
    assert variety(of_responses(*responses)) == pytest.approx({"distinct_2": distinct, "repeated_fraction": repeated})


def test_variety_against_sets_of_pairs():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (60,), generator=generator).tolist()
    responses = [torch.randint(0, 5, (n,), generator=generator).tolist() for n in lengths]
    pairs = [p for r in responses for p in zip(r, r[1:], strict=False)]
    found = variety(of_responses(*responses))
    assert found["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert found["repeated_fraction"] == sum(responses.count(r) > 1 for r in responses) / 60 > 0


def test_metrics_count_what_was_cut_and_how_old_it_is(batch: Batch):
    metrics = rollout_metrics(add_advantages(config(), batch, 0.1, None), version=3)
    assert metrics["truncated_fraction"] == 0.5
    assert metrics["staleness"] == 1.0
    assert metrics["response_length/mean"] == 2.5 and metrics["response_length/max"] == 4.0
    assert metrics["score/mean"] == pytest.approx(0.875)
    kl = sum(
        a - b
        for i in range(4)
        for a, b in zip(response(batch, "old_logprobs", i), response(batch, "reference_logprobs", i), strict=True)
    )
    assert metrics["kl"] == pytest.approx(kl / 4, abs=1e-6)
    assert metrics["reward/mean"] == pytest.approx(0.875 - 0.1 * kl / 4, abs=1e-6)


def test_the_coefficient_moves_towards_the_target():
    settings = config(kl_controller="adaptive", target_kl=6.0, kl_horizon=100)
    assert next_kl_coef(settings, 0.1, 6.3, 10) == pytest.approx(0.1 * (1 + 0.05 * 0.1))
    assert next_kl_coef(settings, 0.1, 60.0, 10) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert next_kl_coef(config(), 0.1, 60.0, 10) == 0.1
    with pytest.raises(RunFailed, match="diverged"):
        next_kl_coef(settings, 0.1, math.nan, 10)


def _prompts(count: int):
    from rayrlhf.data import Prompt

    return [Prompt(i, torch.arange(i % 5 + 1), f"p{i}", {"answer": i}) for i in range(count)]


def test_every_sample_has_a_seed_of_its_own():
    one = prompt_batch(_prompts(6), 3, (1, 7))
    assert len(set(one["seed"].tolist())) == 18
    assert one["prompt_id"].tolist() == [i for i in range(6) for _ in range(3)]
    assert one["sample_index"].tolist() == [0, 1, 2] * 6
    assert torch.equal(prompt_batch(_prompts(6), 3, (1, 7))["seed"], one["seed"])
    assert not set(prompt_batch(_prompts(6), 3, (1, 8))["seed"].tolist()) & set(one["seed"].tolist())


@pytest.mark.parametrize("engines", [1, 2, 3, 7])
def test_prompts_are_dealt_whole_and_evenly(engines: int):
    parts = deal(prompt_batch(_prompts(12), 2, (0, 0)), engines)
    places = [set(part["position"].tolist()) for part in parts]
    assert sorted(p for part in places for p in part) == list(range(24))
    for part in parts:
        assert all(n == 2 for n in np.unique(part["prompt_id"].numpy(), return_counts=True)[1])
    loads = [part.num_tokens for part in parts]
    assert max(loads) - min(loads) <= 10  # the largest prompt, twice


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_minibatches_are_the_same_samples_for_any_number_of_ranks(ranks: int):
    lengths = torch.tensor([3, 9, 4, 4, 8, 2, 7, 5, 6, 1, 2, 3])
    schedule = minibatch_schedule(lengths, 4, 2, ranks, (5, 1))
    one = minibatch_schedule(lengths, 4, 2, 1, (5, 1))
    assert len(schedule) == 6
    for parts, (whole,) in zip(schedule, one, strict=True):
        assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
        assert len(parts) == ranks
    for epoch in (schedule[:3], schedule[3:]):
        assert sorted(i for parts in epoch for part in parts for i in part.tolist()) == list(range(12))
    assert [p.tolist() for p in one[0]] != [p.tolist() for p in one[3]]
