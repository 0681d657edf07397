"""An algorithm of your own on the driver API: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, eq. 8).

python examples/custom_loop.py configs/ppo_local.yaml run_dir=runs/rloo
"""

from __future__ import annotations

import sys

import rayrlhf
from rayrlhf.algorithms import leave_one_out, per_token, segment_sum

NO_CRITIC = ["critic=null", "ppo.advantage_estimator=rloo", "rollout.samples_per_prompt=4"]


def main(config: str, overrides: list[str]) -> None:
    """Sample four responses to each prompt, and push each one by how much better it is than the other three."""
    with rayrlhf.launch(config, [*NO_CRITIC, *overrides]) as run:
        for _ in run.steps():
            batch = run.collect(run.next_prompts())  # adds score, reference_logprobs and old_logprobs

            mask, offsets = batch["response_mask"], batch.offsets
            kl = segment_sum(batch["old_logprobs"] - batch["reference_logprobs"], offsets)
            reward = batch["score"] - run.config.ppo.kl_coef * kl
            advantage = leave_one_out(reward, batch["prompt_id"])
            batch = batch.with_columns({"advantages": per_token(advantage, mask, offsets)})

            metrics = run.update(batch)
            run.publish_weights()
            metrics |= {"score/mean": float(batch["score"].mean()), "kl": float(kl.mean())}
            run.finish_step(metrics, batch)
        run.save_model()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except (rayrlhf.InputRefused, rayrlhf.RunFailed) as error:
        sys.exit(str(error))
