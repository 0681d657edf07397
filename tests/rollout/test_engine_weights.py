"""New weights in a running engine: equal to the trainer's, and every way in which they could not be."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import rollout_models as models
import torch
from torch.cuda._utils import _get_device_index
from transformers import AutoModelForCausalLM, LlamaConfig

from rayrlhf.actors import rollout_transformers
from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.actors.rollout_parts import Comparison
from rayrlhf.batch import Batch
from rayrlhf.config import RolloutConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.export import named_weights
from rayrlhf.weights import Address, Manifest, checksum, open_sender, plan_buckets

CASES = [("vllm", "untied"), ("vllm", "tied"), ("transformers", "untied"), ("transformers", "tied")]


class Trainer:
    """What sends: a model's parameters, laid out for one engine in this very thread."""

    def __init__(self, dtype: str = "float32", receivers: int = 1, per_engine: int = 1):
        self.dtype, self.serial, self.version = dtype, 0, 0
        self.run = f"trainer_{secrets.token_hex(8)}"
        self.sender = open_sender(
            "shared_memory",
            run=self.run,
            receivers=receivers,
            version=1,
            device="cpu",
            timeout_s=20,
            per_engine=per_engine,
            keep_all=True,
        )

    def publish(
        self,
        weights: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
        *,
        version: int | None = None,
        bucket_bytes: int = 2**20,
        checksums: bool = True,
        **kind: object,
    ) -> Manifest:
        """Lay weights out; by default with the next version."""
        if isinstance(weights, torch.nn.Module):
            weights = named_weights(weights, zero_stage=0)
        named = [(name, tensor.detach().clone()) for name, tensor in weights]
        self.serial += 1
        if version is None:
            version = self.version = self.version + 1
        layout = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named]
        buckets = plan_buckets(layout, bucket_bytes=bucket_bytes, dtype=self.dtype)
        manifest = Manifest(version, self.dtype, buckets, checksums, serial=self.serial, **kind)
        self.sender.send(manifest, named)
        return manifest

    def first_bucket(self, manifest: Manifest) -> Path:
        (file,) = Path("/dev/shm").glob(f"rayrlhf-{self.run}-*/{manifest.serial}-0.bucket")
        return file

    def close(self) -> None:
        self.sender.close()


class Case:
    """An engine, and a trainer that publishes to it."""

    def __init__(self, engine: str, path: Path, dtype: str = "float32", **more: object):
        config = RolloutConfig(engine=engine, max_num_seqs=8, max_response_tokens=12)
        self.kind, self.path, self.dtype = engine, path, dtype
        self.rollout = RolloutEngine(
            models.CPU, model_path=str(path), config=config, dtype=dtype, max_model_tokens=256, **more
        )
        self.trainer = Trainer(dtype)
        self.publish = self.trainer.publish
        self.rollout.connect_weights(self.trainer.sender.address)

    @property
    def version(self) -> int:
        return self.trainer.version

    def close(self) -> None:
        self.rollout.close()
        self.trainer.close()

    def send(self, model: torch.nn.Module, *, verify: bool = True, **kwargs: int) -> None:
        self.rollout.receive_weights(self.publish(model, **kwargs), verify)

    def generate(self, prompts: Batch, **kwargs: object) -> Batch:
        return Batch.concat(list(self.rollout.generate(prompts, **kwargs)))

    def parameters(self) -> dict[str, torch.Tensor]:
        """The engine's parameters as it names them itself."""
        if self.kind == "transformers":
            return dict(self.rollout._engine._model.named_parameters(remove_duplicate=False))
        return dict(self.vllm_model().named_parameters(remove_duplicate=False))

    def vllm_model(self) -> torch.nn.Module:
        return self.rollout._engine._engine.apply_model(lambda model: model)[0]

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
    case.close()


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
    expected = {name: checksum(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    sums = case.rollout.weight_checksums()
    tied = {"lm_head.weight": expected.pop("lm_head.weight")} if case.path.name.startswith("tied") else {}
    assert sums == expected and tied.items() <= {"lm_head.weight": expected["model.embed_tokens.weight"]}.items()


def test_weights_that_the_engine_did_not_take_over_are_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.new_weights(case.path, seed=21)
    case.send(model)
    check = Comparison.check
    fused = case.kind == "vllm"
    name = "model.layers.1.self_attn.qkv_proj.weight" if fused else "model.layers.1.self_attn.k_proj.weight"
    kept = case.parameters()[name].clone()

    def check_all_but_one(self: Comparison, *arguments: object) -> None:
        part = slice(64, 96) if fused else slice(None)  # 64 rows of queries, then 32 of keys
        case.parameters()[name].data[part] = kept[part]
        check(self, *arguments)

    monkeypatch.setattr(Comparison, "check", check_all_but_one)
    newer = models.new_weights(case.path, seed=22)
    with pytest.raises(
        RunFailed, match=r"other weights than the trainer sent: model.layers.1.self_attn.k_proj.weight$"
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
    holder = engine._model if case.kind == "transformers" else case.vllm_model()
    shared, check = holder.lm_head.weight, Comparison.check
    old = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)

    def part_and_check(self: Comparison, *arguments: object) -> None:
        holder.lm_head.weight = old
        # vLLM's parameters are looked up once for each transfer.
        self.parts = type(self.parts)(holder, self._facts)
        check(self, *arguments)

    if apart == "before the transfer":
        holder.lm_head.weight = old
        message = "left parameters of .*model as they were: lm_head.weight$"
    else:
        monkeypatch.setattr(Comparison, "check", part_and_check)
        message = "other weights than the trainer sent: lm_head.weight$"
    with pytest.raises(RunFailed, match=message):
        case.send(models.new_weights(case.path, seed=32))
    monkeypatch.undo()
    holder.lm_head.weight = shared
    case.send(model)
    case.assert_holds(model)


def test_a_damaged_bucket_is_named_and_a_whole_one_heals_it(case: Case) -> None:
    model = models.new_weights(case.path, seed=41)
    manifest = case.publish(model)
    entry = next(entry for entry in manifest.buckets[0] if "layers.0.mlp.up_proj" in entry.name)
    with open(case.trainer.first_bucket(manifest), "r+b") as opened:
        opened.seek(entry.offset + 17)
        opened.write(b"\xff")
    damage = r"damaged on their way to rollout rank 0 \(shared_memory, bucket 1 of .*model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RunFailed, match=damage):
        case.rollout.receive_weights(manifest, True)
    with pytest.raises(RunFailed, match="did not finish"):
        case.generate(models.prompts([3]))
    case.send(model)
    case.assert_holds(model)


def test_weights_of_another_shape_are_refused_and_change_nothing(case: Case) -> None:
    model = models.new_weights(case.path, seed=51)
    case.send(model)
    version = case.rollout.weight_version

    def refusal(named: list[tuple[str, torch.Tensor]]) -> str:
        manifest = case.publish(named, version=version + 1, checksums=False)
        with pytest.raises(RunFailed) as caught:
            case.rollout.receive_weights(manifest, False)
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
    with pytest.raises(RunFailed, match="are sent as bfloat16; the rollout engine's type is float32"):
        case.rollout.receive_weights(dataclasses.replace(manifest, version=case.version + 1, dtype="bfloat16"), False)
    with pytest.raises(RunFailed, match="are sent without checksums"):
        case.rollout.receive_weights(dataclasses.replace(manifest, version=case.version + 1, checksums=False), True)


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


def test_weights_are_received_before_the_kv_cache_wakes_up(case: Case) -> None:
    model = models.new_weights(case.path, seed=85)
    case.rollout.sleep(level=2)
    case.rollout.wake("kv_cache")
    with pytest.raises(RunFailed, match="is asleep"):
        case.send(model)
    case.rollout.sleep()
    case.rollout.wake("weights")
    with pytest.raises(RunFailed, match="asleep: only its weights are awake"):
        case.generate(models.prompts([5]))
    case.send(model)
    with pytest.raises(RunFailed, match="asleep: only its weights are awake"):
        case.generate(models.prompts([5]))
    case.rollout.wake("kv_cache")
    assert models.largest_difference(model, case.generate(models.prompts([5])), 1.0) <= 1e-5
    case.rollout.wake("weights")  # it is awake
    case.assert_holds(model)
    with pytest.raises(ValueError, match="legal ones are weights, kv_cache and all"):
        case.rollout.wake("cache")  # type: ignore[arg-type]


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
    case.close()


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
    case.close()


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
    # Over two processes: each holds the one key-value head there is; of four heads each would hold two.
    spread = RolloutConfig(max_num_seqs=3, tensor_parallel=2)
    monkeypatch.setattr(rollout_vllm, "_free_memory", lambda: 2**40)
    assert rollout_vllm.kv_cache_bytes(model, spread, "float32", 200) == size
    model.num_key_value_heads = 4
    assert rollout_vllm.kv_cache_bytes(model, spread, "float32", 200) == 2 * size
    given = RolloutConfig(kv_cache_gib=0.5, tensor_parallel=2)
    assert rollout_vllm.kv_cache_bytes(model, given, "float32", 200) == 2**28
    model.num_key_value_heads = 1
    with pytest.raises(InputRefused, match="kv_cache_gib is 1e-05; one sequence of 200 tokens needs 0.0002 GiB"):
        rollout_vllm.kv_cache_bytes(model, RolloutConfig(kv_cache_gib=0.00001), "float32", 200)


def test_the_transformers_engine_tells_which_gpu_weights_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the model and the other side are stand-ins. Torch makes no device current that has no number."""

    class Held:
        def to(self, device: torch.device) -> Held:
            used.append(device)
            return self

        def eval(self) -> Held:
            return self

        def requires_grad_(self, _: bool) -> None:
            pass

    used: list[torch.device] = []
    receiver = SimpleNamespace(connect=lambda: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Held())
    monkeypatch.setattr(rollout_transformers, "open_receiver", lambda _, __, device: used.append(device) or receiver)
    engine = rollout_transformers.TransformersEngine(
        dataclasses.replace(models.CPU, device="cuda"),
        model_path="",
        tokenizer_path="",
        config=RolloutConfig(engine="transformers"),
        dtype="float32",
        max_model_tokens=8,
        facts=SimpleNamespace(config=LlamaConfig(), eos_ids=()),
        trust_remote_code=False,
        lora=None,
    )
    engine.connect(Address("nccl", "test-1", "127.0.0.1:1", 1, 1.0))
    with pytest.raises(ValueError, match="specified index"):
        _get_device_index(torch.device("cuda"))
    assert len(used) == 2 and {_get_device_index(device) for device in used} == {0}
