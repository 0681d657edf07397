"""A stage in a process of its own: its output on the terminal, its last words, and its end."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from rayrlhf.config import AnyConfig
from rayrlhf.config.pipeline import COMMANDS
from rayrlhf.errors import RunFailed

__all__ = ["StageProcess", "end_all", "is_running"]

INTERRUPT_GRACE_S = 120.0
"""Seconds that a stage has after Ctrl-C to save its last whole step."""
TERMINATE_GRACE_S = 20.0
_KEPT_LINES = 60
_SHOWN_LINES = 12
_ENDINGS = ("The run failed:", "Refused:", "Traceback ")
_print_lock = threading.Lock()


class StageProcess:
    """A stage that was started.

    Args:
        config: its configuration.
        file: where that lies.
        resume: go on from its last whole checkpoint.
        label: is put before each line of its output; None: its output goes straight to the terminal.
        width: columns that its lines may have, with a label.

    Raises:
        RunFailed: where a process of it is there already.
    """

    def __init__(self, config: AnyConfig, file: Path, *, resume: bool, label: str | None, width: int):
        command = [sys.executable, "-m", "rayrlhf.cli", COMMANDS.get(config.algorithm, "train")]
        command.append(str(file.absolute()))
        if resume:
            command.append("--resume")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if label is not None:
            environment["COLUMNS"] = str(max(40, width))
        sys.stdout.flush()
        self.started = time.monotonic()
        lock = _take(file)
        if lock is None:
            raise RunFailed(f"a process that was started with {file} is still running; end that first")
        try:
            # A process group of its own: Ctrl-C on the terminal reaches the pipeline alone, which passes it on once.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=None if label is None else subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                process_group=0,
                pass_fds=(lock,),
            )
        finally:
            os.close(lock)
        self._tail: deque[str] = deque(maxlen=_KEPT_LINES)
        self._readers = []
        for stream, out, kept in (
            (self._process.stdout, sys.stdout, None),
            (self._process.stderr, sys.stderr, self._tail),
        ):
            if stream is not None:
                reader = threading.Thread(target=_pass_on, args=(stream, out, label, kept), daemon=True)
                reader.start()
                self._readers.append(reader)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        code = self._process.poll()
        if code is not None:
            for reader in self._readers:
                # What outlives the stage for a moment (a Ray daemon) may hold the pipe open.
                reader.join(timeout=2.0)
        return code

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def last_words(self) -> str:
        """Its own message, from the line with which that begins; else the last lines that it wrote to stderr."""
        lines = [line for line in self._tail if line.strip()]
        begin = next((i for i in reversed(range(len(lines))) if lines[i].startswith(_ENDINGS)), None)
        if begin is None or len(lines) - begin > _SHOWN_LINES:
            begin = max(0, len(lines) - _SHOWN_LINES)
        return "\n".join(lines[begin:])

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to all that it started and that stayed in its group."""
        with suppress(ProcessLookupError):
            if group:
                os.killpg(self.pid, number)
            else:
                self._process.send_signal(number)


def _pass_on(stream: BinaryIO, out: object, label: str | None, kept: deque[str] | None) -> None:
    """Copy a stream line by line to ours, and keep its last lines."""
    target = getattr(out, "buffer", None)
    for raw in stream:
        text = raw.decode("utf-8", "replace").rstrip("\n")
        if kept is not None:
            kept.append(text)
        line = text if label is None else f"{label} | {text}"
        with _print_lock:
            if target is not None:
                target.write(line.encode("utf-8", "replace") + b"\n")
                target.flush()
            else:
                print(line, file=out, flush=True)  # type: ignore[call-overload]


def is_running(file: Path) -> bool:
    """Whether a process that was started with this file still is there.

    Raises:
        RunFailed: where the lock that tells it can't be opened.
    """
    if not _lock_file(file).exists():
        return False
    lock = _take(file)
    if lock is not None:
        os.close(lock)
    return lock is None


def _lock_file(file: Path) -> Path:
    return file.with_name(f".{file.stem}.lock")


def _take(file: Path) -> int | None:
    """The lock of the stage that has this file, as a descriptor; None where it is held.

    It is the operating system's on an open file, which the stage's process inherits: it is held from before that process
    starts until it has ended, however it and the pipeline end. Programs that the stage starts (Ray's daemons, say) don't
    get it: Python closes in them all that they aren't given by name.

    Raises:
        RunFailed: where it can't be opened.
    """
    name = _lock_file(file)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFailed(f"can't write {name}: {error.strerror or error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def end_all(processes: Sequence[StageProcess]) -> None:
    """Interrupt stages, and where that isn't enough, end them. Another Ctrl-C shortens the wait."""
    steps = (
        (signal.SIGINT, INTERRUPT_GRACE_S),
        (signal.SIGTERM, TERMINATE_GRACE_S),
        (signal.SIGKILL, TERMINATE_GRACE_S),
    )
    for number, grace in steps:
        left = [process for process in processes if process.poll() is None]
        for process in left:
            process.signal(number, group=number != signal.SIGINT)
        until = time.monotonic() + grace
        try:
            while time.monotonic() < until and any(process.poll() is None for process in left):
                time.sleep(0.05)
        except KeyboardInterrupt:
            continue
