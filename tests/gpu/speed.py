"""How much of the GPUs' arithmetic the update uses, rollout against bare vLLM, and the phases of a step against the step.

MFU counts 6 P + 6 L D T operations a token in training (Chowdhery et al. 2022, appendix B, with causal attention counted by
half; P parameters without the input embedding, L layers, D heads times their size, T tokens of a sequence), of policy and
critic, without what activation checkpointing computes again. Peak: --peak-tflops, by default that of an H100 SXM for dense
bfloat16, 989.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_common import arguments, ppo, steps, write_result

import rayrlhf
from rayrlhf.config import Config

GOALS = {"mfu_at_least": 0.45, "rollout_against_vllm_at_least": 0.95, "phases_against_step_at_most": 1.05}
TOGETHER = (("score", "reference", "values", "logprobs"), ("update", "critic_update"))
"""Work that is done at the same time: the longest of it counts."""
ALONE = ("rollout", "sync", "turns")


def training_operations(model: str, rows: list[dict[str, Any]], length: int, epochs: int, both: bool) -> list[float]:
    """Operations of each step's update, all GPUs together."""
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    block = hidden * size * (2 * heads + 2 * kv) + 3 * hidden * config["intermediate_size"]
    trunk, head = layers * block, hidden * config["vocab_size"]
    attention = 6 * layers * heads * size * length
    a_token = 6 * (trunk + head) + attention + ((6 * trunk + attention) if both else 0)
    return [a_token * row["tokens"] * epochs for row in rows]


def seconds_of_phases(row: dict[str, Any]) -> float:
    """What a step should take, if nothing but its phases took time."""
    spent = {name: row.get(f"timing/{name}_s", 0.0) for name in (*ALONE, *(n for names in TOGETHER for n in names))}
    return sum(spent[name] for name in ALONE) + sum(max(spent[name] for name in names) for names in TOGETHER)


def bare_vllm(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The same responses by `vllm.LLM` in a process of its own."""
    facts = {
        "model": config.policy.path,
        "prompts": config.data.prompts,
        "count": config.ppo.prompts_per_step,
        "n": config.rollout.samples_per_prompt,
        "tokens": args.response_tokens,
        "longest": args.prompt_tokens + args.response_tokens,
        "seqs": config.rollout.max_num_seqs,
        "memory": config.rollout.gpu_memory_fraction,
        "steps": args.steps,
    }
    line = [sys.executable, str(Path(__file__).resolve()), "--bare", json.dumps(facts)]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def generate_bare(facts: dict[str, Any]) -> None:
    """In a process of its own: prints tokens and seconds of each round, as JSON."""
    from vllm import LLM, SamplingParams

    rows = [json.loads(line)["prompt"] for line in Path(facts["prompts"]).read_text().splitlines()]
    engine = LLM(
        model=facts["model"],
        dtype="bfloat16",
        max_model_len=facts["longest"],
        max_num_seqs=facts["seqs"],
        gpu_memory_utilization=facts["memory"],
        logprobs_mode="processed_logprobs",
        seed=0,
    )
    rounds = []
    for number in range(facts["steps"] + 1):
        prompts = rows[number * facts["count"] :][: facts["count"]]
        how = SamplingParams(
            n=facts["n"], max_tokens=facts["tokens"], temperature=1.0, seed=number, logprobs=0, detokenize=False
        )
        begun = time.perf_counter()
        outputs = engine.generate(prompts, how, use_tqdm=False)
        seconds = time.perf_counter() - begun
        rounds.append([sum(len(one.token_ids) for output in outputs for one in output.outputs), seconds])
    print(json.dumps({"rounds": rounds[1:]}))  # the first warms up


def main() -> None:
    """Run from the command line."""
    if sys.argv[1:2] == ["--bare"]:
        generate_bare(json.loads(sys.argv[2]))
        return
    parser = arguments(__doc__, "1.5b")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    args = parser.parse_args()
    # Nothing but the work of a step is timed: no checksums.
    config = ppo(args, "speed", {"rollout.verify_weights": "start"})
    with rayrlhf.launch(config) as run:
        rows = steps(run)[1:]  # the first warms up
    length = args.prompt_tokens + args.response_tokens
    work = training_operations(config.policy.path, rows, length, config.ppo.ppo_epochs, config.critic is not None)
    # Policy and critic work on the same GPUs at the same time: the longer of both is the time of the update.
    updates = [max(row["timing/update_s"], row.get("timing/critic_update_s", 0.0)) for row in rows]
    peak = args.peak_tflops * 1e12 * args.gpus
    ours = [row["response_tokens"] / row["timing/rollout_s"] for row in rows]
    result: dict[str, Any] = {
        "mfu": [operations / seconds / peak for operations, seconds in zip(work, updates, strict=True)],
        "rollout_tokens_per_s": ours,
        "step_s": [row["timing/total_s"] for row in rows],
        "step_against_its_phases": [row["timing/total_s"] / seconds_of_phases(row) for row in rows],
        "goals": GOALS,
        "metrics": rows,
    }
    if args.engine == "vllm" and args.gpus == 1:
        bare = [tokens / seconds for tokens, seconds in bare_vllm(args, config)["rounds"]]
        result["bare_vllm_tokens_per_s"] = bare
        result["rollout_against_vllm"] = (sum(ours) / len(ours)) / (sum(bare) / len(bare))
    write_result(args, "speed", result)


if __name__ == "__main__":
    main()
