"""What both rollout engines share: requests, results, and what is read from the model's folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch

from rayrlhf.errors import InputRefused, RunFailed
from rayrlhf.models.export import weight_layout
from rayrlhf.weights import Address, Manifest

if TYPE_CHECKING:
    from rayrlhf.actors.rollout_intake import Intake

__all__ = [
    "Engine",
    "Failed",
    "Finished",
    "ModelFacts",
    "Part",
    "Request",
    "check_tensor_parallel",
    "layout_problems",
    "read_model_facts",
    "rollout_environment",
    "unpartitioned",
]

Part = Literal["weights", "kv_cache", "all"]
"""What of an engine can be woken up by itself."""


def rollout_environment(device: Literal["cpu", "cuda"]) -> dict[str, str]:
    """Environment variables that a process with a vLLM engine needs before it imports vLLM.

    The engine sets them itself where they are missing; a process that is started for it has them from the start.
    """
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: we step the engine ourselves
        # Workers of a tensor-parallel engine: a fork would take over this process's threads' locks and CUDA's state.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "3",  # the others are ended so soon after one of them has died
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the one model runner that all supported versions have, on every device
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if device == "cpu":
        # nobind: the roles share the cores. Without TORCHDYNAMO_DISABLE even the eager mode compiles, which needs a C++
        # compiler.
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    else:
        variables["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it knows no seeds of single requests
    return variables


@dataclass(frozen=True)
class Request:
    """One sample to be generated."""

    index: int
    """Its place among the prompts of the call."""
    prompt: list[int]
    seed: int
    temperature: float
    """0 takes the likeliest token; log-probabilities are then those of temperature 1."""
    max_tokens: int


@dataclass(frozen=True)
class Finished:
    """One generated response."""

    index: int
    tokens: list[int]
    """The response, with the EOS token or the stop string that ended it."""
    logprobs: list[float]
    """Log-probability of each token in the distribution it was drawn from (temperature, top-k and top-p applied)."""
    reason: Literal["stop", "length"]


class Failed(NamedTuple):
    """What one of vLLM's workers failed at. An exception itself would reach the engine as no more than its text."""

    error: RunFailed


class Engine(Protocol):
    """What generates. It is used from this process, and its methods are called by one thread."""

    def generate(self, intake: Intake) -> Iterator[Finished]:
        """All requests that are taken in, as they finish; the order depends on nothing but these and the weights."""

    def connect(self, address: Address) -> None:
        """Get ready to receive weights from there, once for all transfers of that group.

        Raises:
            RunFailed: where the other side isn't there.
        """

    def load(self, manifest: Manifest, verify: bool) -> None:
        """Take over a whole set of weights, or an adapter; runs while they are sent.

        Args:
            verify: compare what the engine holds afterwards with what arrived.

        Raises:
            RunFailed: where a parameter of the engine was not among them, or isn't what was sent; tensors are named.
        """

    def checksums(self, manifest: Manifest) -> dict[str, int]:
        """CRC-32 of each of the manifest's tensors as the engine holds it, in the type in which it was sent; those which
        it can't tell are missing."""

    def reset_prefix_cache(self) -> None:
        """Forget all cached keys and values."""

    def sleep(self, level: int) -> None:
        """Give memory back."""

    def wake(self, part: Part) -> None:
        """Take it again."""

    def close(self) -> None:
        """End the engine."""


@dataclass(frozen=True)
class ModelFacts:
    """What the engines need to know of a model before they load it."""

    config: Any
    """The transformers configuration."""
    vocab_size: int
    """Rows of the embedding."""
    eos_ids: tuple[int, ...]
    """Every token that ends a response."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor of a checkpoint by its name; a tied output layer is not among them."""
    embedding: str
    """Name of the input embedding."""
    tied: str | None
    """Name of the output layer where it is the input embedding, else None."""

    def without_config(self) -> ModelFacts:
        """The same for another process, to which a configuration with code of its own can't travel."""
        return replace(self, config=None)


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def read_model_facts(model_path: str, tokenizer_path: str, *, trust_remote_code: bool = False) -> ModelFacts:
    """Vocabulary, EOS tokens and parameter shapes of a Hugging Face model folder; no weight is loaded.

    A response ends at any EOS token that the model's configuration, its generation configuration or the tokenizer has.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    eos = _as_ids(text.eos_token_id)
    with contextlib.suppress(OSError):  # a model need not have a generation configuration
        eos += _as_ids(GenerationConfig.from_pretrained(model_path).eos_token_id)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
    eos += _as_ids(tokenizer.eos_token_id)
    with torch.device("meta"), unpartitioned():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in reversed(parameters.items())}
    embedding = names[id(model.get_input_embeddings().weight)]
    output = model.get_output_embeddings()
    output_name = next((n for n, p in parameters.items() if output is not None and p is output.weight), None)
    tied = next((n for n, p in parameters.items() if n != embedding and p is parameters[embedding]), None)
    if tied is None and getattr(text, "tie_word_embeddings", False):
        tied = output_name  # not every model ties its parameters before it has weights
    shapes = {name: shape for name, shape, _ in weight_layout(model) if name != tied}
    return ModelFacts(config, shapes[embedding][0], tuple(sorted(set(eos))), shapes, embedding, tied)


def layout_problems(facts: ModelFacts, manifest: Manifest) -> list[str]:
    """What keeps a set of weights from fitting the engine's model: missing, unknown and misshapen parameters."""
    given = {entry.name: entry.shape for entry in manifest.entries()}
    problems = [f"{name} is missing" for name in facts.shapes if name not in given]
    for name, shape in given.items():
        expected = facts.shapes.get(name)
        if name == facts.tied:
            expected = facts.shapes[facts.embedding]
        if expected is None:
            problems.append(f"{name} is no parameter of the engine's model")
        elif shape != expected:
            hint = " (the vocabularies differ)" if name in (facts.embedding, facts.tied) else ""
            problems.append(f"{name} has the shape {list(shape)}, the engine's {list(expected)}{hint}")
    return problems


def check_tensor_parallel(config: Any, size: int) -> None:
    """Refuse to cut a model into parts that it can't be cut into.

    Each part has the same number of attention heads; key-value heads are spread likewise, or each is held by the same
    number of parts.

    Args:
        config: transformers configuration of the model.
        size: parts.

    Raises:
        InputRefused: with the legal sizes.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    inner = [
        value
        for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
        if (value := getattr(text, key, None))
    ]

    def fits(n: int) -> bool:
        shared = groups % n == 0 or n % groups == 0
        return heads % n == 0 and shared and all(value % n == 0 for value in inner)

    if not fits(size):
        legal = ", ".join(str(n) for n in range(1, heads + 1) if fits(n))
        raise InputRefused(
            f"rollout.tensor_parallel is {size}, which does not divide the model: it has {heads} attention heads, "
            f"{groups} key-value heads and inner layers of {' and '.join(map(str, inner))}; legal sizes are {legal}"
        )


@contextlib.contextmanager
def unpartitioned() -> Iterator[None]:
    """Build models whole, even where a trainer under ZeRO-3 lives in this process.

    While transformers knows of a ZeRO-3 configuration, it partitions every model that is made in the process.
    """
    module = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    if module is None or reference is None:
        yield
        return
    module._hf_deepspeed_config_weak_ref = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module._hf_deepspeed_config_weak_ref = reference  # type: ignore[attr-defined]
