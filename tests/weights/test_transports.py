"""What is sent arrives, bit for bit, in other processes, by every transport and in buckets of any size."""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rayrlhf.weights import Manifest, Receiver, open_receiver, open_sender, shared_memory
from rayrlhf.weights import transport as transport_module
from rayrlhf.weights.control import Control
from rayrlhf.weights.ipc import IpcSender
from tests.weights.others import (
    HostMemory,
    Other,
    as_arrived,
    manifest_of,
    own_name,
    receiver_of,
    sender_of,
    some_tensors,
    take_all,
    take_late,
)

TRANSPORTS = ["shared_memory", "gloo", "ipc"]


def own_folders(run: str, directory: str | Path = "/dev/shm") -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(f"rayrlhf-{run}-")]


def until(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_whatever_the_bucket_size_and_the_type_all_receivers_get_what_was_sent(transport: str, tmp_path: Path) -> None:
    run = own_name("sizes")
    sender = sender_of(transport, 3, run=run, folder=str(tmp_path))
    cases = [
        (dtype, bucket_bytes, checksums)
        for dtype in ("float32", "bfloat16")
        for bucket_bytes, checksums in ((1, True), (1, False), (1000, True), (2**40, True), (2**40, False))
    ]
    sets = [some_tensors(seed) for seed in range(len(cases))]
    manifests = [
        manifest_of(tensors, sender, serial=k + 1, bucket_bytes=size, dtype=dtype, checksums=checksums)
        for k, (tensors, (dtype, size, checksums)) in enumerate(zip(sets, cases, strict=True))
    ]
    assert {len(m.buckets) for m, (_, size, _) in zip(manifests, cases, strict=True) if size == 1} == {8}
    assert {len(m.buckets) for m, (_, size, _) in zip(manifests, cases, strict=True) if size == 2**40} == {1}
    others = [Other(take_all, sender.address, index, manifests, str(tmp_path)) for index in range(3)]
    sender.connect()
    for tensors, manifest in zip(sets, manifests, strict=True):
        sender.send(manifest, iter(tensors))
    expected = [as_arrived(tensors, dtype) for tensors, (dtype, _, _) in zip(sets, cases, strict=True)]
    for other in others:
        assert other.said() == "connected" and other.said() == expected
    sender.close()
    assert not own_folders(run) and not list(tmp_path.iterdir())


def test_one_after_the_other_in_one_thread() -> None:
    """As the inline executor does it."""
    run = own_name("alone")
    sender = sender_of("shared_memory", 1, run=run, keep_all=True)
    receiver = receiver_of(sender.address, 0)
    sender.connect()
    receiver.connect()
    for serial in (1, 2):
        tensors = some_tensors(serial)
        manifest = manifest_of(tensors, sender, serial=serial)
        sender.send(manifest, tensors)
        (folder,) = own_folders(run)
        assert len(list(Path("/dev/shm", folder).glob("*.bucket"))) == 8
        found = [(name, tensor.clone()) for name, tensor in receiver.receive(manifest)]
        assert as_arrived(found, "float32") == as_arrived(tensors, "float32")
        sender.release()
        assert not list(Path("/dev/shm", folder).glob("*.bucket"))
    receiver.close()
    sender.close()
    with pytest.raises(ValueError, match="both sides run at the same time"):
        sender_of("gloo", 1, keep_all=True)


def test_a_tensor_is_copied_before_the_next_one_is_asked_for() -> None:
    sender = sender_of("shared_memory", 1, keep_all=True)
    receiver = receiver_of(sender.address, 0)
    receiver.connect()
    memory = torch.zeros(4)

    def reused():
        for value in range(3):
            yield f"p{value}", memory.fill_(value)

    manifest = manifest_of([(f"p{k}", memory) for k in range(3)], sender, bucket_bytes=2**20)
    sender.send(manifest, reused())
    assert [float(tensor[0]) for _, tensor in receiver.receive(manifest)] == [0.0, 1.0, 2.0]
    sender.close()


@pytest.mark.parametrize(("transport", "ahead"), [("shared_memory", 2), ("gloo", 4), ("ipc", 2)])
def test_the_next_bucket_is_filled_while_one_is_under_way_and_no_more(
    transport: str, ahead: int, tmp_path: Path
) -> None:
    """A receiver dwells on a bucket: two lie on the sender's side then, by gloo two more on the receiver's."""
    run = own_name("ahead")
    sender = sender_of(transport, 1, run=run, folder=str(tmp_path))
    receiver = receiver_of(sender.address, 0, str(tmp_path))
    tensors = some_tensors()
    manifest = manifest_of(tensors, sender)
    given: list[str] = []

    def watched():
        for name, tensor in tensors:
            given.append(name)
            if transport == "shared_memory":
                (folder,) = own_folders(run)
                assert len(list(Path("/dev/shm", folder).glob("*.bucket"))) <= 2
            yield name, tensor

    def send() -> None:
        sender.connect()
        sender.send(manifest, watched())

    thread = threading.Thread(target=send)
    thread.start()
    receiver.connect()
    arriving = receiver.receive(manifest)
    for number in range(3):  # of the second one on, whoever loads has let go of one before
        in_hand = next(arriving)
        assert in_hand[0] == tensors[number][0]
        until(lambda number=number: len(given) == ahead + number)
        time.sleep(0.1)
        assert given == [name for name, _ in tensors[: ahead + number]]
    assert [name for name, _ in arriving] == [name for name, _ in tensors[3:]]
    thread.join()
    sender.close()


def slow_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is looked through for so long that the sender would have made the next one meanwhile."""
    look = transport_module.damaged_tensors
    monkeypatch.setattr(transport_module, "damaged_tensors", lambda *given: (time.sleep(0.15), look(*given))[1])


def equal_tensors() -> list[tuple[str, torch.Tensor]]:
    return [(f"t{k}", torch.full((64, 256), float(k))) for k in range(6)]


def loaded(receiver: Receiver, manifest: Manifest) -> list[tuple[str, float]]:
    """As an engine loads: it has one tensor in hand until it gets the next one."""
    found = []
    for name, tensor in receiver.receive(manifest):
        found.append((name, float(tensor.mean())))
    return found


def test_a_receiver_has_two_buckets_of_a_broadcast_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_checksums(monkeypatch)
    made: list[StorageWeakRef] = []
    alive: list[int] = []
    empty = torch.empty

    def watched(*given: Any, **more: Any) -> torch.Tensor:
        tensor = empty(*given, **more)
        if threading.current_thread().name.startswith("weights"):  # a receiver's; the sender makes its own in another
            made.append(StorageWeakRef(tensor.untyped_storage()))
            alive.append(sum(not storage.expired() for storage in made))
        return tensor

    sender, tensors = sender_of("gloo", 1), equal_tensors()
    receiver, manifest = receiver_of(sender.address, 0), manifest_of(tensors, sender)
    sending = threading.Thread(target=lambda: (sender.connect(), sender.send(manifest, tensors)))
    sending.start()
    receiver.connect()
    monkeypatch.setattr(torch, "empty", watched)
    assert loaded(receiver, manifest) == [(name, float(k)) for k, (name, _) in enumerate(tensors)]
    assert alive == [1, 2, 2, 2, 2, 2]
    sending.join()
    monkeypatch.undo()
    # Who keeps all tensors has all buckets.
    sending = threading.Thread(target=sender.send, args=(again := manifest_of(tensors, sender, serial=2), tensors))
    sending.start()
    kept = list(receiver.receive(again))
    assert [float(tensor.mean()) for _, tensor in kept] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    sending.join()
    sender.close()


def test_shared_memory_with_room_for_two_buckets_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room as a memory file system counts it: a removed file takes some as long as somebody maps it."""
    slow_checksums(monkeypatch)
    mapped: list[tuple[weakref.ref[mmap.mmap], int]] = []

    class Mapped(mmap.mmap):
        def __new__(cls, descriptor: int, *given: Any, **more: Any) -> Mapped:
            self = super().__new__(cls, descriptor, *given, **more)
            mapped.append((weakref.ref(self), os.fstat(descriptor).st_ino))
            return self

    run = own_name("small")
    sender, tensors = sender_of("shared_memory", 1, run=run), equal_tensors()
    receiver, manifest = receiver_of(sender.address, 0), manifest_of(tensors, sender)
    receiver.connect()
    bucket = 64 * 256 * 4
    (folder,) = own_folders(run)
    least: list[int] = []

    def room(_: object) -> SimpleNamespace:
        lying = {path.stat().st_ino for path in Path("/dev/shm", folder).glob("*.bucket") if path.stat().st_size}
        lying |= {inode for mapping, inode in list(mapped) if mapping() is not None}
        least.append(int(2.5 * bucket) - bucket * len(lying))
        return SimpleNamespace(f_bavail=least[-1], f_frsize=1)

    monkeypatch.setattr(shared_memory, "mmap", SimpleNamespace(mmap=Mapped, ACCESS_COPY=mmap.ACCESS_COPY))
    monkeypatch.setattr(os, "statvfs", room)
    sending = threading.Thread(target=sender.send, args=(manifest, tensors))
    sending.start()
    assert loaded(receiver, manifest) == [(name, float(k)) for k, (name, _) in enumerate(tensors)]
    sending.join()
    assert 0 < min(least) < bucket, "the room was never too small"
    monkeypatch.undo()
    sender.close()


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_a_late_receiver_is_waited_for(transport: str) -> None:
    sender = sender_of(transport, 2)
    tensors = some_tensors()
    manifest = manifest_of(tensors, sender)
    others = [Other(take_late, sender.address, index, manifest, 1.0 * index) for index in range(2)]
    sender.connect()
    sender.send(manifest, tensors)
    names = [name for name, _ in tensors]
    assert [[row[0] for row in other.said()[0]] for other in others] == [names, names]
    sender.close()


def test_each_rank_serves_the_receivers_on_its_own_gpu(tmp_path: Path) -> None:
    """Rank 0's tensors and rank 1's differ here, so that it shows who was served by whom; rank 2 has nobody."""
    first = sender_of("ipc", 3, folder=str(tmp_path), senders=3)
    sets = {rank: some_tensors(rank) for rank in range(3)}
    manifest = manifest_of(sets[0], first, bucket_bytes=1000)
    gpus = ["gpu-1", "gpu-0", "gpu-1"]
    others = [Other(take_all, first.address, i, [manifest], str(tmp_path), gpu) for i, gpu in enumerate(gpus)]
    drawn: list[int] = []

    def rank(number: int) -> None:
        sender = first
        if number:
            control = Control.join_as_sender(first.address, number)
            sender = IpcSender(control, number, None, HostMemory(f"gpu-{number}", str(tmp_path)))
        sender.connect()
        weights = iter(sets[number])
        sender.send(manifest, weights)
        drawn.append(len(list(weights)))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other, gpu in zip(others, gpus, strict=True):
        assert other.said() == "connected"
        assert other.said() == [as_arrived(sets[int(gpu[-1])], "float32")]
    assert drawn == [0, 0, 0], "a rank that serves nobody gathers all the same"
    first.close()


def test_gloo_and_the_processs_own_group_do_not_disturb_each_other(tmp_path: Path) -> None:
    import torch.distributed as dist

    made = not dist.is_initialized()  # a trainer of an earlier test may have left its own in this process
    if made:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/own", rank=0, world_size=1)
    try:
        own = dist.group.WORLD
        sender, tensors = sender_of("gloo", 1), some_tensors()
        manifest = manifest_of(tensors, sender)
        other = Other(take_all, sender.address, 0, [manifest])
        sender.connect()
        sender.send(manifest, tensors)
        assert other.said() == "connected" and other.said() == [as_arrived(tensors, "float32")]
        sender.close()
        assert dist.group.WORLD is own and dist.get_world_size() == 1
        value = torch.ones(1)
        dist.all_reduce(value)
    finally:
        if made:
            dist.destroy_process_group()


def test_transports_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="legal ones are shared_memory, gloo, nccl, ipc"):
        open_sender("auto", run="x", receivers=1, version=1, device="cpu", timeout_s=1)
    sender = sender_of("shared_memory", 2)
    with pytest.raises(ValueError, match="receiver 2 of a group with 2 receivers"):
        open_receiver(sender.address, 2, "cpu")
    sender.close()
