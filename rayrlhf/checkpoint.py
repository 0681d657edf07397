"""Checkpoints: everything that a run needs to go on, and a manifest that says whether all of it is there.

``checkpoints/step-N/`` holds one folder a trained role (written by its ranks), ``driver.json`` (the driver's own state)
and ``manifest.json`` (every file with its size). It is written under another name and renamed when it is whole, so a
half-written one is never taken for a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.errors import RunFailed

__all__ = ["Checkpoint", "CheckpointStore", "NotWhole", "Written", "check_written", "sees", "sizes_on_disk"]

MANIFEST = "manifest.json"

SEEN_WITHIN_S = 5.0
"""So long after one machine has written a file another one that shares the folder may not see it yet."""


@dataclass(frozen=True)
class Written:
    """A file that a process wrote, which may be on another machine than the driver."""

    name: str
    """Its path below the folder that was written."""
    size: int
    """Bytes."""
    by: str
    """Who wrote it, and where that is."""


class NotWhole(RunFailed):
    """A process wrote a file that the driver doesn't see."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    """Steps that were done when it was saved."""
    state: dict[str, Any]
    """The driver's state."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: ``RUN/checkpoints``.
        keep: whole checkpoints that stay; older ones are removed after a new one is whole.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any], write_roles: Callable[[Path], Sequence[Written]]) -> Checkpoint:
        """Write a checkpoint, and count it only when all of it is on disk, in this very folder.

        Args:
            step: steps done.
            state: the driver's state, for JSON.
            write_roles: lets the roles' processes, wherever they are, write their parts into the folder that it is given,
                and returns what they say they wrote there.

        Raises:
            OSError: where the disk is full or can't be written. What was there before stays.
            NotWhole: where a process wrote into another folder than this one. What was there before stays.
        """
        partial = self.folder / f"partial-step-{step}"
        final = self.folder / f"step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            written = write_roles(partial)
            check_written(partial, written)
            (partial / "driver.json").write_text(json.dumps(state), encoding="utf-8")
            # A listing of a folder in which other machines wrote may lag behind, so their files are named too.
            files = {str(f.relative_to(partial)): f.stat().st_size for f in partial.rglob("*") if f.is_file()}
            files |= {file.name: file.size for file in written}
            listed = json.dumps({"step": step, "files": dict(sorted(files.items()))}, indent=1)
            (partial / MANIFEST).write_text(listed, encoding="utf-8")
            sizes_on_disk(partial, (partial / name for name in (*files, MANIFEST)))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(self.folder)
        for old in self._folders()[self.keep :]:
            shutil.rmtree(old)
        return Checkpoint(final, step, state)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and a sentence on each one that had to be passed over."""
        passed_over: list[str] = []
        for folder in self._folders():
            problem = _what_is_wrong(folder)
            if problem is None:
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                state = json.loads((folder / "driver.json").read_text(encoding="utf-8"))
                return Checkpoint(folder, manifest["step"], state), passed_over
            passed_over.append(f"{folder} is not whole and was passed over: {problem}")
        return None, passed_over

    def _folders(self) -> list[Path]:
        """Folders named step-N, the newest first."""
        if not self.folder.is_dir():
            return []
        found = [f for f in self.folder.glob("step-*") if f.name.removeprefix("step-").isdigit()]
        return sorted(found, key=lambda f: -int(f.name.removeprefix("step-")))


def _what_is_wrong(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        manifest["step"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} can't be read ({error})"
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes where {size} were written"
    return None


def sizes_on_disk(folder: Path, files: Iterable[Path] | None = None) -> dict[str, int]:
    """See to it that files are on the disk, and not only on their way there.

    Args:
        folder: in which they are.
        files: which; None: all that lie below it.

    Returns:
        Their sizes in bytes by their names below ``folder``.
    """
    sizes = {}
    for file in (f for f in folder.rglob("*") if f.is_file()) if files is None else files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            sizes[str(file.relative_to(folder))] = os.fstat(handle.fileno()).st_size
    return sizes


def check_written(folder: Path, written: Iterable[Written]) -> None:
    """Whether this process sees all that others wrote into a folder; it waits a little for what isn't there yet.

    Raises:
        NotWhole: for the first file that isn't here, or has another size: who wrote it, and where.
    """
    end = time.monotonic() + SEEN_WITHIN_S
    for file in written:
        while (size := _size(folder / file.name)) != file.size:
            if time.monotonic() >= end:
                here = "isn't" if size is None else f"has {size} bytes"
                raise NotWhole(
                    f"{file.by} wrote {file.name} with {file.size} bytes, which {here} in {folder} as the driver sees it: "
                    "run_dir must be one folder, on a file system that all machines share"
                )
            time.sleep(0.05)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def sees(file: Path, content: str) -> bool:
    """Whether a file is here that another process has just written; waits a little for it."""
    end = time.monotonic() + SEEN_WITHIN_S
    while not (found := _size(file) is not None and file.read_text(encoding="utf-8") == content):
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    return found


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
