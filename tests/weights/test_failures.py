"""Who dies, comes late, is left over or gets damaged bytes: named, and nobody waits longer than he must."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from rayrlhf.errors import RunFailed
from rayrlhf.weights import Address, PeerFailed, Receiver, Sender, abort, collective, transport
from rayrlhf.weights.shared_memory import remove_stale
from tests.conftest import ROOT
from tests.support.ports import deaf_port
from tests.weights.others import (
    Other,
    die_after,
    die_in_broadcast,
    failure_of,
    manifest_of,
    own_name,
    receiver_of,
    send_and_hang,
    sender_in,
    sender_of,
    set_deadline,
    some_tensors,
    stop_loading,
    take_all,
)
from tests.weights.test_transports import own_folders, until

WIRES = ["shared_memory", "gloo"]


@pytest.mark.parametrize(
    ("wire", "taken", "what"),
    [
        ("shared_memory", 0, r"did not take bucket 1 of 8 \(a\)"),
        ("shared_memory", 4, r"did not take bucket 4 of 8 \(d\)"),
        ("gloo", 0, r"did not get ready for bucket 1 of 8 \(a\)"),
    ],
)
def test_a_receiver_that_dies_is_named_after_the_deadline(wire: str, taken: int, what: str) -> None:
    sender = sender_of(wire, 4, timeout_s=60.0, per_engine=2)
    tensors = some_tensors()
    manifest = manifest_of(tensors, sender)
    dying = Other(die_after, sender.address, 3, manifest, taken)
    others = [Other(failure_of, sender.address, index, manifest) for index in range(3)]
    sender.connect()
    assert [other.said() for other in (dying, *others)] == ["connected"] * 4
    set_deadline(sender, 6.0)  # for the transfer alone: all four are there
    started = time.monotonic()
    with pytest.raises(RunFailed, match=rf"rollout rank 1 worker 1 {what} within 6 s \(rollout.weight_timeout_s\)"):
        sender.send(manifest, tensors)
    assert time.monotonic() - started < 40
    dying.process.join(10)
    for other in others:
        kind, message = other.said(20)
        assert (
            kind == "PeerFailed" and "the weight transfer was ended by the policy: rollout rank 1 worker 1" in message
        )
    sender.close()


def test_a_broadcast_that_breaks_off_ends_the_group_and_a_new_one_works() -> None:
    sender = sender_of("gloo", 2, timeout_s=20.0)
    tensors = [(f"t{k}", torch.full((200_000,), float(k))) for k in range(40)]
    manifest = manifest_of(tensors, sender)
    others = [Other(die_in_broadcast, sender.address, 0, manifest, 5), Other(failure_of, sender.address, 1, manifest)]
    sender.connect()
    started = time.monotonic()
    with pytest.raises(RunFailed):  # of this side, or of the other receiver, whichever sees it first
        sender.send(manifest, tensors)
    assert others[1].said() == "connected"
    kind, message = others[1].said(30)
    assert kind in ("RunFailed", "PeerFailed") and message
    assert time.monotonic() - started < 60
    for other in others:
        other.kill()
    sender.close()
    sender = sender_of("gloo", 1, version=2)
    manifest = manifest_of(tensors[:2], sender)
    again = Other(take_all, sender.address, 0, [manifest])
    sender.connect()
    sender.send(manifest, tensors[:2])
    assert again.said() == "connected" and len(again.said()[0]) == 2
    sender.close()


@pytest.mark.parametrize("wire", WIRES)
def test_a_sender_that_dies_is_noticed_long_before_the_deadline(wire: str, tmp_path: Path) -> None:
    dying = Other(send_and_hang, wire, 1, str(tmp_path))
    address, manifest = dying.said()
    receiver = receiver_of(address, 0)
    receiver.connect()
    found = []
    with pytest.raises(RunFailed, match=f"does not answer any more at {address.place}") as caught:
        for name, _ in receiver.receive(manifest):
            found.append(name)
            if len(found) == 2:
                dying.process.kill()
                killed = time.monotonic()
    assert time.monotonic() - killed < 30 and isinstance(caught.value, PeerFailed)
    assert found == ["a", "b"]
    receiver.close()
    if wire == "shared_memory":  # the next one cleans up
        dying.process.join()
        (folder,) = own_folders("dying", tmp_path)
        assert remove_stale(tmp_path) == [folder]
        assert not own_folders("dying", tmp_path)


@pytest.mark.parametrize("wire", WIRES)
def test_an_engine_that_stops_loading_ends_the_transfer_for_all_and_the_next_one_works(wire: str) -> None:
    sender = sender_of(wire, 2, timeout_s=60.0)
    tensors = some_tensors()
    manifest = manifest_of(tensors, sender)
    others = [Other(stop_loading, sender.address, 0, manifest, 3), Other(failure_of, sender.address, 1, manifest)]
    sender.connect()
    started = time.monotonic()
    with pytest.raises(PeerFailed, match="the weight transfer was ended by rollout rank 0: it stopped loading"):
        sender.send(manifest, tensors)
    assert others[1].said() == "connected"
    assert others[1].said()[0] == "PeerFailed"
    assert time.monotonic() - started < 20
    for other in others:
        other.kill()
    sender.close()


def test_after_a_failure_shared_memory_goes_on_with_the_next_transfer() -> None:
    run = own_name("again")
    sender = sender_of("shared_memory", 1, timeout_s=1.0, run=run)
    tensors = some_tensors()
    with pytest.raises(RunFailed, match=r"rollout rank 0 did not take bucket 1 of 1 \(a and 7 more\) within 1 s"):
        sender.send(manifest_of(tensors, sender, bucket_bytes=2**20), tensors)
    (folder,) = own_folders(run)
    assert os.listdir(f"/dev/shm/{folder}") == ["lock"]
    set_deadline(sender, 60.0)
    manifest = manifest_of(tensors, sender, serial=2)
    other = Other(take_all, sender.address, 0, [manifest])
    assert other.said() == "connected"
    sender.send(manifest, tensors)
    assert len(other.said()[0]) == len(tensors)
    sender.close()


@pytest.mark.parametrize("wire", WIRES)
def test_the_driver_can_end_a_transfer(wire: str) -> None:
    sender = sender_of(wire, 1, timeout_s=60.0)
    tensors = some_tensors()
    manifest = manifest_of(tensors, sender)
    receiver = receiver_of(sender.address, 0)
    joining = threading.Thread(target=receiver.connect)
    joining.start()
    sender.connect()
    joining.join()
    timer = threading.Timer(0.5, abort, (sender.address, manifest.serial, "rollout rank 0: killed"))
    timer.start()
    started = time.monotonic()
    with pytest.raises(PeerFailed, match="ended by the driver: rollout rank 0: killed"):
        sender.send(manifest, tensors)
    with pytest.raises(PeerFailed, match="ended by the driver"):
        list(receiver.receive(manifest))
    assert time.monotonic() - started < 20
    receiver.close()
    sender.close()


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_left_of_an_earlier_group_cannot_take_part(wire: str) -> None:
    old = sender_of(wire, 1)
    left_over = receiver_of(old.address, 0)
    if wire == "shared_memory":
        left_over.connect()
        manifest = manifest_of(some_tensors(), old)
        old.close()
        with pytest.raises(PeerFailed, match="the weight group test-1 is closed"):
            next(left_over.receive(manifest))
    else:
        old.close()
    with pytest.raises(RunFailed, match="rollout rank 0 can't join the weight group test-1: the group there is closed"):
        receiver_of(old.address, 0).connect()
    new = sender_of(wire, 1, version=2)
    wrong = dataclasses.replace(new.address, group=old.address.group)
    with pytest.raises(RunFailed, match="can't join the weight group test-1: the group there is test-2"):
        receiver_of(wrong, 0).connect()
    new.close()


def test_a_gpu_that_the_sender_shares_with_an_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's, by the thread's name. Nobody, the engine on a GPU of its own neither, goes to meet the others."""
    meeting: list[str] = []
    failures: dict[str, BaseException] = {}
    monkeypatch.setattr(collective, "_gpu_of", lambda device: threading.current_thread().name)
    monkeypatch.setattr(collective, "_Broadcasts", lambda *_: meeting.append(threading.current_thread().name))

    def connect(side: Sender | Receiver) -> None:
        try:
            side.connect()
        except RunFailed as error:
            failures[threading.current_thread().name] = error

    monkeypatch.setattr(threading.current_thread(), "name", "GPU-7")
    sender = sender_of("gloo", 2, timeout_s=5.0)
    threads = [
        threading.Thread(target=connect, args=(side,), name=name)
        for name, side in (("policy", sender), ("GPU-8", receiver_of(sender.address, 1)))
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(
        RunFailed, match="rollout rank 0 is on the GPU GPU-7, where rank 0 of the policy is: NCCL has no two"
    ):
        receiver_of(sender.address, 0).connect()
    for thread in threads:
        thread.join()
    assert failures.keys() == {"policy", "GPU-8"} and not meeting
    for failure in failures.values():
        assert isinstance(failure, PeerFailed) and "ended by rollout rank 0: rollout rank 0 is on the GPU" in str(
            failure
        )
    sender.close()


def suppress_failure(call: Callable[[], object]) -> None:
    with suppress(RunFailed):
        call()


def test_a_sender_that_is_gone_is_not_looked_for_long() -> None:
    started = time.monotonic()
    with (
        deaf_port() as port,
        pytest.raises(RunFailed, match="the driver can't join .* the policy's process does not answer at 127.0.0.1:"),
    ):
        abort(Address("gloo", "test-1", f"127.0.0.1:{port}", 1, 60.0), 1, "over")
    assert time.monotonic() - started < 30


def test_who_does_not_come_to_the_rendezvous_is_named() -> None:
    sender = sender_of("gloo", 3, timeout_s=1.0)
    other = Other(take_all, sender.address, 1, [])
    until(lambda: sender.control.get("at/1") == b"0 1")  # it has come
    with pytest.raises(
        RunFailed, match=r"rollout rank 0, rollout rank 2 did not come to the weight group test-1 within 1 s"
    ):
        sender.connect()
    other.kill()
    sender.close()


@pytest.mark.parametrize("wire", WIRES)
def test_a_damaged_tensor_is_named_with_its_bucket_and_its_engine(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = transport.write_checksums

    def and_damage(buffer: torch.Tensor, bucket: tuple) -> None:
        whole(buffer, bucket)
        entry = next((entry for entry in bucket if entry.name == "d"), None)
        if entry is not None:
            buffer[entry.offset + 100] ^= 1

    monkeypatch.setattr(transport, "write_checksums", and_damage)
    sender = sender_of(wire, 1)
    tensors = some_tensors()
    manifest = manifest_of(tensors, sender, bucket_bytes=2000)
    assert [[entry.name for entry in bucket] for bucket in manifest.buckets][1] == ["d"]
    other = Other(failure_of, sender.address, 0, manifest)
    sender.connect()
    with pytest.raises(PeerFailed, match="ended by rollout rank 0"):
        sender.send(manifest, tensors)
    assert other.said() == "connected"
    expected = f"weights of version 1 were damaged on their way to rollout rank 0 ({wire}, bucket 2 of 3): d"
    assert other.said() == ("RunFailed", expected)
    sender.close()


def test_a_receiver_that_writes_changes_nobody_elses_weights() -> None:
    sender = sender_of("shared_memory", 2, keep_all=True)
    manifest = manifest_of([("w", torch.ones(4))], sender)
    sender.send(manifest, [("w", torch.ones(4))])
    for index in range(2):
        receiver = receiver_of(sender.address, index)
        receiver.connect()
        ((_, tensor),) = receiver.receive(manifest)
        assert torch.equal(tensor, torch.ones(4))
        tensor.zero_()
    sender.close()


def test_a_cut_or_missing_file_is_an_error_that_says_so() -> None:
    run = own_name("cut")
    sender = sender_of("shared_memory", 1, keep_all=True, run=run)
    tensors = some_tensors()
    manifest = manifest_of(tensors, sender, bucket_bytes=2**20, checksums=False)
    receiver = receiver_of(sender.address, 0)
    receiver.connect()
    sender.send(manifest, tensors)
    (folder,) = own_folders(run)
    os.truncate(f"/dev/shm/{folder}/1-0.bucket", 100)
    with pytest.raises(RunFailed, match=f"has 100 bytes where {manifest.nbytes} were sent"):
        list(receiver.receive(manifest))
    again = manifest_of(tensors, sender, serial=2)
    sender.send(again, tensors)
    sender.release()
    with pytest.raises(RunFailed, match=r"bucket 1 of 8 \(a\) of version 2 is not in /dev/shm/.*or has removed it"):
        list(receiver.receive(again))
    sender.close()


def test_shared_memory_that_is_too_small_is_said_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    run = own_name("full")
    sender = sender_of("shared_memory", 1, keep_all=True, run=run)
    calls = []

    def full_at_the_second(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.truncate(descriptor, size)

    monkeypatch.setattr(os, "posix_fallocate", full_at_the_second)
    tensors = [("a", torch.ones(100)), ("b", torch.ones(100))]
    with pytest.raises(RunFailed, match=r"/dev/shm has .* MiB free .* needs 0.0 MiB .*--shm-size.*=gloo"):
        sender.send(manifest_of(tensors, sender, bucket_bytes=400), tensors)
    (folder,) = own_folders(run)
    assert os.listdir(f"/dev/shm/{folder}") == ["lock"]
    sender.close()


def test_room_that_nobody_gives_back_is_waited_for_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = sender_of("shared_memory", 1, timeout_s=1.0, run="kept")
    receiver = receiver_of(sender.address, 0)
    receiver.connect()
    manifest = manifest_of(tensors := some_tensors()[:5], sender)
    loading = threading.Thread(target=lambda: suppress_failure(lambda: list(receiver.receive(manifest))))
    loading.start()
    made: list[int] = []
    fill = os.posix_fallocate

    def full_at_the_third(descriptor: int, offset: int, size: int) -> None:
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        made.append(size)
        fill(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full_at_the_third)
    started = time.monotonic()
    with pytest.raises(RunFailed, match=r"MiB free .* \(two buckets lie there at once\).*=gloo"):
        sender.send(manifest, tensors)
    assert 1.0 <= time.monotonic() - started < 30
    loading.join()
    sender.close()


def test_room_that_can_not_come_back_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = sender_of("shared_memory", 1, timeout_s=600.0)
    tensors = [("a", torch.ones(100)), ("b", torch.ones(100)), ("larger", torch.ones(10_000))]
    manifest = manifest_of(tensors, sender, bucket_bytes=400)
    taking = Other(take_all, sender.address, 0, [manifest])
    sender.connect()
    # What lies there already has been given back in full by the time that the large one comes: it is too little.
    monkeypatch.setattr(sender, "_free", lambda: 10_000)
    started = time.monotonic()
    with pytest.raises(RunFailed, match=r"/dev/shm has 0.0 MiB free .*\(two buckets lie there at once"):
        sender.send(manifest, tensors)
    assert time.monotonic() - started < 60
    taking.kill()
    sender.close()


def test_more_than_the_free_memory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sender = sender_of("shared_memory", 1)
    room = os.statvfs("/dev/shm")
    with open(tmp_path / "file", "wb") as file, pytest.raises(RunFailed, match="/dev/shm has"):
        sender._reserve(file.fileno(), room.f_blocks * room.f_frsize + 1)  # type: ignore[attr-defined]
    assert (tmp_path / "file").stat().st_size == 0
    sender.close()


SENDS = """
import sys, torch
from tests.weights.others import manifest_of, sender_in
sender = sender_in(sys.argv[1], "other", keep_all=True)
tensors = [("w", torch.arange(1000.0))]
sender.send(manifest_of(tensors, sender), tensors)
print("there", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "normal"])
def test_files_of_another_process_go_when_it_ends_and_not_before(end: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SENDS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert process.stdin and process.stdout and process.stdout.readline() == "there\n"
    strange = tmp_path / "rayrlhf-not_ours"
    strange.mkdir()
    sender_in(tmp_path).close()  # cleans up, and must leave alone what is in use
    (folder,) = own_folders("other", tmp_path)
    assert sorted(os.listdir(tmp_path / folder)) == ["1-0.bucket", "lock"]
    if end == "killed":
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert own_folders("other", tmp_path) == [folder]
        sender_in(tmp_path).close()
    else:
        process.communicate("\n")
    assert not own_folders("other", tmp_path)
    assert strange.exists()


def test_importing_the_weights_needs_neither_ray_nor_vllm_nor_transformers() -> None:
    code = "import rayrlhf.weights, sys; print({'ray', 'vllm', 'transformers', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr
