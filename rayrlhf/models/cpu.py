"""Faster kernels for a CPU, with the results of torch's own to rounding.

Padding costs time there as much as tokens do, so ragged samples are computed without it (`rayrlhf.models.unpadded`). And two
of torch's choices cost time. Attention's backward pass in bfloat16 takes two to three times as
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

from rayrlhf.models.unpadded import Grid, collect, spread

__all__ = ["has_onednn", "longest_unpadded", "onednn_linear", "run_unpadded", "with_cpu_kernels"]

SHORT = 256
"""Up to so many tokens attention in float32 is the faster one."""
LONGEST = "_rayrlhf_longest_unpadded"
"""Attribute of a backbone, see `longest_unpadded`."""


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


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    grid: Grid | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """torch's scaled dot-product attention; on a CPU short bfloat16 sequences are attended to in float32.

    query [B, H, L, D], key and value [B, G, L, D] -> [B, L, H, D]; with a ``grid`` B is 1, L is T, and the tokens attend
    causally within the sequences of the grid.
    """
    narrow = query.dtype
    length = key.shape[2] if grid is None else grid.width
    widened = query.device.type == "cpu" and narrow == torch.bfloat16 and length <= SHORT
    if grid is not None:
        query, key, value = (spread(part, grid) for part in (query, key, value))
        attention_mask = None
    if widened:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    return (output if grid is None else collect(output, grid)).to(narrow), None


AttentionInterface.register("sdpa_for_cpu", _attention)
AttentionMaskInterface.register("sdpa_for_cpu", sdpa_mask)


def run_unpadded(backbone: Any, grid: Grid) -> Tensor:
    """Last hidden states [T, H] of a grid's tokens."""
    # A mask of four dimensions is passed on as it is, so that none is made; `_attention` doesn't look at it.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    how = {"position_ids": grid.position_ids, "attention_mask": no_mask, "grid": grid}
    return backbone(input_ids=grid.input_ids, use_cache=False, **how).last_hidden_state[0]


def longest_unpadded(backbone: Any) -> int:
    """Tokens of the longest sequence that a model computes right without padding; 0: none.

    It is found out by `with_cpu_kernels`.
    """
    return getattr(backbone, LONGEST, 0)


def _find_longest_unpadded(backbone: Any) -> int:
    """By a trial: not every model hands the grid down to its attention, and some look across sequences elsewhere."""
    text = backbone.config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = min([w for w in windows if w], default=2**62)
    ids = torch.arange(1, 10) % text.vocab_size
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])
    none = torch.zeros(0, dtype=torch.int64)
    cells = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0])
    places = torch.arange(9)
    grid = Grid(ids[None], positions[None], 6, cells, places, none, none, cells)
    with torch.no_grad():
        try:
            found = run_unpadded(backbone, grid).float()
        except (TypeError, ValueError, RuntimeError, IndexError):  # a model that takes no such arguments
            return 0
        apart = [backbone(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in ids.split([6, 3])]
    expected = torch.cat(apart).float()
    tolerance = 1e-4 if backbone.dtype == torch.float32 else 5e-2
    same = found.shape == expected.shape and torch.allclose(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    return longest if same and longest >= 6 else 0


def with_cpu_kernels(model: Any) -> Any:
    """Let a Hugging Face model, which has no adapters yet, use these kernels where its tensors are on a CPU."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_for_cpu")
        setattr(model.base_model, LONGEST, _find_longest_unpadded(model.base_model))
    if has_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model
