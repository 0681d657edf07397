"""The policy's side: what it says that it will send is what it sends, under ZeRO-3, with adapters, and after updates."""

from __future__ import annotations

import dataclasses
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.actors.policy import PolicyTrainer
from rayrlhf.errors import RunFailed
from rayrlhf.models.world import World
from rayrlhf.weights import Address, Manifest, Receiver, open_receiver
from tests.models.making import LENGTHS, alone, config_of, parts_of, settings, training_batch
from tests.models.rank_cases import as_batch, as_columns, make_role, weights_of
from tests.models.ranks import Ranks
from tests.support.tiny import save_tiny_model
from tests.weights.others import set_deadline

ALL = list(range(len(LENGTHS)))
LORA = {"rank": 4, "alpha": 16.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def connected(role: PolicyTrainer, group_version: int = 1) -> Receiver:
    """A receiver in this very thread."""
    address = role.open_weights("shared_memory", receivers=1, group_version=group_version, keep_all=True)
    assert address is not None
    receiver = open_receiver(address, 0, "cpu")
    role.connect_weights(address)
    receiver.connect()
    return receiver


def sent(role: PolicyTrainer, receiver: Receiver, version: int) -> tuple[Manifest, dict[str, Tensor]]:
    manifest = role.weight_manifest(version=version, checksums=True)
    role.publish_weights(manifest=manifest)
    found = {name: tensor.clone() for name, tensor in receiver.receive(manifest)}
    role.release_weights()
    return manifest, found


def policy(tiny: Path, tmp_path: Path, **sections: Any) -> PolicyTrainer:
    optimizer = {"lr": 1e-2}
    own = {"optimizer": optimizer, **sections.pop("policy", {})}
    return PolicyTrainer(alone(), config_of(tiny, tmp_path, policy=own, **sections), str(tiny), 10)


def test_each_version_is_the_present_weights_in_buckets_of_the_configured_size(tiny: Path, tmp_path: Path) -> None:
    role = policy(tiny, tmp_path, rollout={"weight_bucket_mib": 0.01, "dtype": "bfloat16"})
    receiver = connected(role)
    previous: dict[str, Tensor] = {}
    for version in (1, 2):
        manifest, found = sent(role, receiver, version)
        assert manifest.version == version and manifest.serial == version and manifest.kind == "weights"
        assert all(len(bucket) == 1 or bucket[-1].offset + bucket[-1].nbytes <= 10486 for bucket in manifest.buckets)
        expected = {name: w.to(torch.bfloat16) for name, w in dict(role.lm.named_parameters()).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        if previous:
            assert any(not torch.equal(found[name], previous[name]) for name in found), "it was trained"
        previous = found
        role.update(training_batch(), parts_of(ALL), version)
    role.close()


def test_an_adapter_follows_its_base_once_in_each_group(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    role = policy(tiny, tmp_path, policy={"lora": LORA}, rollout={"lora_transfer": "adapter"})
    role.update(training_batch(), parts_of(ALL), 1)
    receiver = connected(role)
    manifest, base = sent(role, receiver, 1)
    assert manifest.kind == "weights" and manifest.adapter is not None, "its adapter is to follow"
    stored = load_file(tiny / "model.safetensors")
    assert base.keys() == stored.keys() and all(torch.equal(base[name], stored[name]) for name in stored)
    for version in (1, 2):
        manifest, found = sent(role, receiver, version)
        assert manifest.kind == "adapter" and manifest.version == version
        role.peft.save_pretrained(tmp_path / f"adapter-{version}")  # type: ignore[union-attr]
        expected = load_file(tmp_path / f"adapter-{version}" / "adapter_model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
        assert manifest.adapter is not None
        assert (manifest.adapter["r"], manifest.adapter["lora_alpha"]) == (4, 16.0)
        assert {name.rpartition(".")[2] for name in manifest.adapter["target_modules"]} >= {"q_proj", "down_proj"}
        assert manifest.adapter["peft_type"] == "LORA"
        role.update(training_batch(), parts_of(ALL), version + 1)
    receiver = connected(role, group_version=2)  # an engine was replaced: it has no base
    assert sent(role, receiver, 3)[0].kind == "weights" and sent(role, receiver, 3)[0].kind == "adapter"
    role.close()


def test_a_policy_that_is_away_publishes_nothing(tiny: Path, tmp_path: Path) -> None:
    role = policy(tiny, tmp_path)
    receiver = connected(role)
    role.set_residence("none")
    with pytest.raises(RunFailed, match="publishing weights needs residence 'weights'"):
        sent(role, receiver, 1)
    role.set_residence("weights")
    assert len(sent(role, receiver, 1)[1]) == len(list(role.lm.parameters()))
    role.close()


# -- ranks in processes of their own -------------------------------------------------------------------------------

_role: Any = None


def make(world: World, path: str, run: dict[str, Any], columns: dict[str, Any], transport: str) -> dict[str, Any]:
    """A policy after one update; rank 0's weights, gathered another way, and where it sends them."""
    global _role
    _role = make_role(world, "policy", path, run)
    _role.update(as_batch(columns), parts_of(ALL[::2], ALL[1::2]), 1)
    address = _role.open_weights(transport, receivers=1, group_version=1, per_engine=1)
    return {"address": address, "weights": {name: w.numpy() for name, w in weights_of(_role).items()}}


def publish(world: World, address: Address, version: int) -> str | None:
    """Send; rank 0 leaves the manifest in the run's folder first. What was raised, if anything."""
    if version == 1:
        _role.connect_weights(address)
    manifest = _role.weight_manifest(version=version, checksums=True)
    if world.rank == 0:
        path = Path(_role.config.run_dir) / f"manifest-{version}"
        path.with_suffix(".partial").write_bytes(pickle.dumps(manifest))
        path.with_suffix(".partial").rename(path)
    try:
        _role.publish_weights(manifest=manifest)
    except RunFailed as error:
        return str(error)
    return None


def allow(world: World, seconds: float) -> None:
    """Another deadline for each bucket, where this rank sends."""
    if _role.sender is not None:
        set_deadline(_role.sender, seconds)


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_zero_3_sends_the_whole_weights(
    tiny: Path, tmp_path: Path, two_ranks: Ranks, transport: str, lora: dict[str, Any] | None
) -> None:
    own = {"zero_stage": 3, "lora": lora, "optimizer": {"lr": 1e-2}}
    run = settings(tiny, tmp_path, policy=own, rollout={"weight_bucket_mib": 0.01, "weight_timeout_s": 30.0})
    columns = as_columns(training_batch())
    first, _ = two_ranks.run(make, path=str(tiny), run=run, columns=columns, transport=transport)
    receiver = open_receiver(first["address"], 0, "cpu")
    found: dict[str, Tensor] = {}

    def receive() -> None:
        receiver.connect()
        found.update((name, tensor.clone()) for name, tensor in receiver.receive(manifest_file(tmp_path, 1)))

    thread = threading.Thread(target=receive)
    thread.start()
    assert two_ranks.run(publish, address=first["address"], version=1) == [None, None]
    thread.join()
    held = {name: torch.from_numpy(w) for name, w in first["weights"].items()}
    expected = by_hand(held) if lora else held
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert float((found[name] - weight).abs().max()) <= (1e-6 if lora else 0.0), name
    receiver.close()


def by_hand(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + alpha / r * B A."""
    merged = {}
    for name, weight in held.items():
        if "lora_" in name:
            continue
        whole = name.replace(".base_layer", "")
        if ".base_layer" in name:
            a, b = (held[name.replace("base_layer", f"lora_{m}.default")] for m in "AB")
            weight = weight + 16.0 / 4 * b @ a
        merged[whole] = weight
    return merged


def manifest_file(folder: Path, version: int) -> Manifest:
    """What rank 0 announced, once it has."""
    path = folder / f"manifest-{version}"
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return pickle.loads(path.read_bytes())


def test_where_no_engine_takes_the_weights_no_rank_is_left_waiting(
    tiny: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    own = {"zero_stage": 3}
    run = settings(tiny, tmp_path, policy=own, rollout={"weight_bucket_mib": 0.01, "weight_timeout_s": 1.0})
    columns = as_columns(training_batch())
    first, _ = two_ranks.run(make, path=str(tiny), run=run, columns=columns, transport="shared_memory")
    said = two_ranks.run(publish, timeout_s=60, address=first["address"], version=1)
    assert "rollout rank 0 did not take bucket 1 of" in said[0] and said[1] is None
    two_ranks.run(allow, seconds=60.0)
    receiver = open_receiver(dataclasses.replace(first["address"], timeout_s=60.0), 0, "cpu")
    receiver.connect()
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.extend(name for name, _ in receiver.receive(manifest_file(tmp_path, 2)))
    )
    thread.start()
    assert two_ranks.run(publish, address=first["address"], version=2) == [None, None], "the next one works"
    thread.join()
    assert found == list(first["weights"])
