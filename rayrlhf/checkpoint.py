"""Checkpoints: everything that a run needs to go on, and a manifest that says whether all of it is there.

``checkpoints/step-N/`` holds one folder a trained role (written by its ranks), ``driver.json`` (the driver's own state)
and ``manifest.json`` (every file with its size). It is written under another name and renamed when it is whole, so a
half-written one is never taken for a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Checkpoint", "CheckpointStore"]

MANIFEST = "manifest.json"


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

    def save(self, step: int, state: dict[str, Any], write_roles: Callable[[Path], None]) -> Checkpoint:
        """Write a checkpoint, and count it only when all of it is on disk.

        Args:
            step: steps done.
            state: the driver's state, for JSON.
            write_roles: writes the roles' parts into the folder that it is given.

        Raises:
            OSError: where the disk is full or can't be written. What was there before stays.
        """
        partial = self.folder / f"partial-step-{step}"
        final = self.folder / f"step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write_roles(partial)
            (partial / "driver.json").write_text(json.dumps(state), encoding="utf-8")
            files = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
            (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
            _to_disk(partial)
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


def _to_disk(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
