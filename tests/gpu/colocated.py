"""Colocated PPO: all roles on the same GPUs, taking turns. Most memory in each phase against the plan."""

from __future__ import annotations

from typing import Any

from gpu_common import MemoryWatch, arguments, planned, ppo, steps, write_result

import rayrlhf

PHASES = ("rollout", "score", "update", "transfer")
GOAL = 0.10
"""How far the plan may be off."""


def compared(peaks: dict[str, int], plan: dict[str, Any]) -> dict[str, Any]:
    """By phase: bytes that were measured and planned, and by how much the plan is off."""
    gpus = plan["memory"]["gpus"] if plan["memory"] else []
    rows = {}
    for name in PHASES:
        most = max((sum(gpu["phases"][name].values()) for gpu in gpus if name in gpu["phases"]), default=None)
        measured = peaks.get(name)
        off = None if most is None or not measured else most / measured - 1
        rows[name] = {"measured_bytes": measured, "planned_bytes": most, "plan_is_off_by": off}
    return rows


def main() -> None:
    """Run from the command line."""
    args = arguments(__doc__, "1.5b").parse_args()
    config = ppo(args, "colocated", {})
    plan = planned(config)
    with MemoryWatch() as watch, rayrlhf.launch(config) as run:
        watch.phase("first transfer")
        rows = steps(run, watch)
        peaks = dict(watch.peaks)
        # To sleep and back again, a few times: nothing may be left behind.
        away = []
        for number in range(5):
            run.turns.take({"rollout": "all"})
            run.turns.send_away(run.groups)
            away.append(watch.settled(f"away {number}"))
        run.turns.take({"policy": "weights"})
        batch = run.collect(run.next_prompts())
    phases = compared(peaks, plan)
    offs = [abs(row["plan_is_off_by"]) for row in phases.values() if row["plan_is_off_by"] is not None]
    result = {
        "peak_bytes_by_phase": peaks,
        "against_the_plan": phases,
        "goal": {"plan_is_off_by_at_most": GOAL, "reached": max(offs) <= GOAL if offs else None},
        "everybody_away_again_and_again_bytes": away,
        "samples_after_that": len(batch),
        "turns_s": [row.get("timing/turns_s") for row in rows],
        "plan_problems": plan["problems"],
        "metrics": rows,
    }
    write_result(args, "colocated", result)


if __name__ == "__main__":
    main()
