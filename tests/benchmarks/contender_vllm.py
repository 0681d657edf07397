"""Raw vLLM: the step's prompts through ``LLM.generate``, with the sampling settings of our rollouts.

The engine is as vLLM ships it: on a CPU its linear layers are repacked for oneDNN, which ours can't use because its
weights change. As in a rollout, each request has a seed of its own and returns the log-probabilities of its tokens,
and nothing is turned into text.
"""

from __future__ import annotations

import os
import time
from itertools import cycle, islice
from typing import Any

from protocol import Channel, arguments, serve
from workload import Workload

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}

CPU_BLOCK = 128


def kv_cache_bytes(workload: Workload, item: int) -> int:
    """Room for all sequences of a step at once, and some blocks to spare."""
    head = workload.hidden // workload.heads
    blocks = -(-(workload.prompt_tokens + workload.response_tokens) // CPU_BLOCK) * workload.rollouts + 8
    return 2 * workload.layers * workload.key_value_heads * head * item * CPU_BLOCK * blocks


def main() -> None:
    channel = Channel()
    workload, options = arguments(Workload.parse)

    import torch
    import vllm

    torch.set_num_threads(workload.threads)
    llm = vllm.LLM(
        model=str(workload.policy),
        skip_tokenizer_init=True,
        dtype=options["dtype"],
        max_model_len=workload.prompt_tokens + workload.response_tokens,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        kv_cache_memory_bytes=kv_cache_bytes(workload, getattr(torch, options["dtype"]).itemsize),
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        seed=workload.seed,
    )
    prompts = cycle(workload.prompt_ids())
    seeds = iter(range(workload.seed, 2**31))

    def step() -> dict[str, Any]:
        rows = list(islice(prompts, workload.rollouts))
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=row) for row in rows],
            [
                vllm.SamplingParams(
                    temperature=1.0,
                    max_tokens=workload.response_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    seed=next(seeds),
                    logprobs=0,
                    flat_logprobs=True,
                )
                for _ in rows
            ],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - start
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"seconds": seconds, "response_tokens": made, "rollout": seconds}

    serve(channel, step, vllm=vllm.__version__, torch=torch.__version__)


if __name__ == "__main__":
    main()
