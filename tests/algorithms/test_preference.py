"""Pair losses against worked numbers, definitions in probabilities with fifty digits, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.algorithms import (
    REFERENCE_FREE_LOSSES,
    adapted_beta,
    conservative_loss,
    hinge_loss,
    ipo_loss,
    length_normalized_loss,
    orpo_loss,
    pair_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from rayrlhf.algorithms.preference import PairLoss
from rayrlhf.config.offline import DPOConfig

F64 = torch.float64
LN2 = math.log(2)
SUMMED = ["sigmoid", "conservative", "robust", "hinge"]
AVERAGED = ["ipo", "simpo", "orpo", "length_normalized"]
KINDS = SUMMED + AVERAGED
SMOOTHING, GAMMA = 0.125, 0.75  # exact in binary, as in the definitions below


def options(kind: str) -> dict[str, float]:
    if kind in ("conservative", "robust"):
        return {"label_smoothing": SMOOTHING}
    return {"simpo_margin": GAMMA} if kind == "simpo" else {}


@dataclass
class Pairs:
    """Log-probabilities of each token of P pairs: lists of the policy's and the reference's, chosen and rejected."""

    chosen: list[list[float]]
    rejected: list[list[float]]
    reference_chosen: list[list[float]]
    reference_rejected: list[list[float]]

    def columns(self, dtype: torch.dtype = F64) -> list[Tensor]:
        """The six arguments of `pair_loss`."""
        lists = (self.chosen, self.rejected, self.reference_chosen, self.reference_rejected)
        sums = [torch.tensor([math.fsum(r) for r in responses], dtype=dtype) for responses in lists]
        return sums + [torch.tensor([len(r) for r in responses]) for responses in (self.chosen, self.rejected)]

    def loss(self, kind: str, beta: float, dtype: torch.dtype = F64) -> PairLoss:
        return pair_loss(kind, *self.columns(dtype), beta=beta, **options(kind))


def by_definition(
    kind: str, w: list[float], v: list[float], w_ref: list[float], v_ref: list[float], beta: float
) -> float:
    """The paper's loss of one pair in probabilities and odds, from the tokens; w is the chosen, v the rejected one."""
    with localcontext() as context:
        context.prec = 50

        def total(tokens: list[float]) -> Decimal:
            return sum((Decimal(t) for t in tokens), Decimal(0))

        def share(better: Decimal, worse: Decimal) -> Decimal:
            """-log of better / (better + worse), of strengths given as logarithms."""
            return -(better.exp() / (better.exp() + worse.exp())).ln()

        b, eps = Decimal(beta), Decimal(SMOOTHING)
        ratio_w, ratio_v = total(w) - total(w_ref), total(v) - total(v_ref)
        mean_w, mean_v = total(w) / len(w), total(v) / len(v)
        if kind == "sigmoid":
            loss = share(b * ratio_w, b * ratio_v)
        elif kind == "conservative":
            loss = (1 - eps) * share(b * ratio_w, b * ratio_v) + eps * share(b * ratio_v, b * ratio_w)
        elif kind == "robust":
            right, wrong = share(b * ratio_w, b * ratio_v), share(b * ratio_v, b * ratio_w)
            loss = ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)
        elif kind == "hinge":
            loss = max(Decimal(0), 1 - b * (ratio_w - ratio_v))
        elif kind == "ipo":
            loss = (ratio_w / len(w) - ratio_v / len(v) - 1 / (2 * b)) ** 2
        elif kind == "length_normalized":
            loss = share(b * ratio_w / len(w), b * ratio_v / len(v))
        elif kind == "simpo":
            loss = share(b * mean_w - Decimal(GAMMA), b * mean_v)
        else:
            odds_w, odds_v = (m.exp() / (1 - m.exp()) for m in (mean_w, mean_v))
            loss = -mean_w - b * (odds_w / (odds_w + odds_v)).ln()
        return float(loss)


token = st.floats(-9, -0.01)


@st.composite
def pairs(draw: Callable) -> Pairs:
    lengths = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4))

    def responses(which: int) -> list[list[float]]:
        return [draw(st.lists(token, min_size=n[which], max_size=n[which])) for n in lengths]

    return Pairs(responses(0), responses(1), responses(0), responses(1))


SOME = Pairs(
    [[-0.5, -1.25, -0.1], [-2.0], [-0.7, -0.3, -4.0, -0.2, -1.1]],
    [[-0.25], [-1.5, -1.0, -0.5, -2.5], [-3.0, -0.9]],
    [[-0.75, -1.0, -0.2], [-1.0], [-0.5, -0.4, -3.5, -0.3, -1.3]],
    [[-0.5], [-1.0, -1.5, -0.75, -1.5], [-2.0, -1.9]],
)


@pytest.mark.parametrize("kind", KINDS)
def test_definitions(kind: str):
    @settings(max_examples=60, deadline=None)
    @given(pairs(), st.sampled_from([0.0625, 0.5, 2.0]))
    def check(p: Pairs, beta: float):
        rows = zip(p.chosen, p.rejected, p.reference_chosen, p.reference_rejected, strict=True)
        expected = [by_definition(kind, *row, beta) for row in rows]
        assert p.loss(kind, beta).loss.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_types_and_single_precision(kind: str, dtype: torch.dtype):
    result = SOME.loss(kind, 0.5, dtype)
    assert result.loss.dtype == result.chosen_rewards.dtype == result.rejected_rewards.dtype == dtype
    rows = zip(SOME.chosen, SOME.rejected, SOME.reference_chosen, SOME.reference_rejected, strict=True)
    assert result.loss.tolist() == pytest.approx([by_definition(kind, *row, 0.5) for row in rows], rel=2e-6, abs=1e-6)


def test_small_log_ratios_of_long_responses_keep_their_digits():
    """Near initialisation the ratio is far below a rounding step of beta times the sums."""
    reference = torch.tensor([-1000.0], dtype=torch.float32)
    result = sigmoid_loss(reference + 2.0**-13, reference, reference, reference, beta=0.1)
    assert (
        result.chosen_rewards.item() == pytest.approx(0.1 * 2.0**-13, rel=1e-6) and result.rejected_rewards.item() == 0
    )


# Response probabilities: chosen 1/2 where the reference has 1/4, rejected 1/4 where it has 1/2. So the ratios are 2 and 1/2.
HALVES = [torch.tensor([math.log(p)], dtype=F64) for p in (1 / 2, 1 / 4, 1 / 4, 1 / 2)]
TOKENS = [torch.tensor([2]), torch.tensor([1])]


def test_worked_numbers_with_sums():
    assert sigmoid_loss(*HALVES, beta=1.0).loss.item() == pytest.approx(-math.log(0.8))
    # -ln 0.8 = 0.2231436, -ln 0.2 = 1.6094379
    smoothed = conservative_loss(*HALVES, beta=1.0, label_smoothing=0.25).loss.item()
    assert smoothed == pytest.approx(0.75 * 0.2231435513 + 0.25 * 1.6094379124)
    unbiased = robust_loss(*HALVES, beta=1.0, label_smoothing=0.25).loss.item()
    assert unbiased == pytest.approx((0.75 * 0.2231435513 - 0.25 * 1.6094379124) / 0.5)
    # beta (ln 2 + ln 2) = 0.3465736; and 1.3862944 is beyond the hinge
    assert hinge_loss(*HALVES, beta=0.25).loss.item() == pytest.approx(0.6534264097)
    assert hinge_loss(*HALVES, beta=1.0).loss.item() == 0
    for loss in (sigmoid_loss, hinge_loss):
        result = loss(*HALVES, beta=0.5)
        assert result.chosen_rewards.item() == pytest.approx(0.5 * LN2)
        assert result.rejected_rewards.item() == pytest.approx(-0.5 * LN2)


def test_worked_numbers_with_averages():
    # ln 2 over 2 tokens, -ln 2 over 1: 1.5 ln 2 = 1.0397208, less 1 / (2 * 0.5)
    ipo = ipo_loss(*HALVES, *TOKENS, beta=0.5)
    assert ipo.loss.item() == pytest.approx(0.0397207708**2, rel=1e-7)
    assert ipo.chosen_rewards.item() == pytest.approx(0.25 * LN2) and ipo.rejected_rewards.item() == pytest.approx(
        -LN2 / 2
    )
    # beta 2/3 makes the 1.5 ln 2 to ln 2: sigma = 2/3
    normalized = length_normalized_loss(*HALVES, *TOKENS, beta=2 / 3)
    assert normalized.loss.item() == pytest.approx(math.log(1.5))
    assert normalized.chosen_rewards.item() == pytest.approx(LN2 / 3)
    # 1/2 a token on 2 tokens, 1/4 a token on 3
    averages = [torch.tensor([math.log(1 / 4)], dtype=F64), torch.tensor([math.log(1 / 64)], dtype=F64)]
    tokens = [torch.tensor([2]), torch.tensor([3])]
    # 2 ln 2 less a margin of ln 2: sigma = 2/3
    simpo = simpo_loss(*averages, *tokens, beta=2.0, margin=LN2)
    assert simpo.loss.item() == pytest.approx(math.log(1.5))
    assert [simpo.chosen_rewards.item(), simpo.rejected_rewards.item()] == pytest.approx([-2 * LN2, -4 * LN2])
    # odds 1 and 1/3, so sigma = 3/4; -ln 1/2 = ln 2
    orpo = orpo_loss(*averages, *tokens, beta=0.5)
    assert orpo.loss.item() == pytest.approx(LN2 + 0.5 * math.log(4 / 3))
    assert [orpo.chosen_rewards.item(), orpo.rejected_rewards.item()] == pytest.approx([-0.5 * LN2, -LN2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_finite_differences(kind: str):
    columns = SOME.columns()
    inputs = [c.requires_grad_() for c in columns[:2]]

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return pair_loss(kind, chosen, rejected, *columns[2:], beta=0.3, **options(kind)).loss

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", KINDS)
def test_large_values_and_their_gradients_stay_finite(kind: str, dtype: torch.dtype):
    # (chosen, rejected, their references); the first pair is wrong by thousands
    rows = [(-1e4, -1e-3, -50.0, -50.0), (-1e-3, -1e4, -50.0, -50.0), (0.0, 0.0, 0.0, 0.0), (0.0, -1e4, -1e4, 0.0)]
    rows += [(-1e4, 0.0, 0.0, -1e4), (-1e-7, -1e-7, -40.0, -40.0), (-1e4, -1e4, -1e4, -1e4)]
    chosen, rejected, *reference = (torch.tensor(x, dtype=dtype) for x in zip(*rows, strict=True))
    chosen.requires_grad_(), rejected.requires_grad_()
    tokens = torch.ones(len(rows), dtype=torch.int64)
    result = pair_loss(kind, chosen, rejected, *reference, tokens, tokens, beta=1.0, **options(kind))
    result.loss.sum().backward()
    assert all(bool(x.isfinite().all()) for x in (result.loss, chosen.grad, rejected.grad))
    assert result.loss[0] > 8000 and chosen.grad[0] <= -0.5


@pytest.mark.parametrize("kind", ["sigmoid", "length_normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_at_initialisation_the_loss_is_exactly_ln_2(kind: str, dtype: torch.dtype):
    columns = SOME.columns(dtype)
    result = pair_loss(kind, *columns[:2], *columns[:2], *columns[4:], beta=0.1)
    assert torch.equal(result.loss, torch.full((3,), LN2, dtype=dtype))
    assert result.chosen_rewards.tolist() == result.rejected_rewards.tolist() == [0, 0, 0]


def test_at_initialisation_of_the_others():
    columns = SOME.columns()
    expected = {"conservative": LN2, "robust": LN2, "hinge": 1.0, "ipo": 1 / (2 * 0.1) ** 2}
    for kind, value in expected.items():
        result = pair_loss(kind, *columns[:2], *columns[:2], *columns[4:], beta=0.1, **options(kind))
        assert result.loss.tolist() == pytest.approx([value] * 3), kind


def gradients(loss: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    inputs = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    return torch.autograd.grad(loss(*inputs).sum(), inputs)


@pytest.mark.parametrize("kind", SUMMED)
def test_swapping_a_pair_flips_its_gradient(kind: str):
    """At initialisation exactly; elsewhere DPO's two gradients have opposite signs, and their sizes add up to beta."""
    columns = SOME.columns()

    def loss(chosen: Tensor, rejected: Tensor, swapped: bool = False) -> Tensor:
        reference = columns[2:4][:: -1 if swapped else 1]
        return pair_loss(kind, chosen, rejected, *reference, *columns[4:], beta=0.3, **options(kind)).loss

    up, down = gradients(loss, columns[2], columns[3])
    again_down, again_up = gradients(lambda a, b: loss(a, b, swapped=True), columns[3], columns[2])
    assert bool((up < 0).all()) and torch.equal(up, -down)
    assert torch.equal(again_up, -up) and torch.equal(again_down, -down)
    if kind == "sigmoid":
        (up, _), (_, swapped) = (
            gradients(loss, *columns[:2]),
            gradients(lambda a, b: loss(a, b, swapped=True), columns[1], columns[0]),
        )
        assert bool((up < 0).all()) and bool((swapped > 0).all())
        assert (swapped - up).tolist() == pytest.approx([0.3] * 3)


def test_no_smoothing_is_plain_dpo_bit_for_bit():
    columns = SOME.columns(torch.float32)[:4]
    plain = sigmoid_loss(*columns, beta=0.3).loss
    for smoothed in (conservative_loss, robust_loss):
        assert torch.equal(smoothed(*columns, beta=0.3, label_smoothing=0.0).loss, plain)


@settings(max_examples=40, deadline=None)
@given(pairs(), st.sampled_from([0.05, 0.2, 0.45]))
def test_the_robust_loss_is_unbiased(p: Pairs, eps: float):
    """Over labels that are flipped with probability eps its mean is DPO's loss of the true labels."""
    w, v, w_ref, v_ref = p.columns()[:4]
    right = robust_loss(w, v, w_ref, v_ref, beta=0.5, label_smoothing=eps).loss
    flipped = robust_loss(v, w, v_ref, w_ref, beta=0.5, label_smoothing=eps).loss
    true = sigmoid_loss(w, v, w_ref, v_ref, beta=0.5).loss
    assert ((1 - eps) * right + eps * flipped).tolist() == pytest.approx(true.tolist(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_the_conservative_loss_is_least_where_the_confidence_is_that_of_the_labels(eps: float):
    best = torch.tensor([math.log((1 - eps) / eps)], dtype=F64)
    zero = torch.zeros(1, dtype=F64)

    def slope(h: Tensor) -> float:
        loss = lambda a, b: conservative_loss(a, b, zero, zero, beta=1.0, label_smoothing=eps).loss  # noqa: E731
        return gradients(loss, h, zero)[0].item()

    assert slope(best) == pytest.approx(0, abs=1e-12) and slope(best - 0.1) < -1e-3 < 1e-3 < slope(best + 0.1)


def repeated(p: Pairs, chosen: int, rejected: int) -> Pairs:
    """Each token of a response several times over: the same average, another sum."""
    return Pairs(
        [r * chosen for r in p.chosen],
        [r * rejected for r in p.rejected],
        [r * chosen for r in p.reference_chosen],
        [r * rejected for r in p.reference_rejected],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_summed_or_averaged(kind: str):
    plain = SOME.loss(kind, 0.5).loss.tolist()
    if kind in AVERAGED:
        assert repeated(SOME, 3, 1).loss(kind, 0.5).loss.tolist() == pytest.approx(plain, rel=1e-12)
        assert repeated(SOME, 1, 4).loss(kind, 0.5).loss.tolist() == pytest.approx(plain, rel=1e-12)
    else:
        assert repeated(SOME, 2, 2).loss(kind, 0.25).loss.tolist() == pytest.approx(plain, rel=1e-12)
        longer = repeated(SOME, 3, 1).loss(kind, 0.5).loss.tolist()
        assert all(abs(a - b) > 1e-3 for a, b in zip(longer, plain, strict=True))


def test_only_the_loss_carries_a_gradient():
    columns = [c.requires_grad_() for c in SOME.columns()[:2]] + SOME.columns()[2:]
    for kind in KINDS:
        result = pair_loss(kind, *columns, beta=0.3, **options(kind))
        assert result.loss.requires_grad and result.loss.shape == (3,), kind
        assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad, kind


def test_the_configuration_names_the_same_losses():
    assert set(get_args(DPOConfig.model_fields["loss"].annotation)) == {*KINDS, "kto"}


def test_the_reference_is_needed_by_all_but_two():
    chosen, rejected, _, _, chosen_tokens, rejected_tokens = SOME.columns()
    assert {"simpo", "orpo"} == REFERENCE_FREE_LOSSES
    for kind in KINDS:
        arguments = (kind, chosen, rejected, None, None, chosen_tokens, rejected_tokens)
        if kind in REFERENCE_FREE_LOSSES:
            alone = pair_loss(*arguments, beta=0.3, **options(kind)).loss
            assert torch.equal(alone, SOME.loss(kind, 0.3).loss)
        else:
            with pytest.raises(ValueError, match=f"'{kind}' needs the reference"):
                pair_loss(*arguments, beta=0.3, **options(kind))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("kto", {"beta": 0.1}, "'kto': expected one of 'sigmoid'"),
        ("simpo", {"beta": 0.1}, "needs its margin"),
        ("simpo", {"beta": 0.1, "simpo_margin": -0.5}, "margin of -0.5"),
        ("hinge", {"beta": 0.1, "label_smoothing": 0.1}, "'hinge', which has none"),
        ("robust", {"beta": 0.1, "label_smoothing": 0.5}, "below 0.5"),
        ("conservative", {"beta": 0.1, "label_smoothing": -0.1}, "below 0.5"),
        *[(kind, {"beta": beta, **options(kind)}, f"beta of {beta}") for kind in KINDS for beta in (0.0, math.nan)],
    ],
)
def test_refusals(kind: str, arguments: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        pair_loss(kind, *SOME.columns(), **arguments)


@pytest.mark.parametrize("kind", AVERAGED)
def test_a_response_without_tokens_has_no_average(kind: str):
    columns = SOME.columns()
    columns[5] = torch.tensor([1, 0, 2])
    with pytest.raises(ValueError, match=r"\[1, 0, 2\]"):
        pair_loss(kind, *columns, beta=0.3, **options(kind))


def test_adapted_beta():
    # target 0.1: up above it, down below 0.05, kept from one to the other
    cases = [(0.11, 0.22), (5.0, 0.22), (0.1, 0.2), (0.07, 0.2), (0.05, 0.2), (0.049, 0.18), (0.0, 0.18), (-0.01, 0.18)]
    assert [adapted_beta(0.2, kl, 0.1) for kl, _ in cases] == pytest.approx([beta for _, beta in cases])
    for kl, target, beta in [(math.nan, 0.1, 0.2), (math.inf, 0.1, 0.2), (0.1, 0.0, 0.2), (0.1, 0.1, 0.0)]:
        with pytest.raises(ValueError):
            adapted_beta(beta, kl, target)
