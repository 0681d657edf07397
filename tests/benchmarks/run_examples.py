"""SFT, reward model and DPO side by side: TRL, the bare model work, and ours. See README.md in this folder."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from example_report import Ratios, show
from example_workload import JOBS, KINDS, ExampleWorkload, make
from measure import CoreWatch, machine, memory
from protocol import Contender, ContenderFailed
from rich.console import Console

REPOSITORY = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")
SMOKE: dict[str, Any] = {"batch": 4, "prompt_tokens": 12, "response_tokens": 12, "shortest": 4, "layers": 2}
SAME = {
    "sft": {"loss": "loss"},
    "reward_model": {"loss": "loss", "margin": "margin"},
    "dpo": {"loss": "loss", "logps/chosen": "logps/chosen", "logps/rejected": "logps/rejected"},
}
"""For each job our metrics and TRL's names for them: equal where both do the same work."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""By how much they may differ, relative to their size where that is above 1."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender and kind")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each kind that aren't counted")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    trl = REPOSITORY / ".venv-trl-1.16" / "bin" / "python"
    parser.add_argument("--trl-python", default=str(trl), help="interpreter of TRL's environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that all runs; figures mean nothing")
    parser.add_argument("--folder", help="where models, runs and logs go; a temporary folder by default")
    parser.add_argument("--write", type=Path, help="add the result to this JSON file, under the key examples")
    parser.add_argument("--timeout", type=float, default=600, help="deadline of a start and of a step, in seconds")
    options = parser.parse_args(arguments)
    if not Path(options.trl_python).exists():
        parser.error(f"--trl-python: {options.trl_python} doesn't exist; make it with trl_env.sh, see README.md")
    if options.rounds < 1 or options.warmup < 0:
        parser.error("--rounds must be at least 1, --warmup at least 0")
    return options


def line_up(options: argparse.Namespace, job: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """The contenders that run side by side for one job: name -> (interpreter, script, options)."""
    own, chosen = sys.executable, {}
    sides = (("trl", options.trl_python, "trl"), ("rayrlhf", own, "rayrlhf"))
    for dtype in options.dtypes:
        for reference in ("live", "cached") if job == "dpo" else (None,):
            wanted = {"job": job, "dtype": dtype} | ({"reference": reference} if reference else {})
            label = " ".join(part for part in (reference, dtype) if part)
            for side, python, script in sides:
                chosen[f"{side} {label}"] = (python, f"contender_{script}_examples.py", wanted)
        bare = {"job": job, "dtype": dtype} | ({"reference": "cached"} if job == "dpo" else {})
        chosen[f"model work {dtype}"] = (own, "contender_example_work.py", bare)
    return chosen


def check_same_work(job: str, steps: dict[str, dict[str, Any]]) -> float:
    """Compare our metrics of a step with TRL's of the same step.

    Returns:
        The largest difference in float32, relative to the metric's size where that is above 1.

    Raises:
        ContenderFailed: where they differ by more than the type's rounding.
    """
    largest = 0.0
    for name, step in steps.items():
        if not name.startswith("rayrlhf"):
            continue
        dtype, other = name.split()[-1], steps[name.replace("rayrlhf", "trl")]
        for ours, theirs in SAME[job].items():
            found, expected = step["metrics"][ours], other["metrics"][theirs]
            difference = abs(found - expected) / max(1.0, abs(expected))
            if not math.isfinite(difference) or difference > TOLERANCE[dtype]:
                raise ContenderFailed(f"{job}: {ours} of {name} is {found}, of TRL {expected}: not the same work")
            largest = max(largest, difference) if dtype == "float32" else largest
    return largest


def side_by_side(options: argparse.Namespace, workload: ExampleWorkload, job: str, console: Console) -> dict[str, Any]:
    """All contenders of a job, in turns. The order is turned round in every other round.

    Returns:
        ``steps`` (kind -> contender -> timed steps), each contender's ``memory`` after the last of them, its
        ``versions``, and the largest ``difference`` of metrics between ours and TRL's in float32.
    """
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(Path(workload.folder, "datasets")),
    }
    contenders: list[Contender] = []
    steps: dict[str, dict[str, list[dict[str, Any]]]] = {kind: {} for kind in KINDS}
    difference = 0.0
    try:
        for name, (python, script, own) in line_up(options, job).items():
            log = Path(workload.folder, f"{job}-{name.replace(' ', '-')}.log")
            contenders.append(Contender(name, python, script, workload, own, environment, log))
        versions = {contender.name: contender.start(options.timeout) for contender in contenders}
        console.print(f"  {len(contenders)} contenders are ready")
        for k in range(options.warmup + options.rounds):
            for kind in KINDS:  # the order of the examples' blocks
                done = {}
                for contender in contenders if k % 2 == 0 else reversed(contenders):
                    watch = CoreWatch(contender.process.pid)
                    done[contender.name] = contender.step(options.timeout) | watch.read()
                difference = max(difference, check_same_work(job, done))
                for name, step in done.items():
                    if k >= options.warmup:
                        steps[kind].setdefault(name, []).append(step)
                label = "warm-up" if k < options.warmup else f"round {k - options.warmup + 1}"
                told = ", ".join(f"{name} {step['seconds']:.2f}" for name, step in done.items())
                console.print(f"  {label}, {kind}: {told}")
        memories = {contender.name: memory(contender.process.pid) for contender in contenders}
    finally:
        for contender in contenders:
            contender.close()
    return {"steps": steps, "memory": memories, "versions": versions, "difference": difference}


def run(options: argparse.Namespace, folder: str, console: Console) -> dict[str, Any]:
    workload = ExampleWorkload(
        folder=folder, seed=options.seed, threads=options.threads, steps=len(KINDS) * (options.warmup + options.rounds)
    )
    if options.smoke:
        workload = replace(workload, **SMOKE)
    result: dict[str, Any] = {
        "machine": machine(),
        "load_before": os.getloadavg(),
        "workload": asdict(workload),
        "smoke": options.smoke,
        "warmup": options.warmup,
        "rounds": options.rounds,
        "parameters": make(workload),
        "jobs": {},
    }
    for job in options.jobs:
        console.print(f"[bold]{job}")
        found = side_by_side(options, workload, job, console)
        ratios = Ratios(job, found["steps"], found["memory"])
        ratios.all(options.dtypes)
        result["jobs"][job] = found | {"figures": ratios.rows}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    with tempfile.TemporaryDirectory(prefix="rayrlhf-bench-") as temporary:
        try:
            result = run(options, str(Path(options.folder or temporary).absolute()), console)
        except ContenderFailed as error:
            console.print(f"[red]{error}", markup=True)
            sys.exit(1)
    show(result, console)
    if options.write:
        result["workload"].pop("folder")  # a temporary one, of this machine alone
        there = json.loads(options.write.read_text()) if options.write.exists() else {}
        options.write.write_text(json.dumps(there | {"examples": result}, indent=1) + "\n")
        console.print(f"written to {options.write}")


if __name__ == "__main__":
    main()
