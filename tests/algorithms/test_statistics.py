"""Statistics of a step against worked numbers."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import approximate_kl, explained_variance, masked_mean, rollout_mismatch

F64 = torch.float64


def test_masked_mean():
    x, mask = torch.tensor([1.0, math.nan, 5.0]), torch.tensor([True, False, True])
    assert float(masked_mean(x, mask)) == 3 and masked_mean(x, mask).dtype == torch.float32
    assert float(masked_mean(x, torch.zeros(3, dtype=torch.bool))) == 0


def test_explained_variance_worked_example():
    mask = torch.tensor([True, True, True, False])
    returns = torch.tensor([1.0, 2.0, 3.0, 99.0])
    # errors 0, 1, 0: variance 2/9; variance of the returns 2/3
    found = explained_variance(torch.tensor([1.0, 1.0, 3.0, -50.0]), returns, mask)
    assert float(found) == pytest.approx(1 - 1 / 3) and found.dtype == torch.float32
    assert float(explained_variance(returns, returns, mask)) == 1
    assert float(explained_variance(torch.zeros(4), returns, mask)) == 0
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3)


def test_explained_variance_without_variance():
    mask, same = torch.ones(3, dtype=torch.bool), torch.full((3,), 0.1)
    assert float(explained_variance(torch.zeros(3), same, mask)) == 1
    assert float(explained_variance(torch.tensor([0.0, 1.0, 2.0]), same, mask)) == 0
    assert float(explained_variance(same, same, ~mask)) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(-9, 9), st.booleans()), min_size=2, max_size=12))
def test_explained_variance_is_its_definition(entries):
    values, returns, mask = (list(column) for column in zip(*entries, strict=True))
    r = [float(x) for x, m in zip(returns, mask, strict=True) if m]
    if len(set(r)) < 2:
        return
    error = [x - v for x, v in zip(r, (v for v, m in zip(values, mask, strict=True) if m), strict=True)]
    expected = 1 - statistics.pvariance(error) / statistics.pvariance(r)
    found = explained_variance(torch.tensor(values, dtype=F64), torch.tensor(returns, dtype=F64), torch.tensor(mask))
    assert float(found) == pytest.approx(expected, abs=1e-9)


def test_approximate_kl_is_that_of_the_old_policy_to_the_new():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    exact = sum(a * math.log(a / b) for a, b in ((0.5, 0.2), (0.3, 0.5), (0.2, 0.3)))
    per_token = approximate_kl(q.log().requires_grad_(), p.log())  # sampled from p, now q
    assert float((p * per_token).sum()) == pytest.approx(exact, abs=1e-12)
    # ratio 2: (2 - 1) - ln 2
    assert float(approximate_kl(torch.tensor(math.log(2.0)), torch.tensor(0.0))) == pytest.approx(1 - math.log(2))
    assert not per_token.requires_grad and (per_token >= 0).all()


def test_rollout_mismatch_worked_example():
    ln2 = math.log(2)
    rollout = torch.tensor([-1.0, -2.0, -3.0, 0.0], dtype=F64)
    old = rollout + torch.tensor([0.0, ln2, -ln2, 50.0], dtype=F64)
    found = rollout_mismatch(old, rollout, torch.tensor([True, True, True, False]))
    # k3 of the ratios 1, 2, 1/2: 0, 1 - ln 2, ln 2 - 1/2
    expected = {"mean_abs": 2 * ln2 / 3, "max_abs": ln2, "k3": 0.5 / 3, "mean_exp_abs": 5 / 3}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, abs=1e-12)


def test_rollout_mismatch_of_the_same_and_of_nothing():
    same = torch.tensor([-0.3, -9.0])
    agree = {"mean_abs": 0, "max_abs": 0, "k3": 0, "mean_exp_abs": 1}
    assert {n: float(v) for n, v in rollout_mismatch(same, same, torch.tensor([True, True])).items()} == agree
    assert {n: float(v) for n, v in rollout_mismatch(same, same + 1, torch.tensor([False] * 2)).items()} == agree
    empty = torch.zeros(0)
    assert {n: float(v) for n, v in rollout_mismatch(empty, empty, empty.bool()).items()} == agree


def test_rollout_mismatch_k3_is_the_kl_from_engine_to_trainer():
    engine, trainer = torch.tensor([0.6, 0.4], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    exact = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    # six tokens of the one and four of the other: the expectation under the engine
    index = torch.tensor([0] * 6 + [1] * 4)
    found = rollout_mismatch(trainer.log()[index], engine.log()[index], torch.ones(10, dtype=torch.bool))
    assert float(found["k3"]) == pytest.approx(exact, abs=1e-12)
