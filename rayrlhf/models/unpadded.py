"""Ragged samples without padding on a CPU: only attention sees a padded grid, all other layers see the tokens alone.

A batch of unlike lengths runs as one row of all its tokens. Each attention layer spreads queries, keys and values over a
grid with one sequence a row, padded on the right, where causal attention can't see the padding, and collects its results
from there. A token may stand in two sequences: the tokens of a prompt that two responses share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Grid", "collect", "spread"]


@dataclass(frozen=True)
class Grid:
    """T tokens of a micro-batch, and where they stand in a grid of R sequences of W cells.

    Cells are numbered flat, row by row.
    """

    input_ids: Tensor
    """int64 [1, T]."""
    position_ids: Tensor
    """int64 [1, T], each token's place in its sequence."""
    width: int
    """W."""
    token_in: Tensor
    """int64 [R * W], the token in each cell; any token where there is none, which is behind its sequence's end."""
    cell_of: Tensor
    """int64 [T], the (first) cell of each token."""
    twice: Tensor
    """int64 [D], tokens that stand in a second cell too."""
    second_cell: Tensor
    """int64 [D], that cell."""
    token_at: Tensor
    """int64 [B * L], the token at each position of the `ModelInput`'s own rows; any where they are padded."""


class _Spread(torch.autograd.Function):
    """[T, F] -> [R * W, F]. What cells without a token pass back isn't wanted: nothing is ever collected from them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return values.index_select(0, grid.token_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grid = ctx.grid
        # Gathered the other way round, which takes a fraction of the time of adding up over all cells.
        total = grad.index_select(0, grid.cell_of)
        if len(grid.twice):
            total.index_add_(0, grid.twice, grad.index_select(0, grid.second_cell))
        return total, None


class _Collect(torch.autograd.Function):
    """[R * W, F] -> [T, F], each token from its first cell."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        return values.index_select(0, grid.cell_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grid = ctx.grid
        return grad.new_zeros(len(grid.token_in), grad.shape[1]).index_copy_(0, grid.cell_of, grad), None


def spread(values: Tensor, grid: Grid) -> Tensor:
    """Queries, keys or values [1, H, T, D] -> [R, H, W, D]."""
    heads, size = values.shape[1], values.shape[3]
    cells: Tensor = _Spread.apply(values[0].transpose(0, 1).reshape(-1, heads * size), grid)  # type: ignore[assignment]
    return cells.view(-1, grid.width, heads, size).transpose(1, 2)


def collect(values: Tensor, grid: Grid) -> Tensor:
    """Attention's results [R, W, H, D] -> [1, T, H, D]."""
    heads, size = values.shape[2:]
    tokens: Tensor = _Collect.apply(values.reshape(-1, heads * size), grid)  # type: ignore[assignment]
    return tokens.view(1, -1, heads, size)
