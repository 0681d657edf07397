"""A PPO step side by side: TRL, the model work alone, raw vLLM, and ours. See README.md in this folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from measure import CoreWatch, machine, memory
from protocol import Contender, ContenderFailed
from report import Figures, Steps, show, summary
from rich.console import Console
from workload import Workload, make

REPOSITORY = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16")
KINDS = ("trl", "model", "vllm", "inline", "ray")
SMOKE: dict[str, Any] = {
    "rollouts": 8,
    "prompt_tokens": 16,
    "response_tokens": 8,
    "epochs": 1,
    "minibatches": 2,
    "prompts": 32,
    "layers": 2,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each contender that aren't counted")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--contenders", nargs="+", choices=KINDS, default=list(KINDS))
    trl = REPOSITORY / ".venv-trl" / "bin" / "python"
    parser.add_argument("--trl-python", default=str(trl), help="interpreter of TRL's environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that all runs; figures mean nothing")
    parser.add_argument("--folder", help="where models, runs and logs go; a temporary folder by default")
    parser.add_argument("--write", type=Path, help="write the result to this JSON file")
    parser.add_argument("--timeout", type=float, default=900, help="deadline of a start and of a step, in seconds")
    options = parser.parse_args(arguments)
    if "trl" in options.contenders and not Path(options.trl_python).exists():
        parser.error(f"--trl-python: {options.trl_python} doesn't exist; make it with trl_env.sh, see README.md")
    if options.rounds < 1 or options.warmup < 0:
        parser.error("--rounds must be at least 1, --warmup at least 0")
    return options


def line_up(options: argparse.Namespace, dtype: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """The contenders that run side by side for one type: name -> (interpreter, script, options).

    TRL in float32 takes part in every line-up: it is what the speed-ups are measured against.
    """
    own, chosen = sys.executable, {}
    if "trl" in options.contenders:
        for kind in dict.fromkeys(("float32", dtype)):
            chosen[f"trl {kind}"] = (options.trl_python, "contender_trl.py", {"dtype": kind})
    if "model" in options.contenders:
        chosen[f"model work {dtype}"] = (own, "contender_model_work.py", {"dtype": dtype})
    if "vllm" in options.contenders:
        chosen[f"vllm {dtype}"] = (own, "contender_vllm.py", {"dtype": dtype})
    for executor in ("inline", "ray"):
        if executor in options.contenders:
            name = f"rayrlhf {executor} {dtype}"
            chosen[name] = (own, "contender_rayrlhf.py", {"dtype": dtype, "executor": executor})
    return chosen


def timed(contender: Contender, options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """One step, checked for the work that it did, with its CPU time and others' share of the cores."""
    watch = CoreWatch(contender.process.pid)
    step = contender.step(options.timeout)
    expected = workload.rollouts * workload.response_tokens
    if step["response_tokens"] not in (None, expected):
        raise ContenderFailed(f"{contender.name} generated {step['response_tokens']} tokens, not {expected}")
    return step | watch.read()


def side_by_side(
    options: argparse.Namespace, workload: Workload, dtype: str, console: Console
) -> tuple[Steps, dict[str, Any], dict[str, Any]]:
    """All contenders of one type, in turns. The order is turned round in every other round.

    Returns:
        The timed steps, each contender's memory after the last of them, and its versions.
    """
    # How OpenMP threads wait is left to each: by default they spin for some milliseconds and then sleep, so that
    # contenders whose turn it isn't leave the cores alone.
    environment = {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    contenders: list[Contender] = []
    steps: Steps = {}
    try:
        versions = {}
        for name, (python, script, own) in line_up(options, dtype).items():
            log = Path(workload.folder, f"{name.replace(' ', '-')}-in-{dtype}.log")
            contenders.append(Contender(name, python, script, workload, own, environment, log))
            versions[name] = contenders[-1].start(options.timeout)
            console.print(f"  {name} is ready")
        for k in range(options.warmup + options.rounds):
            for contender in contenders if k % 2 == 0 else reversed(contenders):
                step = timed(contender, options, workload)
                if k >= options.warmup:
                    steps.setdefault(contender.name, []).append(step)
                label = "warm-up" if k < options.warmup else f"round {k - options.warmup + 1}"
                others = f"others {100 * step['others']:.0f} %"
                console.print(f"  {label}: {contender.name} {step['seconds']:.2f} s, {others}")
        memories = {contender.name: memory(contender.process.pid) for contender in contenders}
    finally:
        for contender in contenders:
            contender.close()
    return {c.name: steps[c.name] for c in contenders}, memories, versions


def run(options: argparse.Namespace, folder: str, console: Console) -> dict[str, Any]:
    workload = Workload(folder=folder, seed=options.seed, threads=options.threads)
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
        "contenders": [],
        "figures": [],
        "memory": {},
        "versions": {},
        "steps": {},
    }
    for dtype in options.dtypes:
        console.print(f"[bold]{dtype}")
        steps, memories, versions = side_by_side(options, workload, dtype, console)
        figures = Figures(steps)
        figures.of_type(dtype)
        result["contenders"] += [row | {"line_up": dtype} for row in summary(steps)]
        result["figures"] += figures.rows
        result["memory"] |= memories
        result["versions"] |= versions
        result["steps"][dtype] = steps
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
        kept = {key: there[key] for key in ("examples", "driver") if key in there}  # of the other scripts
        options.write.write_text(json.dumps(result | kept, indent=1) + "\n")
        console.print(f"written to {options.write}")


if __name__ == "__main__":
    main()
