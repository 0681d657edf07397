"""Policy and value loss, importance weights and loss aggregation: worked numbers, gradients, float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import aggregation_weights, approximate_kl, importance_weights, policy_loss, value_loss

F64 = torch.float64
AGGREGATIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_denominator"]


def surrogate(ratios, advantages, **options):
    """Loss and gradient with respect to log pi, for ratios that are given."""
    logp = torch.tensor([math.log(r) for r in ratios], dtype=F64, requires_grad=True)
    result = policy_loss(logp, torch.zeros(len(ratios), dtype=F64), torch.tensor(advantages, dtype=F64), **options)
    result.loss.sum().backward()
    return result, logp.grad.tolist()


def test_policy_loss_worked_example():
    # clip 0.2 below, 0.3 above
    ratios = [1.0, 1.25, 1.4, 0.9, 0.5, 1.0, 1.25, 1.4, 0.9, 0.5]
    advantages = [2.0, 2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0, -2.0]
    result, gradient = surrogate(ratios, advantages, clip_range=0.2, clip_range_high=0.3)
    assert result.loss.tolist() == pytest.approx([-2, -2.5, -2.6, -1.8, -1, 2, 2.5, 2.8, 1.8, 1.6])
    # d(-A r)/d log pi = -A r where nothing is clipped
    assert gradient == pytest.approx([-2, -2.5, 0, -1.8, -1, 2, 2.5, 2.8, 1.8, 0])
    assert result.clipped.tolist() == [g == 0 for g in gradient]
    assert result.ratio.tolist() == pytest.approx(ratios) and not result.ratio.requires_grad


def test_the_upper_range_is_the_lower_one_unless_given():
    assert surrogate([1.25], [1.0], clip_range=0.2)[0].loss.tolist() == pytest.approx([-1.2])
    assert surrogate([1.25], [1.0], clip_range=0.2, clip_range_high=0.24)[0].loss.tolist() == pytest.approx([-1.24])


def test_dual_clip_worked_example():
    # c = 3: with A = -2 the loss ends at 6, with A = 2 nothing changes
    ratios, advantages = [2.9, 3.1, 10.0, 10.0, 0.5], [-2.0, -2.0, -2.0, 2.0, -2.0]
    result, gradient = surrogate(ratios, advantages, clip_range=0.2, dual_clip=3.0)
    assert result.loss.tolist() == pytest.approx([5.8, 6, 6, -2.4, 1.6])
    assert gradient == pytest.approx([5.8, 0, 0, 0, 0])
    assert result.clipped.tolist() == [False, True, True, True, True]
    with pytest.raises(ValueError, match="above 1"):
        surrogate([1.0], [1.0], clip_range=0.2, dual_clip=1.0)


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-4, 4).filter(lambda x: min(abs(x - math.log(r)) for r in (0.8, 1.3, 3.0)) > 1e-3),
    st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3),
    st.sampled_from([None, 3.0]),
)
def test_policy_gradient_by_finite_differences_and_flat_where_clipped(log_ratio, advantage, dual):
    def loss(x: float) -> float:  # the definition, without tensors
        r = math.exp(x)
        value = max(-advantage * r, -advantage * min(max(r, 0.8), 1.3))
        return min(value, -dual * advantage) if dual and advantage < 0 else value

    options = {"clip_range": 0.2, "clip_range_high": 0.3, "dual_clip": dual}
    result, gradient = surrogate([math.exp(log_ratio)], [advantage], **options)
    assert result.loss.item() == pytest.approx(loss(log_ratio), rel=1e-9, abs=1e-12)
    numeric = (loss(log_ratio + 1e-6) - loss(log_ratio - 1e-6)) / 2e-6
    assert gradient[0] == pytest.approx(numeric, rel=1e-5, abs=1e-5)
    r = math.exp(log_ratio)
    flat = (advantage > 0 and r > 1.3) or (advantage < 0 and (r < 0.8 or (dual is not None and r > dual)))
    assert (gradient[0] == 0) == flat == bool(result.clipped)


def test_first_minibatch_is_reinforce_with_advantages():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, dtype=F64, generator=generator, requires_grad=True)
    actions = torch.tensor([0, 3, 2, 4, 1, 1])
    advantages = torch.randn(6, dtype=F64, generator=generator)
    logp = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
    for dual in (None, 3.0):
        result = policy_loss(logp, logp.detach(), advantages, clip_range=0.2, dual_clip=dual)
        assert result.ratio.tolist() == [1] * 6 and not result.clipped.any()
        assert approximate_kl(logp, logp.detach()).tolist() == [0] * 6
        (found,) = torch.autograd.grad(result.loss.sum(), logits, retain_graph=True)
        # d log softmax_a / d logits = onehot(a) - softmax, written out
        onehot = torch.eye(5, dtype=F64)[actions]
        expected = -advantages[:, None] * (onehot - logits.detach().softmax(-1))
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("log_ratio", [100.0, 1000.0, -1000.0])
def test_clipping_stays_flat_where_the_ratio_would_overflow(log_ratio):
    logp = torch.tensor([log_ratio], requires_grad=True)
    result = policy_loss(logp, torch.zeros(1), torch.tensor([math.copysign(1.0, log_ratio)]), clip_range=0.2)
    result.loss.sum().backward()
    assert logp.grad.tolist() == [0] and math.isfinite(result.loss.item())


def test_value_loss_worked_example():
    # eps 0.2. V_old = 1; R = 2: V = 1.5 is nearer than its clip 1.2, so the clip's larger error counts
    values = torch.tensor([1.5, 1.1, 0.5, 1.5, 3.5], dtype=F64, requires_grad=True)
    old, returns = torch.ones(5, dtype=F64), torch.tensor([2.0, 2.0, 2.0, 0.0, 2.0], dtype=F64)
    result = value_loss(values, old, returns, 0.2)
    # 0.8^2/2; 0.9^2/2; 1.5^2/2 (clip: 1.2^2/2); 1.5^2/2 (clip: 1.2^2/2); 1.5^2/2 (clip: 0.8^2/2)
    assert result.loss.tolist() == pytest.approx([0.32, 0.405, 1.125, 1.125, 1.125])
    assert result.clipped.tolist() == [True, False, False, False, False]
    result.loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([0, -0.9, -1.5, 1.5, 1.5])
    free = value_loss(values, old, returns, None)
    assert free.loss.tolist() == pytest.approx([0.125, 0.405, 1.125, 1.125, 1.125]) and not free.clipped.any()


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 1))
def test_value_loss_takes_the_larger_half_square(value, old, target, eps):
    near = min(max(value, old - eps), old + eps)
    expected = max((value - target) ** 2, (near - target) ** 2) / 2
    found = value_loss(*(torch.tensor([x], dtype=F64) for x in (value, old, target)), eps)
    assert float(found.loss) == pytest.approx(expected, abs=1e-12)
    assert float(found.loss) >= (value - target) ** 2 / 2 - 1e-12


def test_values_within_the_range_are_never_counted_as_clipped():
    generator = torch.Generator().manual_seed(2)
    old, values = torch.randn(2, 20000, generator=generator) * 0.05
    near = (values - old).abs() < 0.19
    old, values = old[near], values[near]
    assert (old + (values - old) != values).any()  # the other way to write the clip moves values within the range
    returns = values + torch.randn(len(values), generator=generator) * 0.01
    assert not value_loss(values, old, returns, 0.2).clipped.any()


# -- importance weights -------------------------------------------------------------------------------------------


def test_importance_weights():
    rollout = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, 0.0])
    old = torch.tensor([-1.0, -1.0 + math.log(1.5), -0.1, -1.0 - math.log(4), 300.0, -300.0]).requires_grad_()
    weights = importance_weights(old, rollout, 2.0)
    assert weights.tolist() == pytest.approx([1, 1.5, 2, 0.25, 2, math.exp(-20)], rel=1e-6)
    assert weights[0] == 1 and not weights.requires_grad and weights.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=10), st.floats(1, 5))
def test_importance_weights_are_the_capped_ratio(pairs, cap):
    old, rollout = (torch.tensor(x, dtype=F64) for x in zip(*pairs, strict=True))
    expected = [min(math.exp(max(o - r, -20)), cap) for o, r in pairs]
    assert importance_weights(old, rollout, cap).tolist() == pytest.approx(expected, rel=1e-9)
    assert importance_weights(old, old.clone(), cap).tolist() == [1] * len(pairs)


# -- aggregation --------------------------------------------------------------------------------------------------


def aggregate_by_definition(losses: list[list[float]], aggregation: str, denominator: float) -> float:
    """The four definitions over the response tokens of each sample, in plain float64."""
    counted = [x for x in losses if x]
    if not counted:
        return 0.0
    if aggregation == "token_mean":
        return math.fsum(y for x in counted for y in x) / sum(map(len, counted))
    if aggregation == "sequence_mean_token_mean":
        return math.fsum(math.fsum(x) / len(x) for x in counted) / len(counted)
    if aggregation == "sequence_mean_token_sum":
        return math.fsum(math.fsum(x) for x in counted) / len(counted)
    return math.fsum(y for x in counted for y in x) / denominator


def aggregate(samples, aggregation, parts, dtype=F64) -> float:
    """The weights' way: each part is a micro-batch of some rank; N and B are those of the whole."""
    num_tokens = sum(m for sample in samples for _, m in sample)
    num_sequences = sum(any(m for _, m in sample) for sample in samples)
    total = 0.0
    for part in parts:
        chosen = [samples[i] for i in part]
        flat = [entry for sample in chosen for entry in sample]
        weights = aggregation_weights(
            torch.tensor([m for _, m in flat], dtype=torch.bool),
            torch.tensor([sum(map(len, chosen[:i])) for i in range(len(chosen) + 1)]),
            aggregation,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            denominator=37.0 if aggregation == "fixed_denominator" else None,
            dtype=dtype,
        )
        total += float((weights * torch.tensor([y for y, _ in flat], dtype=dtype)).sum())
    return total


sample_strategy = st.lists(st.tuples(st.floats(-5, 5), st.booleans()), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(sample_strategy, min_size=1, max_size=6), st.data())
def test_aggregation_is_its_definition_however_the_step_is_cut(samples, data):
    order = data.draw(st.permutations(range(len(samples))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=3)))
    edges = [0, *cuts, len(samples)]
    parts = [order[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    losses = [[y for y, m in sample if m] for sample in samples]
    for aggregation in AGGREGATIONS:
        expected = aggregate_by_definition(losses, aggregation, 37.0)
        assert aggregate(samples, aggregation, parts) == pytest.approx(expected, abs=1e-9)
        # a fully masked sample more, and nothing changes, denominators included
        extended = [*samples, [(9.0, False)] * 4]
        assert aggregate(extended, aggregation, [*parts, [len(samples)]]) == pytest.approx(expected, abs=1e-9)


def test_aggregations_worked_example_and_they_differ():
    # tokens of loss 1, 2, 3 in one sample, 10 in another, none in a third
    samples = [[(7.0, False), (1.0, True), (2.0, True), (3.0, True)], [(10.0, True)], [(5.0, False)]]
    found = {name: aggregate(samples, name, [[0, 1, 2]], torch.float32) for name in AGGREGATIONS}
    expected = {
        "token_mean": 16 / 4,
        "sequence_mean_token_mean": (2 + 10) / 2,
        "sequence_mean_token_sum": (6 + 10) / 2,
        "fixed_denominator": 16 / 37,
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert len({round(x, 3) for x in found.values()}) == 4


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_is_the_same_for_any_micro_batches_and_order(aggregation):
    """Through a shared parameter: the gradient of one step, whole and cut up, with ragged lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 1, 8, 3, 2, 7]
    features = [torch.randn(n, 4, dtype=F64, generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in lengths]
    masks[4][:] = False
    n_tokens, n_sequences = int(sum(m.sum() for m in masks)), sum(bool(m.any()) for m in masks)

    def gradient(parts):
        parameter = torch.arange(4, dtype=F64).requires_grad_()
        for part in parts:
            offsets = torch.tensor([0, *torch.tensor([lengths[i] for i in part]).cumsum(0).tolist()])
            weights = aggregation_weights(
                torch.cat([masks[i] for i in part]),
                offsets,
                aggregation,
                num_tokens=n_tokens,
                num_sequences=n_sequences,
                denominator=11.0 if aggregation == "fixed_denominator" else None,
                dtype=F64,
            )
            (weights * torch.tanh(torch.cat([features[i] for i in part]) @ parameter)).sum().backward()
        return parameter.grad

    whole = gradient([[0, 1, 2, 3, 4, 5]])
    assert whole.abs().max() > 1e-3
    for parts in ([[5, 3, 1], [0, 2, 4]], [[0], [1], [2], [3], [4], [5]], [[4], [2, 0, 1, 5, 3]]):
        assert torch.allclose(gradient(parts), whole, rtol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_learn_from_gives_zero_weights(aggregation):
    denominator = 4.0 if aggregation == "fixed_denominator" else None
    for offsets in ([0], [0, 0], [0, 2, 3]):
        weights = aggregation_weights(
            torch.zeros(offsets[-1], dtype=torch.bool),
            torch.tensor(offsets),
            aggregation,
            num_tokens=0,
            num_sequences=0,
            denominator=denominator,
        )
        assert weights.tolist() == [0] * offsets[-1] and weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("aggregation", "sizes", "message"),
    [
        ("mean", {"num_tokens": 2, "num_sequences": 1}, "expected 'token_mean'"),
        ("fixed_denominator", {"num_tokens": 2, "num_sequences": 1}, "denominator None"),
        ("fixed_denominator", {"num_tokens": 2, "num_sequences": 1, "denominator": 0.0}, "above 0"),
        ("token_mean", {"num_tokens": 2, "num_sequences": 1, "denominator": 3.0}, "belongs to 'fixed_denominator'"),
        ("token_mean", {"num_tokens": 1, "num_sequences": 1}, "more than the 1 tokens"),
        ("token_mean", {"num_tokens": 2, "num_sequences": 0}, "in 0 sequences"),
    ],
)
def test_aggregation_refuses(aggregation, sizes, message):
    with pytest.raises(ValueError, match=message):
        aggregation_weights(torch.tensor([True, True]), torch.tensor([0, 2]), aggregation, **sizes)
