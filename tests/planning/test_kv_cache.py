"""The KV cache as planned, as the engine's role asks for it, and as vLLM makes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf.planning.known import shape_of
from rayrlhf.planning.models import known_models
from rayrlhf.planning.usage import engine_of
from tests.conftest import ROOT
from tests.support.tiny import save_tiny_model

SCRIPT = """
import json, sys
from vllm import LLM
llm = LLM(model=sys.argv[1], dtype=sys.argv[2], enforce_eager=True, kv_cache_memory_bytes=16 << 20, max_model_len=256,
          max_num_seqs=8, skip_tokenizer_init=True)
config = llm.llm_engine.vllm_config.cache_config
def caches(worker):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in worker.model_runner.kv_caches}
    return sum(storages.values())
print(json.dumps([llm.collective_rpc(caches)[0], config.num_gpu_blocks, config.block_size]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), layers=3)


def test_vllm_keeps_what_is_planned_for_a_token(tiny):
    pytest.importorskip("vllm")
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tiny), "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    nbytes, blocks, block_size = json.loads(done.stdout.strip().splitlines()[-1])
    # By hand: 2 x 3 layers x 1 key-value head x 32 x 4 bytes.
    assert nbytes / (blocks * block_size) == shape_of(str(tiny)).kv_bytes_per_token(4) == 768


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_role_asks_for_what_is_planned(load, tiny, dtype):
    from transformers import AutoConfig

    from rayrlhf.actors.rollout_vllm import CPU_BLOCK, kv_cache_bytes

    config = load(f"policy.path={tiny}", "rollout.max_num_seqs=4", f"rollout.dtype={dtype}")
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    asked = kv_cache_bytes(AutoConfig.from_pretrained(tiny), config.rollout, dtype, longest)
    planned = engine_of(config, known_models(config), None)
    assert planned is not None
    # Beside its sequences the role asks for one block, which vLLM keeps to itself.
    block = CPU_BLOCK * shape_of(str(tiny)).kv_bytes_per_token({"float32": 4, "bfloat16": 2}[dtype])
    assert asked == planned.kv_cache + block
