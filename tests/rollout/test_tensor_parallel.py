"""An engine whose weights are spread over two processes, and what becomes of it when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import rollout_models as models
import torch
from test_engine_weights import Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.actors.rollout_common import check_tensor_parallel
from rayrlhf.actors.rollout_vllm import _Deaths
from rayrlhf.batch import Batch
from rayrlhf.config import RolloutConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.world import World

SECOND = World(1, 2, "127.0.0.1", 0, "cpu", 2)
"""The second of two engines."""


class Spread:
    """An engine of two workers, and a trainer that sends to them; the receivers before them are another engine's."""

    def __init__(self, path: Path):
        self.path = path
        config = RolloutConfig(engine="vllm", tensor_parallel=2, max_num_seqs=8, max_response_tokens=12)
        self.rollout = RolloutEngine(SECOND, model_path=str(path), config=config, dtype="float32", max_model_tokens=256)
        self.trainer = Trainer(receivers=4, per_engine=2)
        self.rollout.connect_weights(self.trainer.sender.address)

    def send(self, model: torch.nn.Module, verify: bool = True) -> None:
        self.rollout.receive_weights(self.trainer.publish(model), verify)

    def generate(self, prompts: Batch, **kwargs: object) -> Batch:
        return Batch.concat(list(self.rollout.generate(prompts, **kwargs)))

    @property
    def processes(self) -> list[multiprocessing.Process]:
        return [worker.proc for worker in self.rollout._engine._engine.model_executor.workers]

    def close(self) -> None:
        self.rollout.close()
        self.trainer.close()


@pytest.fixture(scope="module")
def spread(untied: Path) -> Iterator[Spread]:
    spread = Spread(untied)
    yield spread
    spread.close()


def local_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_logprobs_are_those_of_a_plain_forward_before_and_after_new_weights(spread: Spread) -> None:
    given = models.prompts([5, 150, 9], samples=2)
    plain = AutoModelForCausalLM.from_pretrained(spread.path, dtype=torch.float32).eval()
    assert models.largest_difference(plain, spread.generate(given), 1.0) <= 1e-5
    for seed in (1, 2):
        model = models.new_weights(spread.path, seed)
        spread.send(model)
        batch = spread.generate(given, temperature=0.7)
        assert models.largest_difference(model, batch, 0.7) <= 1e-5
        assert (batch["weight_version"] == spread.trainer.version).all()
        greedy = spread.generate(given, temperature=0.0)
        for logprobs, tokens in models.plain_logprobs(model, greedy, 1.0):
            assert torch.equal(logprobs.argmax(-1), tokens)


def test_each_worker_holds_its_part_of_every_parameter(spread: Spread) -> None:
    """The model has 2 query heads of 32 rows, 1 key-value head that both hold, and 260 tokens, padded to 320."""
    model = models.new_weights(spread.path, 3)
    spread.send(model)
    state = model.state_dict()
    held = spread.rollout._engine._engine.apply_model(local_parameters)
    for rank, parameters in enumerate(held):
        rows, half = slice(32 * rank, 32 * rank + 32), slice(64 * rank, 64 * rank + 64)
        vocabulary = slice(160 * rank, min(160 * rank + 160, 260))
        for layer in (0, 1):
            at = f"model.layers.{layer}"
            attention = {n: state[f"{at}.self_attn.{n}_proj.weight"] for n in "qkvo"}
            mlp = {n: state[f"{at}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
            expected = {
                "self_attn.qkv_proj": torch.cat([attention["q"][rows], attention["k"], attention["v"]]),
                "self_attn.o_proj": attention["o"][:, rows],
                "mlp.gate_up_proj": torch.cat([mlp["gate"][half], mlp["up"][half]]),
                "mlp.down_proj": mlp["down"][:, half],
                "input_layernorm": state[f"{at}.input_layernorm.weight"],
            }
            for name, tensor in expected.items():
                assert torch.equal(parameters.pop(f"{at}.{name}.weight"), tensor), (rank, layer, name)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            own = parameters.pop(name)
            assert own.shape == (160, 64) and torch.equal(own[: 160 - 60 * rank], state[name][vocabulary])


def test_a_part_that_differs_is_named_with_its_worker(spread: Spread) -> None:
    model = models.new_weights(spread.path, 4)
    spread.rollout._engine._engine.collective_rpc(_forget_keys)
    with pytest.raises(
        RunFailed, match="the rollout engine's worker 1 holds other weights .*: model.layers.1.self_attn.k_proj"
    ):
        spread.send(model)
    with pytest.raises(RunFailed, match="did not finish"):
        spread.generate(models.prompts([3]))
    spread.rollout._engine._engine.collective_rpc(_remember_keys)
    spread.send(model)
    assert models.largest_difference(model, spread.generate(models.prompts([3])), 1.0) <= 1e-5
    with pytest.raises(RunFailed, match="there are no checksums"):
        spread.rollout.weight_checksums()


def _forget_keys(worker: object) -> None:
    """In the second worker the keys of the last layer are not what was loaded."""
    from rayrlhf.actors import rollout_worker

    if worker.rank != 1:  # type: ignore[attr-defined]
        return
    rollout_worker._kept_repack = rollout_worker._repack  # type: ignore[attr-defined]

    def repack(model: torch.nn.Module) -> None:
        model.model.layers[1].self_attn.qkv_proj.weight.data[32 + 5, 7] += 1e-3
        rollout_worker._kept_repack(model)  # type: ignore[attr-defined]

    rollout_worker._repack = repack


def _remember_keys(worker: object) -> None:
    from rayrlhf.actors import rollout_worker

    if worker.rank == 1:  # type: ignore[attr-defined]
        rollout_worker._repack = rollout_worker._kept_repack  # type: ignore[attr-defined]


def test_damage_on_the_way_is_named(spread: Spread) -> None:
    model = models.new_weights(spread.path, 5)
    manifest = spread.trainer.publish(model)
    entry = manifest.buckets[0][3]
    with open(spread.trainer.first_bucket(manifest), "r+b") as opened:
        opened.seek(entry.offset + 17)
        opened.write(b"\xff\xfe")
    with pytest.raises(RunFailed, match=f"damaged on their way to rollout rank 1 worker . .*{entry.name}$"):
        spread.rollout.receive_weights(manifest, True)
    spread.send(model)


TIED = """
import sys
from pathlib import Path
import rollout_models as models
from test_tensor_parallel import Spread

if __name__ == "__main__":
    path = Path(sys.argv[1])
    spread = Spread(path)
    for seed in (1, 2):
        model = models.new_weights(path, seed)
        spread.send(model)
        assert models.largest_difference(model, spread.generate(models.prompts([5, 40])), 1.0) <= 1e-5
    print("workers", *[process.pid for process in spread.processes], flush=True)
    spread.generate(models.prompts([5], samples=5000))
"""


def test_a_tied_output_layer_is_spread_too_and_no_worker_outlives_an_engine_that_is_killed(
    tied: Path, tmp_path: Path
) -> None:
    """A Qwen2: its attention has biases."""
    script = tmp_path / "tied.py"
    script.write_text(TIED)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    with subprocess.Popen(
        [sys.executable, str(script), str(tied)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = next((line for line in process.stdout if line.startswith("workers")), None)
            assert said is not None, "what it failed at is on the standard error"
            time.sleep(1)
            assert process.poll() is None
        finally:
            process.kill()
    pids = [int(pid) for pid in said.split()[1:]]
    end = time.monotonic() + 60
    while any(_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.2)
    assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_worker_fails_at_while_it_comes_up_is_told(untied: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in untied.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(RunFailed, match=r"vLLM's 2 workers did not come up: SafetensorError: .*[Hh]eader"):
        Spread(broken)


def test_sizes_that_do_not_divide_the_model_are_refused(untied: Path) -> None:
    config = AutoConfig.from_pretrained(untied)
    with pytest.raises(InputRefused, match="it has 2 attention heads, 1 key-value heads .* legal sizes are 1, 2$"):
        check_tensor_parallel(config, 3)
    config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = 24, 6, 96
    for legal in (1, 2, 3, 6, 12, 24):
        check_tensor_parallel(config, legal)
    for size, message in ((4, "legal sizes are 1, 2, 3, 6, 12, 24$"), (8, "legal"), (48, "legal")):
        with pytest.raises(InputRefused, match=message):
            check_tensor_parallel(config, size)
    config.intermediate_size = 90
    with pytest.raises(InputRefused, match="legal sizes are 1, 2, 3, 6$"):
        check_tensor_parallel(config, 12)
    with pytest.raises(InputRefused, match=r"rollout.tensor_parallel is 3, which does not divide the model"):
        RolloutEngine(
            models.CPU,
            model_path=str(untied),
            config=RolloutConfig(engine="vllm", tensor_parallel=3),
            dtype="float32",
            max_model_tokens=64,
        )
    with pytest.raises(InputRefused, match=r"rollout.engine=transformers runs in one process"):
        RolloutEngine(
            models.CPU,
            model_path=str(untied),
            config=RolloutConfig(engine="transformers", tensor_parallel=2),
            dtype="float32",
            max_model_tokens=64,
        )


@pytest.mark.parametrize(
    "codes, says",
    [
        ((-signal.SIGTERM, -signal.SIGKILL), "worker 1 of 2 (process 101) was killed by SIGKILL"),
        ((0, 3), "worker 1 of 2 (process 101) ended with exit code 3"),
        ((-signal.SIGTERM, 0), "worker 0 of 2 (process 100) was killed by SIGTERM"),
    ],
)
def test_who_died_is_named_though_the_others_have_been_ended_since(codes: tuple[int, int], says: str) -> None:
    pipes = [os.pipe() for _ in codes]
    for _, writer in pipes:
        os.close(writer)
    workers = [
        SimpleNamespace(proc=SimpleNamespace(sentinel=reader, exitcode=code, pid=100 + number))
        for number, (code, (reader, _)) in enumerate(zip(codes, pipes, strict=True))
    ]
    deaths = _Deaths(workers)
    assert deaths.noticed.wait(60) and deaths.first == says
    for reader, _ in pipes:
        os.close(reader)


def test_a_worker_that_dies_while_it_generates_is_named_within_ten_seconds(spread: Spread) -> None:
    """The last one here that has this engine."""
    processes = spread.processes
    stream = spread.rollout.generate(models.prompts([5], samples=60))
    next(stream)
    os.kill(processes[1].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RunFailed, match=r"rollout rank 1: worker 1 of 2 \(process \d+\) was killed by SIGKILL"):
        list(stream)
    assert time.monotonic() - started < 30
    with pytest.raises(RunFailed, match="worker 1 of 2"):
        spread.send(models.new_weights(spread.path, 1))
    spread.close()
    assert not any(process.is_alive() for process in processes)
