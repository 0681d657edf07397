"""Faster kernels for a CPU, with the results of torch's own to rounding.

Two of torch's choices cost time there. Attention's backward pass in bfloat16 takes two to three times as
long as in float32 (heads of 64, up to 256 tokens), and more accurate it isn't. And float32 products go to MKL, which on
AMD processors is slower than oneDNN for the product with a weight and for the gradient of its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["has_onednn", "onednn_linear", "with_cpu_kernels"]

SHORT = 256
"""Up to so many tokens attention in float32 is the faster one."""


def has_onednn() -> bool:
    """Whether this torch has oneDNN's float32 product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N], in float32, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _LinearProduct(torch.autograd.Function):
    """y = x W^T + b; dx = dy W by oneDNN too, dW = dy^T x by MKL, which is the faster one for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            onednn_linear(grad, weight.t()) if wanted[0] else None,
            rows.t() @ x.flatten(0, -2) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


class OneDnnLinear(nn.Linear):
    """A linear layer whose float32 products on a CPU are oneDNN's; anything else is torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        on_cpu = input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        if not on_cpu or input.numel() == 0 or input.dim() < 2:
            return super().forward(input)
        return _LinearProduct.apply(input, self.weight, self.bias)  # type: ignore[return-value]


def _short_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """torch's scaled dot-product attention; on a CPU short bfloat16 sequences are attended to in float32.

    query [B, H, L, D], key and value [B, G, L, D] -> [B, L, H, D].
    """
    narrow = query.dtype
    if query.device.type != "cpu" or narrow != torch.bfloat16 or key.shape[2] > SHORT:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **how)
    return output.to(narrow), None


AttentionInterface.register("sdpa_short_in_float32", _short_in_float32)
AttentionMaskInterface.register("sdpa_short_in_float32", sdpa_mask)


def with_cpu_kernels(model: Any) -> Any:
    """Let a Hugging Face model, which has no adapters yet, use these kernels where its tensors are on a CPU."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_short_in_float32")
    if has_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model
