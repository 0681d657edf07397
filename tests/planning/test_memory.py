"""What a training engine holds, as planned and as real DeepSpeed engines on real ranks hold it; caches as vLLM makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rayrlhf.config.trainers import PolicyConfig, TrainedConfig
from rayrlhf.planning.memory import engine_bytes, forward_bytes, frozen_bytes, trained_bytes, training_bytes
from rayrlhf.planning.shapes import Shape
from tests.models.ranks import Ranks
from tests.planning.rank_cases import held

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


# -- by hand ------------------------------------------------------------------------------------------------------------

TINY = Shape.of(
    {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "",
)
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
    cpu = trained_bytes(policy(offload_optimizer="cpu", ranks=2), TINY)
    assert cpu.optimizer == 0 and cpu.host == {"gradients": 2 * P, "optimizer": 6 * P} and cpu.disk == 0
    nvme = trained_bytes(
        policy(zero_stage=3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/n", ranks=2), TINY
    )
    assert nvme.disk == 6 * P + P and nvme.parameters == 0 and "optimizer" not in nvme.host
    assert frozen_bytes(TINY, "bfloat16", 4, zero_stage=3).parameters == 2 * P // 4
    kept = frozen_bytes(TINY, "bfloat16", 4, zero_stage=3, offloaded=True)
    assert kept.parameters == 0 and kept.host == {"parameters": 2 * P // 4}


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
