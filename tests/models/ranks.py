"""Real processes that form a group over gloo, and run functions of `tests.models.rank_cases` together."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rayrlhf.models.world import World

PRELOADED = ["transformers", "peft", "deepspeed", "rayrlhf.actors.policy", "rayrlhf.actors.critic"]


def _serve(world: World, connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while (order := connection.recv()) is not None:
        function, arguments = order
        try:
            answer = (None, function(world, **arguments))
        except BaseException:  # noqa: B036  (goes to the test)
            answer = (traceback.format_exc(), None)
        connection.send(answer)


class Ranks:
    """``size`` processes, forked from one that has imported everything already."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            world = World(rank, size, "127.0.0.1", port, "cpu", 1)
            process = context.Process(target=_serve, args=(world, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], timeout_s: float = 240.0, **arguments: Any) -> list[Any]:
        """The function's results on all ranks, called as ``function(world, **arguments)``."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(timeout_s), f"rank {rank} did not answer {function.__name__} within {timeout_s} s"
            problem, result = pipe.recv()
            assert problem is None, f"rank {rank} failed in {function.__name__}:\n{problem}"
            results.append(result)
        return results

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
