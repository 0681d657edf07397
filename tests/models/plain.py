"""The definitions, written out sample by sample and token by token in float64, over plain Hugging Face forwards."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.batch import Batch


def plain_lm(path: Path | str) -> Any:
    """The model as Hugging Face gives it, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double().eval()


def logprobs_and_entropies(lm: Any, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of one sample: entry t is about token t given those before it; entry 0 is 0."""
    logits = lm(input_ids=tokens[None]).logits[0].double() / temperature
    log_p = torch.log(torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum(-1, keepdim=True))
    logprobs = [torch.zeros((), dtype=torch.float64)]
    entropies = [torch.zeros((), dtype=torch.float64)]
    for t in range(1, len(tokens)):
        logprobs.append(log_p[t - 1, tokens[t]])
        entropies.append(-sum(p.exp() * p for p in log_p[t - 1]))
    return torch.stack(logprobs), torch.stack(entropies)


def column(batch: Batch, name: str, sample: int) -> list[Any]:
    start, end = batch.offsets[sample : sample + 2].tolist()
    return batch[name][start:end].tolist()


def ppo_loss(lm: Any, batch: Batch, samples: Iterable[int], ppo: Any, temperature: float) -> tuple[Tensor, dict]:
    """The loss of one optimizer step over ``samples`` (token_mean), and the sums that its metrics are made of."""
    total = torch.zeros((), dtype=torch.float64)
    found = {"tokens": 0, "clipped": 0, "ppo_kl": 0.0, "entropy": 0.0, "surrogate": 0.0}
    low, high = 1 - ppo.clip_range, 1 + (ppo.clip_range_high or ppo.clip_range)
    for i in samples:
        tokens = torch.tensor(column(batch, "tokens", i))
        logprobs, entropies = logprobs_and_entropies(lm, tokens, temperature)
        names = ("response_mask", "old_logprobs", "rollout_logprobs", "reference_logprobs", "advantages")
        mask, olds, rollouts, references, advantages = (column(batch, name, i) for name in names)
        for t in range(len(tokens)):
            if not mask[t]:
                continue
            ratio, a = torch.exp(logprobs[t] - olds[t]), advantages[t]
            r = float(ratio.detach())
            bounded = min(max(r, low), high)
            surrogate = -a * ratio if -a * r >= -a * bounded else torch.tensor(-a * bounded)
            cap = ppo.importance_sampling_cap
            weight = 1.0 if cap is None else min(math.exp(olds[t] - rollouts[t]), cap)
            total = total + weight * surrogate - ppo.entropy_coef * entropies[t]
            total = total + ppo.kl_loss_coef * (logprobs[t] - references[t]) ** 2 / 2
            found["tokens"] += 1
            found["surrogate"] += weight * float(surrogate.detach())
            found["clipped"] += int(-a * bounded > -a * r)
            found["ppo_kl"] += r - 1 - math.log(r)
            found["entropy"] += float(entropies[t].detach())
    return total / found["tokens"], found


def plain_values(backbone: Any, weight: Tensor, bias: Tensor, tokens: Tensor) -> Tensor:
    """Entry t: what the head reads from the state before token t (0 for t = 0); the last entry: after the last token."""
    states = backbone(input_ids=tokens[None]).last_hidden_state[0].double()
    values = [(state * weight).sum() + bias for state in states]
    return torch.stack([torch.zeros((), dtype=torch.float64), *values])


def critic_loss(scalar: nn.Module, batch: Batch, samples: Iterable[int], clip: float) -> Tensor:
    """1/2 max((V - R)^2, (clip(V) - R)^2), the mean over the response tokens of ``samples``."""
    losses = []
    for i in samples:
        tokens = torch.tensor(column(batch, "tokens", i))
        head: Any = scalar.head
        values = plain_values(scalar.backbone, head.weight[0], head.bias[0], tokens)
        mask, olds, returns = (column(batch, name, i) for name in ("response_mask", "values", "returns"))
        for t in range(len(tokens)):
            if mask[t]:
                free = (values[t] - returns[t]) ** 2
                near = values[t].clamp(olds[t] - clip, olds[t] + clip)
                losses.append(torch.maximum(free, (near - returns[t]) ** 2) / 2)
    return torch.stack(losses).sum() / len(losses)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By name, in float64; a parameter that the loss doesn't reach has none."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||found - expected|| / ||expected|| of all tensors.

    A tensor with less than a hundredth of the whole norm is measured against that hundredth.
    """
    assert found.keys() >= expected.keys(), sorted(expected.keys() - found.keys())
    whole = math.sqrt(sum(float(e.double().norm()) ** 2 for e in expected.values()))
    return max(
        float((found[n].double() - e.double()).norm() / max(float(e.double().norm()), 1e-2 * whole))
        for n, e in expected.items()
    )
