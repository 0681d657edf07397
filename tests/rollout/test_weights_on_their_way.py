"""Buckets, manifests and both transports, without an engine."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from rayrlhf.errors import RunFailed
from rayrlhf.weights import SharedMemory, make_transport, pack, publish, receive, release
from rayrlhf.weights.bucket import ALIGNMENT
from rayrlhf.weights.transport import ObjectStore


def some_tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (1, 1), "d": (64, 9), "e": (), "f": (0, 4)}
    tensors = [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]
    return [*tensors, ("counts", torch.tensor([1, 2, 3])), ("strided", torch.randn(6, 4, generator=generator).t())]


def equal(found: list[tuple[str, torch.Tensor]], expected: list[tuple[str, torch.Tensor]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, tensor), (_, other) in zip(found, expected, strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def own_folders(run: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"rayrlhf-{run}-")]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 2**40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_is_received_whatever_the_bucket_size(bucket_bytes: int, dtype: str) -> None:
    transport = SharedMemory(run="sizes")
    manifest = publish(
        iter(some_tensors()),
        transport=transport,
        version=3,
        bucket_bytes=bucket_bytes,
        dtype=dtype,
        with_checksums=True,
    )
    manifest = pickle.loads(pickle.dumps(manifest))
    expected = [(n, t.to(getattr(torch, dtype)) if t.is_floating_point() else t) for n, t in some_tensors()]
    equal(list(receive(manifest, SharedMemory(run="reader"))), expected)
    assert manifest.version == 3 and len(manifest.buckets) == {1: 8, 2**40: 1}.get(bucket_bytes, len(manifest.buckets))
    release(manifest, transport)
    transport.close()
    assert not own_folders("sizes")


def test_a_bucket_stays_within_its_size_and_its_tensors_are_aligned() -> None:
    buckets = list(pack(some_tensors(), bucket_bytes=1024, dtype="float32"))
    assert all(bucket.nbytes <= 1024 for bucket in buckets if len(bucket.entries) > 1)
    assert len(buckets) > 1 and all(entry.offset % ALIGNMENT == 0 for bucket in buckets for entry in bucket.entries)


def test_a_tensor_is_copied_before_the_next_one_is_asked_for() -> None:
    def reused_memory():
        memory = torch.zeros(4)
        for value in range(3):
            memory.fill_(value)
            yield f"p{value}", memory

    (bucket,) = pack(reused_memory(), bucket_bytes=2**20, dtype="float32")
    assert [float(tensor[0]) for tensor in bucket.tensors] == [0.0, 1.0, 2.0]


def test_a_name_given_twice_and_a_bucket_of_no_size_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' is given twice"):
        list(pack([("a", torch.ones(1)), ("a", torch.ones(1))], bucket_bytes=8, dtype="float32"))
    with pytest.raises(ValueError, match="at least 1"):
        list(pack([], bucket_bytes=0, dtype="float32"))
    with pytest.raises(ValueError, match="legal ones are shared_memory and object_store"):
        make_transport("auto")


def test_checksums_are_those_of_the_bytes_that_travel() -> None:
    transport = SharedMemory(run="sums")
    manifest = publish(
        [("w", torch.tensor([1.0, -2.0]))],
        transport=transport,
        version=1,
        bucket_bytes=64,
        dtype="bfloat16",
        with_checksums=True,
    )
    assert manifest.checksums == {"w": zlib.crc32(bytes([0x80, 0x3F, 0x00, 0xC0]))}
    transport.close()


def test_a_flipped_bit_is_found_and_the_tensor_named() -> None:
    transport = SharedMemory(run="flip")
    manifest = publish(
        some_tensors(), transport=transport, version=5, bucket_bytes=2**20, dtype="float32", with_checksums=True
    )
    (handle,) = manifest.buckets
    place = next(entry for entry in handle.entries if entry.name == "d").offset + 100
    with open(handle.path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(RunFailed, match=r"version 5 were damaged on their way \(shared_memory\): d$"):
        list(receive(manifest, transport))
    transport.close()


def test_a_cut_or_missing_file_is_an_error_that_says_so() -> None:
    transport = SharedMemory(run="cut")
    manifest = publish(
        some_tensors(), transport=transport, version=1, bucket_bytes=2**20, dtype="float32", with_checksums=False
    )
    (handle,) = manifest.buckets
    os.truncate(handle.path, 100)
    with pytest.raises(RunFailed, match=f"has 100 bytes where {handle.nbytes} were published"):
        list(receive(manifest, transport))
    release(manifest, transport)
    release(manifest, transport)
    with pytest.raises(RunFailed, match="is not there.*rollout.weight_transport must be object_store"):
        list(receive(manifest, transport))
    transport.close()


def test_a_receiver_that_writes_changes_nobody_elses_weights() -> None:
    transport = SharedMemory(run="write")
    manifest = publish(
        [("w", torch.ones(4))], transport=transport, version=1, bucket_bytes=64, dtype="float32", with_checksums=False
    )
    ((_, tensor),) = receive(manifest, transport)
    tensor.zero_()
    ((_, again),) = receive(manifest, transport)
    assert torch.equal(again, torch.ones(4))
    transport.close()


def test_shared_memory_that_is_too_small_is_said_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = SharedMemory(run="full")
    calls = []

    def full_at_the_second(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full_at_the_second)
    monkeypatch.setattr("mmap.mmap", lambda descriptor, size: bytearray(size))
    tensors = [("a", torch.ones(100)), ("b", torch.ones(100))]
    with pytest.raises(RunFailed, match=r"/dev/shm has .* MiB free .* needs 0.0 MiB .*--shm-size.*object_store"):
        publish(tensors, transport=transport, version=1, bucket_bytes=400, dtype="float32", with_checksums=True)
    (folder,) = own_folders("full")
    assert os.listdir(f"/dev/shm/{folder}") == ["lock"]
    transport.close()


def test_more_than_the_free_memory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    transport = SharedMemory(run="huge")
    room = os.statvfs("/dev/shm")
    with open(tmp_path / "file", "wb") as file, pytest.raises(RunFailed, match="/dev/shm has"):
        transport._reserve(file.fileno(), room.f_blocks * room.f_frsize + 1)
    assert (tmp_path / "file").stat().st_size == 0


PUBLISHER = """
import os, pickle, sys, torch
from rayrlhf.weights import SharedMemory, publish
transport = SharedMemory(run="other")
tensors = [("w", torch.arange(1000.0)), ("v", torch.ones(3))]
manifest = publish(tensors, transport=transport, version=1, bucket_bytes=64, dtype="float32", with_checksums=True)
sys.stdout.buffer.write(pickle.dumps(manifest))
sys.stdout.flush()
os.close(1)
how = sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "normal"])
def test_files_of_another_process_go_when_it_ends_and_not_before(end: str) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdin and process.stdout
    manifest = pickle.loads(process.stdout.read())
    strange = Path("/dev/shm/rayrlhf-not_ours")
    strange.mkdir(exist_ok=True)
    reader = SharedMemory(run="reader")  # cleans up, and must leave alone what is in use
    equal(list(receive(manifest, reader)), [("w", torch.arange(1000.0)), ("v", torch.ones(3))])
    assert len(own_folders("other")) == 1
    if end == "killed":
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(own_folders("other")) == 1
        make_transport("shared_memory")
    else:
        process.communicate(b"\n")
    assert not own_folders("other")
    assert strange.exists()
    strange.rmdir()


def test_object_store_without_ray_started_here_needs_no_ray_to_be_imported() -> None:
    ObjectStore().close()
    code = "import rayrlhf.weights, rayrlhf.actors.rollout, sys; print({'ray', 'vllm'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "set()", done.stderr
