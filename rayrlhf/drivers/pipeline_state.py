"""What a pipeline remembers: ``pipeline.json``, fingerprints of configurations and outputs, and the lock on its folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rayrlhf.config.roots import AnyConfig
from rayrlhf.errors import InputRefused, RunFailed

__all__ = ["FREE", "PipelineState", "Record", "config_fingerprint", "flat", "locked", "output_fingerprint"]

FREE = ("cluster", "monitoring", "checkpoint")
"""Sections of a stage that may change after it has run: they say where and how it runs, not what comes out."""
_WHOLE_BYTES = 2**24
_PIECES = 16
_PIECE_BYTES = 2**20


@dataclass
class Record:
    """What is known of a stage."""

    status: str = "waiting"
    """waiting, running, done, gate (its quality gate isn't passed), failed, interrupted or skipped. A stage that goes on
    has that of the time before until it is started."""
    started: str | None = None
    """When it was last started, in ISO 8601."""
    seconds: float = 0.0
    """Time that it took, over all its starts."""
    exit_code: int | None = None
    config: str | None = None
    """Fingerprint of its resolved configuration, without what is `FREE`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the output of each stage that it took one of."""
    output: str | None = None
    """Fingerprint of its own output; of an evaluation, of its results."""
    pid: int | None = None
    """Its process, while it runs."""
    words: str = ""
    """Of a failed stage, its last words; of a skipped one, why."""


class PipelineState:
    """The records of all stages, on disk after each change.

    Args:
        folder: the pipeline's.
    """

    def __init__(self, folder: Path):
        self.file = folder / "pipeline.json"
        self.stages: dict[str, Record] = {}
        if self.file.exists():
            self.stages = self._read()

    def _read(self) -> dict[str, Record]:
        known = {f.name for f in fields(Record)}
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))["stages"]
            return {name: Record(**{k: v for k, v in row.items() if k in known}) for name, row in stored.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputRefused(f"{self.file}: can't be read as a pipeline's state ({error}); move it away") from error

    def write(self) -> None:
        """Put the records on disk, all or nothing, also where the power fails.

        Raises:
            RunFailed: where that fails; the file stays as it was.
        """
        draft = self.file.with_name(f".{self.file.name}.partial")
        text = json.dumps({"stages": {name: asdict(record) for name, record in self.stages.items()}}, indent=1)
        try:
            with open(draft, "w", encoding="utf-8") as handle:
                handle.write(text + "\n")
                handle.flush()
                os.fsync(handle.fileno())
            draft.replace(self.file)
            # Else a power cut could take back the new name, and with it what is known of a stage under way.
            folder = os.open(self.file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise RunFailed(f"can't write {self.file}: {error.strerror or error}") from error


# -- fingerprints -----------------------------------------------------------------------------------------------


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; indices count as keys."""
    if isinstance(value, list):
        value = {str(i): part for i, part in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in flat(part, f"{prefix}.{name}" if prefix else name).items()}


def config_fingerprint(config: AnyConfig) -> str:
    """Of a stage's resolved configuration, without what is `FREE`."""
    values = config.model_dump(mode="json", exclude=set(FREE))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def output_fingerprint(path: Path) -> str | None:
    """Of a file or a folder; None where there is none.

    It covers names, sizes and contents: of a file above 16 MiB, sixteen pieces of 1 MiB spread over it, so that a model
    of 100 GB takes no minutes.
    """
    if not path.exists():
        return None
    digest = hashlib.sha256()
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path.parent)}\0{size}\0".encode())
        with open(file, "rb") as handle:
            if size <= _WHOLE_BYTES:
                digest.update(handle.read())
                continue
            for piece in range(_PIECES):
                handle.seek((size - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(handle.read(_PIECE_BYTES))
    return digest.hexdigest()[:32]


# -- one pipeline a folder --------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the pipeline's folder, which is made where it doesn't exist.

    The lock is the operating system's on an open file: it ends with the process, however that ends.

    Raises:
        InputRefused: where another pipeline holds it, or it can't be made.
    """
    file = folder / "pipeline.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(file, "a+", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise InputRefused(f"run_dir: {folder} can't be written: {error.strerror or error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            pid = handle.read().strip() or "unknown"
            raise InputRefused(f"run_dir: {folder} is in use by another pipeline, process {pid}") from None
        handle.seek(0)
        handle.truncate()
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield
