"""New weights in a running engine: equal to the trainer's, and every way in which they could not be."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import rollout_models as models
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.batch import Batch
from rayrlhf.cluster.session import ray_session
from rayrlhf.config import ClusterConfig, RolloutConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.weights import Manifest, SharedMemory, Transport, make_transport, publish, release

CASES = [("vllm", "untied"), ("vllm", "tied"), ("transformers", "untied"), ("transformers", "tied")]


class Case:
    """An engine, and a trainer that publishes to it."""

    def __init__(self, engine: str, path: Path, dtype: str = "float32"):
        config = RolloutConfig(engine=engine, max_num_seqs=8, max_response_tokens=12)
        self.kind, self.path, self.dtype = engine, path, dtype
        self.rollout = RolloutEngine(
            models.CPU,
            model_path=str(path),
            config=config,
            dtype=dtype,
            max_model_tokens=256,
            transport_name="shared_memory",
        )
        self.transport: Transport = SharedMemory(run="trainer")
        self.version = 0

    def publish(self, model: torch.nn.Module, *, bucket_bytes: int = 2**20, checksums: bool = True) -> Manifest:
        self.version += 1
        return publish(
            model.named_parameters(),
            transport=self.transport,
            version=self.version,
            bucket_bytes=bucket_bytes,
            dtype=self.dtype,
            with_checksums=checksums,
        )

    def send(self, model: torch.nn.Module, *, verify: bool = True, **kwargs: int) -> None:
        manifest = self.publish(model, **kwargs)
        self.rollout.receive_weights(manifest, verify)
        release(manifest, self.transport)

    def generate(self, prompts: Batch, **kwargs: object) -> Batch:
        return Batch.concat(list(self.rollout.generate(prompts, **kwargs)))

    def parameters(self) -> dict[str, torch.Tensor]:
        """The engine's parameters as it names them itself."""
        if self.kind == "transformers":
            return dict(self.rollout._engine._model.named_parameters(remove_duplicate=False))
        return self.rollout._engine._on_model(lambda model: dict(model.named_parameters(remove_duplicate=False)))

    def expected(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The engine's parameters, made by hand from the trainer's model."""
        state = {name: tensor.to(getattr(torch, self.dtype)) for name, tensor in model.state_dict().items()}
        if self.kind == "transformers":
            return state
        fused = {}
        for name, tensor in state.items():
            if ".q_proj." in name:
                parts = [state[name.replace(".q_proj.", f".{part}.")] for part in ("q_proj", "k_proj", "v_proj")]
                fused[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
            elif ".gate_proj." in name:
                fused[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                    [tensor, state[name.replace("gate", "up")]]
                )
            elif not any(part in name for part in ("k_proj", "v_proj", "up_proj")):
                fused[name] = tensor
        return fused

    def assert_holds(self, model: torch.nn.Module) -> None:
        found, expected = self.parameters(), self.expected(model)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            rows = found[name][: len(tensor)]
            assert rows.dtype == tensor.dtype and torch.equal(rows, tensor), name


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    engine, model = request.param
    case = Case(engine, request.getfixturevalue(model))
    yield case
    case.rollout.close()
    case.transport.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_follow_the_weights(case: Case, temperature: float) -> None:
    prompts = models.prompts([5, 150, 9], samples=2)  # the long one's keys and values are cached for the next call
    previous = None
    for seed in (11, 12):
        model = models.new_weights(case.path, seed)
        case.send(model)
        batch = case.generate(prompts, temperature=temperature)
        assert models.largest_difference(model, batch, temperature) <= 1e-5
        assert (batch["weight_version"] == case.version).all()
        if previous is not None:
            assert models.largest_difference(previous, batch, temperature) > 0.1
        previous = model


@pytest.mark.parametrize("bucket_bytes", [1, 10_000, 2**40])
def test_every_parameter_equals_the_trainers(case: Case, bucket_bytes: int) -> None:
    model = models.new_weights(case.path, seed=bucket_bytes % 1000)
    manifest = case.publish(model, bucket_bytes=bucket_bytes)
    assert len(manifest.buckets) == {1: len(list(model.parameters())), 2**40: 1}.get(
        bucket_bytes, len(manifest.buckets)
    )
    case.rollout.receive_weights(manifest, True)
    case.assert_holds(model)
    sums = case.rollout.weight_checksums()
    own = publish(
        [(n, p) for n, p in model.named_parameters(remove_duplicate=False)],
        transport=case.transport,
        version=1,
        bucket_bytes=2**20,
        dtype="float32",
        with_checksums=True,
    )
    assert sums == own.checksums and "lm_head.weight" in sums
    for published in (manifest, own):
        release(published, case.transport)


def test_weights_that_the_engine_did_not_take_over_are_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.new_weights(case.path, seed=21)
    case.send(model)
    engine = case.rollout._engine
    load = engine.load
    fused = case.kind == "vllm"
    name = "model.layers.1.self_attn.qkv_proj.weight" if fused else "model.layers.1.self_attn.k_proj.weight"

    def load_all_but_one(*arguments: object) -> None:
        kept = case.parameters()[name].clone()
        load(*arguments)
        part = slice(64, 96) if fused else slice(None)  # 64 rows of queries, then 32 of keys
        case.parameters()[name].data[part] = kept[part]

    monkeypatch.setattr(engine, "load", load_all_but_one)
    newer = models.new_weights(case.path, seed=22)
    with pytest.raises(
        RunFailed, match=r"other weights than the trainer published: model.layers.1.self_attn.k_proj.weight$"
    ):
        case.send(newer)
    with pytest.raises(RunFailed, match="can't generate: the transfer of weights of version"):
        case.generate(models.prompts([3]))
    monkeypatch.undo()
    case.send(newer)
    case.assert_holds(newer)
    assert len(case.generate(models.prompts([3]))) == 1


@pytest.mark.parametrize("apart", ["before the transfer", "after the transfer"])
def test_a_tied_output_layer_that_kept_its_old_weights_is_named(
    case: Case, monkeypatch: pytest.MonkeyPatch, apart: str
) -> None:
    if case.path.name.startswith("untied"):
        return  # the same engines serve a model whose output layer is its own
    model = models.new_weights(case.path, seed=31)
    case.send(model)
    engine = case.rollout._engine
    holder = engine._model if case.kind == "transformers" else engine._on_model(lambda whole: whole)
    shared, load = holder.lm_head.weight, engine.load
    old = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)

    def load_and_part(*arguments: object) -> None:
        load(*arguments)
        holder.lm_head.weight = old

    if apart == "before the transfer":
        holder.lm_head.weight = old
        message = "left parameters of .*model as they were: lm_head.weight$"
    else:
        monkeypatch.setattr(engine, "load", load_and_part)
        message = "other weights than the trainer published: lm_head.weight$"
    with pytest.raises(RunFailed, match=message):
        case.send(models.new_weights(case.path, seed=32))
    monkeypatch.undo()
    holder.lm_head.weight = shared
    case.send(model)
    case.assert_holds(model)


def test_a_damaged_bucket_is_named_and_a_whole_one_heals_it(case: Case) -> None:
    model = models.new_weights(case.path, seed=41)
    manifest = case.publish(model)
    handle = manifest.buckets[0]
    entry = next(entry for entry in handle.entries if "layers.0.mlp.up_proj" in entry.name)
    with open(handle.path, "r+b") as file:
        file.seek(entry.offset + 17)
        file.write(b"\xff")
    with pytest.raises(RunFailed, match=r"damaged on their way \(shared_memory\): model.layers.0.mlp.up_proj.weight"):
        case.rollout.receive_weights(manifest, True)
    release(manifest, case.transport)
    with pytest.raises(RunFailed, match="did not finish"):
        case.generate(models.prompts([3]))
    case.send(model)
    case.assert_holds(model)


def test_weights_of_another_shape_are_refused_and_change_nothing(case: Case) -> None:
    model = models.new_weights(case.path, seed=51)
    case.send(model)
    version = case.rollout.weight_version

    def refusal(named: list[tuple[str, torch.Tensor]]) -> str:
        manifest = publish(
            named,
            transport=case.transport,
            version=version + 1,
            bucket_bytes=2**20,
            dtype="float32",
            with_checksums=False,
        )
        with pytest.raises(RunFailed) as caught:
            case.rollout.receive_weights(manifest, False)
        release(manifest, case.transport)
        return str(caught.value)

    named = dict(models.new_weights(case.path, seed=52).named_parameters())
    embedding = "model.embed_tokens.weight"
    larger = torch.cat([named[embedding].detach(), torch.zeros(4, 64)])
    message = refusal([*{**named, embedding: larger}.items()])
    assert f"{embedding} has the shape [264, 64], the engine's [260, 64] (the vocabularies differ)" in message
    without = {name: tensor for name, tensor in named.items() if "layers.1.mlp.down" not in name}
    assert "model.layers.1.mlp.down_proj.weight is missing" in refusal([*without.items()])
    assert "surplus.weight is no parameter of the engine's model" in refusal(
        [*named.items(), ("surplus.weight", torch.ones(2))]
    )
    case.assert_holds(model)
    assert case.rollout.weight_version == version
    assert (case.generate(models.prompts([3]), weight_version=version)["weight_version"] == version).all()


def test_the_version_only_rises_and_others_are_not_served(case: Case) -> None:
    model = models.new_weights(case.path, seed=61)
    manifest = case.publish(model)
    case.rollout.receive_weights(manifest, False)
    for version in (case.version, case.version - 1, -1):
        with pytest.raises(RunFailed, match=f"version {version} are no newer"):
            case.rollout.receive_weights(dataclasses.replace(manifest, version=version), False)
    with pytest.raises(RunFailed, match=f"version {case.version} where version {case.version + 1} is asked for"):
        case.generate(models.prompts([3]), weight_version=case.version + 1)
    with pytest.raises(RunFailed, match="published as bfloat16; the rollout engine's type is float32"):
        case.rollout.receive_weights(dataclasses.replace(manifest, version=case.version + 1, dtype="bfloat16"), False)
    with pytest.raises(RunFailed, match="published without checksums"):
        case.rollout.receive_weights(dataclasses.replace(manifest, version=case.version + 1, checksums=None), True)
    release(manifest, case.transport)


def test_no_new_weights_while_samples_are_under_way(case: Case) -> None:
    manifest = case.publish(models.new_weights(case.path, seed=62))
    stream = case.rollout.generate(models.prompts([3], samples=40))
    next(stream)
    with pytest.raises(RunFailed, match="can't change while the rollout engine is generating"):
        case.rollout.receive_weights(manifest, False)
    with pytest.raises(RunFailed, match="can't sleep while"):
        case.rollout.sleep()
    stream.close()
    case.rollout.receive_weights(manifest, False)
    release(manifest, case.transport)


def test_the_prefix_cache_is_emptied_once_for_each_set_of_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    owner = case.rollout._engine._engine.engine_core if case.kind == "vllm" else case.rollout._engine
    reset = owner.reset_prefix_cache
    monkeypatch.setattr(owner, "reset_prefix_cache", lambda *a, **k: (calls.append(1), reset(*a, **k))[1])
    for updates in (1, 2):
        case.send(models.new_weights(case.path, seed=70), verify=updates == 1, bucket_bytes=1)
        case.generate(models.prompts([3]))
        assert len(calls) == updates


def test_asleep_it_does_nothing_and_after_level_two_it_needs_weights(case: Case) -> None:
    model = models.new_weights(case.path, seed=80)
    case.send(model)
    expected = models.responses(case.generate(models.prompts([5])))
    case.rollout.sleep()
    with pytest.raises(RunFailed, match="asleep"):
        case.generate(models.prompts([5]))
    with pytest.raises(RunFailed, match="is asleep"):
        case.send(model)
    case.rollout.wake()
    assert models.responses(case.generate(models.prompts([5]))) == expected
    case.rollout.sleep(level=2)
    case.rollout.wake()
    with pytest.raises(RunFailed, match=r"sleep\(level=2\) dropped its weights"):
        case.generate(models.prompts([5]))
    case.send(model)
    assert models.responses(case.generate(models.prompts([5]))) == expected
    with pytest.raises(ValueError, match="legal ones are 1 and 2"):
        case.rollout.sleep(level=3)


def test_vllm_leaves_threads_and_random_state_alone(untied: Path) -> None:
    """The engines of this module have been built by now; see also the order tests."""
    set_threads = torch.set_num_threads
    assert set_threads.__module__ == "torch" or "vllm" not in (set_threads.__module__ or "")
    assert torch.get_num_threads() == models.CPU.threads
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)


def test_no_checksums_before_the_first_weights_and_the_folder_is_version_0(untied: Path) -> None:
    case = Case("transformers", untied)
    with pytest.raises(RunFailed, match="received no weights yet"):
        case.rollout.weight_checksums()
    batch = case.generate(models.prompts([4]))
    assert batch["weight_version"].tolist() == [0]
    manifest = case.publish(models.new_weights(untied, 1))
    case.rollout.receive_weights(dataclasses.replace(manifest, version=0), True)  # the first may be version 0 too
    assert case.rollout.weight_version == 0
    case.transport.close()


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_bfloat16_weights_arrive_bit_for_bit(engine: str, tied: Path) -> None:
    case = Case(engine, tied, dtype="bfloat16")
    model = models.new_weights(tied, seed=91)
    case.send(model)
    case.assert_holds(model)
    batch = case.generate(models.prompts([6] * 8, samples=2))
    half = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.bfloat16).eval()
    half.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})
    assert models.largest_difference(half, batch, 1.0) < 0.3
    again = models.new_weights(tied, seed=92)
    case.send(again)
    case.assert_holds(again)
    case.rollout.close()
    case.transport.close()


def test_kv_cache_on_a_cpu(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    from rayrlhf.actors import rollout_vllm

    model = AutoConfig.from_pretrained(untied)  # 2 layers, 1 key-value head of 32, keys and values
    token = 2 * 2 * 1 * 32 * 4
    settings = RolloutConfig(max_num_seqs=3)
    monkeypatch.setattr(rollout_vllm, "_free_memory", lambda: 2**40)
    size = rollout_vllm.kv_cache_bytes(model, settings, "float32", 200)
    assert size == token * 128 * (3 * 2 + 1)  # three sequences of two blocks, and vLLM's own
    assert rollout_vllm.kv_cache_bytes(model, settings, "bfloat16", 200) == size // 2
    monkeypatch.setattr(rollout_vllm, "_free_memory", lambda: 4 * token * 128 * 4)
    assert rollout_vllm.kv_cache_bytes(model, settings, "float32", 200) == token * 128 * 4
    monkeypatch.setattr(rollout_vllm, "_free_memory", lambda: 0)
    assert rollout_vllm.kv_cache_bytes(model, settings, "float32", 200) == token * 128 * 3  # one sequence at least
    assert rollout_vllm.kv_cache_bytes(model, RolloutConfig(kv_cache_gib=0.5), "float32", 200) == 2**29
    with pytest.raises(InputRefused, match="kv_cache_gib is 1e-05; one sequence of 200 tokens needs 0.0002 GiB"):
        rollout_vllm.kv_cache_bytes(model, RolloutConfig(kv_cache_gib=0.00001), "float32", 200)


def test_through_rays_object_store_from_another_process(untied: Path, tied: Path) -> None:
    ray = pytest.importorskip("ray")
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, str(Path(__file__).parent)])
    with ray_session(ClusterConfig()):  # another test's, where there is one

        @ray.remote(num_cpus=0, runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}})
        class Trainer:
            def publish(self, path: str, seed: int, bucket_bytes: int) -> Manifest:
                self.transport = make_transport("object_store")
                return publish(
                    models.new_weights(path, seed).named_parameters(),
                    transport=self.transport,
                    version=seed,
                    bucket_bytes=bucket_bytes,
                    dtype="float32",
                    with_checksums=True,
                )

        trainer = Trainer.remote()
        for path in (untied, tied):
            case = Case("transformers", path)
            case.rollout._transport = make_transport("object_store")
            for seed, bucket_bytes in ((1, 1), (2, 10_000), (3, 2**40)):
                manifest = ray.get(trainer.publish.remote(str(path), seed, bucket_bytes))
                case.rollout.receive_weights(manifest, True)
                case.assert_holds(models.new_weights(path, seed))
            damaged = {**(manifest.checksums or {}), "model.norm.weight": 1}
            with pytest.raises(RunFailed, match=r"damaged on their way \(object_store\): model.norm.weight$"):
                case.rollout.receive_weights(dataclasses.replace(manifest, version=4, checksums=damaged), True)
            case.transport.close()
        ray.kill(trainer)
