"""How many bytes a process of each role holds, from the dimensions of its model and its configuration.

What a training engine keeps is that of DeepSpeed as `rayrlhf.models.engine` configures it; tests compare it with real engines.
P: parameters of the model, T: those of them that are trained, N: data-parallel ranks, b: bytes of a number (2 in bfloat16,
4 in float32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayrlhf.config.derive import data_ranks, lora_room
from rayrlhf.config.trainers import LoraConfig, ModelConfig, TrainedConfig
from rayrlhf.planning.offload import (
    Block,
    moved_bytes,
    optimizer_blocks,
    parameter_blocks,
    pinned_bytes,
    segment_bytes,
    swap_blocks,
)
from rayrlhf.planning.shapes import Shape, Weight, numel

__all__ = [
    "CONTEXT",
    "ENGINE_WORKSPACE",
    "HOST_PROCESS",
    "HOST_PROCESS_CPU",
    "KV_BLOCK",
    "PARTS",
    "WORKSPACE",
    "ModelBytes",
    "cache_bytes",
    "engine_adapter_bytes",
    "engine_backup_bytes",
    "engine_bytes",
    "forward_bytes",
    "frozen_bytes",
    "itemsize_of",
    "trained_bytes",
    "training_bytes",
]

GIB = 2**30
PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers", "kv_cache", "transfer", "other")
"""What memory is used for, in the order in which it is shown."""

CONTEXT = GIB // 2
"""Assumed: what each process takes of a GPU by being there (CUDA's context, kernels)."""
WORKSPACE = GIB // 2
"""Assumed: what a process that computes takes besides its tensors (cuBLAS, NCCL's buffers, fragments between blocks)."""
ENGINE_WORKSPACE = 2 * GIB
"""Assumed: what an engine of vLLM takes besides weights and KV cache (activations of one step, CUDA graphs)."""
KV_BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU, and at most of one on a GPU, where most models have 16."""
HOST_PROCESS = GIB
"""Assumed: host memory of each process that works on a GPU, by itself (torch, CUDA's and Python's libraries)."""
HOST_PROCESS_CPU = 640 * 2**20
"""Assumed: the same of a process that works on a CPU."""

LIVE = 10**9
"""Parameters that ZeRO-3 keeps whole for a while: DeepSpeed's stage3_max_live_parameters."""
PERSISTENT = 10**5
"""Parameters with fewer numbers stay whole under ZeRO-3: DeepSpeed's stage3_param_persistence_threshold."""
SWAPPED_STATES, SWAPPED_PARAMETERS = 4, 5
"""Buffers between host memory and a disk, of the optimizer's states and of parameters: DeepSpeed's buffer_count."""
KEPT = 10**9
"""Parameters that a rank keeps in host memory although they are to be on a disk: DeepSpeed's max_in_cpu."""
LEAST_BUCKET = 2**24
"""Numbers of a reduction bucket, at least, where there are so many."""
SUB_GROUP = 10**9
"""Numbers that ZeRO-3's optimizer works on at once: DeepSpeed's sub_group_size."""


def itemsize_of(dtype: str) -> int:
    """Bytes of a number."""
    return {"float32": 4, "bfloat16": 2}[dtype]


@dataclass(frozen=True)
class ModelBytes:
    """What one process holds of a model and its training, in bytes."""

    parameters: int
    gradients: int = 0
    """Between the last backward pass and the optimizer's step."""
    optimizer: int = 0
    """Master weights and moments."""
    buffers: int = 0
    """During forward and backward of training: reduction bucket, parameters and gradients that are whole for a while."""
    step_buffers: int = 0
    """During the optimizer's step: a second copy of the gradients."""
    forward_buffers: int = 0
    """Parameters that are whole for a while, in forwards."""
    host: Mapping[str, int] = field(default_factory=dict)
    """What lives in host memory, by part."""
    pinning: int = 0
    """What these take besides, at most, where they are page-locked for a GPU."""
    away: int = 0
    """What host memory takes in all while everything that is `resident` has left its GPU."""
    loading: int = 0
    """In host memory while the model is read."""
    disk: int = 0
    """What lives on a disk."""

    @property
    def resident(self) -> int:
        """What stays on the device between two steps."""
        return self.parameters + self.gradients + self.optimizer


def _whole(weights: Sequence[Weight], itemsize: int) -> int:
    """Bytes of the parameters that ZeRO-3 has whole at one time: live ones, or the largest where it alone has more numbers,
    and the small ones that always are."""
    live = max(min(LIVE, numel(weights)), max(w.numel for w in weights))
    small = numel(w for w in weights if w.numel < PERSISTENT)
    return (live + small) * itemsize


def _per_rank(weights: Sequence[Weight], tensor_parallel: int) -> list[Weight]:
    """What a rank has under AutoTP: its share of the layers' linear weights, all else whole."""
    if tensor_parallel == 1:
        return list(weights)
    return [
        w._replace(shape=(-(-w.shape[0] // tensor_parallel), *w.shape[1:]))
        if w.linear and "lm_head" not in w.name
        else w
        for w in weights
    ]


def trained_bytes(
    config: TrainedConfig, shape: Shape, *, head: str = "vocabulary", layers: int | None = None
) -> ModelBytes:
    """What a rank of a trained model holds (Rajbhandari et al. 2020, section 3).

    - Parameters: b P; with stage 3 b P / N. Adapters (LoRA) are parameters too.
    - Optimizer: (4 + 4 + 4) T / N: float32 master weights, which DeepSpeed keeps of float32 models as well, and two moments.
    - Gradients: 4 T / N in float32; stage 1 in bfloat16 keeps 4 T for what is added up and 2 T for the last backward pass.
      Stage 1 in float32 has them whole until they are reduced. The step makes a copy, with stage 3 of 10^9 numbers at a time.
    - Reduction bucket, with more than one rank: b times its numbers: those of the largest tensor, at least 2^24, at most T.
    - Stage 3: up to 10^9 parameters are whole at a time in b bytes each.
    - Offload: what is in host memory or on a disk isn't on the device; the blocks in host memory are listed in
      `rayrlhf.planning.offload`.

    Args:
        head: see `Shape.weights`.
        layers: see `Shape.weights`.
    """
    size, ranks, stage = itemsize_of(config.dtype), data_ranks(config) * config.sequence_parallel, config.zero_stage
    model = _per_rank(shape.weights(head=head, layers=layers), config.tensor_parallel)
    trained = _trained_of(config.lora, shape, model, head, layers)
    everything = model if config.lora is None else [*model, *trained]
    total, learnt = numel(everything), numel(trained)
    parameters = size * total // (ranks if stage == 3 else 1)
    gradients = 6 * learnt if stage == 1 and size == 2 else 4 * learnt // ranks
    optimizer = 12 * learnt // ranks
    largest = max(w.numel for w in trained)
    bucket = size * min(max(largest, LEAST_BUCKET), learnt) if ranks > 1 else 0
    whole = _whole(everything, size) if stage == 3 and (ranks > 1 or config.offload_parameters != "none") else 0
    unreduced = 4 * learnt if stage == 1 and size == 4 and ranks > 1 else 0
    copy = 4 * min(learnt // ranks, SUB_GROUP if stage == 3 else learnt)
    blocks: list[Block] = []
    disk = 0
    if config.offload_optimizer != "none":
        gradients, copy = _gradients_beside_offload(config, learnt, largest, ranks), 0
        if config.offload_optimizer == "cpu":
            blocks += optimizer_blocks(trained, ranks, stage, size, SUB_GROUP)
        else:
            blocks.append(Block("gradients", 4 * learnt // ranks, True))
            blocks += swap_blocks(4 * min(learnt // ranks, SUB_GROUP), SWAPPED_STATES)
            disk += optimizer
        optimizer = 0
    if config.offload_parameters == "cpu":
        blocks += parameter_blocks(everything, trained, ranks, size)
    if config.offload_parameters == "nvme":
        # As many numbers as `rayrlhf.models.zero` gives a buffer.
        blocks += swap_blocks(size * (max(w.numel for w in everything) // ranks + 1), SWAPPED_PARAMETERS)
        blocks.append(Block("parameters", size * min(learnt // ranks, KEPT), True))
        disk += parameters
    if config.offload_parameters != "none":
        parameters = 0
    states = ModelBytes(parameters, gradients, optimizer, bucket + whole + unreduced, copy, whole, disk=disk)
    # What is trained lies in one piece, and so does each kind of its states; what isn't, tensor by tensor.
    flat = 0 if config.offload_parameters != "none" else size * learnt // (ranks if stage == 3 else 1)
    apart = [] if config.lora is None or config.offload_parameters != "none" else model
    moved = [flat, gradients, *[optimizer // 3] * 3, *_shares(apart, size, ranks if stage == 3 else 1)]
    # Read in float32, unless ZeRO-3 spreads each tensor as it is read (`rayrlhf.actors.language_model.load_trained_lm`).
    read = shape.weights(head=head, layers=layers)
    loading = size * max(w.numel for w in read) if stage == 3 else 4 * numel(read)
    return replace(states, **_hosted(blocks), away=sum(map(moved_bytes, moved)), loading=loading)


def _hosted(blocks: Sequence[Block]) -> dict[str, Any]:
    """Blocks in host memory by part, and what page-locking adds to them: they are larger, and freed ones stay."""
    host: dict[str, int] = {}
    for block in blocks:
        if not block.freed:
            host[block.part] = host.get(block.part, 0) + block.nbytes
    taken = sum(pinned_bytes(block.nbytes) if block.pinned else block.nbytes for block in blocks)
    return {"host": host, "pinning": taken - sum(host.values())}


def _shares(weights: Sequence[Weight], size: int, ranks: int) -> list[int]:
    return [size * -(-w.numel // ranks) for w in weights]


def _gradients_beside_offload(config: TrainedConfig, learnt: int, largest: int, ranks: int) -> int:
    """What stays of gradients on the device where the optimizer's states don't: of bfloat16 models what stage 1 adds up in
    float32, and the last backward pass; the rank's share of that sum in stage 2. Else it is in host memory, and one tensor at a
    time on the device."""
    size = itemsize_of(config.dtype)
    if size == 2 and config.zero_stage == 1:
        return 6 * learnt
    return size * largest + (4 * learnt // ranks if size == 2 and config.zero_stage == 2 else 0)


def _trained_of(
    lora: LoraConfig | None, shape: Shape, model: Sequence[Weight], head: str, layers: int | None
) -> list[Weight]:
    if lora is None:
        return list(model)
    scalar = [w for w in model if w.name.startswith("head.")]
    return [*shape.adapters(lora, head=head, layers=layers), *scalar]


def frozen_bytes(
    shape: Shape, dtype: str, ranks: int, *, zero_stage: int = 0, offloaded: bool = False, head: str = "vocabulary"
) -> ModelBytes:
    """What a rank of a model holds that nothing trains: b P; with stage 3 b P / N, and live parameters besides."""
    weights, size = shape.weights(head=head), itemsize_of(dtype)
    over = ranks if zero_stage == 3 else 1
    parameters = size * numel(weights) // over
    whole = _whole(weights, size) if zero_stage == 3 and (ranks > 1 or offloaded) else 0
    # With stage 3 each tensor is spread as it is read, else all of them are there before any leaves for the device.
    loading = size * max(w.numel for w in weights) if zero_stage == 3 else size * numel(weights)
    if offloaded:
        hosted = _hosted([*parameter_blocks(weights, [], ranks, size)])
        return ModelBytes(0, forward_buffers=whole, buffers=whole, **hosted, loading=loading)
    away = sum(map(moved_bytes, _shares(weights, size, over)))
    return ModelBytes(parameters, forward_buffers=whole, buffers=whole, away=away, loading=loading)


# -- activations ------------------------------------------------------------------------------------------------------


def _layer_bytes_per_token(shape: Shape, size: int, tensor_parallel: int) -> int:
    """Bytes that one layer keeps of one token for its backward pass.

    Counted as Korthikanti et al. 2022 (section 4.1) do, for this architecture: no dropout, and attention that keeps no matrix
    of weights. Each of the norms: its input in float32 (4 h), the normalised values and the result (2 b h). Attention:
    queries, keys, values, and the output (b d (2 H + 2 K)). MLP: gate, its activation, up, and their product (4 b I), for each
    expert that a token visits.
    """
    norms = 2 * shape.hidden * (4 + 2 * size)
    attention = size * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    mlp = 4 * size * shape.intermediate * max(1, shape.experts_per_token)
    return norms + (attention + mlp) // tensor_parallel


def training_bytes(
    config: TrainedConfig, shape: Shape, tokens: int, *, head: str = "vocabulary", layers: int | None = None
) -> int:
    """Activations of one micro-batch, at the peak of forward and backward.

    Without checkpointing all layers keep theirs; with it each keeps its input (b h), and one layer at a time all of it.
    Sequence parallelism leaves a rank its share of the tokens. Log-probabilities have one chunk of logits at a time:
    (2 b + 8) V bytes a token, in the backward pass (logits and their gradient, log-probabilities and probabilities in float32).

    Args:
        tokens: of the micro-batch, padding included.
    """
    size = itemsize_of(config.dtype)
    own = -(-tokens // config.sequence_parallel)
    count = shape.layers if layers is None else min(layers, shape.layers)
    each = _layer_bytes_per_token(shape, size, config.tensor_parallel)
    kept = count * size * shape.hidden + each if config.gradient_checkpointing else count * each
    ends = 2 * shape.hidden * size
    logits = min(own, config.logits_chunk_tokens) * shape.vocabulary * (2 * size + 8) if head == "vocabulary" else 0
    return own * (kept + ends) + logits


def forward_bytes(
    config: ModelConfig, shape: Shape, tokens: int, *, head: str = "vocabulary", sequence_parallel: int = 1
) -> int:
    """Activations of a forward without gradient: those of one layer, and one chunk of logits ((b + 8) V bytes a token)."""
    size = itemsize_of(config.dtype)
    own = -(-tokens // sequence_parallel)
    chunk = getattr(config, "logits_chunk_tokens", 0) if head == "vocabulary" else 0
    layer = _layer_bytes_per_token(shape, size, getattr(config, "tensor_parallel", 1))
    return own * (layer + 2 * shape.hidden * size) + min(own, chunk) * shape.vocabulary * (size + 8)


# -- engines ----------------------------------------------------------------------------------------------------------


def engine_bytes(shape: Shape, dtype: str, tensor_parallel: int) -> int:
    """Weights of an engine on one of its GPUs: b P / t. Norms, which each GPU has whole, are counted whole."""
    weights, size = shape.weights(), itemsize_of(dtype)
    vectors = numel(w for w in weights if len(w.shape) == 1)
    return size * ((numel(weights) - vectors) // tensor_parallel + vectors)


def engine_adapter_bytes(shape: Shape, rank: int, dtype: str, tensor_parallel: int) -> int:
    """Room for an adapter on one GPU of a vLLM engine that gets adapters alone, at most: b r (in + out) a linear layer.

    vLLM makes it for all layers, whichever of them the adapter has, with `lora_room` for r. Of a layer whose outputs are
    spread over GPUs (queries, gate, ...) each has its share of the out, with one key-value head at least; of one whose inputs
    are (the other two), its share of the in. Embedding and output layer have room on each GPU, in most families. Each expert
    has its own. Hu et al. 2022, section 4.1; vllm/lora/layers.
    """
    t, keys = tensor_parallel, max(1, shape.kv_heads // tensor_parallel) * shape.head_dim
    count = 2 * (shape.vocabulary + shape.hidden)
    for weight in shape.layer_weights():
        name = weight.name.removesuffix(".weight")
        if len(weight.shape) == 1 or name.endswith(".gate"):
            continue
        *experts, out, into = weight.shape
        if name.endswith(("o_proj", "down_proj")):
            each = into // t + out
        elif name.endswith(("k_proj", "v_proj")):
            each = into + keys
        else:
            each = into * (2 if name.endswith("gate_up_proj") else 1) + out // t
        count += shape.layers * math.prod(experts) * each
    return itemsize_of(dtype) * lora_room(rank) * count


def cache_bytes(sequences: int, tokens: int, token_bytes: int, block: int = KV_BLOCK) -> int:
    """A KV cache with room for so many sequences of so many tokens, each in whole blocks, and the block that vLLM keeps to itself
    (`BlockPool` in vllm/v1/core/block_pool.py)."""
    return (sequences * -(-tokens // block) + 1) * block * token_bytes


def engine_backup_bytes(shape: Shape, dtype: str, tensor_parallel: int) -> int:
    """Host memory for the weights of one GPU of an engine of vLLM that sleeps, at most.

    vLLM copies each segment of its GPU memory to a page-locked block (`CuMemAllocator.sleep` in device_allocator/cumem.py).
    Tensors of 10 MiB and more have segments of their own, in steps of 2 MiB, as torch's allocator has it; projections of the
    same input are one tensor: queries, keys and values; gate and up.
    """
    size, t = itemsize_of(dtype), tensor_parallel
    joined: dict[tuple[str, str], int] = {}
    for w in shape.weights():
        place, _, name = w.name.removesuffix(".weight").rpartition(".")
        kind = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}.get(
            name, name
        )
        own = w.numel if len(w.shape) == 1 else w.numel // t
        joined[place, kind] = joined.get((place, kind), 0) + own * size
    return segment_bytes(joined.values())
