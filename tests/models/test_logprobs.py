"""Log-probabilities and entropies, in chunks or at once, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayrlhf.models.logprobs import token_logprobs_and_entropy

TOKENS, WIDTH, VOCABULARY = 23, 8, 50


def made(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = 2.0 * torch.randn(VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def definition(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax and -sum p log p, in float64."""
    x = logits.double() / temperature
    p = torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)
    return torch.log(p[torch.arange(len(targets)), targets]), -(p * torch.log(p)).sum(-1)


def mixture(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """A scalar in which both count, each token with another factor."""
    factors = torch.linspace(-1, 2, TOKENS, dtype=logprobs.dtype)
    return (factors * logprobs).sum() + (factors.flip(0) ** 2 * entropy).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
def test_values_and_gradients(chunk: int, temperature: float) -> None:
    hidden, weight, targets = made()
    found = token_logprobs_and_entropy(
        lambda h: h @ weight.T, hidden, targets, temperature=temperature, chunk_tokens=chunk, with_entropy=True
    )
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = definition(exact_hidden @ exact_weight.T, targets, temperature)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-6)
    mixture(*found).backward()
    mixture(*expected).backward()
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-5)


def test_only_logprobs_or_only_entropy_may_have_a_gradient() -> None:
    for which in (0, 1):
        hidden, weight, targets = made()
        found = token_logprobs_and_entropy(
            lambda h, w=weight: h @ w.T, hidden, targets, temperature=0.7, chunk_tokens=9, with_entropy=True
        )
        found[which].sum().backward()
        exact = hidden.detach().double().requires_grad_()
        definition(exact @ weight.detach().double().T, targets, 0.7)[which].sum().backward()
        torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_chunks_equal_the_whole_with_and_without_gradient() -> None:
    hidden, weight, targets = made()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            parts, whole = (
                token_logprobs_and_entropy(
                    lambda h: h @ weight.T, hidden, targets, temperature=0.7, chunk_tokens=n, with_entropy=True
                )
                for n in (5, TOKENS)
            )
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    hidden, weight, targets = made()
    seen: list[int] = []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return states @ weight.T

    found = token_logprobs_and_entropy(head, hidden, targets, temperature=1.0, chunk_tokens=6, with_entropy=False)
    assert seen == [6, 6, 6, 5]
    found[0].sum().backward()
    assert sorted(seen[4:]) == [6, 6, 6], "the backward pass computes the logits of all chunks but the last again"
    assert not found[1].any()


def test_softmax_is_in_float32_for_a_bfloat16_model() -> None:
    hidden, weight, targets = made(torch.bfloat16)
    found = token_logprobs_and_entropy(
        lambda h: h @ weight.T, hidden, targets, temperature=0.7, chunk_tokens=10, with_entropy=True
    )
    logits = (
        torch.cat([(hidden[i : i + 10] @ weight.T).detach() for i in range(0, TOKENS, 10)]).double().requires_grad_()
    )
    expected = definition(logits, targets, 0.7)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=5e-6)
    mixture(*found).backward()
    mixture(*expected).backward()
    assert hidden.grad.dtype == torch.bfloat16
    exact = logits.grad @ weight.detach().double()
    assert float((hidden.grad.double() - exact).norm() / exact.norm()) < 1e-2


def test_no_token_at_all() -> None:
    hidden, weight, targets = made()
    logprobs, entropy = token_logprobs_and_entropy(
        lambda h: h @ weight.T, hidden[:0], targets[:0], temperature=1.0, chunk_tokens=5, with_entropy=True
    )
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert not hidden.grad.any()
