"""Weight buckets as files in shared memory, for roles on one machine.

A process that sends has a folder ``rayrlhf-RUN-PID-RANDOM`` of its own in /dev/shm, with one file a bucket. At most two
lie there at once: the next one is written while the receivers read the one before. A third may still be mapped, as whoever
loads has a tensor of it in hand until he gets the next one; where that leaves no room, the sender waits until it is gone.

The process holds a lock on the folder's file ``lock`` for as long as it lives. The kernel gives that lock back however the
process ends, so a folder whose lock is free was left behind by a process that died, and the next sender of the same user
removes it. A process number alone would not do: containers that share /dev/shm count their processes apart.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import wire_bytes
from rayrlhf.weights.control import LONGEST_PAUSE, Control
from rayrlhf.weights.manifest import Manifest
from rayrlhf.weights.transport import Receiver, Sender

__all__ = ["SharedMemoryReceiver", "SharedMemorySender", "remove_stale"]

PREFIX = "rayrlhf-"
LOCK = "lock"
FOLDER_KEY = "folder"


def remove_stale(directory: str | os.PathLike[str]) -> list[str]:
    """Remove the folders of our own that processes of this user left behind when they died; their names."""
    removed = []
    for folder in sorted(Path(directory).glob(PREFIX + "*")):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(folder / LOCK, os.O_RDWR)
        except OSError:  # not one of our folders, or its owner is removing it at this moment
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its process lives
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
        finally:
            os.close(descriptor)
    return removed


def _remove(folder: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs this too, and must leave its parent's files alone
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _file_name(serial: int, number: int) -> str:
    return f"{serial}-{number}.bucket"


class SharedMemorySender(Sender):
    """Buckets in files under /dev/shm, at most two at a time.

    Args:
        control: this side of the group's store.
        run: name of the run, for people who look into the directory.
        keep_all: lay all buckets out without waiting for receivers, which come afterwards in this very thread; `release`
            frees them.
        directory: where the files lie; anything but a memory file system is slow.

    Raises:
        RunFailed: where there is no such directory.
    """

    def __init__(self, control: Control, *, run: str = "run", keep_all: bool = False, directory: str = "/dev/shm"):
        super().__init__()
        self.control, self._keep_all = control, keep_all
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise RunFailed(
                f"there is no directory {directory} for the weight transport shared_memory; "
                "rollout.weight_transport=gloo needs none"
            )
        remove_stale(self._directory)
        self._make_folder(re.sub(r"[^A-Za-z0-9_]+", "_", run)[-40:])
        control.put(FOLDER_KEY, str(self._folder).encode())

    def _make_folder(self, run: str) -> None:
        name = f"{PREFIX}{run}-{os.getpid()}-{secrets.token_hex(4)}"
        # Locked first and named afterwards: nobody sees the folder under its name without the lock.
        unnamed = self._directory / f".{name}"
        unnamed.mkdir(mode=0o700)
        lock = os.open(unnamed / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._folder = unnamed.rename(self._directory / name)
        self._finalizer = weakref.finalize(self, _remove, self._folder, lock, os.getpid())

    def _room(self, manifest: Manifest, number: int) -> Tensor:
        if number == 0:
            self.release()
        lent = 0
        if not self._keep_all and number >= 2:
            self._await(manifest, number - 2)
            lent = wire_bytes(manifest.buckets[number - 2], manifest.checksums)
            (self._folder / _file_name(manifest.serial, number - 2)).unlink()
        size = wire_bytes(manifest.buckets[number], manifest.checksums)
        path = self._folder / _file_name(manifest.serial, number)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if not size:
                return torch.empty(0, dtype=torch.uint8)
            self._reserve(descriptor, size, manifest.serial, lent)
            # The mapping goes with the last tensor that looks into it.
            return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        finally:
            os.close(descriptor)

    def _await(self, manifest: Manifest, number: int) -> None:
        self.control.wait_receivers(manifest.serial, number + 1, f"did not take {manifest.place(number)}")

    def _hand_over(self, manifest: Manifest, number: int, buffer: Tensor) -> None:
        self.control.report(manifest.serial, number + 1)

    def _finish(self, manifest: Manifest) -> None:
        if self._keep_all:
            return
        for number in range(max(0, len(manifest.buckets) - 2), len(manifest.buckets)):
            self._await(manifest, number)
        self.release()

    def release(self) -> None:
        """Remove all buckets. Who has mapped one keeps it until he lets go of it."""
        for path in self._folder.glob("*.bucket"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self.control.close()
        self._finalizer()

    def _reserve(self, descriptor: int, size: int, serial: int = 0, lent: int = 0) -> None:
        """Room for ``size`` bytes, now: a write into a full memory file system would kill the process (SIGBUS).

        Args:
            serial: of the transfer.
            lent: bytes of a bucket that was removed, and that its receivers are about to let go of: they are waited for
                where they can make room enough.
        """
        end = time.monotonic() + self.address.timeout_s
        while (error := self._allocate(descriptor, size)) is not None:
            if not lent or size > self._free() + lent or time.monotonic() > end:
                at_once = "a whole set of weights lies" if self._keep_all else "two buckets lie"
                raise RunFailed(
                    f"{self._directory} has {self._free() / 2**20:.1f} MiB free where the next weight bucket needs "
                    f"{size / 2**20:.1f} MiB ({at_once} there at once). Make it larger (Docker: --shm-size), take a smaller "
                    "rollout.weight_bucket_mib, or set rollout.weight_transport=gloo."
                ) from error
            self.control.check(serial)
            time.sleep(LONGEST_PAUSE)

    def _free(self) -> int:
        room = os.statvfs(self._directory)
        return room.f_bavail * room.f_frsize

    def _allocate(self, descriptor: int, size: int) -> OSError | None:
        """Take room for a file; the error where there is none."""
        if size > self._free():
            return OSError(errno.ENOSPC, "no space")
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                raise
            return error
        return None


class SharedMemoryReceiver(Receiver):
    """Reads the sender's files, without a copy."""

    def connect(self) -> None:
        super().connect()
        self._folder = Path(self.control.get(FOLDER_KEY).decode())
        if not self._folder.is_dir():
            raise RunFailed(
                f"{self.name} does not see {self._folder}, where the policy lays its weights out: it runs on another machine "
                "or has another /dev/shm; then rollout.weight_transport must be gloo, nccl or auto"
            )

    def _buffers(self, manifest: Manifest) -> Generator[Tensor]:
        self.control.report(manifest.serial, 0)
        for number in range(len(manifest.buckets)):
            self.control.wait_sender(manifest.serial, number + 1, manifest.place(number))
            yield self._map(manifest, number)
            self.control.report(manifest.serial, number + 1)

    def _map(self, manifest: Manifest, number: int) -> Tensor:
        expected = wire_bytes(manifest.buckets[number], manifest.checksums)
        path = self._folder / _file_name(manifest.serial, number)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise RunFailed(f"the weight bucket {path} has {size} bytes where {expected} were sent")
                if not size:
                    return torch.empty(0, dtype=torch.uint8)
                # Copy-on-write, so that not even a stray write can reach the other engines' weights.
                return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        except FileNotFoundError as error:
            raise RunFailed(
                f"{manifest.place(number)} of version {manifest.version} is not in {self._folder}: the policy has sent it "
                "already, or has removed it"
            ) from error
