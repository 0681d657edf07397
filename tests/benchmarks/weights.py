"""How fast weights travel from one process to others: GB/s of shared_memory and gloo, as JSON.

    python tests/benchmarks/weights.py [--megabytes 400] [--receivers 1] [--bucket-mib 1024] [--repeats 5]

Receivers copy each tensor into memory of their own, as an engine does. The figure is 10^9 bytes a second to each receiver,
from the manifest to the last receiver's answer; the first transfer, which touches memory for the first time, is left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

from rayrlhf.weights import Manifest, open_receiver, open_sender, plan_buckets  # noqa: E402

LAYER = [(1024, 1024)] * 4 + [(2816, 1024)] * 3
"""Matrices of one layer of a model of about the measured size."""


def layout_of(megabytes: float) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Float32 matrices of so many 10^6 bytes together."""
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    total = 0
    while total < megabytes * 1e6:
        shape = LAYER[len(found) % len(LAYER)]
        found.append((f"layers.{len(found)}.weight", shape, torch.float32))
        total += 4 * shape[0] * shape[1]
    return found


def receive(pipe: Any, address: Any, index: int, layout: Any) -> None:
    """A receiver: for each manifest, copy what comes, and answer."""
    torch.set_num_threads(1)
    own = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}
    receiver = open_receiver(address, index, "cpu")
    receiver.connect()
    while (manifest := pipe.recv()) is not None:
        for name, tensor in receiver.receive(manifest):
            own[name].copy_(tensor)
        pipe.send(float(own[layout[-1][0]][0, 0]))
    receiver.close()


def measure(transport: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and GB/s of the transfers by one transport, with and without checksums."""
    layout = layout_of(arguments.megabytes)
    tensors = [(name, torch.randn(shape)) for name, shape, _ in layout]
    buckets = plan_buckets(layout, bucket_bytes=int(arguments.bucket_mib * 2**20), dtype="float32")
    sender = open_sender(
        transport, run="benchmark", receivers=arguments.receivers, version=1, device="cpu", timeout_s=60
    )
    context = multiprocessing.get_context("spawn")
    pipes = []
    for index in range(arguments.receivers):
        mine, theirs = context.Pipe()
        context.Process(target=receive, args=(theirs, sender.address, index, layout), daemon=True).start()
        pipes.append(mine)
    sender.connect()
    result: dict[str, Any] = {"transport": transport, "bytes": sum(4 * t.numel() for _, t in tensors)}
    serial = 0
    for checksums in (False, True):
        seconds = []
        for _ in range(arguments.repeats + 1):
            serial += 1
            started = time.perf_counter()
            manifest = Manifest(serial, "float32", buckets, checksums, serial=serial, address=sender.address)
            for pipe in pipes:
                pipe.send(manifest)
            sender.send(manifest, tensors)
            answers = [pipe.recv() for pipe in pipes]
            seconds.append(time.perf_counter() - started)
            assert answers == [float(tensors[-1][1][0, 0])] * len(pipes)
        median = statistics.median(seconds[1:])
        name = "with_checksums" if checksums else "plain"
        result[name] = {"seconds": median, "all_seconds": seconds[1:], "gb_per_s": result["bytes"] / median / 1e9}
    for pipe in pipes:
        pipe.send(None)
    sender.close()
    return {**result, "buckets": len(buckets), "receivers": arguments.receivers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=400.0)
    parser.add_argument("--receivers", type=int, default=1)
    parser.add_argument("--bucket-mib", type=float, default=1024.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps([measure(transport, arguments) for transport in ("shared_memory", "gloo")], indent=1))


if __name__ == "__main__":
    main()
