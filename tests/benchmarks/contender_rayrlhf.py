"""Our own PPO step: ``rayrlhf.launch`` and the loop of ``rayrlhf train``, held between two steps.

The configuration does what TRL's does: the same models, prompts, lengths, epochs and minibatches, a reward model, k1 KL
in the reward, whitened advantages, no evaluation, no checkpoint within the run. It does more in three places: the
policy's log-probabilities are computed again rather than taken from the rollout, gradients are clipped, and metrics are
written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol import Channel, arguments
from workload import Workload


def configuration(workload: Workload, dtype: str, executor: str) -> dict[str, Any]:
    """The run's configuration, as a YAML file would hold it."""
    length = workload.prompt_tokens + workload.response_tokens
    # One minibatch is one micro-batch, as TRL has it.
    model = {"dtype": dtype, "tokens_per_micro_batch": workload.minibatch * length}
    trained = model | {"zero_stage": 2, "optimizer": {"lr": workload.learning_rate}}
    return {
        "run_dir": str(Path(workload.folder, f"run-{executor}-{dtype}")),
        "seed": workload.seed,
        "policy": trained | {"path": str(workload.policy), "tokenizer": str(workload.tokenizer)},
        "critic": trained | {"path": str(workload.scorer)},
        "reference": model,
        "reward": {
            "sources": [{"model": str(workload.scorer)}],
            "dtype": dtype,
            "tokens_per_micro_batch": workload.minibatch * length,
        },
        "rollout": {"max_response_tokens": workload.response_tokens, "dtype": dtype},
        "data": {
            "prompts": str(workload.prompt_file),
            "chat_template": "never",
            "max_prompt_tokens": workload.prompt_tokens,
        },
        "ppo": {
            "steps": 1_000_000,
            "prompts_per_step": workload.rollouts,
            "minibatch_samples": workload.minibatch,
            "ppo_epochs": workload.epochs,
        },
        "evaluation": {"prompts": 0},
        "monitoring": {"progress": "none", "tensorboard": False},
        "cluster": {"executor": executor, "threads": workload.threads},
    }


def last_row(folder: str) -> dict[str, Any]:
    """The metrics of the step that was just done."""
    return json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])


def main() -> None:
    channel = Channel()
    workload, options = arguments(Workload.parse)

    import shutil

    import yaml

    import rayrlhf
    from rayrlhf.drivers import ppo

    content = configuration(workload, options["dtype"], options["executor"])
    shutil.rmtree(content["run_dir"], ignore_errors=True)
    path = Path(workload.folder, f"{options['executor']}-{options['dtype']}.yaml")
    path.write_text(yaml.safe_dump(content))
    config = rayrlhf.load_config(str(path), [])

    with rayrlhf.launch(config) as run:
        whole = run.steps()

        def held() -> Iterator[int]:
            channel.ready(rayrlhf=rayrlhf.__version__)
            while channel.wait():
                start = time.perf_counter()
                yield next(whole)
                seconds = time.perf_counter() - start
                row = last_row(content["run_dir"])
                phases = {k[7:-2]: v for k, v in row.items() if k.startswith("timing/") and k != "timing/total_s"}
                made = row["response_length/mean"] * workload.rollouts
                channel.done(seconds, response_tokens=round(made), **phases)

        run.steps = held  # type: ignore[method-assign]
        ppo.train(run)


if __name__ == "__main__":
    main()
