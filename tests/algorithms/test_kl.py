"""KL estimators against worked numbers, their expectation against the exact KL, and the adaptive coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import adaptive_kl_coef, kl_estimate

F64 = torch.float64
ESTIMATORS = ["k1", "k2", "k3"]


def estimate(d: float, estimator: str, base: float = -3.0) -> float:
    zero = torch.tensor([base], dtype=F64)
    return float(kl_estimate(zero + d, zero, estimator))


@pytest.mark.parametrize(
    ("d", "k1", "k2", "k3"),
    [
        (0.0, 0.0, 0.0, 0.0),
        # p = 1/2, p_ref = 1/4: d = ln 2, exp(-d) = 1/2
        (math.log(2), 0.6931471805599453, 0.2402265069591007, 0.1931471805599453),
        # p = 1/4, p_ref = 1/2: d = -ln 2, exp(-d) = 2
        (-math.log(2), -0.6931471805599453, 0.2402265069591007, 0.3068528194400547),
        (-2.0, -2.0, 2.0, 7.38905609893065 - 3.0),
        (4.0, 4.0, 8.0, 3.0183156388887342),
        # ±10: k2 = 12.5, k3 = e^5 - 6
        (5.0, 5.0, 10.0, 4.006737946999085),
        (-5.0, -5.0, 10.0, 10.0),
        (15.0, 10.0, 10.0, 10.0),
        (-15.0, -10.0, 10.0, 10.0),
        (300.0, 10.0, 10.0, 10.0),
        (-300.0, -10.0, 10.0, 10.0),
    ],
)
def test_values(d, k1, k2, k3):
    assert [estimate(d, e) for e in ESTIMATORS] == pytest.approx([k1, k2, k3], abs=1e-12)


def test_gradients():
    # k1' = 1, k2' = d, k3' = 1 - exp(-d); nothing beyond the bound of the result; nothing against the clamp of d
    d = [-30.0, -12.0, -3.0, -0.5, 0.0, 0.5, 3.0, 4.5, 12.0, 30.0]
    expected = {
        "k1": [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
        "k2": [0, 0, -3, -0.5, 0, 0.5, 3, 0, 0, 0],
        "k3": [0, 0, 0, 1 - math.exp(0.5), 0, 1 - math.exp(-0.5), 1 - math.exp(-3), 1 - math.exp(-4.5), 0, 0],
    }
    for estimator in ESTIMATORS:
        x = torch.tensor(d, dtype=F64, requires_grad=True)
        reference = torch.zeros(len(d), dtype=F64, requires_grad=True)
        kl_estimate(x, reference, estimator).sum().backward()
        assert x.grad.tolist() == pytest.approx(expected[estimator], abs=1e-12), estimator
        assert reference.grad.tolist() == pytest.approx([-g for g in expected[estimator]], abs=1e-12), estimator


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_by_finite_differences(estimator):
    x = torch.tensor([-1.3, -0.2, 0.1, 0.9, 2.7], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: kl_estimate(v, torch.zeros(5, dtype=F64), estimator), x)


def test_expectation_is_the_exact_kl():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    exact = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.3)
    for estimator in ("k1", "k3"):
        assert float((p * kl_estimate(p.log(), q.log(), estimator)).sum()) == pytest.approx(exact, abs=1e-12)
    # The expected gradient of k2 is that of the KL; k3's isn't (its is that of KL(ref || pi)).
    logits = torch.tensor([0.4, -0.3, 0.1], dtype=F64, requires_grad=True)
    logp = logits.log_softmax(0)
    (kl,) = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits, retain_graph=True)
    (k2,) = torch.autograd.grad((logp.exp().detach() * kl_estimate(logp, q.log(), "k2")).sum(), logits)
    assert torch.allclose(kl, k2, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.floats(-40, 40), st.floats(-30, 0))
def test_signs_and_bounds(d, base):
    k1, k2, k3 = (estimate(d, e, base) for e in ESTIMATORS)
    assert k1 * d >= 0 and 0 <= k2 <= 10 and 0 <= k3 <= 10 and abs(k1) <= 10


def test_k3_keeps_its_digits_in_float32():
    # exp(-d) - 1 + d is 0 or twice too large here when it is computed as it is written
    d = torch.tensor([1e-4, -1e-4, 1e-3, -2e-3])
    k3 = kl_estimate(d, torch.zeros(4), "k3").double()
    assert torch.allclose(k3, torch.tensor([5e-9, 5e-9, 4.99833e-7, 2.001334e-6], dtype=F64), rtol=2e-3, atol=0)
    tiny = torch.logspace(-9, 1, 20001)
    assert (kl_estimate(tiny, torch.zeros_like(tiny), "k3") >= 0).all()
    assert (kl_estimate(-tiny, torch.zeros_like(tiny), "k3") >= 0).all()


def test_same_model_is_zero_and_types_stay():
    for dtype in (torch.float32, F64):
        logp = torch.tensor([-0.1, -7.3, -22.9], dtype=dtype)
        for estimator in ESTIMATORS:
            kl = kl_estimate(logp, logp.clone(), estimator)
            assert kl.dtype == dtype and kl.tolist() == [0, 0, 0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_log_ratio_that_would_overflow_has_a_bound_and_no_gradient(estimator):
    x = torch.tensor([-300.0, 300.0], requires_grad=True)
    kl = kl_estimate(x, torch.zeros(2), estimator)
    kl.sum().backward()
    assert kl.abs().tolist() == [10, 10] and x.grad.tolist() == [0, 0]


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.0256)),  # 10 % above
        (5.4, 0.1 * (1 - 0.1 * 0.0256)),
        (60.0, 0.1 * (1 + 0.2 * 0.0256)),  # clipped
        (-3.0, 0.1 * (1 - 0.2 * 0.0256)),  # clipped; k1 may be negative
    ],
)
def test_adaptive_coefficient(kl, expected):
    assert adaptive_kl_coef(0.1, kl, 6.0, 256, 10000) == pytest.approx(expected, rel=1e-12)


def test_adaptive_coefficient_goes_on_from_its_last_value():
    kls = [3.0, 9.0, 7.0, 6.5, 2.0, 6.1]
    coef = 0.2
    for kl in kls:
        coef = adaptive_kl_coef(coef, kl, 6.0, 64, 1000)
    first = 0.2
    for kl in kls[:3]:
        first = adaptive_kl_coef(first, kl, 6.0, 64, 1000)
    for kl in kls[3:]:  # the coefficient is all of its state
        first = adaptive_kl_coef(first, kl, 6.0, 64, 1000)
    product = 0.2 * (1 - 0.0128) * (1 + 0.0128) * (1 + 0.064 / 6) * (1 + 0.032 / 6) * (1 - 0.0128) * (1 + 0.0064 / 6)
    assert first == coef == pytest.approx(product, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(-100, 100), st.floats(0.01, 50), st.integers(1, 999))
def test_adaptive_coefficient_moves_the_right_way_and_not_too_far(kl, target, samples):
    new = adaptive_kl_coef(0.3, kl, target, samples, 1000)
    assert (new >= 0.3) if kl >= target else (new <= 0.3)
    assert abs(new / 0.3 - 1) <= 0.2 * samples / 1000 + 1e-12 and new > 0


@pytest.mark.parametrize("arguments", [(0.1, math.nan, 6, 1, 10), (0.1, math.inf, 6, 1, 10), (0.1, 5, 0, 1, 10)])
def test_adaptive_coefficient_refuses(arguments):
    with pytest.raises(ValueError):
        adaptive_kl_coef(*arguments)


def test_adaptive_coefficient_refuses_a_horizon_that_could_turn_its_sign():
    with pytest.raises(ValueError, match="must be above 51.2"):
        adaptive_kl_coef(0.1, 1.0, 6.0, 256, 51.2)
    assert adaptive_kl_coef(0.1, 1.0, 6.0, 256, 52) > 0
