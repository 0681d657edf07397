"""vLLM and DeepSpeed in one process, vLLM first; runs in one process, whose policy comes first, are in tests/drivers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.ports import free_port

SCRIPT = """
import importlib, os, random, sys
import numpy, torch
import rollout_models as models
from rayrlhf.actors.rollout import RolloutEngine
from rayrlhf.batch import Batch
from rayrlhf.config.schema import RolloutConfig

path = sys.argv[1]

def start_deepspeed():
    import deepspeed
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # or it compiles for a minute
    deepspeed.init_distributed(dist_backend="gloo")
    assert torch.distributed.get_world_size() == 1

def train():
    import deepspeed
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2},
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    before = module.weight.detach().clone()
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    assert not torch.equal(before, module.weight)

def start_vllm():
    random.seed(1); numpy.random.seed(2); torch.manual_seed(3)
    state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    engine = RolloutEngine(models.CPU, model_path=path, config=RolloutConfig(max_num_seqs=4, max_response_tokens=8),
                           dtype="float32", max_model_tokens=64)
    assert len(Batch.concat(list(engine.generate(models.prompts([4, 5]))))) == 2
    assert state == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert torch.get_num_threads() == 2, torch.get_num_threads()
    return engine

torch.set_num_threads(1)
engine = start_vllm()
start_deepspeed()
train()
assert len(Batch.concat(list(engine.generate(models.prompts([4, 5]))))) == 2
assert torch.get_num_threads() == 2, torch.get_num_threads()
engine.close()
train()  # the engine took down its own groups, and not DeepSpeed's
print("worked")
"""


def test_vllm_and_deepspeed_share_a_process(untied: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "DS_ACCELERATOR": "cpu",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-c", SCRIPT, str(untied)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "worked" in done.stdout, done.stderr[-3000:]
