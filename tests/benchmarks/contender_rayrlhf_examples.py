"""Our own SFT, reward model and DPO: ``rayrlhf train`` in one process, held between two steps.

The configuration does what TRL's does: the whole batch in one optimizer step, the same AdamW, the data in their order, no
validation, no sampled KL, no checkpoint within the run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from example_workload import ExampleWorkload
from protocol import Channel, arguments


def configuration(workload: ExampleWorkload, options: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration, as a YAML file would hold it."""
    job, dtype = options["job"], options["dtype"]
    longest = workload.prompt_tokens + workload.response_tokens
    optimizer = {"lr": workload.learning_rate, "betas": [0.9, 0.999], "max_grad_norm": 1.0}
    # The whole batch is one micro-batch, as TRL has it.
    model = {"dtype": dtype, "tokens_per_micro_batch": 2 * workload.batch * longest}
    path = workload.scorer if job == "reward_model" else workload.model
    content: dict[str, Any] = {
        "algorithm": job,
        "run_dir": str(Path(workload.folder, "-".join(["run", *options.values()]))),
        "seed": workload.seed,
        "policy": model | {"path": str(path), "tokenizer": str(workload.tokenizer), "optimizer": optimizer},
        "data": {
            "train": str(workload.completions if job == "sft" else workload.pairs),
            "validation_fraction": 0,
            "chat_template": "never",
            "max_prompt_tokens": workload.prompt_tokens,
            "max_tokens": longest,
            "shuffle": False,
        },
        "training": {"epochs": 100_000, "batch_examples": workload.batch, "keep_best": False},
        "monitoring": {"progress": "none", "tensorboard": False},
        "cluster": {"executor": "inline", "threads": workload.threads},
    }
    if job == "reward_model":
        content["reward_model"] = {"normalize": False, "failures_shown": 0}
    if job == "dpo":
        content["reference"] = model
        content["dpo"] = {"beta": workload.beta, "reference": options["reference"]}
        content["guard"] = {"kl_prompts": 0, "max_kl": None}
    return content


def last_row(folder: str) -> dict[str, Any]:
    """The metrics of the step that was just done."""
    return json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])


def main() -> None:
    channel = Channel()
    workload, options = arguments(ExampleWorkload.parse)

    import yaml

    import rayrlhf
    from rayrlhf.drivers.offline import launch_offline
    from rayrlhf.drivers.train import LOOPS

    content = configuration(workload, options)
    shutil.rmtree(content["run_dir"], ignore_errors=True)
    path = Path(f"{content['run_dir']}.yaml")
    path.write_text(yaml.safe_dump(content))
    config: Any = rayrlhf.load_config(str(path), [])

    with launch_offline(config) as run:
        whole = run.steps()

        def held() -> Iterator[int]:
            channel.ready(rayrlhf=rayrlhf.__version__)
            while channel.wait():
                start = time.perf_counter()
                yield next(whole)
                seconds = time.perf_counter() - start
                row = last_row(content["run_dir"])
                phases = {k[7:-2]: v for k, v in row.items() if k.startswith("timing/") and k != "timing/total_s"}
                shown = {k: v for k, v in row.items() if isinstance(v, float) and not k.startswith("timing/")}
                channel.done(seconds, metrics=shown, **phases)

        run.steps = held  # type: ignore[method-assign]
        LOOPS[type(config)](run)


if __name__ == "__main__":
    main()
