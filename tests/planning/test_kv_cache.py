"""The KV cache as planned, and as the engine's role asks for it; as vLLM makes it, in tests/rollout/test_engine_samples.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayrlhf.errors import InputRefused
from rayrlhf.planning.models import known_models
from rayrlhf.planning.plan import make_plan
from rayrlhf.planning.usage import engine_of
from tests.support.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), layers=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_role_asks_for_what_is_planned(load, tiny, dtype):
    from transformers import AutoConfig

    from rayrlhf.actors.rollout_vllm import kv_cache_bytes

    config = load(f"policy.path={tiny}", "rollout.max_num_seqs=4", f"rollout.dtype={dtype}")
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    asked = kv_cache_bytes(AutoConfig.from_pretrained(tiny), config.rollout, dtype, longest)
    planned = engine_of(config, known_models(config), None)
    assert planned is not None
    assert asked == planned.kv_cache and planned.sequences == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_role_takes_the_least_that_is_named(load, device):
    """768 tokens of Qwen2.5 7B in bfloat16: 6 blocks of 128, and vLLM's own; 2 x 28 layers x 4 key-value heads x 128 x 2 bytes =
    57,344 a token: 896 x 57,344 = 0.04785 GiB."""
    from transformers import Qwen2Config

    from rayrlhf.actors.rollout_vllm import kv_cache_bytes

    words = [f"cluster.device={device}", "policy.path=Qwen/Qwen2.5-7B", "data.max_prompt_tokens=512"]
    words += ["rollout.max_response_tokens=256", "rollout.dtype=bfloat16"]
    model = Qwen2Config(num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, hidden_size=3584)
    enough, too_little = (load(*words, f"rollout.kv_cache_gib={size}", base="base_sampling") for size in (0.048, 0.047))
    assert make_plan(enough).problems == [] and kv_cache_bytes(model, enough.rollout, "bfloat16", 768) >= 896 * 57_344
    (problem,) = make_plan(too_little).problems
    assert problem.endswith("needs 0.04785 GiB; what would do: rollout.kv_cache_gib 0.048")
    with pytest.raises(InputRefused, match="one sequence of 768 tokens needs 0.0479 GiB"):
        kv_cache_bytes(model, too_little.rollout, "bfloat16", 768)
