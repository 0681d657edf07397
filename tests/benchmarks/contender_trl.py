"""TRL's PPO (``trl.experimental.ppo``), in an environment of its own, as its users run it on a CPU.

TRL's loop is one method without an end of step that we could call, so a callback holds it between two steps.

Settings, where TRL leaves a choice: one micro-batch a minibatch (``gradient_accumulation_steps=1`` with the whole batch
as the device's: otherwise TRL would step its optimizer once in several minibatches), no gradient checkpointing, all
rollouts in one generation batch (its default), no evaluation, saving, reporting or progress bar. In bfloat16
``bf16=True`` (autocast around the trained models) and the frozen models loaded in bfloat16.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import Channel, arguments
from workload import Workload

PHASES = {"batch_generation": "rollout", "get_reward": "values_and_score", "forward": "forward"}
"""Functions of TRL's module that are timed, as long as no gradient is taken."""


class Stopwatch:
    """Seconds by phase, taken by wrapping functions of TRL's module."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        import torch

        def timed(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return function(*args, **kwargs)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            return result

        return timed


def trainer(workload: Workload, dtype: str, callback: Any) -> Any:
    """TRL's trainer on the workload."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    frozen = getattr(torch, dtype)
    settings = PPOConfig(
        output_dir=str(Path(workload.folder, "trl")),
        seed=workload.seed,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        per_device_train_batch_size=workload.rollouts,
        gradient_accumulation_steps=1,
        num_mini_batches=workload.minibatches,
        num_ppo_epochs=workload.epochs,
        local_rollout_forward_batch_size=workload.rollouts,
        total_episodes=workload.rollouts * 1_000_000,
        response_length=workload.response_tokens,
        temperature=1.0,
        kl_estimator="k1",
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return PPOTrainer(
        args=settings,
        processing_class=AutoTokenizer.from_pretrained(workload.tokenizer, padding_side="left"),
        model=AutoModelForCausalLM.from_pretrained(workload.policy, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(workload.policy, dtype=frozen),
        reward_model=AutoModelForSequenceClassification.from_pretrained(workload.scorer, dtype=frozen),
        value_model=AutoModelForSequenceClassification.from_pretrained(workload.scorer, dtype=torch.float32),
        train_dataset=Dataset.from_dict({"input_ids": workload.prompt_ids()}),
        callbacks=[callback],
    )


def main() -> None:
    channel = Channel()
    workload, options = arguments(Workload.parse)

    import torch
    import transformers
    import trl
    import trl.experimental.ppo.ppo_trainer as module

    torch.set_num_threads(workload.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    watch = Stopwatch()
    for name, phase in PHASES.items():
        setattr(module, name, watch.around(getattr(module, name), phase))
    generation = module.batch_generation
    made = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        result = generation(*args, **kwargs)
        made = int((result[0][:, workload.prompt_tokens :] != 0).sum())  # 0 is the padding token
        return result

    module.batch_generation = counted

    class Gate(transformers.TrainerCallback):
        """Holds TRL's loop between two steps."""

        start = 0.0

        def hold(self) -> None:
            if not channel.wait():
                raise SystemExit
            watch.seconds.clear()
            self.start = time.perf_counter()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            channel.ready(trl=trl.__version__, torch=torch.__version__, transformers=transformers.__version__)
            self.hold()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.start
            rest = seconds - sum(watch.seconds.values())
            channel.done(seconds, response_tokens=made, **watch.seconds, update_and_rest=rest)
            self.hold()

    trainer(workload, options["dtype"], Gate()).train()


if __name__ == "__main__":
    main()
