"""The driver's own cost: milliseconds a call and actor with 1, 4, 16 and 64 stand-in actors, and memory over many samples.

    python -m tests.benchmarks.driver_cost --actors 1 4 16 64 --samples 1000000 [--write docs/benchmarks.json]

Prints one JSON document. The stand-ins do next to nothing, but share this machine's cores with the driver: ``wall_ms`` is
what a call takes from its start to its result, over the actors; ``driver_cpu_ms`` is the time that the driver's own process
was at work meanwhile (all its threads). ``bare`` is a call of all actors through Ray alone, without a group: what nobody can
go below.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from rayrlhf.cluster.group import Group
from rayrlhf.cluster.session import ray_session
from rayrlhf.cluster.start import start_groups
from tests.benchmarks.measure import machine
from tests.cluster.toy_setup import SETTINGS, samples, toy
from tests.cluster.traffic import check, one_step

PER_ACTOR = 4
CHUNKS = 4


def calls_of(group: Group) -> dict[str, tuple[Callable[[], Any], int]]:
    """The kinds of calls, and how many answers of each actor one has."""
    batch = samples([8] * PER_ACTOR * group.size)
    parts = [samples([8] * CHUNKS, start=10 * rank) for rank in range(group.size)]
    handles = group._handles  # type: ignore[attr-defined]

    def bare() -> None:
        ray.get([answer for handle in handles for answer in handle.run.remote("ping", None, {})])

    return {
        "bare": (bare, 1),
        "broadcast": (lambda: group.broadcast("ping"), 1),
        "submit": (lambda: group.call("where", batch), 1),
        "stream": (lambda: list(group.stream("numbers", parts, chunk=1)), CHUNKS),
    }


def cost(call: Callable[[], Any], answers: int, rounds: int) -> dict[str, float]:
    """Medians over rounds, in ms an answer."""
    call()
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append((time.perf_counter() - wall) * 1e3 / answers)
        cpus.append((time.process_time() - cpu) * 1e3 / answers)
    return {
        "wall_ms": round(statistics.median(walls), 3),
        "wall_ms_best": round(min(walls), 3),
        "driver_cpu_ms": round(statistics.median(cpus), 3),
    }


def measure_calls(actors: int, rounds: int) -> dict[str, Any]:
    settings = SETTINGS.model_copy(update={"start_timeout_s": 1800.0, "call_timeout_s": 600.0})
    began = time.monotonic()
    with start_groups([toy("standin", actors)], executor="ray", settings=settings) as groups:
        started = time.monotonic() - began
        group = groups["standin"]
        found = {name: cost(call, n * actors, rounds) for name, (call, n) in calls_of(group).items()}
    return {"actors": actors, "start_s": round(started, 1), "ms_a_call_and_actor": found}


def measure_memory(total: int, each: int) -> dict[str, Any]:
    """Samples through a group of two actors; the driver's resident memory after each tenth of them."""
    me = psutil.Process()
    with start_groups([toy("standin", 2)], executor="ray", settings=SETTINGS) as groups:
        steps, resident = -(-total // each), []
        began = time.monotonic()
        for step in range(steps):
            check(each, step, one_step(groups["standin"], each, step))
            if (step + 1) % max(1, steps // 10) == 0:
                gc.collect()
                resident.append(round(me.memory_info().rss / 2**20, 1))
        return {
            "samples": steps * each,
            "samples_a_step": each,
            "seconds": round(time.monotonic() - began, 1),
            "resident_mib": resident,
            "growth_after_first_tenth_mib": round(resident[-1] - resident[0], 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--samples", type=int, default=0, help="how many go through the driver; 0: none")
    parser.add_argument("--samples-a-step", type=int, default=2000)
    parser.add_argument("--write", type=Path, help="add the result to this JSON file, under the key driver")
    asked = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "load_average": psutil.getloadavg()[0]}
    with ray_session(SETTINGS):
        result["calls"] = [measure_calls(actors, asked.rounds) for actors in asked.actors]
        if asked.samples:
            result["memory"] = measure_memory(asked.samples, asked.samples_a_step)
    json.dump(result, sys.stdout, indent=1)
    print()
    if asked.write:
        there = json.loads(asked.write.read_text()) if asked.write.exists() else {}
        asked.write.write_text(json.dumps(there | {"driver": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
