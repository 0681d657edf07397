"""Roles that do nothing but send and receive weights, with real transports, for tests on Ray."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from rayrlhf.errors import RunFailed
from rayrlhf.models.world import World
from rayrlhf.weights import Address, Manifest, open_receiver, open_sender, plan_buckets


def weights_of_version(version: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(version)
    return [(f"layer{k}.weight", torch.randn(50, 40, generator=generator)) for k in range(6)]


class Sends:
    """A policy. ``fails`` is a version at which it raises after two tensors."""

    def __init__(self, world: World, timeout_s: float, fails: int = -1):
        self.world, self.timeout_s, self.fails = world, timeout_s, fails
        self.transfers, self.sender = 0, None

    def open_weights(
        self, transport: str, receivers: int, group_version: int, per_engine: int = 1, keep_all: bool = False
    ) -> Any:
        if self.sender is not None:
            self.sender.close()
        self.sender = open_sender(
            transport,
            run="toy",
            receivers=receivers,
            version=group_version,
            device="cpu",
            timeout_s=self.timeout_s,
            host=self.world.master_addr,
            per_engine=per_engine,
            keep_all=keep_all,
        )
        return self.sender.address

    def connect_weights(self, address: Address) -> None:
        self.sender.connect()

    def weight_manifest(self, version: int, checksums: bool) -> Manifest:
        self.transfers += 1
        layout = [(name, tuple(t.shape), t.dtype) for name, t in weights_of_version(version)]
        buckets = plan_buckets(layout, bucket_bytes=9000, dtype="float32")
        return Manifest(version, "float32", buckets, checksums, serial=self.transfers, address=self.sender.address)

    def publish_weights(self, manifest: Manifest) -> None:
        def weights():
            for number, item in enumerate(weights_of_version(manifest.version)):
                if manifest.version == self.fails and number == 2:
                    raise ValueError("the disk is full")
                yield item

        self.sender.send(manifest, weights())

    def release_weights(self) -> None:
        self.sender.release()

    def alive(self) -> bool:
        return True


class Receives:
    """An engine. What the rank of that number does instead of receiving, at that version: ``die``, ``raise``, ``half``."""

    def __init__(self, world: World, trouble: dict[tuple[int, int], str]):
        self.world, self.trouble, self.sums = world, trouble, {}

    def connect_weights(self, address: Address) -> None:
        if trouble := self.trouble.get((self.world.rank, 0)):
            self.make(trouble)
        self.receiver = open_receiver(address, self.world.rank, "cpu")
        self.receiver.connect()

    def receive_weights(self, manifest: Manifest, verify: bool) -> None:
        trouble = self.trouble.get((self.world.rank, manifest.version))
        total = 0.0
        for number, (_, tensor) in enumerate(self.receiver.receive(manifest)):
            total += float(tensor.double().sum())
            if number == 2 and trouble:
                self.make(trouble)
        self.sums[manifest.version] = total

    def make(self, trouble: str) -> None:
        if trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "raise":
            raise RunFailed("the engine has no such parameter")
        time.sleep(600)

    def sum(self, version: int) -> float:
        return self.sums[version]
