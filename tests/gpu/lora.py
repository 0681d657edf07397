"""LoRA on a large policy: the whole model merged for each transfer, or the adapters alone. Memory, transfer and step of each."""

from __future__ import annotations

from typing import Any

from gpu_common import MemoryWatch, arguments, planned, ppo, steps, write_result

import rayrlhf


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__, "7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--transfers", nargs="+", default=["merged", "adapter"])
    args = parser.parse_args()
    result: dict[str, Any] = {}
    for transfer in args.transfers:
        changes = {
            "policy.lora": {"rank": args.rank},
            "policy.optimizer": {"lr": 1e-4},
            # Its reference is the policy with its adapters off; a group's other samples stand for the critic.
            "reference": {},
            "critic": None,
            "ppo.advantage_estimator": "rloo",
            "rollout.lora_transfer": transfer,
        }
        config = ppo(args, f"lora-{transfer}", changes)
        plan = planned(config)
        with MemoryWatch() as watch, rayrlhf.launch(config) as run:
            rows = steps(run, watch)
        result[transfer] = {
            "peak_bytes_by_phase": watch.peaks,
            "planned": plan["memory"],
            "planned_transfers": plan["transfers"],
            "sync": [{name: row[name] for name in row if name.startswith("sync/")} for row in rows],
            # Of the second step: in the first the adapters change nothing yet.
            "rollout_mismatch": [row["rollout_mismatch/mean_exp_abs"] for row in rows],
            "kl": [row["kl"] for row in rows],
            "step_s": [row["timing/total_s"] for row in rows],
            "metrics": rows,
        }
    write_result(args, "lora", result)


if __name__ == "__main__":
    main()
