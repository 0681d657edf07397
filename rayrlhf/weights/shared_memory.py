"""Weight buckets as files in shared memory, for roles on one machine.

A process that publishes has a folder ``rayrlhf-RUN-PID-RANDOM`` of its own in /dev/shm, with one file a bucket. It
holds a lock on the folder's file ``lock`` for as long as it lives. The kernel gives that lock back however the process
ends, so a folder whose lock is free was left behind by a process that died, and the next transport of the same user
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
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from rayrlhf.errors import RunFailed
from rayrlhf.weights.bucket import Bucket, Entry

__all__ = ["FileHandle", "SharedMemory", "remove_stale"]

PREFIX = "rayrlhf-"
LOCK = "lock"


@dataclass(frozen=True)
class FileHandle:
    """A bucket in a file that is shared memory."""

    path: str
    entries: tuple[Entry, ...]
    nbytes: int


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


class SharedMemory:
    """Buckets in files under /dev/shm. Files that this process put go away on release, and at its end.

    Args:
        run: name of the run, for people who look into the directory.
        directory: where the files lie; anything but a memory file system is slow.
    """

    name = "shared_memory"

    def __init__(self, *, run: str = "run", directory: str = "/dev/shm"):
        self._directory = Path(directory)
        self._run = re.sub(r"[^A-Za-z0-9_]+", "_", run)[-40:]
        self._folder: Path | None = None
        self._finalizer: weakref.finalize | None = None
        self._count = 0
        if not self._directory.is_dir():
            raise RunFailed(
                f"there is no directory {directory} for the weight transport shared_memory; "
                "rollout.weight_transport=object_store needs none"
            )
        remove_stale(self._directory)

    def put(self, bucket: Bucket) -> FileHandle:
        folder = self._own_folder()
        path = folder / f"{self._count}.bucket"
        self._count += 1
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if bucket.nbytes:
                self._reserve(descriptor, bucket.nbytes)
                # The mapping goes with the last tensor that looks into it.
                bucket.write(torch.frombuffer(mmap.mmap(descriptor, bucket.nbytes), dtype=torch.uint8))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return FileHandle(str(path), bucket.entries, bucket.nbytes)

    def get(self, handle: FileHandle) -> Bucket:
        try:
            with open(handle.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != handle.nbytes:
                    raise RunFailed(
                        f"the weight bucket {handle.path} has {size} bytes where {handle.nbytes} were published"
                    )
                if not size:
                    return Bucket.read(handle.entries, torch.empty(0, dtype=torch.uint8))
                # Copy-on-write, so that not even a stray write can reach the other engines' weights.
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise RunFailed(
                f"the weight bucket {handle.path} is not there: the trainer's process has ended or has released it, "
                "or it runs on another machine (then rollout.weight_transport must be object_store)"
            ) from error
        return Bucket.read(handle.entries, torch.frombuffer(mapped, dtype=torch.uint8))

    def release(self, handle: FileHandle) -> None:
        Path(handle.path).unlink(missing_ok=True)

    def close(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
            self._folder = self._finalizer = None

    def _own_folder(self) -> Path:
        if self._folder is None:
            name = f"{PREFIX}{self._run}-{os.getpid()}-{secrets.token_hex(4)}"
            # Locked first and named afterwards: nobody sees the folder under its name without the lock.
            unnamed = self._directory / f".{name}"
            unnamed.mkdir(mode=0o700)
            lock = os.open(unnamed / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._folder = unnamed.rename(self._directory / name)
            self._finalizer = weakref.finalize(self, _remove, self._folder, lock, os.getpid())
        return self._folder

    def _reserve(self, descriptor: int, size: int) -> None:
        """Room for ``size`` bytes, now: a write into a full memory file system would kill the process (SIGBUS)."""
        room = os.statvfs(self._directory)
        free = room.f_bavail * room.f_frsize
        try:
            if size > free:
                raise OSError(errno.ENOSPC, "no space")
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                raise
            raise RunFailed(
                f"{self._directory} has {free / 2**20:.1f} MiB free where the next weight bucket needs "
                f"{size / 2**20:.1f} MiB (a whole set of weights lies there at once). Make it larger (Docker: "
                "--shm-size), or set rollout.weight_transport=object_store."
            ) from error
