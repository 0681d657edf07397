"""What ranks do together in the tests of ZeRO-3, of offloading and of frozen models; each runs on all of them."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rayrlhf.actors.reference import ReferenceModel
from rayrlhf.actors.reward import NamedSource, RewardScorer
from rayrlhf.config import Config
from rayrlhf.config.schema import ScorerProcesses, ScoreSource
from rayrlhf.config.trainers import FrozenConfig, ModelConfig
from rayrlhf.models.distributed import join_group
from rayrlhf.models.heads import PolicyModel
from rayrlhf.models.loading import (
    DTYPES,
    check_output_head,
    load_causal_lm,
    load_critic,
    load_reward_model,
    prompt_sharing,
)
from rayrlhf.models.residence import tensors_within
from rayrlhf.models.world import World
from rayrlhf.models.zero import Partitioner, frozen_settings, partitioner_of, whole
from tests.models.rank_cases import as_batch, make_role, weights_of


class PeakMemory:
    """The largest anonymous memory of this process while the block runs, in bytes: what isn't a file's pages, which the
    system can take back at any time. Looked at every millisecond."""

    def __enter__(self) -> PeakMemory:
        self.begin = self.peak = _anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.is_set():
            self.peak = max(self.peak, _anonymous_bytes())
            time.sleep(0.001)

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()
        self.end = _anonymous_bytes()
        self.peak = max(self.peak, self.end)  # it may have grown since the last look


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Within it memory of 64 KiB and more is given back to the system when it is freed, as it always is where tensors are
    larger than 32 MiB; else what the C library keeps in hand would be counted too."""
    mmap_threshold = -3  # of malloc.h
    libc = ctypes.CDLL(None)
    assert libc.mallopt(mmap_threshold, 1 << 16) == 1
    gc.collect()
    libc.malloc_trim(0)
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, 1 << 25)


def partitioner(world: World, dtype: str = "float32") -> Partitioner:
    return partitioner_of(world, frozen_settings(world, dtype, "none"), DTYPES[dtype], 100.0)


def loading_peaks(world: World, path: str, in_parts: bool) -> dict[str, int]:
    """Bytes of memory beyond what there was: the most while a model is loaded, and when it is."""
    join_group(world, 100.0)
    zero = partitioner(world) if in_parts else None
    # What the libraries take once isn't the model's.
    load_causal_lm(str(Path(path).parent / "little"), ModelConfig(dtype="float32"), dtype=torch.float32, zero=zero)
    with freed_at_once(), PeakMemory() as memory:
        lm = load_causal_lm(path, ModelConfig(dtype="float32"), dtype=torch.float32, zero=zero)
        check_output_head(lm)
    del lm
    return {"peak": memory.peak - memory.begin, "after": memory.end - memory.begin}


def same_weights(world: World, path: str, kind: str, dtype: str, num_layers: int | None = None) -> dict[str, Any]:
    """Names of the weights which differ between a model that is loaded in parts and one that is loaded whole; what the checks
    at loading find of both."""
    zero, settings = partitioner(world, dtype), ModelConfig(dtype=dtype)  # type: ignore[arg-type]
    found: list[Any] = []
    for how in (zero, None):
        if kind == "lm":
            model: Any = load_causal_lm(path, settings, dtype=DTYPES[dtype], zero=how)
            check_output_head(model)
            body = model.base_model
        elif kind == "critic":
            model = load_critic(path, settings, num_layers=num_layers, dtype=DTYPES[dtype], zero=how)
            body = model.backbone
        else:
            model = load_reward_model(path, settings, dtype=DTYPES[dtype], zero=how)
            body = model.backbone
        found.append((model, prompt_sharing(body, settings), body._rayrlhf_longest_unpadded))
    (parts, *of_parts), (plain, *of_plain) = found
    expected = dict(plain.named_parameters(remove_duplicate=False))
    got = dict(parts.named_parameters(remove_duplicate=False))
    assert got.keys() == expected.keys()
    tied = {n for n, p in got.items() for m, q in got.items() if n != m and p is q}
    assert tied == {n for n, p in expected.items() for m, q in expected.items() if n != m and p is q}
    local = sum(getattr(p, "ds_tensor", p).numel() for p in parts.parameters())
    with whole(parts.parameters()):
        differing = [n for n, p in got.items() if p.dtype != expected[n].dtype or not torch.equal(p, expected[n])]
    buffers = dict(parts.named_buffers())
    differing += [n for n, b in plain.named_buffers() if not torch.equal(b, buffers[n])]
    return {
        "differing": differing,
        "trials": of_parts == of_plain,
        "share": local / sum(p.numel() for p in plain.parameters()),
        "tied": sorted(tied),
    }


def frozen_role(world: World, kind: str, path: str, settings: dict[str, Any], **how: Any) -> Any:
    """A reference, an evaluation's model or a scorer."""
    config = Config.model_validate(settings)
    if kind == "reference":
        reference = config.reference.model_copy(update=how)  # type: ignore[union-attr]
        return ReferenceModel(world, config.model_copy(update={"reference": reference}), path)
    if kind == "measure":
        measure = FrozenConfig(dtype="float32", **how)
        return ReferenceModel(world, SimpleNamespace(reference=measure, rollout=config.rollout), path)  # type: ignore[arg-type]
    sources = [NamedSource("one", ScoreSource(model=path)), NamedSource("two", ScoreSource(model=path), -3.0)]
    return RewardScorer(world, ScorerProcesses(**how), path, sources)


def frozen_results(
    world: World,
    kind: str,
    path: str,
    settings: dict[str, Any],
    columns: dict[str, Any],
    parts: list[list[int]],
    how: dict[str, Any],
) -> dict[str, Any]:
    """Log-probabilities (or scores) of this rank's samples, twice; and what of the parameters this rank holds."""
    role = frozen_role(world, kind, path, settings, **how)
    batch = as_batch(columns).select(torch.tensor(parts[world.rank], dtype=torch.int64))
    calls = [role.score if kind == "reward" else role.token_logprobs] * 2
    name = "score" if kind == "reward" else "reference_logprobs"
    results = [call(batch)[name].numpy() for call in calls]
    model = role.sources[0][1].frozen.model if kind == "reward" else role.frozen.model
    parameters = list(model.parameters())
    held = sum(getattr(p, "ds_tensor", p).numel() for p in parameters)
    return {
        "results": results,
        "held": held,
        "all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "is_policy_model": isinstance(model, PolicyModel),
    }


def bytes_held(role: Any) -> int:
    """Bytes of all storages that can be reached from a trainer's model and optimizer."""
    trainer = role.trainer
    tensors = tensors_within(
        trainer.engine.optimizer, list(trainer.module.parameters()), list(trainer.module.buffers())
    )
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_meta}.values())


def away_and_back(
    world: World, kind: str, path: str, settings: dict[str, Any], columns: dict[str, Any], parts: list[list[list[int]]]
) -> dict[str, Any]:
    """Train a role that stays, and one that leaves its device between any two calls, really; compare them."""
    batch = as_batch(columns)
    schedule = [[torch.tensor(p, dtype=torch.int64) for p in ranks] for ranks in parts]
    roles = [make_role(world, kind, path, settings, 6) for _ in range(2)]
    stays, leaves = roles
    start = weights_of(stays)
    leaves.trainer.residence.moves = True
    metrics: list[list[dict[str, float]]] = [[], []]
    outputs: list[list[torch.Tensor]] = [[], []]

    def forward(role: Any) -> torch.Tensor:
        return role.values(batch)["values"] if kind == "critic" else role.token_logprobs(batch)["old_logprobs"]

    sizes = []
    for step in range(3):
        for k, role in enumerate(roles):
            metrics[k].append(role.update(batch, schedule, step))
        if step == 0:
            sizes.append(bytes_held(leaves))
        leaves.set_residence("weights")
        if step == 0:
            sizes.append(bytes_held(leaves))
        for k, role in enumerate(roles):
            outputs[k].append(forward(role))
        leaves.set_residence("none")
        if step == 0:
            sizes.append(bytes_held(leaves))
        if step == 1:
            leaves.set_residence("weights")
            outputs[0].append(forward(stays))
            outputs[1].append(forward(leaves))
        leaves.set_residence("all")
        if step == 0:
            sizes.append(bytes_held(leaves))
            folder = settings["run_dir"] + f"/{kind}-between"
            leaves.save(folder)
            leaves.set_residence("none")
            leaves.set_residence("all")
            leaves.load(folder)
    after = [weights_of(role) for role in roles]
    return {
        "metrics": metrics,
        "differing": [n for n, w in after[0].items() if not torch.equal(w, after[1][n])],
        "moved": max(float((w - start[n]).abs().max()) for n, w in after[0].items()),
        "same_outputs": all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)),
        "bytes": sizes,
    }
