"""KTO and the reward model's loss: worked numbers, definitions with fifty digits, finite differences."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import bradley_terry_loss, kto_loss

F64 = torch.float64
LN2 = math.log(2)


def kto(log_ratios, desirable, kl, dtype=F64, **options):
    """With a reference of -3 everywhere, so that nothing is a log-probability by accident."""
    reference = torch.full((len(log_ratios),), -3.0, dtype=dtype)
    logps = (reference + torch.tensor(log_ratios, dtype=dtype)).requires_grad_()
    return logps, kto_loss(logps, reference, torch.tensor(desirable), kl, **options)


def test_kto_worked_numbers():
    # ratio 2 against z_0 = 0: sigma(ln 2) = 2/3; against z_0 = ln 2: 1/2
    _, at_zero = kto([LN2, LN2], [True, False], 0.0, beta=1.0)
    assert at_zero.loss.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert at_zero.rewards.tolist() == pytest.approx([LN2, LN2]) and not at_zero.rewards.requires_grad
    _, higher = kto([LN2, LN2, 0.0], [True, False, True], LN2, beta=1.0, desirable_weight=3.0, undesirable_weight=0.5)
    assert higher.loss.tolist() == pytest.approx([1.5, 0.25, 2.0])
    assert at_zero.correct.tolist() == [True, False]
    _, sides = kto([0.5, -0.5, 0.5, -0.5, 0.1], [True, True, False, False, True], 0.2, beta=0.3)
    assert sides.correct.tolist() == [True, False, False, True, False]
    _, halved = kto([2 * LN2], [False], 0.0, beta=0.5)
    assert halved.loss.tolist() == pytest.approx([2 / 3]) and halved.rewards.tolist() == pytest.approx([LN2])


def test_kto_at_initialisation_is_half_the_weight():
    _, result = kto([0.0, 0.0], [True, False], 0.0, beta=0.1, desirable_weight=1.0, undesirable_weight=2.0)
    assert result.loss.tolist() == [0.5, 1.0] and result.rewards.tolist() == [0, 0]


def test_the_kl_is_clamped_at_zero_and_carries_no_gradient():
    kl = torch.tensor(-5.0, dtype=F64, requires_grad=True)
    _, negative = kto([0.3, -0.7], [True, False], kl, beta=0.5)
    _, zero = kto([0.3, -0.7], [True, False], 0.0, beta=0.5)
    assert torch.equal(negative.loss, zero.loss)
    above = torch.tensor(0.4, dtype=F64, requires_grad=True)
    logps, result = kto([0.3, -0.7], [True, False], above, beta=0.5)
    result.loss.sum().backward()
    assert above.grad is None and logps.grad is not None
    assert not torch.equal(result.loss, zero.loss)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=1, max_size=5),
    st.floats(-2, 8),
    st.sampled_from([0.125, 1.0]),
)
def test_kto_by_definition(examples, kl, beta):
    """lambda_y less the value, as printed."""
    ratios, desirable = [r for r, _ in examples], [d for _, d in examples]
    logps, result = kto(ratios, desirable, kl, beta=beta, desirable_weight=1.25, undesirable_weight=0.75)
    with localcontext() as context:
        context.prec = 50
        expected = []
        for logp, good in zip(logps.tolist(), desirable, strict=True):
            distance = Decimal(beta) * (Decimal(logp) + 3 - max(Decimal(kl), Decimal(0)))
            weight = Decimal(1.25) if good else Decimal(0.75)
            value = weight / (1 + (-distance if good else distance).exp())
            expected.append(float(weight - value))
    assert result.loss.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-300)
    assert bool((result.loss >= 0).all())


def test_kto_gradient_raises_the_desirable_and_lowers_the_others():
    logps, result = kto([0.5, -1.0, 0.5, -1.0], [True, True, False, False], 0.1, beta=0.7)
    result.loss.sum().backward()
    assert [g < 0 for g in logps.grad.tolist()] == [True, True, False, False]
    reference = torch.full((4,), -3.0, dtype=F64)
    desirable = torch.tensor([True, True, False, False])
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, reference, desirable, 0.1, beta=0.7).loss, logps)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_kto_far_out(dtype):
    logps, result = kto([1e4, -1e4, 1e4, -1e4], [True, True, False, False], 0.0, dtype, beta=1.0)
    result.loss.sum().backward()
    assert result.loss.tolist() == [0, 1, 1, 0] and result.loss.dtype == dtype
    assert bool(logps.grad.isfinite().all())
    # where 1 - sigma would have lost every digit
    _, close = kto([60.0], [True], 0.0, dtype, beta=1.0)
    assert close.loss.item() == pytest.approx(math.exp(-60), rel=1e-4)


def test_kto_refusals():
    for options in ({"beta": 0.0}, {"beta": 0.1, "desirable_weight": 0.0}, {"beta": 0.1, "undesirable_weight": -1.0}):
        with pytest.raises(ValueError, match="must be above 0"):
            kto([0.0], [True], 0.0, **options)
    with pytest.raises(ValueError, match="expected bool"):
        kto([0.0], [1], 0.0, beta=0.1)
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        kto([0.0], [True], torch.zeros(1), beta=0.1)


def scores(*pairs):
    chosen, rejected = zip(*pairs, strict=True)
    return torch.tensor(chosen, dtype=F64), torch.tensor(rejected, dtype=F64)


def test_bradley_terry_worked_numbers():
    # strengths e^s: 2 to 1 wins 2/3 of the time, 1 to 4 1/5
    chosen, rejected = scores((LN2, 0.0), (0.0, 2 * LN2), (5.0, 5.0))
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx([math.log(1.5), math.log(5), LN2])
    assert bradley_terry_loss(chosen, rejected)[2].item() == LN2
    # a margin of ln 2 takes the first pair back to even odds; NaN is no margin; the sums are ln 2, 2 ln 2 and 10
    margin = torch.tensor([LN2, math.nan, 0.0])
    assert bradley_terry_loss(chosen, rejected, margin).tolist() == pytest.approx([LN2, math.log(5), LN2], rel=1e-6)
    centred = bradley_terry_loss(chosen, rejected, margin, 0.5).tolist()
    assert centred == pytest.approx([LN2 + LN2**2 / 2, math.log(5) + 2 * LN2**2, LN2 + 50], rel=1e-6)


@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_bradley_terry_gradient(coef: float):
    chosen, rejected = (x.requires_grad_() for x in scores((1.5, -0.5), (-2.0, 0.7), (0.1, 0.1)))
    margin = torch.tensor([0.5, math.nan, math.nan], dtype=F64)
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry_loss(a, b, margin, coef), (chosen, rejected))


def test_swapping_a_pair_flips_the_gradient_of_its_scores():
    first, second = (x.requires_grad_() for x in scores((0.7, 0.7), (1.5, -0.5)))
    bradley_terry_loss(first, second).sum().backward()
    one, other = first.grad.clone(), second.grad.clone()
    first.grad = second.grad = None
    bradley_terry_loss(second, first).sum().backward()
    assert one.tolist()[0] == -0.5 and first.grad.tolist()[0] == 0.5
    # -sigma(-d) becomes sigma(d): opposite signs, and together 1
    assert bool((one < 0).all()) and bool((first.grad > 0).all())
    assert torch.equal(one, -other) and (first.grad - one).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_bradley_terry_far_out(dtype):
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([math.nan, 1.0]))
    loss.sum().backward()
    assert loss.tolist() == [0, 20001] and loss.dtype == dtype
    assert chosen.grad.tolist() == [0, -1] and rejected.grad.tolist() == [0, 1]


def test_bradley_terry_refuses_a_negative_coefficient():
    with pytest.raises(ValueError, match="center_coef of -0.1"):
        bradley_terry_loss(*scores((1.0, 0.0)), center_coef=-0.1)
