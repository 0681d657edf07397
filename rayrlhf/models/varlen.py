"""Attention over samples of unlike lengths that stand one behind the other in one row, without a mask over all pairs.

On a GPU it is torch's flash kernel for variable lengths (`torch.nn.attention.varlen`, from torch 2.11 on); on a CPU, which has
no such kernel, it is attention sample by sample. Importing this module registers it in transformers as ``varlen``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = ["VARLEN", "bounds_of", "refuse_unknown", "varlen_attention"]

VARLEN = "varlen"
"""The name in transformers and in the configuration."""

UNKNOWN = {
    "softcap": "caps its attention logits",
    "s_aux": "has attention sinks",
    "position_bias": "adds a bias to its attention logits",
}
"""What a model may ask of its attention by a keyword that isn't known here, and what it means."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each of n samples.

    Args:
        query: [T, H, D].
        key: [T, G, D]; H is a multiple of G, and neighbouring queries share a key.
        value: [T, G, D].
        bounds: int32 [n + 1], where each sample begins, and T.
        longest: tokens of the longest sample.
        scale: of the products; None: 1 / sqrt(D).
        window: a token sees so many tokens, itself included; None: all before it.

    Returns:
        [T, H, D].

    Raises:
        ValueError: on a GPU, for a type that the kernel doesn't take.
    """
    if query.device.type == "cuda":
        return _by_kernel(query, key, value, bounds, longest, scale, window)
    return _by_sample(query, key, value, bounds, scale, window)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the attention varlen computes in bfloat16 on a GPU, not in {query.dtype}")
    how: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:  # from torch 2.12 on
        how["enable_gqa"] = True
    elif groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    # (left, right): tokens that are seen beside one's own. (-1, 0) is plain causal attention.
    sides = (-1 if window is None else window - 1, 0)
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=sides, **how
    )
    return output


def _by_sample(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None, window: int | None
) -> Tensor:
    ends = bounds.tolist()
    outputs = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        length = end - start
        mask = None
        if window is not None and window < length:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = mask.tril().triu(1 - window)
        q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def bounds_of(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where samples begin in rows of which each begins with one, from their tokens' places in them.

    Args:
        position_ids: int64 [B, L]; 0 at each sample's first token, and nowhere else.

    Returns:
        int32 [n + 1], over the flat rows, the last entry is B * L; and the longest sample's tokens.
    """
    flat = position_ids.flatten()
    starts = torch.nonzero(flat == 0).flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])])
    return bounds.to(torch.int32), int(bounds.diff().max())


def refuse_unknown(module: nn.Module, how: dict[str, Any], known: tuple[str, ...] = ()) -> None:
    """Say no to what would otherwise be left out in silence.

    Args:
        module: the attention layer.
        how: the keywords that it passes.
        known: those of `UNKNOWN` that the caller deals with.

    Raises:
        ValueError: naming it.
    """
    for name, meaning in UNKNOWN.items():
        if name not in known and how.get(name) is not None:
            raise ValueError(f"{type(module).__name__} {meaning} ({name}), which this attention can't do")
    if how.get("dropout") or how.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} asks for dropout, or for tokens that see later ones")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, H, L, D], key and value [B, G, L, D] -> [B, L, H, D].

    Samples are told by ``cu_seq_lens_q`` and ``max_length_q``, or else by ``position_ids``; without either each row is one.
    """
    refuse_unknown(module, how)
    if attention_mask is not None:
        raise ValueError("the attention varlen takes no mask")
    rows, heads, length, _ = query.shape
    if cu_seq_lens_q is not None and max_length_q is not None:
        bounds, longest = cu_seq_lens_q, max_length_q
    elif position_ids is not None and position_ids.shape == (rows, length):
        bounds, longest = bounds_of(position_ids)
    else:
        bounds, longest = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length, length
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    output = varlen_attention(q, k, v, bounds, longest, scale=scaling, window=sliding_window)
    return output.view(rows, length, heads, -1), None


AttentionInterface.register(VARLEN, _attention)
