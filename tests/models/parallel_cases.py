"""What ranks do together that share sequences or weights; each function runs on all of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.critic import CriticTrainer
from rayrlhf.batch import Batch
from rayrlhf.config.trainers import TrainedConfig
from rayrlhf.errors import InputRefused
from rayrlhf.models.adapters import add_lora
from rayrlhf.models.engine import TrainEngine
from rayrlhf.models.export import named_weights, weight_layout
from rayrlhf.models.heads import PolicyModel
from rayrlhf.models.layout import ModelInput, PromptSharing, micro_batches, pair_micro_batches
from rayrlhf.models.loading import load_causal_lm, load_critic
from rayrlhf.models.world import World
from tests.models.making import ragged_tokens
from tests.models.pairs import pair_batch
from tests.models.rank_cases import as_batch, make_role

EXTRA = (2, 3)
"""Lengths of samples that are shorter than four ranks."""


def ragged() -> Batch:
    """Eight ragged samples and two of two and three tokens."""
    tokens, masks = ragged_tokens()
    generator = torch.Generator().manual_seed(9)
    tokens = tokens + [torch.randint(3, 64, (n,), generator=generator) for n in EXTRA]
    masks = masks + [torch.arange(n) >= 1 for n in EXTRA]
    return Batch.from_samples({"tokens": tokens, "response_mask": masks})


def weighted(batch: Batch) -> Batch:
    """With a column ``weight``, how much each token's result counts in the loss: differently, and with both signs."""
    return batch.with_columns({"weight": torch.sin(torch.arange(batch.num_tokens).float())})


def make_engine(world: World, kind: str, path: str, trained: dict[str, Any]) -> TrainEngine:
    """An engine over a policy or a critic."""
    config = TrainedConfig.model_validate({"dtype": "float32", "ranks": world.size, **trained})
    model: Any
    if kind == "policy":
        lm = load_causal_lm(path, config, dtype=torch.float32)
        if config.lora is not None:
            add_lora(lm, config.lora, 3)
        model = PolicyModel(lm, 7)
    else:
        model = load_critic(path, config, num_layers=None, dtype=torch.float32)
        with torch.no_grad():
            model.head.weight.copy_(torch.cos(torch.arange(model.head.weight.numel()).float())[None] / 4)
    per_shard = config.sequence_parallel * config.tensor_parallel
    shared = replace(world, ranks_per_shard=per_shard)
    return TrainEngine(model, config, shared, total_steps=100, timeout_s=60.0)


def made_loss(shard: Batch, kind: str) -> Any:
    """Not linear in what the model computes, and not the same for any two tokens."""

    def loss(inputs: ModelInput, outputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        w, first = shard["weight"][inputs.where], outputs[0]
        total = (w * first + 0.3 * w * first.square()).sum()
        total = total + (0.5 * (w.abs() * outputs[1]).sum() if kind == "policy" else outputs[1].sum())
        return total / 100, {"seen": torch.tensor(float(len(w))), "sum": first.sum()}

    return loss


def whole_weights(engine: TrainEngine) -> dict[str, Tensor]:
    """All parameters of the model."""
    return {
        name: weight.double().clone()
        for name, weight in named_weights(engine.module, zero_stage=engine.config.zero_stage)
    }


def steps(
    world: World,
    kind: str,
    path: str,
    trained: dict[str, Any],
    *,
    parts: list[list[int]],
    budget: int,
    packing: bool = False,
    number: int = 1,
    pairs: bool = False,
) -> dict[str, Any]:
    """Results of each token before training; then optimizer steps. ``parts``: the samples of each shard of the ranks."""
    engine = make_engine(world, kind, path, trained)
    shard = weighted(pair_batch() if pairs else ragged()).select(torch.tensor(parts[engine.world.shard]))
    if pairs:
        inputs = pair_micro_batches(shard, budget, sharing=PromptSharing(2**20, 2**20))
        assert inputs and all(i.attention_mask is not None for i in inputs)
    else:
        inputs = micro_batches(shard, budget, packing)
    forward: Any = engine.engine
    if kind == "policy":
        forward = partial(engine.engine, temperature=0.7, with_entropy=True)
    found = torch.zeros(shard.num_tokens)
    for micro, output in zip(inputs, engine.infer(inputs, forward), strict=False):
        found[micro.where] = output[0]
    counts = engine.global_counts(len(shard))
    before = whole_weights(engine)
    outcomes = [engine.optimizer_step(inputs, forward, made_loss(shard, kind)) for _ in range(number)]
    after = whole_weights(engine)
    return {
        "results": found.numpy(),
        "moved": {name: (before[name] - after[name]).numpy() for name in before},
        "norms": [o.grad_norm for o in outcomes],
        "sums": [o.sums for o in outcomes],
        "counts": counts,
        "micro_batches": len(inputs),
    }


def parts_held(world: World, path: str, trained: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of this rank's weights in the first layer, and of what is whole."""
    names = make_engine(world, "policy", path, trained).module.named_parameters()
    return {name.split(".")[-2]: tuple(p.shape) for name, p in names if "layers.1" not in name}


def interrupted(
    world: World, path: str, trained: dict[str, Any], folder: str, parts: list[list[int]]
) -> dict[str, Any]:
    """Four steps; and two steps, saved, loaded into another engine, two more. Weights of both, and what export says of them."""
    engine = make_engine(world, "policy", path, trained)
    shard = weighted(ragged()).select(torch.tensor(parts[engine.world.shard]))
    inputs = micro_batches(shard, 60, False)

    def run(engine: TrainEngine, number: int) -> list[float]:
        forward = partial(engine.engine, temperature=0.7, with_entropy=True)
        loss = made_loss(shard, "policy")
        return [engine.optimizer_step(inputs, forward, loss).grad_norm for _ in range(number)]

    norms = run(engine, 2)
    engine.save(folder)
    norms += run(engine, 2)
    other = make_engine(world, "policy", path, trained)
    other.load(folder)
    again = run(other, 2)
    straight, resumed = whole_weights(engine), whole_weights(other)
    layout = {name: shape for name, shape, _ in weight_layout(engine.module)}
    return {
        "same": all(torch.equal(straight[name], resumed[name]) for name in straight),
        "norms": (norms, again),
        "weights": {name: w.numpy() for name, w in straight.items()},
        "layout": layout,
    }


def updated(
    world: World, kind: str, path: str, settings: dict[str, Any], columns: dict[str, Any], parts: list[list[list[int]]]
) -> dict[str, Any]:
    """A role of a PPO run: what it computes of all samples, and one update of several optimizer steps."""
    section = settings[kind]
    per_shard = section.get("sequence_parallel", 1) * section.get("tensor_parallel", 1)
    role, batch = make_role(replace(world, ranks_per_shard=per_shard), kind, path, settings), as_batch(columns)
    before = role.values(batch) if isinstance(role, CriticTrainer) else role.token_logprobs(batch)  # type: ignore[attr-defined]
    schedule = [[torch.tensor(part, dtype=torch.int64) for part in shards] for shards in parts]
    metrics = role.update(batch, schedule, 1)
    return {
        "before": {name: before[name].numpy() for name in before.keys()},
        "metrics": metrics,
        "weights": {name: w.numpy() for name, w in whole_weights(role.trainer).items()},
    }


def refused(world: World, kind: str, path: str, trained: dict[str, Any]) -> list[str]:
    """What is said against an engine."""
    try:
        make_engine(world, kind, path, trained)
    except InputRefused as error:
        return error.problems
    return []


def loads_the_compiler(world: World, path: str) -> bool:
    """Whether a process that trains has loaded torch's compiler for it."""
    for trained in ({"zero_stage": 1}, {"zero_stage": 3, "dtype": "bfloat16"}):
        steps(world, kind="policy", path=path, trained=trained, parts=[list(range(10))], budget=1000)
    return "torch._inductor.compile_fx" in sys.modules
