"""Real processes that form a group over gloo, and run functions of `tests.models.rank_cases` together."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from rayrlhf.models.world import World
from tests.support.forked import fork_context
from tests.support.ports import free_port


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
        self.size = size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = fork_context()
        port = free_port()
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            world = World(rank, self.size, "127.0.0.1", port, "cpu", 1)
            process = context.Process(target=_serve, args=(world, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], timeout_s: float = 120.0, **arguments: Any) -> list[Any]:
        """The function's results on all ranks, called as ``function(world, **arguments)``.

        Where one fails or is late, all processes are ended: others would wait for it. The next run starts new ones.
        """
        if not self.pipes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        problem, deadline = None, time.monotonic() + timeout_s
        while len(results) < self.size and problem is None:
            waiting = [p for rank, p in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            problem = None if ready else f"no answer within {timeout_s} s, only ranks {sorted(results)} are done"
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    trace, results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    trace = "the process is dead"
                problem = problem or (f"rank {rank} failed:\n{trace}" if trace else None)
        if problem is not None:
            self.close()
            raise AssertionError(f"{function.__name__}: {problem}")
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes, self.processes = [], []
