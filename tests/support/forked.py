"""Processes forked from one that has imported everything already; all tests of a process have it in common."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# Python keeps the first list it is given: two of them would leave the later one's libraries to each process.
PRELOADED = [
    "transformers",
    "peft",
    "deepspeed",
    "rayrlhf.weights",
    "rayrlhf.actors.policy",
    "rayrlhf.actors.preference",
    "tests.support.frozen",
]


def fork_context() -> ForkServerContext:
    """Of a fork server that has imported what most of a test's processes need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
