"""TRL's SFTTrainer, RewardTrainer and DPOTrainer, in an environment of its own, as its users run them on a CPU.

Settings, where TRL leaves a choice: the whole batch as one micro-batch, no gradient checkpointing (its default costs a
second forward), the data in their order, metrics in each step, no evaluation, saving, reporting or progress bar. Padding
is TRL's default, on the right: "padding-free" batches need flash attention, which a CPU doesn't have. In bfloat16
``bf16=True``, autocast around float32 weights.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from example_workload import ExampleWorkload
from protocol import Channel, arguments


def settings(workload: ExampleWorkload, options: dict[str, Any]) -> dict[str, Any]:
    """What all of TRL's configurations have in common."""
    return {
        "output_dir": str(Path(workload.folder, "trl")),
        "seed": workload.seed,
        "use_cpu": True,
        "bf16": options["dtype"] == "bfloat16",
        "per_device_train_batch_size": workload.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "max_steps": 1_000_000,
        "max_length": workload.prompt_tokens + workload.response_tokens,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trainer(workload: ExampleWorkload, options: dict[str, Any], callback: Any) -> Any:
    """TRL's trainer of a job."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    job, common = options["job"], settings(workload, options)
    given: dict[str, Any] = {
        "train_dataset": Dataset.from_list(workload.rows(job)),
        "processing_class": AutoTokenizer.from_pretrained(workload.tokenizer),
        "callbacks": [callback],
    }
    if job == "sft":
        return trl.SFTTrainer(model=str(workload.model), args=trl.SFTConfig(**common), **given)
    if job == "reward_model":
        return trl.RewardTrainer(model=str(workload.scorer), args=trl.RewardConfig(**common), **given)
    precomputed = options["reference"] == "cached"
    config = trl.DPOConfig(**common, beta=workload.beta, precompute_ref_log_probs=precomputed)
    return trl.DPOTrainer(model=str(workload.model), args=config, **given)


def main() -> None:
    channel = Channel()
    workload, options = arguments(ExampleWorkload.parse)

    import torch
    import transformers
    import trl
    from transformers.trainer_callback import PrinterCallback

    torch.set_num_threads(workload.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    class Gate(transformers.TrainerCallback):
        """Holds TRL's loop after each step's metrics, which come last."""

        start = 0.0

        def hold(self) -> None:
            if not channel.wait():
                raise SystemExit
            self.start = time.perf_counter()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            channel.ready(trl=trl.__version__, torch=torch.__version__, transformers=transformers.__version__)
            self.hold()

        def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.start
            channel.done(seconds, metrics={key: float(value) for key, value in logs.items()})
            self.hold()

    learner = trainer(workload, options, Gate())
    learner.remove_callback(PrinterCallback)
    learner.train()


if __name__ == "__main__":
    main()
