"""LoRA adapters that are sent alone: the engine applies them to the base that it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rollout_models as models
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from test_engine_weights import Trainer

from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.actors.rollout_adapter import adapted_name, scale_of, write_adapter
from rayrlhf.batch import Batch
from rayrlhf.config import RolloutConfig
from rayrlhf.config.derive import lora_room
from rayrlhf.config.trainers import LoraConfig
from rayrlhf.errors import RunFailed
from rayrlhf.models.export import named_adapters, named_weights
from rayrlhf.planning.known import shape_of
from rayrlhf.planning.memory import engine_adapter_bytes
from rayrlhf.weights import Manifest

ENGINES = ["vllm", "vllm of two workers", "transformers"]
LORA = LoraConfig(rank=3, alpha=24.0)


class Adapted:
    """An engine, and a trainer of adapters on the model of its folder."""

    def __init__(self, kind: str, path: Path):
        workers = 2 if "two" in kind else 1
        config = RolloutConfig(engine=kind.split()[0], tensor_parallel=workers, max_num_seqs=8, max_response_tokens=12)
        self.path = path
        self.rollout = RolloutEngine(
            models.CPU, model_path=str(path), config=config, dtype="float32", max_model_tokens=256, lora=LORA
        )
        self.trainer = Trainer(receivers=workers, per_engine=workers)
        self.rollout.connect_weights(self.trainer.sender.address)

    def send_base(self, lm: torch.nn.Module) -> None:
        named = named_weights(lm, zero_stage=0, merged=False)
        self.rollout.receive_weights(self.trainer.publish(named, adapter=settings_of(lm)), True)

    def adapter(self, lm: torch.nn.Module, **more: Any) -> Manifest:
        named = list(named_adapters(lm, zero_stage=0))
        return self.trainer.publish(named, **{"kind": "adapter", "adapter": settings_of(lm), **more})

    def send(self, lm: torch.nn.Module, **more: Any) -> None:
        self.rollout.receive_weights(self.adapter(lm, **more), True)

    def difference(self, lm: torch.nn.Module) -> float:
        """Of the engine's log-probabilities to those that peft computes."""
        batch = Batch.concat(list(self.rollout.generate(models.prompts([5, 150, 9], samples=2))))
        return models.largest_difference(lm, batch, 1.0)

    def close(self) -> None:
        self.rollout.close()
        self.trainer.close()


def adapted(path: Path, seed: int, targets: str | list[str] = "all-linear", size: float = 0.1, **more: Any) -> Any:
    """The folder's model with random adapters."""
    base = models.new_weights(path, 0)
    adapted = get_peft_model(
        base, PeftConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets, **more)
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return base


def settings_of(lm: Any) -> dict[str, Any]:
    return lm.peft_config["default"].to_dict()


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, untied: Path) -> Iterator[Adapted]:
    engine = Adapted(request.param, untied)
    yield engine
    workers = engine.rollout._engine._engine.model_executor.workers if "two" in request.param else []
    processes = [worker.proc for worker in workers]
    assert all(process.is_alive() for process in processes)
    engine.close()
    assert not any(process.is_alive() for process in processes)


def test_an_adapter_makes_the_engine_what_peft_makes_of_the_model(engine: Adapted) -> None:
    first = adapted(engine.path, 1)
    base = models.new_weights(engine.path, 0)
    assert engine.difference(base) <= 1e-5  # the folder's own
    engine.send_base(first)
    with pytest.raises(RunFailed, match="of version 1 it has the base, and its adapter has not come"):
        engine.difference(base)
    engine.send(first, version=1)
    assert engine.rollout.weight_version == 1
    assert engine.difference(first) <= 1e-5
    assert engine.difference(base) > 0.1
    for seed in (2, 3):  # each in the place of the one before
        other = adapted(engine.path, seed)
        engine.send(other)
        assert engine.difference(other) <= 2e-5 and engine.difference(first) > 0.1
        assert engine.rollout.weight_version == engine.trainer.version


def room_of(worker: object) -> int:
    """Bytes that a vLLM worker keeps for adapters."""
    found = 0
    for module in worker.model_runner.model.modules():  # type: ignore[attr-defined]
        for name in ("lora_a_stacked", "lora_b_stacked"):
            tensors = getattr(module, name, ())
            found += sum(t.nbytes for t in (tensors if isinstance(tensors, tuple | list) else [tensors]))
    return found


def test_the_room_for_an_adapter_is_as_planned(engine: Adapted) -> None:
    inner = getattr(engine.rollout._engine, "_engine", None)
    if inner is None:
        return  # transformers: the adapter itself
    found = inner.collective_rpc(room_of)
    planned = engine_adapter_bytes(shape_of(str(engine.path)), LORA.rank, "float32", len(found))
    assert found == [planned] * len(found)


def test_an_adapter_of_some_modules_leaves_the_others_as_they_were(engine: Adapted) -> None:
    everywhere, few = adapted(engine.path, 4), adapted(engine.path, 5, ["q_proj", "down_proj"])
    engine.send_base(everywhere)
    for lm in (everywhere, few):
        engine.send(lm, version=engine.trainer.version if lm is everywhere else None)
        assert engine.difference(lm) <= 1e-5


def test_other_scales(engine: Adapted) -> None:
    rooted = adapted(engine.path, 6, size=0.06, use_rslora=True)
    engine.send_base(rooted)
    engine.send(rooted, version=engine.trainer.version)
    assert engine.difference(rooted) <= 1e-5
    assert engine.difference(adapted(engine.path, 6, size=0.06)) > 0.1


def test_a_new_base_ends_an_adapter_and_takes_another(engine: Adapted) -> None:
    engine.send_base(adapted(engine.path, 7))
    engine.send(adapted(engine.path, 7), version=engine.trainer.version)
    new = models.new_weights(engine.path, 8)
    engine.rollout.receive_weights(engine.trainer.publish(new), True)
    assert engine.difference(new) <= 1e-5
    on_new = adapted(engine.path, 9)
    on_new.load_state_dict(
        {
            f"{name.removesuffix('.weight')}.base_layer.weight"
            if ".layers." in name and "norm" not in name
            else name: t
            for name, t in new.state_dict().items()
        },
        strict=False,
    )
    engine.send(on_new)
    assert engine.difference(on_new) <= 1e-5


def test_what_does_not_fit_is_refused_and_changes_nothing(engine: Adapted) -> None:
    lm = adapted(engine.path, 10)
    engine.send_base(lm)
    engine.send(lm, version=engine.trainer.version)

    def refusal(lm: Any, **settings: Any) -> str:
        manifest = engine.adapter(lm, version=1000, adapter={**settings_of(lm), **settings})
        with pytest.raises(RunFailed) as caught:
            engine.rollout.receive_weights(manifest, True)
        return str(caught.value)

    assert "which engines don't apply" in refusal(lm, use_dora=True)
    assert "its rank is 5, the engine was started for ranks up to 3" in refusal(lm, r=5)
    assert "the shape [3, 64], expected is [2, 64]" in refusal(lm, r=2)
    named = list(named_adapters(lm, zero_stage=0))
    for change, message in (
        (named[1:], "has only its factor B"),
        ([*named, ("base_model.model.other.lora_A.weight", torch.ones(3, 3))], "other.weight is no parameter"),
        ([("weight", torch.ones(2))], "'weight' is no factor of a LoRA adapter"),
        ([], "it has no tensors"),
    ):
        manifest = engine.trainer.publish(change, version=1000, kind="adapter", adapter=settings_of(lm))
        with pytest.raises(RunFailed, match=message):
            engine.rollout.receive_weights(manifest, True)
    assert engine.difference(lm) <= 1e-5
    engine.rollout.sleep(level=2)
    engine.rollout.wake()
    with pytest.raises(RunFailed, match="no base weights: sleep.level=2. dropped"):
        engine.send(lm)
    engine.send_base(lm)
    engine.send(lm, version=engine.trainer.version)
    engine.rollout.sleep(level=1)
    engine.rollout.wake("weights")
    engine.send(lm)
    engine.rollout.wake("kv_cache")
    assert engine.difference(lm) <= 1e-5


def test_an_engine_for_whole_sets_of_weights_takes_no_adapter(untied: Path) -> None:
    config = RolloutConfig(engine="transformers", max_response_tokens=4)
    rollout = RolloutEngine(models.CPU, model_path=str(untied), config=config, dtype="float32", max_model_tokens=64)
    trainer = Trainer()
    rollout.connect_weights(trainer.sender.address)
    lm = adapted(untied, 1)
    manifest = trainer.publish(named_weights(lm, zero_stage=0, merged=False), adapter=settings_of(lm))
    with pytest.raises(RunFailed, match="started for whole sets of weights"):
        rollout.receive_weights(manifest, True)
    rollout.receive_weights(dataclasses.replace(manifest, adapter=None), True)
    trainer.close()


def test_names_scales_and_files(tmp_path: Path) -> None:
    assert adapted_name("base_model.model.a.b.lora_A.weight") == ("a.b.weight", "A")
    assert adapted_name("base_model.model.a.b.lora_B.weight") == ("a.b.weight", "B")
    for name in ("a.b.lora_A.weight", "base_model.model.a.b.lora_A.default.weight", "base_model.model.a.b.weight"):
        with pytest.raises(ValueError, match="is no factor"):
            adapted_name(name)
    assert scale_of({"r": 4, "lora_alpha": 6.0}) == 1.5
    assert scale_of({"r": 4, "lora_alpha": 6.0, "use_rslora": True}) == 3.0
    write_adapter(tmp_path, {"r": 2, "target_modules": {"b", "a"}}, [("x", torch.arange(3.0))])
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["x"], torch.tensor([0.0, 1.0, 2.0]))
    assert (tmp_path / "adapter_config.json").read_text() == '{"r": 2, "target_modules": ["a", "b"]}'
    assert [lora_room(rank) for rank in (1, 8, 9, 300)] == [8, 8, 16, 320]
