"""Small roles for the tests of groups. They know nothing of Ray."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from rayrlhf.batch import Batch

VISIBLE_AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")


def touch(path: str) -> None:
    if path:
        with open(path, "w") as file:
            file.write("here")


def wait_for(path: str, seconds: float = 45.0) -> None:
    """Until the test has left a file there."""
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(f"no {path} after {seconds:g} s")
        time.sleep(0.02)


class Toy:
    def __init__(
        self, *, world, bias: int = 0, fail_rank: int | None = None, hang_rank: int | None = None, mark: str = ""
    ):
        self.world, self.bias = world, bias
        if fail_rank == world.rank:
            touch(mark)
            raise FileNotFoundError("no weights in /nowhere/model")
        if hang_rank == world.rank:
            print("loading the last shard", file=sys.stderr, flush=True)
            touch(mark)
            time.sleep(300)

    def columns(self, batch: Batch, factor: int = 1) -> Batch:
        """One column of each kind, each a function of the sample alone."""
        tokens = batch["tokens"]
        sums = [int(tokens[a:b].sum()) * factor for a, b in batch.spans()]
        return Batch(
            batch.offsets,
            {"shifted": tokens * factor + self.bias, "half": tokens.to(torch.bfloat16) / 3, "odd": tokens % 2 == 1},
            {
                "sum": torch.tensor(sums, dtype=torch.float32),
                "word": [f"{word}!" for word in batch["word"]],
                "pair": torch.stack([batch.lengths, batch.lengths * 2], 1),
            },
        )

    def second(self, batch: Batch) -> Batch:
        """Of columns which another call computed."""
        return Batch(batch.offsets, {"more": batch["shifted"] + 1}, {"half_sum": batch["sum"] / 2})

    def where(self, batch: Batch) -> Batch:
        """Which rank had the sample, and how many it had."""
        rank = torch.full((len(batch),), self.world.rank)
        return Batch(batch.offsets, {}, {"rank": rank, "shard": torch.full((len(batch),), len(batch))})

    def overwrite(self, batch: Batch) -> Batch:
        batch["tokens"].fill_(-1)
        return Batch(batch.offsets, {"seen": batch["tokens"]}, {})

    def wrong(self, batch: Batch, what: str) -> object:
        return {"number": 3, "fewer": batch.select(list(range(len(batch) - 1)))}[what]

    def boom(self, batch: Batch, rank: int) -> Batch:
        if self.world.rank == rank:
            raise FloatingPointError("loss is nan")
        time.sleep(60)
        return batch

    def ping(self, value: object = None) -> tuple:
        return (self.world.rank, self.world.size, value)

    def describe(self) -> dict:
        return {
            "pid": os.getpid(),
            "torch_threads": torch.get_num_threads(),
            "threads": (self.world.threads, os.environ.get("OMP_NUM_THREADS"), os.environ.get("OMP_WAIT_POLICY")),
            "toy": os.environ.get("TOY_VARIABLE"),
            "device": self.world.device,
        }

    def seat(self) -> dict:
        """Where this process is, and the GPUs that it sees, and saw when this module was imported."""
        import ray

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        node = ray.get_runtime_context().get_node_id()
        return {"rank": self.world.rank, "node": node, "visible": visible, "at_import": VISIBLE_AT_IMPORT}

    def total(self, batch: Batch) -> int:
        return int(batch["tokens"].sum()) + self.world.rank

    def echo(self, batch: Batch) -> Batch:
        return batch

    def sleep(self, seconds: float) -> str:
        print("about to sleep", file=sys.stderr, flush=True)
        time.sleep(seconds)
        return "woken"

    def wait(self, mark: str) -> str:
        wait_for(mark)
        return "woken"

    def end(self, how: str) -> None:
        if how == "exit":
            os._exit(3)
        elif how == "sys.exit":
            sys.exit(4)
        elif how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)

    def stop(self) -> None:
        breakpoint()  # noqa: T100

    def unpicklable(self) -> object:
        class Odd(Exception):
            def __reduce__(self):
                raise TypeError("can't be pickled")

        raise Odd("but can be told")

    def numbers(self, batch: Batch, chunk: int, pause: float = 0.0, fail_at: int | None = None, mark: str = ""):
        """Twice the tokens; with ``mark`` what follows the first chunk is made when that file is there."""
        for number, start in enumerate(range(0, len(batch), chunk)):
            if fail_at == number:
                raise ValueError(f"chunk {number} is bad")
            part = batch.select(list(range(start, min(start + chunk, len(batch)))))
            ranks = [self.world.rank] * len(part)
            yield Batch(part.offsets, {"tokens": part["tokens"] * 2}, {"index": part["index"], "from": ranks})
            time.sleep(pause)
            if mark:
                wait_for(mark)

    def die_in_stream(self, batch: Batch, mark: str):
        yield batch.only(["index"])
        wait_for(mark)
        os.kill(os.getpid(), signal.SIGKILL)


class Meeting:
    """Two ranks of a real process group."""

    def __init__(self, *, world):
        self.world = world
        dist.init_process_group(
            "gloo", init_method=f"tcp://{world.master_addr}:{world.master_port}", rank=world.rank, world_size=world.size
        )

    def add(self, batch: Batch) -> Batch:
        """The sum of all tokens of all ranks, at each sample."""
        total = batch["tokens"].sum()
        dist.all_reduce(total)
        return Batch(batch.offsets, {}, {"total": total.repeat(len(batch))})

    def leave(self, rank: int, how: str) -> None:
        """One rank goes while the others wait for it in a collective."""
        if self.world.rank == rank:
            time.sleep(0.2)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise FloatingPointError("loss is nan")
        dist.all_reduce(torch.ones(1))


class Absent:
    """Ranks of a process group of which one never comes, so that the others wait for it in their constructors."""

    def __init__(self, *, world, how: str, mark: str):
        self.world = world
        if world.rank == world.size - 1:
            while not os.path.exists(f"{mark}.waiting"):
                time.sleep(0.02)
            time.sleep(0.3)
            touch(mark)
            if how == "raise":
                raise FileNotFoundError("no weights in /nowhere/model")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(300)
        touch(f"{mark}.waiting")
        dist.init_process_group(
            "gloo", init_method=f"tcp://{world.master_addr}:{world.master_port}", rank=world.rank, world_size=world.size
        )


class Closing:
    """Says on a file that it was closed."""

    def __init__(self, *, world, path: str):
        self.path = f"{path}.{world.rank}"

    def close(self) -> None:
        touch(self.path)
