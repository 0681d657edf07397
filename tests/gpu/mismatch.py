"""Log-probabilities of the rollout engine against the trainer's in bfloat16: mean of exp|delta|, before and after updates.

Random weights give flat distributions, in which differences are small: name a real model with --model.
"""

from __future__ import annotations

from gpu_common import arguments, ppo, steps, write_result

import rayrlhf

GOAL = 1.05


def main() -> None:
    """Run from the command line."""
    args = arguments(__doc__, "1.5b").parse_args()
    changes = {"critic": None, "ppo.advantage_estimator": "rloo", "ppo.importance_sampling_cap": 2.0}
    with rayrlhf.launch(ppo(args, "mismatch", changes)) as run:
        rows = steps(run)
    names = ("mean_exp_abs", "mean_abs", "max_abs", "k3")
    found = [{name: row[f"rollout_mismatch/{name}"] for name in names} for row in rows]
    reached = all(row["mean_exp_abs"] < GOAL for row in found)
    write_result(args, "mismatch", {"steps": found, "goal": {"mean_exp_abs_below": GOAL, "reached": reached}})


if __name__ == "__main__":
    main()
