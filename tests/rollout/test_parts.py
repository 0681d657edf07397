"""Which part of a tensor each process of an engine holds, worked out from shapes; no engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayrlhf.actors.rollout_common import ModelFacts
from rayrlhf.actors.rollout_parts import Comparison, Parts, region
from rayrlhf.errors import RunFailed
from rayrlhf.weights import Manifest, plan_buckets


def rows(part: tuple[slice, ...] | None, whole: int) -> list[int]:
    assert part is not None
    return list(range(whole))[part[0]]


def test_regions_by_hand() -> None:
    assert region((6, 4), (6, 4), 1, 2) == (slice(6), slice(4))  # whole in each
    assert [rows(region((6, 4), (2, 4), rank, 3), 6) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [region((6, 4), (6, 1), rank, 4)[1] for rank in range(4)] == [slice(n, n + 1) for n in range(4)]
    # Two key-value heads of three rows over four processes: neighbours hold the same one.
    assert [rows(region((6, 4), (3, 4), rank, 4), 6) for rank in range(4)] == [
        [0, 1, 2],
        [0, 1, 2],
        [3, 4, 5],
        [3, 4, 5],
    ]
    assert rows(region((7,), (7,), 2, 3), 7) == list(range(7))
    assert region((), (), 0, 1) == ()


def test_padded_vocabularies_by_hand() -> None:
    # 10 tokens, padded to 16, over two and over four processes.
    assert [rows(region((10, 3), (8, 3), rank, 2, padded=True), 10) for rank in range(2)] == [list(range(8)), [8, 9]]
    parts = [rows(region((10, 3), (4, 3), rank, 4, padded=True), 10) for rank in range(4)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]
    assert region((10, 3), (4, 3), 0, 2, padded=True) is None  # too few for all tokens
    assert region((10, 3), (8, 2), 0, 2, padded=True) is None


@pytest.mark.parametrize(
    "whole, local, size", [((6, 4), (6,), 1), ((6, 4), (4, 4), 2), ((6, 4), (5, 4), 2), ((6,), (0,), 2)]
)
def test_shapes_that_do_not_tell(whole: tuple[int, ...], local: tuple[int, ...], size: int) -> None:
    assert region(whole, local, 0, size) is None


class Fused(nn.Module):
    """A model as vLLM makes them: queries, keys and values in one parameter, experts in two."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, heads: int, groups: int, rows: int, experts: int):
        super().__init__()
        self.qkv_proj = nn.Linear(3, (heads + 2 * groups) * rows, bias=True)
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.w13_weight = nn.Parameter(torch.randn(experts, 4, 3))
        self.mlp.experts.w2_weight = nn.Parameter(torch.randn(experts, 3, 2))


def facts(shapes: dict[str, tuple[int, ...]]) -> ModelFacts:
    return ModelFacts(None, 10, (1,), shapes, "embed.weight", None)


def entries_of(shapes: dict[str, tuple[int, ...]]) -> Manifest:
    layout = [(name, shape, torch.float32) for name, shape in shapes.items()]
    return Manifest(1, "float32", plan_buckets(layout, bucket_bytes=10**6, dtype="float32"), True)


SHAPES = {
    "q_proj.weight": (8, 3), "k_proj.weight": (2, 3), "v_proj.weight": (2, 3),
    "q_proj.bias": (8,), "k_proj.bias": (2,), "v_proj.bias": (2,),
    **{f"mlp.experts.{e}.{n}.weight": s for e in (0, 1) for n, s in (("w1", (4, 3)), ("w3", (4, 3)), ("w2", (3, 4)))},
}  # fmt: skip
"""Four query heads and one key-value head of two rows; two experts with an inner layer of four."""


def test_members_of_fused_parameters_over_two_processes() -> None:
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for rank in (0, 1):
        model = Fused(heads=2, groups=1, rows=2, experts=2)
        half = slice(4 * rank, 4 * rank + 4)
        with torch.no_grad():
            for kind in ("weight", "bias"):
                q, k, v = (whole[f"{n}_proj.{kind}"] for n in "qkv")
                getattr(model.qkv_proj, kind).copy_(torch.cat([q[half], k, v]))
            inner = slice(2 * rank, 2 * rank + 2)
            for e in (0, 1):
                gate, up, down = (whole[f"mlp.experts.{e}.{n}.weight"] for n in ("w1", "w3", "w2"))
                model.mlp.experts.w13_weight[e] = torch.cat([gate[inner], up[inner]])
                model.mlp.experts.w2_weight[e] = down[:, inner]
        parts = Parts(model, facts(SHAPES), rank, 2)
        for entry in entries_of(SHAPES).entries():
            held = parts.find(entry)
            assert held is not None and torch.equal(held.local, whole[entry.name][held.where]), entry.name
            assert held.local.numel() == whole[entry.name].numel() // (1 if entry.name[0] in "kv" else 2)

        def check(model: Fused = model, rank: int = rank) -> None:
            comparison = Comparison(Parts(model, facts(SHAPES), rank, 2), facts(SHAPES))
            assert dict(comparison.watch(entries_of(SHAPES), iter(whole.items()))).keys() == SHAPES.keys()
            comparison.check(1, "it")

        check()
        for change, name in (
            (model.qkv_proj.weight[5], "k_proj.weight"),
            (model.qkv_proj.bias[6:7], "v_proj.bias"),
            (model.mlp.experts.w13_weight[1, 3], "mlp.experts.1.w3.weight"),
            (model.mlp.experts.w2_weight[0], "mlp.experts.0.w2.weight"),
        ):
            kept = change.detach().clone()
            change.data += 1
            with pytest.raises(RunFailed, match=f"of version 1 it holds other weights than the trainer sent: {name}$"):
                check()
            change.data.copy_(kept)
        check()


def test_what_can_not_be_found_is_named() -> None:
    model = Fused(heads=2, groups=1, rows=2, experts=2)
    shapes = {**SHAPES, "o_proj.weight": (3, 3)}
    comparison = Comparison(Parts(model, facts(shapes), 0, 2), facts(shapes))
    tensors = ((name, torch.zeros(shape)) for name, shape in shapes.items())
    list(comparison.watch(entries_of(shapes), tensors))
    with pytest.raises(RunFailed, match="can't be verified: it doesn't tell where it keeps o_proj.weight$"):
        comparison.check(1, "it")
