"""GAE against its quadratic definition and worked numbers; baselines and whitening against Python's statistics."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms import gae, group_normalized, last_true, leave_one_out, per_token, token_rewards, whiten

F64 = torch.float64
COEFFICIENTS = [0.0, 0.9, 0.95, 1.0]
numbers = st.floats(-5, 5, allow_nan=False)


def gae_by_definition(rewards, values, mask, offsets, gamma, lam, final_values):
    """Eq. 16 as it stands: A_t = sum_l (gamma lam)^l delta_{t+l}, over the tokens of the mask, one sample at a time."""
    advantages = [0.0] * len(mask)
    for i in range(len(offsets) - 1):
        steps = [t for t in range(offsets[i], offsets[i + 1]) if mask[t]]
        v = [values[t] for t in steps] + [final_values[i]]
        delta = [rewards[t] + gamma * v[k + 1] - v[k] for k, t in enumerate(steps)]
        for k, t in enumerate(steps):
            advantages[t] = math.fsum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(steps)))
    return advantages


@st.composite
def episodes(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    size = {"min_size": offsets[-1], "max_size": offsets[-1]}
    rewards, values = draw(st.lists(numbers, **size)), draw(st.lists(numbers, **size))
    mask = draw(st.lists(st.booleans(), **size))
    final = draw(st.lists(numbers, min_size=len(lengths), max_size=len(lengths)))
    return rewards, values, mask, offsets, final


def run_gae(rewards, values, mask, offsets, gamma, lam, final=None, dtype=F64):
    return gae(
        torch.tensor(rewards, dtype=dtype),
        torch.tensor(values, dtype=dtype),
        torch.tensor(mask, dtype=torch.bool),
        torch.tensor(offsets, dtype=torch.int64),
        gamma,
        lam,
        None if final is None else torch.tensor(final, dtype=dtype),
    )


def test_gae_worked_example():
    # prompt 1 token, then response | masked | response; gamma = lam = 1/2
    # last: delta = 4 - 2 = 2; first: delta = 1 + 0.5 * 2 - 6 = -4, A = -4 + 0.25 * 2 = -3.5
    advantages, returns = run_gae([9, 1, 9, 4], [9, 6, 9, 2], [0, 1, 0, 1], [0, 4], 0.5, 0.5)
    assert advantages.tolist() == [0, -3.5, 0, 2]
    assert returns.tolist() == [0, 2.5, 0, 4]
    # bootstrapped with V = 8: last delta = 4 + 4 - 2 = 6, first A = -4 + 0.25 * 6 = -2.5
    advantages, returns = run_gae([9, 1, 9, 4], [9, 6, 9, 2], [0, 1, 0, 1], [0, 4], 0.5, 0.5, [8])
    assert advantages.tolist() == [0, -2.5, 0, 6]
    assert returns.tolist() == [0, 3.5, 0, 8]


@pytest.mark.parametrize("gamma", COEFFICIENTS)
@pytest.mark.parametrize("lam", COEFFICIENTS)
def test_gae_is_its_definition(gamma, lam):
    @settings(max_examples=15, deadline=None)
    @given(episodes())
    def check(episode):
        rewards, values, mask, offsets, final = episode
        expected = gae_by_definition(rewards, values, mask, offsets, gamma, lam, final)
        advantages, returns = run_gae(rewards, values, mask, offsets, gamma, lam, final)
        assert advantages.tolist() == pytest.approx(expected, abs=1e-9)
        targets = [a + v if m else 0.0 for a, v, m in zip(expected, values, mask, strict=True)]
        assert returns.tolist() == pytest.approx(targets, abs=1e-9)
        terminal = gae_by_definition(rewards, values, mask, offsets, gamma, lam, [0.0] * len(final))
        assert run_gae(rewards, values, mask, offsets, gamma, lam)[0].tolist() == pytest.approx(terminal, abs=1e-9)

    check()


@settings(max_examples=40, deadline=None)
@given(episodes(), st.sampled_from([0.9, 1.0]))
def test_lambda_one_is_discounted_return_less_value(episode, gamma):
    rewards, values, mask, offsets, _ = episode
    advantages, returns = run_gae(rewards, values, mask, offsets, gamma, 1.0)
    for i in range(len(offsets) - 1):
        steps = [t for t in range(offsets[i], offsets[i + 1]) if mask[t]]
        for k, t in enumerate(steps):
            discounted = math.fsum(gamma**j * rewards[s] for j, s in enumerate(steps[k:]))
            assert float(returns[t]) == pytest.approx(discounted, abs=1e-9)
            assert float(advantages[t]) == pytest.approx(discounted - values[t], abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(episodes(), st.data())
def test_gae_ignores_what_is_outside_the_mask(episode, data):
    """Other numbers on prompts and masked tokens, or no such tokens at all: the same advantages."""
    rewards, values, mask, offsets, final = episode
    advantages, returns = run_gae(rewards, values, mask, offsets, 0.9, 0.95, final)
    assert all(a == 0 and g == 0 for a, g, m in zip(advantages.tolist(), returns.tolist(), mask, strict=True) if not m)
    noise = data.draw(st.sampled_from([7.0, -100.0, math.nan, math.inf]))
    spoilt = [r if m else noise for r, m in zip(rewards, mask, strict=True)]
    disturbed = [v if m else noise for v, m in zip(values, mask, strict=True)]
    again = run_gae(spoilt, disturbed, mask, offsets, 0.9, 0.95, final)
    assert torch.equal(again[0], advantages) and torch.equal(again[1], returns)
    kept = [t for t, m in enumerate(mask) if m]
    shorter = [sum(mask[: offsets[i]]) for i in range(len(offsets))]
    bare = run_gae([rewards[t] for t in kept], [values[t] for t in kept], [1] * len(kept), shorter, 0.9, 0.95, final)
    assert torch.equal(bare[0], advantages[kept])


@settings(max_examples=40, deadline=None)
@given(episodes(), st.integers(0, 5), st.integers(1, 12))
def test_a_fully_masked_sample_changes_no_advantage(episode, where, length):
    rewards, values, mask, offsets, final = episode
    where = min(where, len(final))
    at = offsets[where]

    def insert(column, entries):
        return column[:at] + entries + column[at:]

    more = insert(mask, [False] * length)
    longer = offsets[: where + 1] + [o + length for o in offsets[where:]]
    finals = final[:where] + [3.0] + final[where:]
    plain, _ = run_gae(rewards, values, mask, offsets, 0.9, 0.95, final)
    padded, _ = run_gae(
        insert(rewards, [8.0] * length), insert(values, [8.0] * length), more, longer, 0.9, 0.95, finals
    )
    chosen = torch.tensor(more, dtype=torch.bool)
    assert torch.equal(padded[chosen], plain[torch.tensor(mask, dtype=torch.bool)])
    rest, before = whiten(padded, chosen)[chosen], whiten(plain, torch.tensor(mask, dtype=torch.bool))
    assert torch.equal(rest, before[torch.tensor(mask, dtype=torch.bool)])


def test_truncated_responses():
    """terminal, bootstrap and mask for a truncated first sample, beside a second one that ended."""
    mask, offsets = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool), torch.tensor([0, 3, 5])
    values = torch.tensor([0.0, 2.0, 3.0, 0.0, 4.0])
    rewards = token_rewards(torch.tensor([1.0, 5.0]), torch.zeros(5), mask, offsets, 0.1)
    truncated, after = torch.tensor([True, False]), torch.tensor([6.0, 7.0])
    terminal, _ = gae(rewards, values, mask, offsets, 1.0, 1.0)
    assert terminal.tolist() == [0, 1 - 2, 1 - 3, 0, 5 - 4]
    bootstrap, _ = gae(rewards, values, mask, offsets, 1.0, 1.0, torch.where(truncated, after, 0.0))
    assert bootstrap.tolist() == [0, 1 + 6 - 2, 1 + 6 - 3, 0, 5 - 4]
    without = mask & torch.tensor([False, False, False, True, True])
    assert last_true(without, offsets).tolist() == [-1, 4]
    rewards = token_rewards(torch.tensor([1.0, 5.0]), torch.zeros(5), without, offsets, 0.1)
    masked, returns = gae(rewards, values, without, offsets, 1.0, 1.0)
    assert masked.tolist() == [0, 0, 0, 0, 1] and returns.tolist() == [0, 0, 0, 0, 5]


def test_gae_of_nothing_and_types():
    for offsets in ([0], [0, 0], [0, 3]):
        n = offsets[-1]
        advantages, returns = run_gae([1.0] * n, [1.0] * n, [0] * n, offsets, 1.0, 0.95)
        assert advantages.tolist() == [0] * n and returns.tolist() == [0] * n
    assert run_gae([1.0], [1.0], [1], [0, 1], 1.0, 1.0, dtype=torch.float32)[0].dtype == torch.float32


def test_gae_of_long_float32_responses_agrees_to_the_last_digits():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3000, generator=generator) * 0.01, torch.randn(3000, generator=generator)
    mask, offsets = torch.ones(3000, dtype=torch.bool), torch.tensor([0, 2900, 3000])
    advantages, _ = gae(rewards, values, mask, offsets, 1.0, 0.95)
    running, expected = 0.0, []
    for t in reversed(range(2900)):
        upcoming = float(values[t + 1]) if t < 2899 else 0.0
        running = float(rewards[t]) + upcoming - float(values[t]) + 0.95 * running
        expected.append(running)
    assert advantages[:2900].tolist() == pytest.approx(expected[::-1], rel=1e-6, abs=1e-6)


# -- groups -------------------------------------------------------------------------------------------------------


def test_leave_one_out_worked_example():
    scores, groups = torch.tensor([1.0, 10.0, 3.0, 20.0, 8.0]), torch.tensor([4, 9, 4, 9, 4])
    # group 4: 1 - 5.5, 3 - 4.5, 8 - 2; group 9: 10 - 20, 20 - 10
    assert leave_one_out(scores, groups).tolist() == [-4.5, -10, -1.5, 10, 6]


def test_group_normalized_worked_example():
    scores, groups = torch.tensor([1.0, 0.0, 5.0, 1.0, 9.0]), torch.tensor([7, 2, 7, 2, 7])
    # group 7: mean 5, unbiased deviation 4; group 2: mean 1/2, deviation sqrt(1/2)
    assert group_normalized(scores, groups).tolist() == pytest.approx([-1, -(0.5**0.5), 0, 0.5**0.5, 1], abs=1e-6)


def test_a_variance_as_small_as_the_floor():
    # 0 and 2e-4: unbiased variance 2e-8, with the floor 3e-8, so 1e-4 becomes 1 / sqrt(3)
    x, third = torch.tensor([0.0, 2e-4], dtype=F64), 3**-0.5
    assert group_normalized(x, torch.tensor([1, 1])).tolist() == pytest.approx([-third, third])
    assert whiten(x, torch.tensor([True, True])).tolist() == pytest.approx([-third, third])


@st.composite
def grouped(draw):
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    ids = draw(st.lists(st.integers(-50, 50), min_size=len(sizes), max_size=len(sizes), unique=True))
    groups = draw(st.permutations([g for g, n in zip(ids, sizes, strict=True) for _ in range(n)]))
    # a coarse grid, so that the variance is either zero or well above its floor
    scores = draw(st.lists(st.integers(-50, 50).map(lambda k: k / 5), min_size=len(groups), max_size=len(groups)))
    return scores, list(groups)


@settings(max_examples=60, deadline=None)
@given(grouped(), st.randoms(use_true_random=False))
def test_group_baselines_in_any_order(members, random):
    scores, groups = members
    order = list(range(len(scores)))
    random.shuffle(order)
    s, g = torch.tensor(scores, dtype=F64), torch.tensor(groups)
    rloo, grpo = leave_one_out(s, g), group_normalized(s, g)
    assert torch.allclose(leave_one_out(s[order], g[order]), rloo[order], atol=1e-12)
    assert torch.allclose(group_normalized(s[order], g[order]), grpo[order], atol=1e-12)
    pairs = list(zip(scores, groups, strict=True))
    for i, (score, group) in enumerate(pairs):
        others = [x for j, (x, h) in enumerate(pairs) if h == group and j != i]
        assert float(rloo[i]) == pytest.approx(score - statistics.fmean(others), abs=1e-9)
        deviation = statistics.stdev([*others, score])
        expected = (score - statistics.fmean([*others, score])) / deviation if deviation > 1e-9 else 0.0
        assert float(grpo[i]) == pytest.approx(expected, abs=2e-6)


def test_a_dropped_member_is_as_if_it_never_was():
    scores, groups = torch.tensor([1.0, 2.0, 4.0, 100.0, 0.0, 6.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    keep = torch.tensor([0, 1, 2, 4, 5])
    assert leave_one_out(scores[keep], groups[keep]).tolist() == [1 - 3, 2 - 2.5, 4 - 1.5, -6, 6]
    # the other group doesn't notice
    assert torch.equal(group_normalized(scores[keep], groups[keep])[3:], group_normalized(scores, groups)[4:])


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6 + 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_group_without_variance_is_zero(value, dtype):
    scores = torch.full((7,), value, dtype=dtype)
    normalized = group_normalized(scores, torch.tensor([3] * 7))
    assert normalized.tolist() == [0] * 7 and normalized.dtype == dtype
    assert leave_one_out(scores, torch.tensor([3] * 7)).abs().max() <= 1e-9


@pytest.mark.parametrize("function", [leave_one_out, group_normalized])
def test_a_group_of_one_is_refused(function):
    with pytest.raises(ValueError, match="only one: 5, 8"):
        function(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([8, 2, 5, 2]))


def test_per_token():
    mask, offsets = torch.tensor([0, 1, 1, 0, 0, 1, 0], dtype=torch.bool), torch.tensor([0, 3, 3, 5, 7])
    assert per_token(torch.tensor([2.0, 3.0, 4.0, 5.0]), mask, offsets).tolist() == [0, 2, 2, 0, 0, 5, 0]


# -- whitening ----------------------------------------------------------------------------------------------------


def test_whiten_worked_example():
    # 1, 5, 9: mean 5, unbiased variance 16
    x, mask = torch.tensor([1.0, 77.0, 5.0, 9.0]), torch.tensor([True, False, True, True])
    assert whiten(x, mask).tolist() == pytest.approx([-1, 0, 0, 1], abs=1e-6)
    assert whiten(x, mask, shift_mean=False).tolist() == pytest.approx([4, 0, 5, 6], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=20), st.data())
def test_whiten_is_the_global_masked_formula(entries, data):
    x, mask = torch.tensor([v for v, _ in entries], dtype=F64), torch.tensor([m for _, m in entries])
    inside = [v for v, m in entries if m]
    found = whiten(x, mask)
    if len(inside) < 2:
        assert found.tolist() == [0] * len(entries)
        return
    scale = 1 / math.sqrt(statistics.variance(inside) + 1e-8)
    expected = [(v - statistics.fmean(inside)) * scale if m else 0.0 for v, m in entries]
    assert found.tolist() == pytest.approx(expected, abs=1e-7)
    # However the tokens lie on ranks, put together they are whitened alike.
    order = data.draw(st.permutations(range(len(entries))))
    assert torch.allclose(whiten(x[order], mask[order]), found[order], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_whiten_without_variance(dtype):
    for n in (0, 1, 5):
        x, mask = torch.full((6,), 0.1, dtype=dtype), torch.arange(6) < n
        whitened = whiten(x, mask)
        assert whitened.abs().max() < 1e-9 and whitened.dtype == dtype
        kept = whiten(x, mask, shift_mean=False)
        assert kept.tolist() == pytest.approx([0.1] * n + [0.0] * (6 - n), abs=1e-7)
