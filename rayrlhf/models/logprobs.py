"""Log-probabilities of sampled tokens without the logits of all tokens at once.

The softmax is in float32 whatever the model's type. Logits exist for one chunk of tokens at a time; with more chunks
than one, the backward pass computes the logits of each but the last again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["LogprobsAndEntropy", "token_logprobs_and_entropy"]


class LogprobsAndEntropy(torch.autograd.Function):
    """log p(token) and the entropy of p = softmax(logits / temperature), with few passes over the logits.

    With x = logits / temperature, Z = logsumexp(x): log p_i = x_i - Z and H = -sum_i p_i log p_i. Their derivatives are
    d log p_k / d x_i = [i = k] - p_i and dH / d x_i = -p_i (x_i - Z + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """logits [N, V] of any float type, targets int64 [N] -> float32 [N], [N] (zeros without ``with_entropy``)."""
        scaled = logits.float()
        if temperature != 1.0:
            scaled = scaled / temperature
        log_z = torch.logsumexp(scaled, dim=-1)
        logprobs = scaled.gather(1, targets[:, None])[:, 0] - log_z
        if with_entropy:
            # Not as Z - sum_i p_i x_i: a rounding error of p would count times the whole size of the logits.
            log_p = scaled - log_z[:, None] if scaled is logits else scaled.sub_(log_z[:, None])
            entropy = -torch.einsum("nv,nv->n", log_p.exp(), log_p)
        else:
            entropy = torch.zeros_like(logprobs)
        # The logits are kept in their own type: half the memory where the model is in bfloat16.
        ctx.save_for_backward(logits, targets, log_z, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, targets, log_z, entropy = ctx.saved_tensors
        scaled = logits.float() / ctx.temperature
        log_p = scaled.sub_(log_z[:, None])
        p = log_p.exp()
        factor = torch.zeros_like(log_z)[:, None]
        if grad_logprobs is not None:
            factor = factor - grad_logprobs[:, None]
        if grad_entropy is not None:
            factor = factor - grad_entropy[:, None] * (log_p + entropy[:, None])
        grad = p.mul_(factor)
        if grad_logprobs is not None:
            grad.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
        return (grad / ctx.temperature if ctx.temperature != 1.0 else grad).to(logits.dtype), None, None, None


def token_logprobs_and_entropy(
    output_logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution that it was drawn from.

    Args:
        output_logits: hidden states [n, H] -> logits [n, V].
        hidden: [N, H], the state before each target.
        targets: int64 [N].
        temperature: the logits are divided by it.
        chunk_tokens: logits exist for so many tokens at a time.
        with_entropy: whether the entropy is wanted; zeros otherwise.

    Returns:
        Two float32 tensors [N].
    """

    def one_chunk(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return LogprobsAndEntropy.apply(output_logits(states), wanted, temperature, with_entropy)  # type: ignore[return-value]

    if len(targets) <= chunk_tokens:
        return one_chunk(hidden, targets)
    parts = []
    for start in range(0, len(targets), chunk_tokens):
        states, wanted = hidden[start : start + chunk_tokens], targets[start : start + chunk_tokens]
        # The last one is the first whose logits the backward pass needs, so computing them again would save nothing.
        if torch.is_grad_enabled() and start + chunk_tokens < len(targets):
            parts.append(checkpoint(one_chunk, states, wanted, use_reentrant=False))
        else:
            parts.append(one_chunk(states, wanted))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
