"""What a training engine holds, as planned and as real DeepSpeed engines on real ranks hold it; caches as vLLM makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rayrlhf.config.trainers import PolicyConfig, TrainedConfig
from rayrlhf.planning.known import shape_of
from rayrlhf.planning.memory import (
    engine_adapter_bytes,
    engine_backup_bytes,
    engine_bytes,
    forward_bytes,
    frozen_bytes,
    trained_bytes,
    training_bytes,
)
from rayrlhf.planning.offload import moved_bytes, optimizer_blocks, parameter_blocks, pinned_bytes, segment_bytes
from rayrlhf.planning.shapes import Shape
from tests.models.ranks import Ranks
from tests.planning.rank_cases import held, locked, swapped

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LARGE = {**SMALL, "hidden_size": 512, "intermediate_size": 1536, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    groups = {1: Ranks(1), 2: Ranks(2)}
    yield groups
    for group in groups.values():
        group.close()


def close_to(found: int, planned: int) -> bool:
    return abs(found - planned) <= 0.05 * max(found, planned)


CASES = [
    *((size, stage, dtype, SMALL, None) for size in (1, 2) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")),
    (2, 2, "bfloat16", LARGE, None),
    (2, 3, "bfloat16", LARGE, None),
    (1, 2, "float32", SMALL, {"rank": 8}),
    (2, 2, "bfloat16", SMALL, {"rank": 8}),
    (2, 3, "bfloat16", SMALL, {"rank": 8}),
]


@pytest.mark.parametrize(("size", "stage", "dtype", "dimensions", "lora"), CASES)
def test_a_real_engine_holds_what_is_planned(ranks, size, stage, dtype, dimensions, lora):
    config = TrainedConfig(zero_stage=stage, dtype=dtype, ranks=size, lora=lora)
    planned = trained_bytes(config, Shape.of({"model_type": "llama", **dimensions}, ""))
    found = ranks[size].run(held, settings=config.model_dump(), dimensions=dimensions)[0]
    assert close_to(found["parameters"], planned.parameters), (found, planned)
    assert close_to(found["optimizer"], planned.optimizer), (found, planned)
    assert close_to(found["gradients"], planned.gradients), (found, planned)
    # All that is there besides: buckets, whole parameters, copies. No more than planned, and it is planned from what is there.
    assert found["peak"] <= 1.05 * (planned.resident + planned.buffers + planned.step_buffers), (found, planned)


@pytest.mark.parametrize(
    ("stage", "dtype", "more"),
    [
        (1, "bfloat16", {}),
        (2, "bfloat16", {}),
        (2, "float32", {}),
        (3, "bfloat16", {}),
        (3, "bfloat16", {"offload_parameters": "cpu"}),
    ],
)
def test_a_real_engine_asks_for_the_blocks_that_are_planned(ranks, stage, dtype, more):
    """DeepSpeed is told to page-lock, as for a GPU: each block that it asks for is planned, and no other."""
    config = TrainedConfig(zero_stage=stage, dtype=dtype, offload_optimizer="cpu", **more)
    weights = Shape.of({"model_type": "llama", **SMALL}, "").weights()
    size = 4 if dtype == "float32" else 2
    planned = [*optimizer_blocks(weights, 1, stage, size, 10**9)]
    planned += parameter_blocks(weights, weights, 1, size) if more else []
    found = ranks[1].run(locked, settings=config.model_dump(), dimensions=SMALL)[0]
    assert sorted(found) == sorted(block.nbytes for block in planned if block.pinned)


@pytest.mark.parametrize("size, dtype", [(1, "bfloat16"), (2, "bfloat16"), (1, "float32")])
def test_a_real_engine_has_the_buffers_between_memory_and_disk_that_are_planned(ranks, size, dtype, tmp_path):
    config = TrainedConfig(
        zero_stage=3,
        dtype=dtype,
        ranks=size,
        nvme_path=str(tmp_path),
        offload_optimizer="nvme",
        offload_parameters="nvme",
    )
    host = trained_bytes(config, Shape.of({"model_type": "llama", **SMALL}, "")).host
    for found in ranks[size].run(swapped, settings=config.model_dump(), dimensions=SMALL):
        assert sum(found["buffers"]) == pytest.approx(host["buffers"], rel=1e-3)  # DeepSpeed rounds up to 1,024 bytes
        assert sum(found["parameters"]) == host["parameters"]


# -- by hand ------------------------------------------------------------------------------------------------------------

TINY_CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
TINY = Shape.of(TINY_CONFIG, "")
# embedding 800, output 800, last norm 8; a layer: q 64, k 32, v 32, o 64, MLP 3 x 128, norms 16: 592. In all 2,792.
P = 2792


def policy(**more) -> PolicyConfig:
    return PolicyConfig(path="m", **more)


def test_states_by_hand():
    assert TINY.parameters() == P
    one = trained_bytes(policy(dtype="bfloat16"), TINY)
    assert (one.parameters, one.optimizer, one.gradients, one.buffers) == (2 * P, 12 * P, 4 * P, 0)
    four = trained_bytes(policy(dtype="bfloat16", ranks=4, zero_stage=3), TINY)
    assert (four.parameters, four.optimizer, four.gradients) == (2 * P // 4, 12 * P // 4, 4 * P // 4)
    # Two ranks share each sequence: ZeRO still spreads over all four.
    shared = trained_bytes(policy(dtype="bfloat16", ranks=4, zero_stage=3, sequence_parallel=2), TINY)
    assert shared.optimizer == four.optimizer
    # Bucket: there are fewer than 2^24 numbers, so all of them, in bfloat16.
    assert trained_bytes(policy(ranks=4), TINY).buffers == 2 * P
    # LoRA of rank 2 on all linear layers: q 2(8+8), k 2(8+4), v 2(8+4), o 2(8+8), MLP 3 x 2(8+16): 256 a layer.
    lora = trained_bytes(policy(lora={"rank": 2}), TINY)
    assert lora.parameters == 2 * (P + 512) and lora.optimizer == 12 * 512
    # AutoTP over 2 halves the layers' linear weights (2 x 576), and the two ranks are no data-parallel ones.
    halves = trained_bytes(policy(ranks=2, tensor_parallel=2), TINY)
    assert halves.parameters == 2 * (P - 576) and halves.optimizer == 12 * (P - 576)


def test_offloaded_states_are_elsewhere():
    # Stage 2, two ranks, bfloat16: 1,396 numbers each. Master weights and moments 12 bytes, a copy in bfloat16; gradients 4
    # bytes, and the largest tensor's (800 numbers) in bfloat16. On the GPU: what is added up, and one tensor at a time.
    cpu = trained_bytes(policy(offload_optimizer="cpu", ranks=2), TINY)
    assert cpu.optimizer == 0 and cpu.disk == 0 and cpu.gradients == 4 * 1396 + 2 * 800
    assert cpu.host == {"optimizer": 14 * 1396, "gradients": 4 * 1396 + 2 * 800}
    # Page-locked blocks become powers of two: 5,584 twice, 2,792 and 1,600 become 8,192 twice, 4,096 and 2,048.
    assert cpu.pinning == 2 * (8192 - 5584) + (4096 - 2792) + (2048 - 1600)
    nvme = trained_bytes(
        policy(zero_stage=3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/n", ranks=2), TINY
    )
    assert nvme.disk == 6 * P + P and nvme.parameters == 0
    # Four buffers for a rank's 1,396 numbers in float32, five for the largest tensor's share and one number in bfloat16; and
    # DeepSpeed keeps the first 10^9 parameters of a rank in host memory all the same.
    assert nvme.host == {"gradients": 4 * 1396, "buffers": 4 * 4 * 1396 + 5 * 2 * 401, "parameters": 2 * 1396}
    assert frozen_bytes(TINY, "bfloat16", 4, zero_stage=3).parameters == 2 * P // 4
    kept = frozen_bytes(TINY, "bfloat16", 4, zero_stage=3, offloaded=True)
    assert kept.parameters == 0 and kept.host == {"parameters": 2 * P // 4}
    # By tensor, a quarter in bytes: embedding and output 400 become 512; of a layer q and o 32, k and v 16, MLP 3 x 64 are
    # powers already, and so are norms of 4.
    assert kept.pinning == 2 * (512 - 400)


def test_stage_3_keeps_gradients_twice_in_host_memory():
    # Two ranks: 1,396 numbers. Master weights and moments 12 bytes, none of them page-locked; 4 bytes of gradients twice.
    spread = trained_bytes(policy(zero_stage=3, offload_optimizer="cpu", ranks=2), TINY)
    assert spread.host == {"optimizer": 12 * 1396, "gradients": 8 * 1396} and spread.pinning == 2 * (8192 - 5584)
    # Groups of at least 500 numbers of a rank: embedding 400, q, k, v, o 96, gate 64: 560; up, down 128, norms 8, the second
    # layer 296, the last norm 4, output 400: 836.
    groups = [block.nbytes for block in optimizer_blocks(TINY.weights(), 2, 3, 2, 500) if block.pinned]
    assert groups == [4 * 560, 4 * 836, 4 * 1396]


def test_parameters_move_to_one_block_and_leave_theirs_behind():
    # Stage 3, two ranks, bfloat16: a tensor's share has as many bytes as the tensor has numbers. Embedding and output 800 ->
    # 1,024 each, the rest are powers of two: 2 x 592 + 8; in all 3,240, which torch keeps when they are freed. The block for all:
    # 2,792 -> 4,096.
    spread = trained_bytes(policy(zero_stage=3, offload_parameters="cpu", ranks=2), TINY)
    assert spread.parameters == 0 and spread.host == {"parameters": P} and spread.pinning == 3240 + 4096 - P
    # With adapters what isn't trained stays where it is: only these have a block, 2 layers x 256 numbers of 1 byte a rank; of a
    # layer q 16, 16, k 16, 8, v 16, 8, o 16, 16, gate and up 16, 32, down 32, 16, all powers.
    lora = trained_bytes(policy(zero_stage=3, offload_parameters="cpu", ranks=2, lora={"rank": 2}), TINY)
    assert lora.host == {"parameters": P + 512} and lora.pinning == 2 * (1024 - 800) + 512


def test_what_page_locking_takes():
    assert [pinned_bytes(n) for n in (0, 1, 3, 4096, 4097)] == [0, 1, 4, 4096, 8192]
    # 200 MiB leave a GPU in three pieces of 64 MiB and one of 8; 201 in three and one of 9, which takes 16.
    assert moved_bytes(200 * 2**20) == 200 * 2**20 and moved_bytes(201 * 2**20) == 208 * 2**20
    # 17 MiB have a segment of 18, of which a copy takes 32; 9 and 12 KiB share one of 20 MiB, of which a copy takes 32 too.
    assert segment_bytes([17 * 2**20, 9 * 2**20, 12 * 2**10]) == 64 * 2**20


def test_an_engine_that_sleeps_by_hand():
    """Llama 3 70B over 8 GPUs. A layer: q, k and v (8192 + 2 x 1024) / 8 x 8192 x 2 bytes = 20 MiB -> 32; o 16 -> 16; gate and up
    2 x 28672 / 8 x 8192 x 2 = 112 -> 128; down 56 -> 64. 80 layers x 240 MiB = 19,200 MiB. Embedding and output 128256 / 8 x
    8192 x 2 = 250.5 MiB, in steps of 2 MiB 252 -> 256 each. The norms, 161 x 16 KiB = 2.5 MiB: 20 -> 32."""
    assert engine_backup_bytes(shape_of("meta-llama/Meta-Llama-3-70B"), "bfloat16", 8) == (19_200 + 512 + 32) * 2**20


def test_what_is_read_by_hand():
    """In float32 by each rank, but tensor by tensor under ZeRO-3; what isn't trained in its own type."""
    assert trained_bytes(policy(ranks=4), TINY).loading == 4 * P
    assert trained_bytes(policy(ranks=2, tensor_parallel=2), TINY).loading == 4 * P  # divided when it is there
    assert trained_bytes(policy(ranks=4, zero_stage=3), TINY).loading == 2 * 800
    assert frozen_bytes(TINY, "bfloat16", 4).loading == 2 * P
    assert frozen_bytes(TINY, "bfloat16", 4, zero_stage=3).loading == 2 * 800


def test_activations_by_hand():
    # A layer and token in bfloat16: two norms of 4 x 8 + 2 x 2 x 8 = 64 bytes; q, k, v, out 2 x 4 x 2 x (2 + 1) = 48;
    # MLP 4 x 2 x 16 = 128. In all 304.
    config = policy(dtype="bfloat16", logits_chunk_tokens=10)
    ends, logits = 2 * 8 * 2, 10 * 100 * (2 * 2 + 8)
    assert training_bytes(config, TINY, 40) == 40 * (2 * 304 + ends) + logits
    checkpointed = policy(dtype="bfloat16", logits_chunk_tokens=10, gradient_checkpointing=True)
    assert training_bytes(checkpointed, TINY, 40) == 40 * (2 * 16 + 304 + ends) + logits
    shared = policy(dtype="bfloat16", logits_chunk_tokens=10, ranks=2, sequence_parallel=2)
    assert training_bytes(shared, TINY, 40) == 20 * (2 * 304 + ends) + logits
    assert training_bytes(config, TINY, 40, head="scalar") == 40 * (2 * 304 + ends)
    assert forward_bytes(config, TINY, 40) == 40 * (304 + ends) + 10 * 100 * (2 + 8)


def test_weights_of_an_engine():
    assert engine_bytes(TINY, "float32", 1) == 4 * P
    assert engine_bytes(TINY, "bfloat16", 2) == 2 * ((P - 40) // 2 + 40)  # five norms of 8 are on each GPU


def test_room_for_an_adapter_by_hand():
    """Of rank 2, for which vLLM makes room for 8: q 8+8, k and v 8+4, o 8+8, MLP 3 x (8+16), so 128 a layer; embedding and output
    100+8 each. Over two GPUs: q 8+4, k and v as before (there is one key-value head), o 4+8, gate and up 8+8, down 8+8: 96."""
    assert engine_adapter_bytes(TINY, 2, "bfloat16", 1) == 2 * 8 * (2 * 128 + 2 * 108)
    assert engine_adapter_bytes(TINY, 2, "bfloat16", 2) == 2 * 8 * (2 * 96 + 2 * 108)
    # Two experts of gate, up and down instead: 2 x (2 x 8 + 32 + 16 + 8) in place of 3 x 24.
    mixture = Shape.of({**TINY_CONFIG, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}, "")
    assert engine_adapter_bytes(mixture, 9, "float32", 1) == 4 * 16 * (2 * (128 - 72 + 144) + 2 * 108)
