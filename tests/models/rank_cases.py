"""What ranks do together; each function runs on all of them, with plain arguments and plain results."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.actors.critic import CriticTrainer
from rayrlhf.actors.language_model import LanguageModelTrainer
from rayrlhf.actors.policy import PolicyTrainer
from rayrlhf.actors.preference import PreferenceTrainer
from rayrlhf.actors.reward_trainer import RewardModelTrainer
from rayrlhf.actors.sft import SFTTrainer
from rayrlhf.actors.trainer import TrainerRole
from rayrlhf.batch import Batch
from rayrlhf.config import Config
from rayrlhf.config.offline import PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.models.export import named_weights
from rayrlhf.models.world import World


def as_columns(batch: Batch) -> dict[str, Any]:
    """A batch as it goes through a pipe."""
    return {"offsets": batch.offsets.numpy(), **{name: batch[name].numpy() for name in batch.keys()}}  # noqa: SIM118


def as_batch(columns: dict[str, Any]) -> Batch:
    tensors = {name: torch.from_numpy(values.copy()) for name, values in columns.items()}
    offsets = tensors.pop("offsets")
    token = {name: values for name, values in tensors.items() if len(values) == int(offsets[-1])}
    return Batch(offsets, token, {name: values for name, values in tensors.items() if name not in token})


def make_role(world: World, kind: str, path: str, settings: dict[str, Any], total_steps: int = 1000) -> TrainerRole:
    if kind == "sft":
        return SFTTrainer(world, SFTConfig.model_validate(settings), path, total_steps)
    if kind == "reward":
        return RewardModelTrainer(world, RewardModelConfig.model_validate(settings), path, total_steps)
    if kind == "preference":
        return PreferenceTrainer(world, PreferenceConfig.model_validate(settings), path, total_steps)
    config = Config.model_validate(settings)
    if kind == "critic":
        return CriticTrainer(world, config, path, total_steps)
    return PolicyTrainer(world, config, path, total_steps)


def weights_of(role: TrainerRole) -> dict[str, Tensor]:
    """All parameters of the role's model, whole, under the names that they have in it."""
    model = role.lm if isinstance(role, LanguageModelTrainer) else role.trainer.module
    parameters = dict(model.named_parameters())
    if role.trained.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    else:
        gathered = nullcontext()
    with gathered:
        return {name: p.detach().clone().float() for name, p in parameters.items()}


def with_budget(role: TrainerRole, tokens: int, packing: bool) -> None:
    role.trained = role.trained.model_copy(update={"tokens_per_micro_batch": tokens, "packing": packing})


def single_steps(
    world: World, kind: str, path: str, settings: dict[str, Any], columns: dict[str, Any], cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each case one optimizer step from the same start: how the weights moved, the metrics, the micro-batches.

    Each case has ``budget``, ``packing`` and ``parts``, the samples of each rank.
    """
    role, batch = make_role(world, kind, path, settings), as_batch(columns)
    folder = settings["run_dir"] + f"/{kind}-start"
    role.save(folder)
    before = weights_of(role)
    results = []
    for case in cases:
        role.load(folder)
        with_budget(role, case["budget"], case["packing"])
        mine = torch.tensor(case["parts"][world.rank], dtype=torch.int64)
        count = len(role.lay_out_training(batch.select(mine))) if len(mine) else 0
        metrics = role.update(batch, [[torch.tensor(p, dtype=torch.int64) for p in case["parts"]]], 1)
        after = weights_of(role)
        moved = {name: (before[name].double() - after[name].double()).numpy() for name in before}
        results.append({"moved": moved if world.rank == 0 else None, "metrics": metrics, "micro_batches": count})
    results[0]["before"] = {name: w.numpy() for name, w in before.items()}
    return results


def trained(
    world: World,
    kind: str,
    path: str,
    settings: dict[str, Any],
    columns: dict[str, Any],
    schedule: list[list[list[int]]],
    total_steps: int,
) -> dict[str, Any]:
    """Several optimizer steps, one `update` each: weights before and after, what is exported, metrics of each."""
    role, batch = make_role(world, kind, path, settings, total_steps), as_batch(columns)
    before = weights_of(role)
    metrics = [
        role.update(batch, [[torch.tensor(part, dtype=torch.int64) for part in parts]], k + 1)
        for k, parts in enumerate(schedule)
    ]
    result: dict[str, Any] = {"metrics": metrics, "steps_done": role.trainer.steps_done}
    result["before"] = {name: w.numpy() for name, w in before.items()}
    result["after"] = {name: w.numpy() for name, w in weights_of(role).items()}
    if isinstance(role, LanguageModelTrainer):
        exported = named_weights(role.lm, zero_stage=role.trained.zero_stage, group_bytes=20_000)
        result["exported"] = {name: w.float().clone().numpy() for name, w in exported}
        result["logprobs"] = role.token_logprobs(batch)["old_logprobs"].numpy()
        if role.peft is not None:
            result["without_adapters"] = role.token_logprobs(batch, adapters=False)["reference_logprobs"].numpy()
    return result


def interrupted(
    world: World, kind: str, path: str, settings: dict[str, Any], columns: dict[str, Any], parts: list[list[list[int]]]
) -> dict[str, Any]:
    """Train on all of ``parts``; and train on half, save, load into a new role, train on the rest. Weights of both."""
    batch = as_batch(columns)
    schedule = [[torch.tensor(p, dtype=torch.int64) for p in ranks] for ranks in parts]
    half = len(schedule) // 2
    straight = make_role(world, kind, path, settings, len(schedule))
    straight.update(batch, schedule[:half], 1)
    folder = settings["run_dir"] + f"/{kind}-half"
    written = straight.save(folder)
    first = straight.update(batch, schedule[half:], 2)
    resumed = make_role(world, kind, path, settings, len(schedule))
    resumed.load(folder)
    second = resumed.update(batch, schedule[half:], 2)
    same = {name: bool(torch.equal(w, weights_of(resumed)[name])) for name, w in weights_of(straight).items()}
    return {
        "same": same,
        "written": {name: (size, Path(folder, name).stat().st_size) for name, size in written.items()},
        "metrics": (first, second),
        "steps": (straight.trainer.steps_done, resumed.trainer.steps_done),
    }


def save_and_export(world: World, kind: str, path: str, settings: dict[str, Any], folder: str) -> None:
    role = make_role(world, kind, path, settings)
    assert isinstance(role, LanguageModelTrainer | RewardModelTrainer)
    role.save_model(folder)
